"""Copied runs against a search of every substring, by Python's own `str.find`."""

from pathlib import Path

import numpy as np
import pytest

from llm.data.token_file import TokenFile
from llm.generation import copying
from llm.generation.copying import NgramIndex, Run, copied_runs, copied_share, load_ngram_index, longest_run

hash_ngrams = copying._hash_ngrams


def saved(tokens: list[int], path: Path, dtype: type = np.uint16) -> TokenFile:
    """The tokens as `token_file` gives them."""
    np.save(path, np.array(tokens, dtype=dtype))
    return TokenFile(np.load(path, mmap_mode="r"), path.stem, len(tokens), path)


def runs_by_substrings(text: list[int], sample: list[int], n: int) -> list[Run]:
    """Every substring of n tokens or more that the text has, less those that lie inside another one."""
    letters, searched = "".join(map(chr, sample)), "".join(map(chr, text))
    found = {
        (start, end): position
        for start in range(len(sample))
        for end in range(start + n, len(sample) + 1)
        if (position := searched.find(letters[start:end])) >= 0
    }
    return [
        Run(start, end - start, position)
        for (start, end), position in sorted(found.items())
        if (start - 1, end) not in found and (start, end + 1) not in found
    ]


def assert_same_as_by_substrings(folder: Path, seed: int) -> None:
    generator = np.random.default_rng(seed)
    for case in range(20):
        n = int(generator.integers(1, 6))
        letters = int(generator.integers(1, 4))
        text = generator.integers(letters, size=generator.integers(150)).tolist()
        sample = generator.integers(letters + case % 2, size=40).tolist()  # every other time an unseen one
        sample += text[-10:]  # a match up to the text's end, from where the sample goes on
        sample += generator.integers(letters, size=generator.integers(4)).tolist() + text[:7]
        index = load_ngram_index(saved(text, folder / f"text-{case}.npy"), folder, n)
        assert copied_runs(index, sample) == runs_by_substrings(text, sample, n)


@pytest.mark.parametrize("seed", range(5))
def test_runs_are_those_of_a_search_by_substrings(tmp_path: Path, seed: int) -> None:
    assert_same_as_by_substrings(tmp_path, seed)


@pytest.mark.parametrize("bits", [0, 2])
def test_colliding_hashes_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    mask = np.uint64((1 << 64) - (1 << 64 - bits))
    monkeypatch.setattr(copying, "_hash_ngrams", lambda tokens, n: hash_ngrams(tokens, n) & mask)
    assert_same_as_by_substrings(tmp_path, seed=9)


def test_table_is_the_same_in_chunks_and_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.random.default_rng(0).integers(3, size=1000, dtype=np.uint8)
    whole = copying._sorted_ngrams(tokens, 8)
    monkeypatch.setattr(copying, "CHUNK_TOKENS", 17)
    monkeypatch.setattr(copying, "PART_NGRAMS", 10)
    np.testing.assert_array_equal(copying._sorted_ngrams(tokens, 8), whole)
    position = whole & np.uint64(1023)
    assert sorted(position.tolist()) == list(range(993))
    assert (whole[1:] > whole[:-1]).all()


def test_index_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = saved(list(range(50)), tmp_path / "plays.npy", np.uint8)
    built = load_ngram_index(tokens, tmp_path)
    names = {path.name for path in (tmp_path / "ngrams").iterdir()}
    assert names == {"plays-8.npy", "plays-8.json"}
    assert built.table.dtype == np.uint64

    def fail(*_: object) -> np.ndarray:
        raise AssertionError("built again")

    monkeypatch.setattr(copying, "_sorted_ngrams", fail)
    for index in (built, load_ngram_index(tokens, tmp_path)):
        assert copied_runs(index, [*range(30, 45), 0, 0]) == [Run(0, 15, 30)]
    with pytest.raises(AssertionError, match="built again"):
        load_ngram_index(tokens, tmp_path, n=9)


@pytest.mark.parametrize("text", [[], [1, 2, 3, 4, 5, 6, 7], list(range(8))])
def test_short_text_and_short_samples(tmp_path: Path, text: list[int]) -> None:
    index = load_ngram_index(saved(text, tmp_path / "text.npy"), tmp_path)
    assert index.table.shape == (len(text) // 8,)
    for length in range(12):
        sample = list(range(length))
        assert copied_runs(index, sample) == ([Run(0, 8, 0)] if len(text) == 8 and length >= 8 else [])


def test_ids_that_the_texts_type_cannot_hold_are_not_in_it(tmp_path: Path) -> None:
    index = load_ngram_index(saved([1] * 20, tmp_path / "text.npy", np.uint8), tmp_path)
    assert copied_runs(index, [257] * 8 + [1] * 9 + [50256]) == [Run(8, 9, 0)]
    assert copied_runs(index, np.array([1] * 9, dtype=np.uint32)) == [Run(0, 9, 0)]


def test_positions_above_32_bits() -> None:
    tokens = np.broadcast_to(np.uint8(7), 1 << 33)  # takes one byte
    position = (1 << 32) + 5
    entry = hash_ngrams(tokens[:8], 8) >> np.uint64(34) << np.uint64(34) | np.uint64(position)
    assert copied_runs(NgramIndex(tokens, entry, 8), [7] * 10) == [Run(0, 10, position)]


def test_share_and_longest_run() -> None:
    runs = [Run(0, 8, 3), Run(5, 9, 40), Run(20, 9, 7)]  # the first two overlap in 3 tokens
    assert copied_share(runs, 40) == (14 + 9) / 40
    assert longest_run(runs) == runs[1]
    assert copied_share([], 40) == 0
    assert copied_share([], 0) == 0
    assert longest_run([]) is None
