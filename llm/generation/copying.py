"""How much of a generated text is copied word for word from the training tokens.

Each n-gram of the training tokens has an entry in a sorted table, which is searched by hash. Every match is
verified against the tokens themselves, so the answers are exact. The GPT-2 paper counts 8-grams too (Radford
et al. 2019, section 4), but with Bloom filters, which can tell neither where a match is nor how long it is.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from llm.data.cache import Record, made_once, read_array, write_array
from llm.data.token_file import TokenFile
from llm.progress import Progress, format_count

CHUNK_TOKENS = 1 << 20  # hashed at a time
PART_NGRAMS = 1 << 25  # sorted at a time, in a few seconds


@dataclass(frozen=True)
class NgramIndex:
    """Where each n-gram of the training tokens occurs.

    `tokens` is (tokens,) of integers. `table` is (tokens - n + 1,) uint64, ascending. The low bits of an
    entry are an n-gram's position, in as many bits as `len(tokens)` takes; the high bits are those of its
    hash. Equal n-grams are therefore adjacent, in the order of the text.
    """

    tokens: np.ndarray
    table: np.ndarray
    n: int


@dataclass(frozen=True)
class Run:
    """A run of `length` tokens, from `start` of a sample, that occurs in the training tokens, first at
    `position`."""

    start: int
    length: int
    position: int


def load_ngram_index(tokens: TokenFile, cache: Path, n: int = 8) -> NgramIndex:
    """The index of the training tokens, memory-mapped from the cache; built first if it is not cached, or the
    cached one is damaged.

    It takes 8 bytes per token, on disk permanently and in memory while it is built.
    """
    identity = f"{tokens.fingerprint}-{n}"
    path = cache / "ngrams" / f"{identity}.npy"
    plain = np.asarray(tokens.ids)  # the same mapping, without np.memmap's overhead on every access

    def write(file: IO[bytes]) -> Record:
        np.save(file, _sorted_ngrams(plain, n))
        return {}

    table, _ = made_once(
        path,
        read=partial(read_array, path, identity),
        make=lambda: write_array(path, identity, write),
        doing="indexing the training text",
    )
    return NgramIndex(plain, np.asarray(table), n)


def _sorted_ngrams(tokens: np.ndarray, n: int) -> np.ndarray:
    """The table of `NgramIndex`, sorted in place."""
    if len(tokens) < n:
        return np.empty(0, dtype=np.uint64)
    progress = Progress("indexing the training text")
    position_mask = _position_mask(tokens)
    table = np.empty(len(tokens) - n + 1, dtype=np.uint64)
    for start in range(0, len(table), CHUNK_TOKENS):
        end = min(start + CHUNK_TOKENS, len(table))
        hashes = _hash_ngrams(tokens[start : end + n - 1], n)
        table[start:end] = hashes & ~position_mask | np.arange(start, end, dtype=np.uint64)
        progress.update(end / len(table) / 10, f"{format_count(end)} n-grams hashed")  # a tenth of the work
    done = 0
    for part in _ascending_parts(table):
        part.sort()
        done += len(part)
        progress.update(0.1 + 0.9 * done / len(table), f"{format_count(done)} n-grams sorted")
    progress.clear()
    return table


def _ascending_parts(table: np.ndarray) -> Iterator[np.ndarray]:
    """Partition `table` in place so that no entry of a part exceeds one of a later part; yield the parts.

    A single sort would need no more memory and a tenth less time, but could not report its progress.
    """
    if len(table) <= PART_NGRAMS:
        yield table
        return
    middle = len(table) // 2
    table.partition(middle)
    yield from _ascending_parts(table[:middle])
    yield from _ascending_parts(table[middle:])


def _hash_ngrams(tokens: np.ndarray, n: int) -> np.ndarray:
    """64-bit hashes of all n-grams of (tokens,) integers: (tokens - n + 1,) uint64. The high bits mix best.

    FNV-1a (Fowler, Noll and Vo) over tokens instead of bytes, with a full-width multiplier: 2^64 over the
    golden ratio. Cached indexes hold these hashes: if you change the hash, change the index file's name too.
    """
    hashes = np.zeros(len(tokens) - n + 1, dtype=np.uint64)
    for offset in range(n):
        hashes ^= tokens[offset : offset + len(hashes)].astype(np.uint64)
        hashes *= np.uint64(0x9E3779B97F4A7C15)
    return hashes


def _position_mask(tokens: np.ndarray) -> np.uint64:
    return np.uint64((1 << len(tokens).bit_length()) - 1)


def copied_runs(index: NgramIndex, sample: list[int] | np.ndarray) -> list[Run]:
    """The maximal runs of at least n tokens of a sample that occur in the training tokens, sorted by start.

    No run can be extended on either side. None contains another, though two may overlap.
    """
    sample = np.asarray(sample, dtype=np.int64)
    if len(sample) < index.n:
        return []
    position_mask = _position_mask(index.tokens)
    hashes = _hash_ngrams(sample, index.n)
    first = np.searchsorted(index.table, hashes & ~position_mask)
    last = np.searchsorted(index.table, hashes | position_mask, side="right")
    counts = last - first

    runs: list[Run] = []
    end = 0  # of the last run
    for start in range(len(hashes)):
        if end == len(sample):
            break
        # A run from here that the last one does not contain includes the token at `beyond`, and every n-gram
        # up to it. The rarest of these n-grams leaves the fewest places to compare, and often none.
        beyond = max(start, end)
        rarest = start + int(counts[start : max(start, beyond + 1 - index.n) + 1].argmin())
        entries = index.table[first[rarest] : last[rarest]]
        places = (entries & position_mask).astype(np.int64) - (rarest - start)
        places = _agreeing(index.tokens, places[places >= 0], beyond - start, sample[beyond])
        length, places = _follow(index.tokens, places, sample[start:])
        if length >= index.n and start + length > end:
            runs.append(Run(start, length, int(places[0])))
            end = start + length
    return runs


def _follow(tokens: np.ndarray, places: np.ndarray, wanted: np.ndarray) -> tuple[int, np.ndarray]:
    """The longest prefix of `wanted` found at any of the ascending `places`: its length, and those places."""
    for length, token in enumerate(wanted):
        agreeing = _agreeing(tokens, places, length, token)
        if not len(agreeing):
            return length, places
        places = agreeing
    return len(wanted), places


def _agreeing(tokens: np.ndarray, places: np.ndarray, offset: int, token: int) -> np.ndarray:
    """The ascending `places` that have `token` at `offset` from them."""
    places = places[: np.searchsorted(places, len(tokens) - offset)]
    return places[tokens[places + offset] == token]


def copied_share(runs: list[Run], sample_length: int) -> float:
    """The share (0 to 1) of a sample's tokens that lie in one of its runs; 0 for an empty sample."""
    copied, end = 0, 0
    for run in runs:  # sorted by start, and so by end, as none contains another
        copied += run.start + run.length - max(run.start, end)
        end = run.start + run.length
    return copied / sample_length if sample_length else 0.0


def longest_run(runs: list[Run]) -> Run | None:
    """The longest run, the earliest of equals; None if there is none."""
    return max(runs, key=lambda run: run.length, default=None)
