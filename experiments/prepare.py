"""Tokenise a run's text in advance: `python experiments/prepare.py --help`."""

from launch import Invocation, launch

from llm.config import PrepareConfig
from llm.outcome import Outcome


def run(config: PrepareConfig, invocation: Invocation) -> Outcome:
    from llm.commands.prepare import prepare  # imports torch, which --help need not wait for

    return prepare(config)


if __name__ == "__main__":
    launch("prepare", PrepareConfig, run)
