"""From logits to the next token: repetition penalty, temperature, top-k, top-p and min-p, as pure functions.

Each is the same as the logits processor of that name in Hugging Face transformers, including ties, and they
are applied in the same order.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llm.config import SamplingConfig

GREEDY_BELOW = 1e-6  # temperatures below this count as 0: dividing by them could overflow

# Draws token ids (batch,) from probabilities (batch, vocab), whose rows sum to 1.
Draw = Callable[[Tensor], Tensor]


def next_token(logits: Tensor, config: SamplingConfig, draw: Draw) -> Tensor:
    """A token id for each row of logits (batch, vocab): (batch,). Temperature 0 takes the likeliest token."""
    if config.temperature < GREEDY_BELOW:
        return logits.argmax(dim=-1)
    return draw(next_distribution(logits, config))


def next_distribution(logits: Tensor, config: SamplingConfig) -> Tensor:
    """The probabilities that `next_token` draws from: logits (batch, vocab) to (batch, vocab)."""
    if config.temperature < GREEDY_BELOW:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    return torch.softmax(filter_logits(logits, config), dim=-1)


def filter_logits(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Logits (…, vocab) divided by the temperature, with those that must not be drawn set to -inf."""
    logits = logits / config.temperature
    for name, keep in FILTERS.items():
        if (value := getattr(config, name)) is not None:
            logits = keep(logits, value)
    return logits


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Lower the logits (batch, vocab) of tokens in `seen`, bool of that shape: divided by `penalty` where
    positive, multiplied by it where negative; CTRL (Keskar et al. 2019), section 4.1."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Top-k filtering (Fan et al. 2018): keep the k largest logits of each row, and any that tie with the
    smallest of these."""
    # Ties are kept, as it is undefined which of several equal logits `topk` returns.
    smallest_kept = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Nucleus sampling (Holtzman et al. 2020): keep the fewest tokens, likeliest first, whose probabilities
    add up to at least p; always at least one."""
    ascending, indices = logits.sort(dim=-1, descending=False)
    dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    dropped[..., -1] = False  # with p=0 the likeliest token would be dropped as well
    return logits.masked_fill(dropped.scatter(-1, indices, dropped), -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Min-p sampling (Nguyen et al. 2024): keep the tokens at least p times as likely as the likeliest."""
    probabilities = logits.softmax(dim=-1)
    likeliest = probabilities.amax(dim=-1, keepdim=True)
    return logits.masked_fill(probabilities < p * likeliest, -torch.inf)


# By the key of `SamplingConfig` that sets them, in the order in which they are applied: functions of logits
# (…, vocab) and the key's value. A key that is null turns its filter off.
FILTERS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "top_k": keep_top_k,
    "top_p": keep_top_p,
    "min_p": keep_min_p,
}


def draw_from(generator: torch.Generator | None = None) -> Draw:
    """Draw as the book does: by one `torch.multinomial` for the whole batch, from torch's global random
    stream unless a generator is given."""

    def draw(probabilities: Tensor) -> Tensor:
        return torch.multinomial(probabilities, num_samples=1, generator=generator).squeeze(-1)

    return draw


def draw_at(uniform: Tensor) -> Draw:
    """Draw by inverse transform sampling: the token at which a row's cumulative probability passes its number
    in [0, 1). A row's token then depends on its own number alone, not on the batch or the device.

    Args:
        uniform: (batch,), fp32.
    """

    def draw(probabilities: Tensor) -> Tensor:
        if probabilities.device.type == "mps":  # which has no float64
            return draw_at(uniform.cpu())(probabilities.cpu()).to(probabilities.device)
        # In float64 the cumulative sums never decrease, so a token of probability 0 is never drawn.
        if probabilities.is_cuda and len(probabilities) > 1:
            cumulative = cumulative_in_pieces(probabilities)
        else:
            cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
        passed = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
        if torch.compiler.is_compiling():  # some versions of torch cannot compile a search of a padded tensor
            return (cumulative <= passed).sum(dim=-1)
        found = torch.searchsorted(cumulative, passed, right=True).squeeze(-1)
        # Logits that are not finite make all of these NaN, and the index found is past the last one.
        return found.clamp(max=probabilities.shape[-1] - 1)

    return draw


def cumulative_in_pieces(probabilities: Tensor, piece: int = 256) -> Tensor:
    """Cumulative sums of rows (rows, vocab) in float64, with the last one repeated up to a multiple of
    `piece`. torch's own, for several rows on CUDA, sums each row on a single processor, 1,024 numbers at a
    time."""
    padded = F.pad(probabilities, (0, -probabilities.shape[-1] % piece))
    pieces = padded.unflatten(-1, (-1, piece)).cumsum(dim=-1, dtype=torch.float64)
    before = F.pad(pieces[..., -1].cumsum(dim=-1)[..., :-1], (1, 0))
    return (pieces + before[..., None]).flatten(-2)


def uniform_stream(seed: int, stream: tuple[int, ...], count: int) -> np.ndarray:
    """The first `count` numbers in [0, 1) of the random stream (seed, *stream): (count,), fp32."""
    # numpy ignores zeros at the end of a seed: without the 1, sample 0 would share training's stream.
    return np.random.default_rng((seed, *stream, 1)).random(count, dtype=np.float32)
