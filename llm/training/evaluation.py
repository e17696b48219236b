"""Loss, perplexity and bits per byte of a model over batches of text."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from torch import Tensor

from llm.data.windows import Batch
from llm.model.gpt import GPTModel
from llm.runtime import Runtime


@dataclass(frozen=True)
class Evaluation:
    loss: float  # mean cross-entropy in nats per token
    bits_per_byte: float  # of the UTF-8 text of the target tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf  # exp overflows above 709


def evaluate(
    model: GPTModel,
    batches: Iterable[Batch],
    bytes_of_tokens: Tensor,
    runtime: Runtime,
    max_batches: int | None = None,
    weigh_batches_equally: bool = False,
) -> Evaluation:
    """Evaluate without dropout, on at most `max_batches` batches.

    Args:
        bytes_of_tokens: UTF-8 length of each token id, (vocab_size,). Unlike the loss per token, bits per
            byte can be compared between tokenizers.
        weigh_batches_equally: take the mean of batch means, as the book does; else all tokens count the same.
    """
    nats = batch_means = tokens = byte_count = count = 0.0
    was_training = model.training
    model.eval()
    for inputs, targets in islice(batches, max_batches):
        with runtime.autocast():
            # .item() waits for the device, once a batch; Python then sums in fp64, where fp32 would round.
            loss = model.token_losses(inputs.to(runtime.device), targets.to(runtime.device)).mean().item()
        count += 1
        batch_means += loss
        tokens += targets.numel()
        nats += loss * targets.numel()
        byte_count += bytes_of_tokens[targets].sum().item()
    model.train(was_training)
    return Evaluation(
        loss=batch_means / count if weigh_batches_equally else nats / tokens,
        bits_per_byte=nats / math.log(2) / byte_count,
    )
