"""Make the token files of a run ahead of it: `python experiments/prepare.py --help`."""

from launch import Invocation, launch

from llm.config import PretrainConfig


def run(config: PretrainConfig, invocation: Invocation) -> None:
    from llm.commands.prepare import prepare  # imports torch, which --help need not wait for

    prepare(config)


if __name__ == "__main__":
    launch("prepare", PretrainConfig, run)
