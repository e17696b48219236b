"""When a run is evaluated, and on which windows: a few during training, and many at its end."""

from collections.abc import Iterator

import numpy as np
import torch

from llm.data.windows import AnyWindows, Batch, Mixture, book_batches, random_order, shuffled_batches
from llm.model.gpt import training_flops_per_token
from llm.progress import Progress
from llm.training.evaluation import evaluate
from llm.training.optimizers import OPTIMIZERS
from llm.training.run import Run
from llm.training.state import generator_states, restore_generators
from llm.training.update_size import update_tokens

LARGEST_SHARE = 0.1  # of the work of training that the validation at the end may take
# A forward pass is a third of the work of a forward and backward pass, and more where turning logits into
# losses dominates: 0.38 was measured with GPT-2's vocabulary and a model 128 wide.
FORWARD_SHARE = 0.4
# Random stream for choosing the windows of that validation. It is the same for every seed, so that runs are
# compared on the same windows, and has one number more than training's streams, so that it is none of these.
FINAL_STREAM = (0, 0, 2)


def evaluation_due(run: Run) -> bool:
    """Whether to evaluate after the update just done: every `eval_freq` updates, and after the last one."""
    return _evaluates_regularly(run) or run.progress() >= 1


def _evaluates_regularly(run: Run) -> bool:
    frequency = run.config.training.eval_freq
    return frequency is not None and run.step % frequency == 0


def evaluate_splits(run: Run) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics on `eval_iter` batches of the training split, and on as many of the validation split."""
    states = generator_states(run.runtime)
    metrics = evaluate_some(run, run.training_windows), evaluate_some(run, run.validation_windows)
    if not _evaluates_regularly(run):
        # In the book's order evaluations draw random numbers. This one, after the last update, must not, or
        # the run would continue otherwise than one that had never ended.
        restore_generators(states)
    return metrics


def evaluate_some(run: Run, windows: AnyWindows | Mixture) -> dict[str, float]:
    """Metrics on the same `eval_iter` batches every time, so that they are comparable; in the book's order,
    on the first ones of a fresh pass."""
    data, eval_iter = run.config.data, run.config.training.eval_iter
    if in_book_order := data.order == "book":
        batches = book_batches(windows, data.batch_size, training=windows is run.training_windows)
    else:
        stream = (run.config.seed, 0, 1)  # training's streams have one number less
        batches = shuffled_batches(windows, data.batch_size, stream, drop_last=False)
    return evaluate(run.model, batches, run.bytes_of_tokens, run.runtime, eval_iter, in_book_order)


def final_window_count(run: Run, tokens_seen: float) -> int:
    """How many windows of the validation split are evaluated at the end of a run of `tokens_seen` tokens.

    With `training.final_eval=tenth` it is all of them, or the largest of a half, a quarter, an eighth … that
    takes at most a tenth of the work of training. Work is counted in floating-point operations, not seconds,
    so that a run that is resumed or repeated evaluates the same windows; and the number is halved, not fitted
    exactly, so that runs of about the same length evaluate the same windows too.
    """
    total, config = len(run.validation_windows), run.config
    if config.training.final_eval == "full":
        return total
    flops = training_flops_per_token(run.model)
    optimizer_flops = OPTIMIZERS[config.optimizer.name].flops(run.model) / update_tokens(config)
    # Only one process evaluates.
    affordable = LARGEST_SHARE * tokens_seen * (flops + optimizer_flops) / run.runtime.processes
    count = total
    while count > 1 and count * config.model.context_length * FORWARD_SHARE * flops > affordable:
        count = -(-count // 2)
    return count


def evaluate_at_the_end(run: Run) -> tuple[dict[str, float], int]:
    """Metrics over `final_window_count` windows of the validation split, and that number. A smaller number of
    windows is always a subset of a larger one."""
    windows, batch_size = run.validation_windows, run.config.data.batch_size
    count = final_window_count(run, run.counters.tokens_seen)
    order = random_order(windows, FINAL_STREAM)
    chosen = torch.from_numpy(np.sort(order[:count]))
    progress = Progress("validating")

    def batches() -> Iterator[Batch]:
        for start in range(0, count, batch_size):
            progress.update(start / count, f"window {start:,} of {count:,}")
            run.alive()
            yield windows.batch(chosen[start : start + batch_size])

    metrics = evaluate(run.model, batches(), run.bytes_of_tokens, run.runtime)
    progress.clear()
    return metrics, count
