"""The KV cache: keys and values of the tokens so far, so that a new token costs only its own work."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from llm.config import ModelConfig

# Added to a score, it makes the attention weight exactly 0. torch uses it for cuDNN in place of -infinity.
HIDDEN = -65504.0


class KVCache:
    """A cache for rows of different lengths, allocated once.

    `fill` writes a row's prompt; then `extending` or `extend_together` add a token per step. Position p is in
    slot p mod length, so past `length` tokens a new token overwrites the oldest. The model is given these
    methods as a function of (layer, keys, values), both (rows, heads, time, head_dim), that returns the keys
    and values to attend to, and a mask unless a causal one is enough.
    """

    def __init__(
        self, config: ModelConfig, rows: int, length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.rows, self.length, heads = rows, length, config.kv_heads
        # Keys and values of a layer are one tensor, so that a step writes both at once.
        shape = (2, rows, heads, length, config.head_dim)
        self.layers = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self._lengths = torch.arange(length, device=device)
        # The place of each row's and head's first key and first value, with a layer as one list of vectors.
        self._starts = length * torch.arange(2 * rows * heads, device=device).view(2, rows, heads)

    def fill(self, layer: int, keys: Tensor, values: Tensor, rows: Tensor, source: Tensor) -> "Attended":
        """Write the first tokens of rows: row rows[i] gets the keys and values of prompt source[i]."""
        time = keys.shape[2]
        kept = self.layers[layer]
        kept[:, rows, :, :time] = torch.stack([keys[source], values[source]]).to(kept.dtype)
        return keys, values, None

    def fill_on(self, layer: int, keys: Tensor, values: Tensor, rows: Tensor) -> "Attended":
        """Write the next tokens, at most `length`, of equal rows that hold a multiple of `length` tokens:
        keys and values (1, heads, time, head_dim). Each token attends to the `length` tokens up to itself."""
        time = keys.shape[2]
        kept = self.layers[layer]
        older = kept[:, rows[:1]].unbind()
        kept[:, rows, :, :time] = torch.stack([keys, values]).to(kept.dtype)
        seen = torch.ones(time, self.length + time, dtype=torch.bool, device=keys.device)
        mask = seen.triu(1).tril(self.length)
        return torch.cat([older[0], keys], dim=2), torch.cat([older[1], values], dim=2), mask

    def extending(self, where: Tensor, end: int) -> Callable[[int, Tensor, Tensor], "Attended"]:
        """Append a token to each of the first rows, at the positions `where` (rows,), all below `end`."""
        # Computed once for all layers, as every kernel counts on a GPU.
        places = self._starts[:, : len(where)] + (where % self.length)[:, None]
        # Rows differ in length: slots beyond a row's new token are unwritten or stale, until all are in use.
        hidden = self._lengths[:end] > where[:, None]
        mask = torch.zeros(hidden.shape, device=where.device, dtype=self.layers[0].dtype)
        mask.masked_fill_(hidden, HIDDEN)
        return partial(self._extend, places.flatten(), mask[:, None, None])

    def _extend(self, places: Tensor, mask: Tensor, layer: int, keys: Tensor, values: Tensor) -> "Attended":
        kept, (count, end) = self.layers[layer], (len(keys), mask.shape[-1])
        new = torch.cat([keys, values]).to(kept.dtype)
        kept.view(-1, kept.shape[-1]).index_copy_(0, places, new.flatten(0, 2))
        return kept[0, :count, :, :end], kept[1, :count, :, :end], mask

    def extend_together(self, layer: int, keys: Tensor, values: Tensor, position: int) -> "Attended":
        """Append a token to each row, all at one position; this needs no mask."""
        kept, rows, slot = self.layers[layer], len(keys), position % self.length
        kept[0, :rows, :, slot] = keys[:, :, 0]
        kept[1, :rows, :, slot] = values[:, :, 0]
        return kept[0, :rows, :, : position + 1], kept[1, :rows, :, : position + 1], None

    def move(self, row: int, to: int) -> None:
        """Copy a row to the place of another."""
        for kept in self.layers:
            kept[:, to] = kept[:, row]


Attended = tuple[Tensor, Tensor, Tensor | None]  # keys, values (rows, heads, length, head_dim), and a mask
