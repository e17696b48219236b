"""Cached keys and values of the tokens so far, so that a new token costs one token's work."""

import torch
from torch import Tensor

from llm.config import ModelConfig


class KVCache:
    """Room for rows of different lengths, allocated once.

    `fill` writes a row from its first token on; then `extend` or `extend_together` adds a token per step.
    Past `length` tokens each takes the slot of the oldest: position p is in slot p mod length. Each is handed
    to the model as a function of (layer, keys, values), both (rows, heads, time, head_dim), that returns the
    keys and values to attend to, and a mask where a causal one is not enough.
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
        """Write the first tokens of `rows`: row rows[i] gets the keys and values of prompt source[i]."""
        time = keys.shape[2]
        self.keys[layer][rows, :, :time] = keys[source].to(self.keys[layer].dtype)
        self.values[layer][rows, :, :time] = values[source].to(self.values[layer].dtype)
        return keys, values, None

    def fill_on(self, layer: int, keys: Tensor, values: Tensor, rows: Tensor) -> "Attended":
        """Write the next tokens, at most `length`, of `rows`, which are equal and hold a multiple of `length`
        tokens: keys and values (1, heads, time, head_dim). Each attends to the `length` tokens up to it."""
        time = keys.shape[2]
        older = self.keys[layer][rows[:1]], self.values[layer][rows[:1]]
        self.keys[layer][rows, :, :time] = keys.to(self.keys[layer].dtype)
        self.values[layer][rows, :, :time] = values.to(self.values[layer].dtype)
        seen = torch.ones(time, self.length + time, dtype=torch.bool, device=keys.device)
        mask = seen.triu(1).tril(self.length)
        return torch.cat([older[0], keys], dim=2), torch.cat([older[1], values], dim=2), mask

    def extend(self, layer: int, keys: Tensor, values: Tensor, where: Tensor, end: int) -> "Attended":
        """Append a token to each of the first rows, at its position in `where`, (rows,), below `end`."""
        rows, slots = len(where), where % self.length
        self.keys[layer][self._rows[:rows], :, slots] = keys[:, :, 0].to(self.keys[layer].dtype)
        self.values[layer][self._rows[:rows], :, slots] = values[:, :, 0].to(self.values[layer].dtype)
        # Rows differ in length: beyond a row's new token its slot is unwritten or stale, until all are taken.
        mask = (self._lengths[:end] <= where[:, None])[:, None, None]  # (rows, 1, 1, end)
        return self.keys[layer][:rows, :, :end], self.values[layer][:rows, :, :end], mask

    def extend_together(self, layer: int, keys: Tensor, values: Tensor, position: int) -> "Attended":
        """`extend` for rows of one length, which need no mask."""
        rows, slot = len(keys), position % self.length
        self.keys[layer][:rows, :, slot] = keys[:, :, 0]
        self.values[layer][:rows, :, slot] = values[:, :, 0]
        return self.keys[layer][:rows, :, : position + 1], self.values[layer][:rows, :, : position + 1], None

    def move(self, row: int, to: int) -> None:
        """Copy a row over another."""
        for kept in (*self.keys, *self.values):
            kept[to] = kept[row]


Attended = tuple[Tensor, Tensor, Tensor | None]  # keys, values (rows, heads, length, head_dim), and a mask
