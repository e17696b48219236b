"""Windows of tokens, cut anywhere or only within documents."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from llm.data.tokens import ShardedTokens

Batch = tuple[Tensor, Tensor]  # inputs and targets, both (batch, time), int64


class Windows(Dataset[Batch]):
    """Windows of `context_length` tokens, each `stride` after the one before: the book's GPTDatasetV1.

    Item i is (inputs, targets), both (context_length,), with targets one token later. With an offset, all
    windows start that many tokens later, and those that would start past the end wrap around.
    """

    def __init__(
        self, tokens: np.ndarray | ShardedTokens, context_length: int, stride: int, offset: int = 0
    ) -> None:
        self.tokens = tokens
        self.context_length = context_length
        self.stride = stride
        self.offset = offset

    def __len__(self) -> int:
        return max(0, -(-(len(self.tokens) - self.context_length) // self.stride))

    def __getitem__(self, index: int) -> Batch:
        start = (self.offset + index * self.stride) % (len(self.tokens) - self.context_length)
        window = torch.from_numpy(self.tokens[start : start + self.context_length + 1].astype(np.int64))
        return window[:-1], window[1:]

    def batch(self, indices: Tensor) -> Batch:
        """The windows with these indices (batch,): two tensors (batch, context_length)."""
        starts = (self.offset + indices.numpy() * self.stride) % (len(self.tokens) - self.context_length)
        return batch_at(self.tokens, starts, self.context_length)


class DocumentWindows(Dataset[Batch]):
    """Windows within documents of shards, each `stride` after the one before; a document's last window ends
    where the document does. Documents of fewer than context_length + 1 tokens have none. Takes 24 bytes per
    document.
    """

    def __init__(self, tokens: ShardedTokens, context_length: int, stride: int) -> None:
        self.tokens = tokens
        self.context_length = context_length
        self.stride = stride
        ends = tokens.document_ends
        lengths = np.diff(ends, prepend=0)
        has_windows = lengths > context_length
        lengths = lengths[has_windows]
        self._last = ends[has_windows] - context_length - 1  # the start of each document's last window
        self._begins = ends[has_windows] - lengths
        self._ends = np.cumsum(1 + -(-(lengths - context_length - 1) // stride))  # of their windows
        self.covered = int(lengths.sum())  # tokens of the documents that have windows

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Batch:
        inputs, targets = self.batch(torch.tensor([index]))
        return inputs[0], targets[0]

    def batch(self, indices: Tensor) -> Batch:
        """See `Windows.batch`."""
        numbers = indices.numpy()
        documents = np.searchsorted(self._ends, numbers, side="right")
        within = numbers - np.where(documents > 0, self._ends[documents - 1], 0)
        starts = np.minimum(self._begins[documents] + within * self.stride, self._last[documents])
        return batch_at(self.tokens, starts, self.context_length)


AnyWindows = Windows | DocumentWindows


def batch_at(tokens: np.ndarray | ShardedTokens, starts: np.ndarray, context_length: int) -> Batch:
    """The windows that start at `starts` (batch,): two tensors (batch, context_length)."""
    if isinstance(tokens, ShardedTokens):
        windows = torch.from_numpy(tokens.rows(starts, context_length + 1))
    else:
        windows = torch.from_numpy(tokens[starts[:, None] + np.arange(context_length + 1)].astype(np.int64))
    return windows[:, :-1], windows[:, 1:]


def shifted(windows: AnyWindows, stream: tuple[int, ...]) -> AnyWindows:
    """The windows with a random offset, drawn from a random stream; unchanged if they are bound to
    documents."""
    if isinstance(windows, DocumentWindows):
        return windows
    offset = int(np.random.default_rng(stream).integers(windows.stride))
    return Windows(windows.tokens, windows.context_length, windows.stride, offset)
