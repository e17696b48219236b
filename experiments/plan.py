"""Estimate what a run takes before it starts: `python experiments/plan.py --help`."""

from launch import Invocation, launch

from llm.config import PlanConfig
from llm.outcome import Outcome


def run(config: PlanConfig, invocation: Invocation) -> Outcome:
    from llm.commands.plan import plan  # imports torch, which --help need not wait for

    return plan(config, invocation.run_dir, invocation.given)


if __name__ == "__main__":
    launch("plan", PlanConfig, run)
