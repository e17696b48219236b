"""What a run's limits allow, estimated before the first update."""

from dataclasses import dataclass

from llm.model.gpt import training_flops_per_token
from llm.training.optimizers import OPTIMIZERS
from llm.training.run import Run

EXPECTED_MFU = 0.45  # of small models on CPUs


@dataclass(frozen=True)
class Budget:
    """An estimate of what a run will do."""

    update_tokens: int  # tokens of one update
    limit: str  # the key of the limit that is reached first, as max_minutes
    tokens: float  # of the whole run
    epochs: float  # of the whole run
    seconds_left: float  # of training
    validation_seconds: float  # of the pass over the validation split at the end


def estimate_budget(run: Run, matmul_flops: float) -> Budget:
    """What the limits of a run allow on a device of `matmul_flops` floating-point operations per second."""
    config, training = run.config, run.config.training
    batch_tokens = config.data.batch_size * config.model.context_length
    update_tokens, epoch_tokens = training.accumulate * batch_tokens, len(run.batches) * batch_tokens
    token_flops = training_flops_per_token(run.model)
    optimizer_flops = OPTIMIZERS[config.optimizer.name].flops(run.model)
    tokens_per_second = EXPECTED_MFU * matmul_flops / (token_flops + optimizer_flops / update_tokens)
    tokens_of = {
        "max_minutes": training.max_minutes and 60 * training.max_minutes * tokens_per_second,
        "max_steps": training.max_steps and training.max_steps * update_tokens,
        "max_epochs": training.max_epochs and training.max_epochs * epoch_tokens,
    }
    limit, tokens = min(
        ((limit, tokens) for limit, tokens in tokens_of.items() if tokens), key=lambda each: each[1]
    )
    # A forward pass is a third of a forward and a backward pass.
    validation_flops = len(run.validation_windows) * config.model.context_length * token_flops / 3
    return Budget(
        update_tokens=update_tokens,
        limit=limit,
        tokens=tokens,
        epochs=tokens / epoch_tokens,
        seconds_left=(tokens - run.counters.tokens_seen) / tokens_per_second,
        validation_seconds=validation_flops / EXPECTED_MFU / matmul_flops,
    )
