"""Metrics of a model over batches of text, and the table of those that are recorded."""

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
    """What the metrics are computed from: sums over all target tokens of the batches seen."""

    nats: float = 0.0  # cross-entropy
    tokens: int = 0
    bytes: int = 0  # of the UTF-8 text that the targets stand for
    batches: int = 0
    batch_means: float = 0.0  # of the cross-entropy in each batch, nats a token
    weigh_batches_equally: bool = False  # as the book does; else each token counts the same
    scores: dict[str, float] = field(default_factory=dict)  # each metric's own score, by its name


def loss(sums: Sums) -> float:
    """Mean cross-entropy, nats a token; the book's mean of batch means if batches weigh the same."""
    if sums.weigh_batches_equally:
        return sums.batch_means / sums.batches
    return sums.nats / sums.tokens


def perplexity(sums: Sums) -> float:
    """The exponential of the loss: as uncertain as a choice among so many equally likely tokens."""
    nats = loss(sums)
    return math.exp(nats) if nats < 700 else math.inf  # exp overflows above 709


def bits_per_byte(sums: Sums) -> float:
    """Cross-entropy in bits over the bytes of the text. Unlike the loss it compares between tokenizers. Of
    ends of text alone, which stand for no bytes, it is infinite."""
    if not sums.bytes:
        return math.inf
    return sums.nats / math.log(2) / sums.bytes


@dataclass(frozen=True)
class Metric:
    """A figure of an evaluation."""

    value: Callable[[Sums], float]
    title: str  # in tables
    form: str = "{:.3f}"
    # What it needs to sum over tokens besides their loss, into `Sums.scores` under the metric's name.
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
    """Every metric, by its name, without dropout, over at most `max_batches` batches.

    Args:
        bytes_of_tokens: UTF-8 length of each token id, (vocab_size,).
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
        # .item() waits for the device, once a batch; Python then sums in fp64, where fp32 would round.
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
