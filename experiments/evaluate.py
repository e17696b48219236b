"""Measure a trained model on a text: `python experiments/evaluate.py --help`."""

from pathlib import Path

from launch import launch

from llm.config import EvaluateConfig


def run(config: EvaluateConfig, run_dir: Path) -> float:
    """The loss in nats per token is what sweeps compare."""
    from llm.commands.evaluate import run_evaluation  # imports torch, which --help need not wait for

    return run_evaluation(config, run_dir)


if __name__ == "__main__":
    launch("evaluate", EvaluateConfig, run)
