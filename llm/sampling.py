"""Logits to a next token: temperature, top-k, top-p and min-p, as pure functions.

Each equals the logits processor of the same name in Hugging Face transformers, ties included, and
they are applied in its order.
"""

import torch
from torch import Tensor

from llm.config import SamplingConfig


def next_token(logits: Tensor, config: SamplingConfig, generator: torch.Generator | None = None) -> Tensor:
    """A token id for each row of logits (batch, vocab): (batch,). Temperature 0 takes the likeliest."""
    if config.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(filter_logits(logits, config), dim=-1)
    return torch.multinomial(probabilities, num_samples=1, generator=generator).squeeze(-1)


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
