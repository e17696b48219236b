"""The training loop: update after update, with evaluations along the way. The book's chapter 5.2.

It knows nothing about files, W&B or signals: it reports each event to an `Observer`. The one that records
metrics and writes checkpoints is in llm/training/recorder.py; llm/training/lifecycle.py builds a run, calls
the loop and concludes the run.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from llm.errors import NotFinite
from llm.runtime import Late
from llm.training.run import Launched, Run
from llm.training.state import checkpoint_due
from llm.training.update import accumulate_gradients, queue_update, share
from llm.training.validation import evaluate_splits, evaluation_due

log = logging.getLogger(__name__)

SPIKE = 4.0  # a gradient norm this many times its running mean is reported
SPIKES_FROM_STEP = 20  # until then the norm falls too fast for its mean to say much


class Observer(Protocol):
    """What a process does besides training. The loop calls these methods as things happen."""

    def updated(self, metrics: dict[str, float]) -> None: ...
    def evaluated(self, training: dict[str, float], validation: dict[str, float]) -> None: ...
    def sample_due(self, epoch_ended: bool) -> bool: ...
    def sample(self) -> None: ...
    def save(self) -> None: ...


def train(run: Run, observer: Observer, stop_requested: Callable[[], bool]) -> None:
    """Update until the budget is spent or a stop is requested.

    A GPU always has an update queued: the loss of one update is read only after the next one is launched.
    Evaluations, samples and checkpoints wait until no update is in flight.

    Raises:
        NotFinite: too many updates in a row were skipped, see `finish`; or the model cannot be evaluated.
    """
    counters, saved = run.counters, replace(run.counters)
    agree = run.runtime.agree  # clocks and signals differ between processes: the main one decides for all
    run.skipped_in_a_row.fill_(counters.skipped_in_a_row)

    def drain(leave: int = 0) -> None:
        while len(run.in_flight) > leave:
            observer.updated(finish(run))

    while (done := agree(run.progress())) < 1 and not agree(stop_requested()):
        epochs = int(run.epochs())
        run.in_flight.append(launch(run, done))
        drain(leave=int(run.optimizers.can_queue))
        saves = agree(checkpoint_due(run, saved))
        samples = run.takes_part(observer.sample_due(epoch_ended=run.epochs() >= epochs + 1))
        if saves or samples:
            drain()
        if run.takes_part(evaluation_due(run)):
            drain()
            metrics = evaluate_splits(run)
            observer.evaluated(*metrics)
            if not all(math.isfinite(each["loss"]) for each in metrics):  # before such weights are saved
                raise NotFinite(f"step {counters.step}: the loss after this update is not finite")
        if samples:
            observer.sample()
        # Never right after a skipped update: the weights may be what made its loss not finite.
        if saves and not counters.skipped_in_a_row:
            observer.save()
            saved = replace(counters)
    drain()


def launch(run: Run, done: float) -> Launched:
    """Start the next update, without waiting for it if the device has a queue.

    Args:
        done: share of the budget that was spent before it, 0 to 1.
    """
    begin = time.perf_counter()
    optimizers, count = run.optimizers, run.micro_batches()
    if optimizers.can_queue:
        batches = [next(run.batches) for _ in range(count)]
        # Its duration is not known yet. Assume that it, and any update in flight, takes as long as the last
        # did.
        lr = run.learning_rate(done, run.update_seconds * (1 + len(run.in_flight)))
        optimizers.set_lr(lr)
        replayed = run.captured if count == run.config.training.accumulate else None
        figures = (
            replayed(batches)
            if replayed
            else queue_update(run, (share(run, batch) for batch in batches), count)
        )
    else:
        shared = (share(run, next(run.batches)) for _ in range(count))
        figures = accumulate_gradients(run, shared, count)
        finite = bool(figures.isfinite().all())  # waits for the device, so the time below is the update's
        lr = run.learning_rate(done, time.perf_counter() - begin)
        if finite:
            optimizers.set_lr(lr)
            optimizers.step()
        optimizers.zero_grad()
    tokens = count * run.config.data.batch_size * run.config.model.context_length
    return Launched(Late(figures), tokens, run.epochs(), lr, begin)


def finish(run: Run) -> dict[str, float]:
    """Wait for the oldest update in flight, count it, and return its metrics. It was skipped if its loss or
    gradient norm is not finite.

    Raises:
        NotFinite: more than `max_skipped` updates in a row were skipped; the weights are as before them.
    """
    update = run.in_flight[0]
    loss, norm = update.figures.read()
    now = time.perf_counter()
    seconds = now - max(update.begin, run.finished_at)  # the device may have been busy with the one before
    finite = math.isfinite(loss) and math.isfinite(norm)
    watch(run, finite, loss, norm)
    run.in_flight.popleft()
    run.count(update.tokens, seconds)
    run.update_seconds, run.finished_at = seconds, now
    return {
        **run.position(),
        "epoch": update.epoch,
        "train/loss": loss,
        "lr": update.lr,
        "grad_norm": norm,
        "tokens_per_second": update.tokens / seconds,
        **({} if finite else {"skipped": run.counters.skipped}),
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
