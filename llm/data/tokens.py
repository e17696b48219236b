"""Token ids in files: in a single one, as a numpy array, or in many that are read as one."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from llm.errors import UserError

MOST_MAPPED = 512  # files mapped at once
ROWS_MAPPED = 1024  # reads after which files are unmapped, so that the memory of what was read is freed


@dataclass(frozen=True)
class Shard:
    path: Path
    tokens: int
    dtype: np.dtype  # of the tokens in the file
    begin: int = 0  # byte at which the tokens start
    documents: Path | None = None  # where each document ends, int64


class ShardedTokens:
    """The tokens of shards, one after the other, as one array (tokens,) of the files' integer type."""

    def __init__(self, shards: list[Shard], vocab_size: int) -> None:
        """
        Args:
            vocab_size: bound of the ids; reading one beyond it is an error.
        """
        self.shards = [shard for shard in shards if shard.tokens]
        self.vocab_size = vocab_size
        self._ends = np.cumsum([0, *(shard.tokens for shard in self.shards)])
        self._mapped: dict[int, np.memmap] = {}
        self._rows = 0

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, place: slice) -> np.ndarray:
        start, end, _ = place.indices(len(self))
        return self._read(start, max(start, end))

    def rows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The `length` tokens from each start (rows,): (rows, length), int64."""
        return np.stack([self._read(start, start + length) for start in starts.tolist()]).astype(np.int64)

    @cached_property
    def document_ends(self) -> np.ndarray:
        """Where each document ends: (documents,), int64.

        Raises:
            UserError: the shards have no record of it, or it is damaged.
        """
        ends = []
        for shard, before in zip(self.shards, self._ends.tolist(), strict=False):
            if shard.documents is None:
                raise UserError(
                    f"data.cross_documents=false: {shard.path} does not say where its documents end; make "
                    f"shards of the text with experiments/prepare.py"
                )
            of_shard = np.fromfile(shard.documents, "<i8")
            if not of_shard.size or of_shard[-1] != shard.tokens:
                raise UserError(f"{shard.documents} is damaged: prepare it once more")
            ends.append(of_shard + before)
        return np.concatenate(ends) if ends else np.empty(0, np.int64)

    def _read(self, start: int, end: int) -> np.ndarray:
        first = int(np.searchsorted(self._ends, start, side="right")) - 1
        parts = [np.empty(0, np.uint16)]
        for number in range(first, len(self.shards)):
            before = int(self._ends[number])
            if before >= end:
                break
            part = self._map(number)[max(0, start - before) : end - before]
            if part.size and (largest := int(part.max())) >= self.vocab_size:
                raise UserError(
                    f"{self.shards[number].path} holds the token id {largest}, and the tokenizer has "
                    f"{self.vocab_size}: give the tokenizer it was made with"
                )
            parts.append(np.array(part))
        return np.concatenate(parts)

    def _map(self, number: int) -> np.memmap:
        self._rows += 1
        if self._rows > ROWS_MAPPED or len(self._mapped) == MOST_MAPPED:
            self._mapped, self._rows = {}, 0
        if number not in self._mapped:
            shard = self.shards[number]
            try:
                if shard.path.stat().st_size != shard.begin + shard.tokens * shard.dtype.itemsize:
                    raise UserError(f"{shard.path} changed during the run: its size is another")
                self._mapped[number] = np.memmap(shard.path, shard.dtype, "r", shard.begin, (shard.tokens,))
            except OSError as error:
                raise UserError(f"cannot read {shard.path}: {error.strerror}") from error
        return self._mapped[number]


@dataclass(frozen=True)
class TokenFile:
    """The token ids of a text, memory-mapped."""

    ids: np.ndarray | ShardedTokens  # (tokens,), the smallest integer type that fits
    fingerprint: str  # of the text and the tokenizer, which together determine the ids
    bytes: int | None  # UTF-8 length of the text, without ends of text; None: unknown
    path: Path  # a file, or a folder of shards
