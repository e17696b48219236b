"""Windows of shards in a random order that is computed as needed, mixed from several sources by weight."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from llm.data.cutting import AnyWindows, Batch, shifted
from llm.data.permutation import Permutation
from llm.data.tokens import ShardedTokens

MIXED = 1024  # consecutive places, among which each source of a mixture has its share


class Mixture(Dataset[Batch]):
    """Windows of one or more sources of shards, mixed in proportion to weights, each source in random order.

    The windows form an endless sequence in which each place is computed independently: no order is kept in
    memory, and a run can start anywhere as fast as at the beginning. Every MIXED consecutive places hold
    windows of each source in proportion to its weight (fractions carry over), in an order that a permutation
    decides. A source whose windows are used up starts again, in another order.
    """

    def __init__(
        self,
        tokens: np.ndarray | ShardedTokens,
        sources: list[AnyWindows],
        weights: list[float],
        seed: int,
        shift: bool,
    ) -> None:
        """
        Args:
            tokens: those of all sources.
            shift: see `DataConfig.shift_windows`.
        """
        self.tokens = tokens
        self.sources, self.seed, self.shift = sources, seed, shift
        self._shares = np.cumsum([0, *weights]) / sum(weights)
        self._shares[-1] = 1.0
        self._epochs: dict[tuple[int, int], tuple[AnyWindows, Permutation]] = {}

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def batches(self, epoch: int, position: int, batch_size: int) -> Iterator[Batch]:
        """The batches of an epoch, from batch `position` on. An epoch has as many windows as all sources."""
        for start in range(position * batch_size, len(self) // batch_size * batch_size, batch_size):
            yield self.batch(torch.arange(start, start + batch_size) + epoch * len(self))

    def batch(self, places: Tensor) -> Batch:
        """The windows at some places (batch,) of the sequence: two tensors (batch, context_length)."""
        sources, numbers = self.drawn(places.numpy())
        rows: list[Batch] = [(places, places)] * len(places)
        epochs = numbers // np.array([*map(len, self.sources)])[sources]
        for source, epoch in {*zip(sources.tolist(), epochs.tolist(), strict=True)}:
            windows, order = self._epoch(source, epoch)
            [chosen] = np.nonzero((sources == source) & (epochs == epoch))
            inputs, targets = windows.batch(torch.from_numpy(order[numbers[chosen] - epoch * len(order)]))
            for row, index in enumerate(chosen.tolist()):
                rows[index] = inputs[row], targets[row]
        return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])

    def drawn(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each place (places,), its source, and the number of this source's windows before it."""
        if len(self.sources) == 1:
            return np.zeros_like(places), places
        sources, numbers = np.empty_like(places), np.empty_like(places)
        blocks = places // MIXED
        for block in np.unique(blocks).tolist():
            chosen = blocks == block
            mixed = Permutation(MIXED, (self.seed, block, 0, 0))[places[chosen] % MIXED]
            # Each source's windows within the first `count` blocks lie between two of these bounds.
            before, after = (
                np.round(count * MIXED * self._shares).astype(np.int64) for count in (block, block + 1)
            )
            used, ends = np.diff(before), np.cumsum(np.diff(after) - np.diff(before))
            of = np.searchsorted(ends, mixed, side="right")
            sources[chosen] = of
            numbers[chosen] = used[of] + mixed - np.concatenate([[0], ends])[of]
        return sources, numbers

    def _epoch(self, source: int, epoch: int) -> tuple[AnyWindows, Permutation]:
        """The windows of a source in one of its epochs, and their order."""
        if (source, epoch) not in self._epochs:
            self._epochs = {key: kept for key, kept in self._epochs.items() if key[0] != source}
            windows, stream = self.sources[source], (self.seed, epoch, source)
            order = Permutation(len(windows), stream)
            self._epochs[source, epoch] = (
                shifted(windows, (*stream, 2)) if self.shift and epoch else windows,
                order,
            )
        return self._epochs[source, epoch]
