"""Generate text from a trained model: `python experiments/generate.py --help`."""

from pathlib import Path

from launch import launch

from llm.config import GenerateConfig


def run(config: GenerateConfig, run_dir: Path) -> None:
    from llm.commands.generate import run_generation  # imports torch, which --help need not wait for

    run_generation(config, run_dir)


if __name__ == "__main__":
    launch("generate", GenerateConfig, run)
