"""Say whether one setting is better than another: `python experiments/compare.py --help`."""

from launch import Invocation, launch

from llm.config import CompareConfig
from llm.outcome import Outcome


def run(config: CompareConfig, invocation: Invocation) -> Outcome:
    from llm.commands.compare import compare  # imports torch and scipy, which --help need not wait for

    return compare(config, invocation.run_dir)


if __name__ == "__main__":
    launch("compare", CompareConfig, run)
