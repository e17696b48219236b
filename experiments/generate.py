"""Generate text from a trained model: `python experiments/generate.py --help`."""

from launch import Invocation, launch

from llm.config import GenerateConfig
from llm.outcome import Outcome


def run(config: GenerateConfig, invocation: Invocation) -> Outcome:
    from llm.commands.generate import run_generation  # imports torch, which --help need not wait for

    return run_generation(config, invocation.run_dir)


if __name__ == "__main__":
    launch("generate", GenerateConfig, run, repeatable=True)
