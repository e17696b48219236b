"""Evaluation of a model over batches of text, and the table of metrics that it records."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice

from torch import Tensor

from llm.data.windows import Batch
from llm.model.gpt import GPTModel, Score
from llm.model.loss import token_loss
from llm.runtime import Runtime
from llm.training.sharding import release


@dataclass
class Sums:
    """What metrics are computed from: sums over all target tokens so far."""

    nats: float = 0.0  # cross-entropy
    tokens: int = 0
    bytes: int = 0  # of the UTF-8 text that the targets stand for
    batches: int = 0
    batch_means: float = 0.0  # sum of each batch's mean cross-entropy, nats per token
    weigh_batches_equally: bool = False  # as the book does; otherwise every token counts the same
    scores: dict[str, float] = field(default_factory=dict)  # each metric's own score, by its name


def loss(sums: Sums) -> float:
    """Mean cross-entropy in nats per token; if batches weigh the same, the book's mean of batch means."""
    if sums.weigh_batches_equally:
        return sums.batch_means / sums.batches
    return sums.nats / sums.tokens


def perplexity(sums: Sums) -> float:
    """The exponential of the loss: the number of equally likely tokens that would be as uncertain."""
    nats = loss(sums)
    return math.exp(nats) if nats < 700 else math.inf  # exp overflows above 709


def bits_per_byte(sums: Sums) -> float:
    """Cross-entropy in bits per UTF-8 byte of text. Unlike the loss, it is comparable between tokenizers.
    Infinite if the text is empty, as where all targets are ends of text."""
    if not sums.bytes:
        return math.inf
    return sums.nats / math.log(2) / sums.bytes


@dataclass(frozen=True)
class Metric:
    """A figure that every evaluation computes."""

    value: Callable[[Sums], float]
    # In the tables of runs and evaluations. Sweeps, which read records of any version, show the name instead.
    title: str
    form: str = "{:.3f}"  # how these tables format it
    # A score of each token, if the metric needs more than the loss: summed into `Sums.scores[its name]`.
    score: Score | None = None


# By the name that is recorded: `val/NAME` in metrics.jsonl and W&B, `val_NAME` in summary.json.
METRICS: dict[str, Metric] = {
    "loss": Metric(loss, "loss"),
    "perplexity": Metric(perplexity, "perplexity", "{:.1f}"),
    "bits_per_byte": Metric(bits_per_byte, "bits per byte"),
}


def evaluate(
    model: GPTModel,
    batches: Iterable[Batch],
    bytes_of_tokens: Tensor,
    runtime: Runtime,
    max_batches: int | None = None,
    weigh_batches_equally: bool = False,
) -> dict[str, float]:
    """Compute every metric of `METRICS`, without dropout.

    Args:
        bytes_of_tokens: UTF-8 length of each token id, (vocab_size,).
        max_batches: use only the first of `batches`.

    Returns:
        The metrics' values by name.
    """
    sums = Sums(weigh_batches_equally=weigh_batches_equally)
    scores = {name: metric.score for name, metric in METRICS.items() if metric.score}
    was_training = model.training
    model.eval()
    for inputs, targets in islice(batches, max_batches):
        with runtime.autocast():
            losses, *others = model.score_tokens(
                inputs.to(runtime.device), targets.to(runtime.device), token_loss, *scores.values()
            )
        # .item() waits for the device once per batch; Python then sums in fp64, as fp32 would round.
        batch_loss = losses.mean().item()
        sums.batches += 1
        sums.batch_means += batch_loss
        sums.tokens += targets.numel()
        sums.nats += batch_loss * targets.numel()
        sums.bytes += int(bytes_of_tokens[targets].sum())
        for name, score in zip(scores, others, strict=True):
            sums.scores[name] = sums.scores.get(name, 0.0) + score.sum().item()
    release(model)
    model.train(was_training)
    return {name: metric.value(sums) for name, metric in METRICS.items()}
