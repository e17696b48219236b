"""Generate text from a trained model: `python experiments/generate.py --help`."""

from pathlib import Path

from launch import Invocation, launch
from repeating import Repeat

from llm.config import GenerateConfig
from llm.outcome import Outcome


# These import torch, which --help need not wait for.
def run(config: GenerateConfig, invocation: Invocation) -> Outcome:
    from llm.commands.generate import run_generation

    return run_generation(config, invocation.run_dir)


def outcome_of(run_dir: Path) -> Outcome:
    from llm.commands.generate import outcome_of

    return outcome_of(run_dir)


def show(config: GenerateConfig, run_dir: Path) -> None:
    from llm.commands.generate import show_again

    show_again(config, run_dir)


if __name__ == "__main__":
    launch("generate", GenerateConfig, run, repeat=Repeat(outcome_of, show))
