"""Pretrain a GPT on raw text: `python experiments/pretrain.py --help`."""

import atexit
import math
import os
import signal
import sys

from answer import tell
from arguments import only_shows
from launch import Interrupted, Invocation, launch

from llm.config import PretrainConfig
from llm.errors import UserError
from llm.launched import launched_rank
from llm.outcome import Outcome


def run(config: PretrainConfig, invocation: Invocation) -> Outcome:
    """Pretrain. Sweeps compare the validation loss at the end.

    A job that was stopped early has none, and counts as infinitely bad. Its best loss during training would
    not do: it was measured on a part of the split, and if runs end worse than their best, as on a small text,
    it may be below the final losses of jobs that trained to their end, so that the stopped job would seem the
    best.
    """
    from llm.commands.pretrain import outcome_of, pretrain_in  # imports torch, which --help need not wait for

    summary = pretrain_in(invocation.run_dir, config, invocation.given)
    outcome = outcome_of(invocation.run_dir)
    outcome.result = math.inf if summary.stopped_early else summary.val_loss
    if summary.stopped_early:
        return outcome
    if summary.val_loss is None:
        assert summary.stopped_by
        tell(outcome, invocation.run_dir)
        raise Interrupted(signal.Signals[summary.stopped_by])
    return outcome


def follow_the_first() -> int:
    """Take part in a run as one of its other processes; only the first reads the config and prints. Returns
    an exit status."""
    from llm.commands.pretrain import take_part

    status = 1

    def end() -> None:
        """Exit as processes of `multiprocessing` do. Torch's threads for exchanging gradients may outlive the
        interpreter for a moment, and would abort the process when they ask for its lock."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    atexit.register(end)
    try:
        take_part()
        status = 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    if not launched_rank():
        launch("pretrain", PretrainConfig, run, repeatable=True, follow=follow_the_first)
    elif not only_shows(sys.argv[1:]):
        sys.exit(follow_the_first())
