"""Corpus, token files, windows and orders against the book's loops and plain Python."""

import hashlib
import tracemalloc
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import FORKED

from llm.config import DataConfig, PretrainConfig
from llm.data import cache, decoding, pieces
from llm.data.corpus import Corpus, Split, find_corpus, find_splits
from llm.data.token_file import token_file, token_files
from llm.data.tokenizer import encode, load_tokenizer
from llm.data.windows import TrainingBatches, Windows, cut_windows, ordered_batches
from llm.errors import UserError


def test_shakespeare_is_the_38_plays() -> None:
    training, validation = find_splits(DataConfig())
    assert (training.end, validation.end) == (4_786_923, 5_318_804)  # nine tenths, rounded down
    assert "".join(training.pieces()).startswith("# A Midsummer Night's Dream\n")


def test_windows_are_the_books() -> None:
    tokens = np.arange(100, 161, dtype=np.uint16)
    windows = Windows(tokens, context_length=8, stride=5)
    # chapter 2's loop
    expected = [
        (tokens[i : i + 8].tolist(), tokens[i + 1 : i + 9].tolist()) for i in range(0, len(tokens) - 8, 5)
    ]
    assert [(x.tolist(), y.tolist()) for x, y in (windows[i] for i in range(len(windows)))] == expected
    inputs, targets = windows.batch(torch.tensor([3, 0]))
    assert inputs.tolist() == [expected[3][0], expected[0][0]]
    assert targets.tolist() == [expected[3][1], expected[0][1]]
    assert len(Windows(tokens[:8], 8, 5)) == 0  # no target for the last token


def test_a_text_is_never_whole_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "PIECE_BYTES", 5_000)
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 5_000)
    monkeypatch.setattr(cache, "BLOCK_BYTES", 50_000)
    text = "to be or not to be\n" * 100_000
    (tmp_path / "text.txt").write_text(text)
    config = DataConfig("text", str(tmp_path / "text.txt"), cache_dir=str(tmp_path / "cache"))
    tracemalloc.start()
    training, _ = token_files(config, load_tokenizer("bytes"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert bytes(training.ids[:].astype(np.uint8)) == text[:1_710_000].encode()
    assert peak < 500_000


def split_of(text: str, folder: Path) -> Split:
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return Split(Corpus([folder / "text.txt"]), 0, len(text), hashlib.sha256(text.encode()).hexdigest())


def test_token_file_is_kept_in_the_smallest_type(tmp_path: Path) -> None:
    for name in ("bytes", "gpt2"):
        tokenizer = load_tokenizer(name)
        file = token_file(split_of("To be, or not to be", tmp_path), tokenizer, tmp_path, "test")
        tokens = file.ids
        assert isinstance(tokens, np.memmap)
        assert tokens.dtype == np.uint16  # 257 and 50,257 ids
        assert tokens.tolist() == encode("To be, or not to be", tokenizer)
        assert file.bytes == len("To be, or not to be")
    assert len(list((tmp_path / "tokens").iterdir())) == 4  # two of tokens, and a record beside each
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens").iterdir()}
    token_file(split_of("To be, or not to be", tmp_path), load_tokenizer("gpt2"), tmp_path, "test")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens").iterdir()}


def _tokenise(cache: Path, split: Split) -> int:
    return int(token_file(split, load_tokenizer("bytes"), cache, "test").ids[:].astype(int).sum())


def test_several_processes_may_tokenise_at_once(tmp_path: Path) -> None:
    with FORKED.Pool(3) as pool:
        sums = pool.starmap(_tokenise, [(tmp_path, split_of("to be " * 5000, tmp_path))] * 6)
    assert sums == [sum(("to be " * 5000).encode())] * 6
    assert len(list((tmp_path / "tokens").iterdir())) == 2  # the record beside it; no temporary file stays


@pytest.mark.parametrize("order", ["shuffled", "book"])
def test_an_epoch_has_each_window_once_and_resumes_anywhere(order: str) -> None:
    windows = Windows(np.arange(201, dtype=np.uint16), context_length=4, stride=4)
    config = DataConfig(batch_size=4, order=order)
    torch.manual_seed(5)
    batches = TrainingBatches(windows, config, seed=7)
    per_epoch = len(batches)
    assert per_epoch == 50 // 4
    seen = []
    states = []
    for _ in range(2 * per_epoch):
        states.append((batches.state(), torch.get_rng_state()))
        seen.append(next(batches)[0][:, 0].tolist())
    first, second = seen[:per_epoch], seen[per_epoch:]
    assert len(set(chain.from_iterable(first))) == 4 * per_epoch
    assert first != second
    for position in (0, 1, per_epoch - 1, per_epoch, per_epoch + 3):
        state, generator = states[position]
        resumed = TrainingBatches(windows, config, seed=7)
        torch.manual_seed(99)
        resumed.load_state(*state)
        torch.set_rng_state(generator)
        rest = [next(resumed)[0][:, 0].tolist() for _ in range(2 * per_epoch - position)]
        assert rest == seen[position:]


@pytest.mark.parametrize("stride", [4, 3])
def test_later_epochs_cut_shifted_windows_elsewhere(stride: int) -> None:
    """From arange, a window is whole if its tokens and its targets are consecutive."""
    tokens, starts = np.arange(203, dtype=np.uint16), []
    config = DataConfig(batch_size=1, shift_windows=True)
    batches = TrainingBatches(Windows(tokens, 4, stride), config, seed=7)
    for _ in range(12):
        epoch = []
        for _ in range(len(batches)):
            inputs, targets = next(batches)
            start = int(inputs[0, 0])
            assert inputs.tolist() == [list(range(start, start + 4))]
            assert targets.tolist() == [list(range(start + 1, start + 5))]
            epoch.append(start)
        starts.append(epoch)
    assert sorted(starts[0]) == list(range(0, 199, stride))
    assert {start % stride for start in starts[0]} == {0}
    # Each epoch has one offset, but for windows that begin at the front again; and all offsets come up.
    offsets = [max(set(rests := [start % stride for start in epoch]), key=rests.count) for epoch in starts]
    assert set(offsets) == set(range(stride))
    for epoch, offset in zip(starts, offsets, strict=True):
        expected = [(offset + index * stride) % 199 for index in range(len(batches))]
        assert sorted(epoch) == sorted(expected)
    resumed = TrainingBatches(Windows(tokens, 4, stride), config, seed=7)
    resumed.load_state({"epoch": 5, "position": 3}, None)
    assert next(resumed)[0][0, 0] == starts[5][3]


def test_ordered_batches_cover_all() -> None:
    windows = Windows(np.arange(30, dtype=np.uint16), context_length=4, stride=4)
    starts = [start for inputs, _ in ordered_batches(windows, 4) for start in inputs[:, 0].tolist()]
    assert starts == list(range(0, 28, 4))


def test_folder_and_glob_are_joined_by_end_of_text(tmp_path: Path) -> None:
    for name, text in (("b.txt", "second"), ("a.md", "first"), ("c.dat", "no")):
        (tmp_path / name).write_text(text)
    for path, text in ((tmp_path, "first<|endoftext|>second"), (tmp_path / "*.dat", "no")):
        assert "".join(find_corpus(DataConfig("text", str(path))).pieces()) == text


@pytest.mark.parametrize(
    ("content", "change", "message"),
    [
        (b"", {}, "is empty"),
        (b"  \n ", {}, "is empty"),
        (b"a", {}, "the training text is too short: its 0 tokens make 0 windows"),
        (
            b"to be or not " * 9000 + b"<|endoftext|>" * 1000,
            {},
            "the validation text is empty: its 1000",
        ),
        (b"good \xff bad", {}, r"text\.txt is not UTF-8: byte 0xff at offset 5"),
        (b"a short text", {}, "the training text is too short: its 3 tokens make 0 windows"),
        (b"word " * 4000, {"train_ratio": 0.999}, "the validation text is too short"),
        (
            b"word " * 2000,
            {"vocab_size": 100},
            r"outside the model: model.vocab_size=100 must be at least 50257",
        ),
    ],
)
def test_bad_texts_are_one_line(
    tmp_path: Path, content: bytes, change: dict[str, float], message: str
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    config = PretrainConfig(data=DataConfig(source="text", path=str(path), cache_dir=str(tmp_path)))
    config.data.train_ratio = change.get("train_ratio", 0.9)
    config.model.vocab_size = int(change.get("vocab_size", 50257))
    tokenizer = load_tokenizer("gpt2")
    with pytest.raises(UserError, match=message) as error:
        cut_windows(config, tokenizer, token_files(config.data, tokenizer))
    assert "\n" not in str(error.value)
