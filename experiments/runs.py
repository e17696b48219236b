"""List runs: `python experiments/runs.py --help`."""

from launch import Invocation, launch

from llm.commands.runs import list_runs
from llm.config import RunsConfig


def run(config: RunsConfig, invocation: Invocation) -> None:
    list_runs(config)


if __name__ == "__main__":
    launch("runs", RunsConfig, run, recorded=False)
