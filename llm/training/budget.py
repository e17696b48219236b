"""How much training a run's limits allow: estimated from how fast its device multiplies matrices, then from
how fast it trains."""

from dataclasses import dataclass

from llm.model.gpt import training_flops_per_token
from llm.training.optimizers import OPTIMIZERS
from llm.training.run import Run
from llm.training.update_size import update_tokens
from llm.training.validation import FORWARD_SHARE, final_window_count

EXPECTED_MFU = 0.45  # of small models on CPUs, and of 124M parameters on an H200
# The least that a GPU's kernels take per layer in an update, however small the layer; measured on an H200
# with the update as one graph.
LAYER_SECONDS = 4e-4


@dataclass(frozen=True)
class Budget:
    """An estimate of what a run still has to do."""

    update_tokens: int  # tokens of one update
    limit: str  # the key of the limit that is reached first, as max_minutes
    tokens_left: float
    epochs_left: float
    seconds_left: float  # of training
    windows: int  # of the validation split, evaluated at the end
    validation_seconds: float  # for that evaluation


def expected_speed(run: Run, matmul_flops: float, kind: str) -> float:
    """Tokens per second of training to expect.

    Args:
        matmul_flops: floating-point operations per second of large matrix products, over all processes.
        kind: the kind of device, such as `cuda`.
    """
    tokens, optimizer = update_tokens(run.config), OPTIMIZERS[run.config.optimizer.name]
    flops = tokens * training_flops_per_token(run.model) + optimizer.flops(run.model)
    seconds = flops / (EXPECTED_MFU * matmul_flops)
    if kind == "cuda":
        seconds = max(seconds, LAYER_SECONDS * run.config.model.n_layers * run.config.training.accumulate)
    return tokens / seconds


def estimate_budget(run: Run, tokens_per_second: float) -> Budget:
    """What a run's limits still allow at this training speed."""
    config, training, counters = run.config, run.config.training, run.counters
    epoch_tokens = len(run.batches) * config.data.batch_size * config.model.context_length
    left = {}
    if training.max_minutes is not None:
        left["max_minutes"] = (60 * training.max_minutes - counters.seconds) * tokens_per_second
    if training.max_steps is not None:
        left["max_steps"] = float(training.max_steps - counters.steps) * update_tokens(config)
    if training.max_epochs is not None:
        left["max_epochs"] = (training.max_epochs - run.epochs()) * epoch_tokens
    limit = min(left, key=lambda each: left[each])
    # A limit ends a run after the update that reaches it, so one that has not begun makes at least one.
    tokens = max(0.0 if counters.steps else float(update_tokens(config)), left[limit])
    windows = final_window_count(run, counters.tokens_seen + tokens)
    # One process evaluates.
    window_tokens = config.model.context_length * run.runtime.processes
    window_seconds = FORWARD_SHARE * window_tokens / tokens_per_second
    return Budget(
        update_tokens=update_tokens(config),
        limit=limit,
        tokens_left=tokens,
        epochs_left=tokens / epoch_tokens,
        seconds_left=tokens / tokens_per_second,
        windows=windows,
        validation_seconds=windows * window_seconds,
    )
