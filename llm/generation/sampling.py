"""Logits to a next token: repetition penalty, temperature, top-k, top-p and min-p, as pure functions.

Each equals the logits processor of the same name in Hugging Face transformers, ties included, and
they are applied in its order.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from llm.config import SamplingConfig

GREEDY_BELOW = 1e-6  # a temperature; below it quotients overflow, and there is hardly a second choice

# Probabilities (batch, vocab), each row summing to 1, to token ids (batch,).
Draw = Callable[[Tensor], Tensor]


def next_token(logits: Tensor, config: SamplingConfig, draw: Draw) -> Tensor:
    """A token id for each row of logits (batch, vocab): (batch,). Temperature 0 takes the likeliest."""
    if config.temperature < GREEDY_BELOW:
        return logits.argmax(dim=-1)
    return draw(next_distribution(logits, config))


def next_distribution(logits: Tensor, config: SamplingConfig) -> Tensor:
    """The probabilities that `next_token` draws from: logits (batch, vocab) to (batch, vocab)."""
    if config.temperature < GREEDY_BELOW:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    return torch.softmax(filter_logits(logits, config), dim=-1)


def filter_logits(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Logits (…, vocab) divided by the temperature, those that may not be drawn at -inf."""
    logits = logits / config.temperature
    if config.top_k is not None:
        logits = keep_top_k(logits, config.top_k)
    if config.top_p is not None:
        logits = keep_top_p(logits, config.top_p)
    if config.min_p is not None:
        logits = keep_min_p(logits, config.min_p)
    return logits


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (batch, vocab) with those of tokens in `seen`, bool of that shape, divided by `penalty` where
    positive and multiplied by it where negative; CTRL (Keskar et al. 2019), section 4.1."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """The k largest logits of each row, and all that equal the smallest of these (Fan et al. 2018)."""
    smallest_kept = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """The likeliest tokens that together hold at least probability p, one at least; nucleus sampling
    (Holtzman et al. 2020)."""
    ascending, indices = logits.sort(dim=-1, descending=False)
    dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    dropped[..., -1] = False
    return logits.masked_fill(dropped.scatter(-1, indices, dropped), -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Tokens at least p times as likely as the likeliest (Nguyen et al. 2024)."""
    probabilities = logits.softmax(dim=-1)
    likeliest = probabilities.amax(dim=-1, keepdim=True)
    return logits.masked_fill(probabilities < p * likeliest, -torch.inf)


def draw_from(generator: torch.Generator | None = None) -> Draw:
    """Draw as the book does: one `torch.multinomial` for the whole batch, on torch's global stream if no
    generator is given."""

    def draw(probabilities: Tensor) -> Tensor:
        return torch.multinomial(probabilities, num_samples=1, generator=generator).squeeze(-1)

    return draw


def draw_at(uniform: Tensor) -> Draw:
    """Draw where the cumulative probability of each row passes its number in [0, 1): uniform (batch,), fp32.

    A row's token then depends on its own number alone, not on the batch or the device.
    """

    def draw(probabilities: Tensor) -> Tensor:
        if probabilities.device.type == "mps":  # which has no float64
            return draw_at(uniform.cpu())(probabilities.cpu()).to(probabilities.device)
        # In float64 the sums never fall, so a token of probability 0 is never where they pass a number.
        cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
        passed = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, passed, right=True).squeeze(-1)

    return draw


def uniform_stream(seed: int, stream: tuple[int, ...], count: int) -> np.ndarray:
    """The first `count` numbers in [0, 1) of a random stream of its own: (count,), fp32."""
    # numpy takes zeros at the end of a seed for nothing: without the 1, sample 0 had training's stream.
    return np.random.default_rng((seed, *stream, 1)).random(count, dtype=np.float32)
