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
        shape = (rows, config.kv_heads, length, config.head_dim)
        self.rows, self.length = rows, length
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self._rows = torch.arange(rows, device=device)
        self._lengths = torch.arange(length, device=device)

    def fill(self, layer: int, keys: Tensor, values: Tensor, rows: Tensor, source: Tensor) -> "Attended":
        """Write the first tokens of rows: row rows[i] gets the keys and values of prompt source[i]."""
        time = keys.shape[2]
        self.keys[layer][rows, :, :time] = keys[source].to(self.keys[layer].dtype)
        self.values[layer][rows, :, :time] = values[source].to(self.values[layer].dtype)
        return keys, values, None

    def fill_on(self, layer: int, keys: Tensor, values: Tensor, rows: Tensor) -> "Attended":
        """Write the next tokens, at most `length`, of equal rows that hold a multiple of `length` tokens:
        keys and values (1, heads, time, head_dim). Each token attends to the `length` tokens up to itself."""
        time = keys.shape[2]
        older = self.keys[layer][rows[:1]], self.values[layer][rows[:1]]
        self.keys[layer][rows, :, :time] = keys.to(self.keys[layer].dtype)
        self.values[layer][rows, :, :time] = values.to(self.values[layer].dtype)
        seen = torch.ones(time, self.length + time, dtype=torch.bool, device=keys.device)
        mask = seen.triu(1).tril(self.length)
        return torch.cat([older[0], keys], dim=2), torch.cat([older[1], values], dim=2), mask

    def extending(self, where: Tensor, end: int) -> Callable[[int, Tensor, Tensor], "Attended"]:
        """Append a token to each of the first rows, at the positions `where` (rows,), all below `end`."""
        # Computed once for all layers, as every kernel counts on a GPU.
        rows, slots = self._rows[: len(where)], where % self.length
        # Rows differ in length: slots beyond a row's new token are unwritten or stale, until all are in use.
        hidden = self._lengths[:end] > where[:, None]
        mask = torch.zeros(hidden.shape, device=where.device, dtype=self.keys[0].dtype)
        mask.masked_fill_(hidden, HIDDEN)
        return partial(self._extend, rows, slots, mask[:, None, None])

    def _extend(
        self, rows: Tensor, slots: Tensor, mask: Tensor, layer: int, keys: Tensor, values: Tensor
    ) -> "Attended":
        kept = self.keys[layer], self.values[layer]
        for each, new in zip(kept, (keys, values), strict=True):
            each[rows, :, slots] = new[:, :, 0].to(each.dtype)
        count, end = len(rows), mask.shape[-1]
        return kept[0][:count, :, :end], kept[1][:count, :, :end], mask

    def extend_together(self, layer: int, keys: Tensor, values: Tensor, position: int) -> "Attended":
        """Append a token to each row, all at one position; this needs no mask."""
        rows, slot = len(keys), position % self.length
        self.keys[layer][:rows, :, slot] = keys[:, :, 0]
        self.values[layer][:rows, :, slot] = values[:, :, 0]
        return self.keys[layer][:rows, :, : position + 1], self.values[layer][:rows, :, : position + 1], None

    def move(self, row: int, to: int) -> None:
        """Copy a row to the place of another."""
        for kept in (*self.keys, *self.values):
            kept[to] = kept[row]


Attended = tuple[Tensor, Tensor, Tensor | None]  # keys, values (rows, heads, length, head_dim), and a mask
