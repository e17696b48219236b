"""Measure a trained model on a text: `python experiments/evaluate.py --help`."""

from launch import Invocation, launch

from llm.config import EvaluateConfig
from llm.outcome import Outcome


def run(config: EvaluateConfig, invocation: Invocation) -> Outcome:
    from llm.commands.evaluate import run_evaluation  # imports torch, which --help need not wait for

    return run_evaluation(config, invocation.run_dir, invocation.in_sweep)


if __name__ == "__main__":
    launch("evaluate", EvaluateConfig, run, repeatable=True)
