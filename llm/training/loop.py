"""The training loop: update after update, with evaluations along the way. The book's chapter 5.2.

It knows nothing of files, W&B or signals. What happens is told to an `Observer`; see llm/training/recorder.py
for the one that keeps metrics and checkpoints, and llm/training/lifecycle.py for what surrounds the loop.
"""

import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Protocol

import torch
from torch import nn

from llm.training.run import Run
from llm.training.state import checkpoint_due
from llm.training.validation import evaluate_splits, evaluation_due

log = logging.getLogger(__name__)

SPIKE = 4.0  # a gradient norm this many times its running mean is reported
SPIKES_FROM_STEP = 20  # until then the norm falls too fast for its mean to say much


class Observer(Protocol):
    """What a process does besides training, told of everything in the order in which it happens."""

    def updated(self, metrics: dict[str, float]) -> None: ...
    def evaluated(self, training: dict[str, float], validation: dict[str, float]) -> None: ...
    def epoch_ended(self) -> None: ...
    def save(self) -> None: ...


class NotFinite(Exception):
    """Too many updates in a row whose loss or gradient is not finite."""


def train(run: Run, observer: Observer, stop_requested: Callable[[], bool]) -> None:
    """Update until the budget is spent or a stop is requested.

    Raises:
        NotFinite: see `update`.
    """
    counters, saved = run.counters, replace(run.counters)
    agree = run.runtime.agree  # clocks and signals differ between processes: the main one decides for all
    while (done := agree(run.progress())) < 1 and not agree(stop_requested()):
        epochs = int(run.epochs())
        observer.updated(update(run, done))
        if run.runtime.is_main and evaluation_due(run):
            observer.evaluated(*evaluate_splits(run))
        if run.epochs() >= epochs + 1:
            observer.epoch_ended()
        if agree(checkpoint_due(run.config.checkpoint, counters, saved)):
            observer.save()
            saved = replace(counters)


def update(run: Run, done: float) -> dict[str, float]:
    """One optimizer step over `accumulate` batches; returns its metrics. A step whose loss or gradient is not
    finite is skipped and counted. `done` is the share of the budget that was spent before.

    Raises:
        NotFinite: more than `max_skipped` in a row; the weights are those before them.
    """
    training, runtime, counters = run.config.training, run.runtime, run.counters
    start = time.perf_counter()
    loss = torch.zeros((), device=runtime.device)
    tokens, micro_batches = 0, run.micro_batches()
    for micro_step in range(micro_batches):
        inputs, targets = next(run.batches)
        tokens += inputs.numel()
        # Gradients add up over the micro-batches; several processes average them once, at the last one.
        exchange = runtime.processes == 1 or micro_step == micro_batches - 1
        with nullcontext() if exchange else run.trained_model.no_sync(), runtime.autocast():  # type: ignore[operator]
            # Each batch's loss is a mean. Divided by the number of batches, their gradients add up to that of
            # the mean over all of them: the same update as one large batch makes.
            share = runtime.share(inputs), runtime.share(targets)
            batch_loss = run.trained_model(*share) / micro_batches
            batch_loss.backward()
        loss += batch_loss.detach()
    parameters = list(run.model.parameters())
    grad_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if training.grad_clip is not None:
        nn.utils.clip_grads_with_norm_(parameters, training.grad_clip, grad_norm)
    # `.item()` waits until a GPU has computed the number: the step depends on it, and so does the time.
    mean_loss, norm = runtime.mean(loss).item(), grad_norm.item()
    finite = math.isfinite(mean_loss) and math.isfinite(norm)
    lr = run.learning_rate(done, time.perf_counter() - start)
    if finite:
        run.optimizers.set_lr(lr)
        run.optimizers.step()
    run.optimizers.zero_grad()
    seconds = time.perf_counter() - start
    watch(run, finite, mean_loss, norm)
    run.count(tokens, seconds)
    return {
        **run.position(),
        "train/loss": mean_loss,
        "lr": lr,
        "grad_norm": norm,
        "tokens_per_second": tokens / seconds,
        **({} if finite else {"skipped": counters.skipped}),
    }


def watch(run: Run, finite: bool, loss: float, grad_norm: float) -> None:
    """Count skipped updates and gradient norms far above their running mean, and report them.

    Raises:
        NotFinite: too many updates in a row were skipped.
    """
    counters = run.counters
    counters.skipped_in_a_row = 0 if finite else counters.skipped_in_a_row + 1
    if not finite:
        if counters.skipped_in_a_row > run.config.training.max_skipped:
            raise NotFinite(
                f"step {counters.steps}: loss {loss} with gradient norm {grad_norm} is not finite"
            )
        counters.skipped += 1
        log.warning("step %d skipped: loss %s, gradient norm %s", counters.steps, loss, grad_norm)
        return
    usual = counters.usual_grad_norm
    if usual and grad_norm > SPIKE * usual and counters.steps >= SPIKES_FROM_STEP:
        counters.grad_norm_spikes += 1
        ratio = grad_norm / usual
        log.warning("step %d: gradient norm %.3g, %.1f times its mean", counters.steps, grad_norm, ratio)
    counters.usual_grad_norm = grad_norm if usual is None else 0.95 * usual + 0.05 * grad_norm
