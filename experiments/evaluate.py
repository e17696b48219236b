"""Measure a trained model on a text: `python experiments/evaluate.py --help`."""

from pathlib import Path

from launch import Invocation, launch
from repeating import Repeat

from llm.config import EvaluateConfig
from llm.outcome import Outcome


# These import torch, which --help need not wait for.
def run(config: EvaluateConfig, invocation: Invocation) -> Outcome:
    from llm.commands.evaluate import run_evaluation

    return run_evaluation(config, invocation.run_dir, invocation.in_sweep)


def outcome_of(run_dir: Path) -> Outcome:
    from llm.commands.evaluate import outcome_of

    return outcome_of(run_dir)


def show(_: EvaluateConfig, run_dir: Path) -> None:
    from llm.commands.evaluate import show_again

    show_again(run_dir)


if __name__ == "__main__":
    launch("evaluate", EvaluateConfig, run, repeat=Repeat(outcome_of, show))
