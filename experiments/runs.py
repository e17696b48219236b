"""List runs: `python experiments/runs.py --help`."""

from launch import Invocation, launch

from llm.commands.runs import list_runs
from llm.config import RunsConfig
from llm.outcome import Outcome


def run(config: RunsConfig, invocation: Invocation) -> Outcome:
    return list_runs(config)


if __name__ == "__main__":
    launch("runs", RunsConfig, run, recorded=False)
