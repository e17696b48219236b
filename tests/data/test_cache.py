"""Every file of the cache, damaged, against what an undamaged one gives."""

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripts import FORKED

from llm.config import DataConfig
from llm.data import cache, corpus, token_file
from llm.data.cache import read_record, write_record
from llm.data.token_file import token_files
from llm.data.tokenizer import load_tokenizer
from llm.errors import UserError
from llm.generation.copying import load_ngram_index

BYTES = load_tokenizer("bytes")
TEXT = "<|endoftext|>To be, or not to be.\n" * 40


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    (tmp_path / "text.txt").write_text(TEXT)
    return DataConfig("text", str(tmp_path / "text.txt"), cache_dir=str(tmp_path / "cache"))


def used(config: DataConfig) -> list[Any]:
    """All that a run and a study take from the cache."""
    files = token_files(config, BYTES)
    index = load_ngram_index(files[0], Path(config.cache_dir or ""))
    return [
        [(file.fingerprint, file.bytes, file.ids[:].tolist()) for file in files],
        index.table.tolist(),
    ]


def flip(content: bytes) -> bytes:
    place = len(content) * 2 // 3
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGE = {
    "flip": flip,
    "cut": lambda content: content[:-2],
    "empty": lambda content: b"",
    "longer": lambda content: content + b"\n0",
    "null": lambda content: b"null",
    "deep": lambda content: b"[" * 100_000,
    "binary": lambda content: b"\xff\0" * 100,
    "of another": lambda content: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_made_again_and_named(
    config: DataConfig,
    damage: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(cache, "BLOCK_BYTES", 200)
    right = used(config)
    folder = tmp_path / "cache"
    files = sorted(path for path in folder.glob("*/*") if path.is_file())
    assert [path.suffix for path in files] == [".json", ".npy", ".json", ".json", ".npy", ".json", ".npy"]
    contents = [path.read_bytes() for path in files]
    for path, content in zip(files, contents, strict=True):
        if damage == "of another":  # sound, but of something else
            replacement = next(each for each in contents if each != content and each[:1] == content[:1])
            path.write_bytes(replacement)
        else:
            path.write_bytes(DAMAGE[damage](content))
        with caplog.at_level(logging.WARNING):
            assert used(config) == right
        assert [record.getMessage().count("\n") for record in caplog.records] == [0]
        assert f"{path.with_suffix('')}" in caplog.text
        assert "is damaged" in caplog.text
        caplog.clear()
    assert [path.read_bytes() for path in files] == contents
    times = [path.stat().st_mtime_ns for path in files]
    assert used(config) == right
    assert [path.stat().st_mtime_ns for path in files] == times


def test_no_bit_of_a_record_can_change(tmp_path: Path) -> None:
    record = {"length": 1234, "blocks": ["aé", "b"], "bytes": 0}
    write_record(tmp_path / "record.json", "aé", record)
    content = (tmp_path / "record.json").read_bytes()
    right = {"fingerprint": "aé", **record}
    assert read_record(tmp_path / "record.json", "aé") == right
    assert read_record(tmp_path / "record.json", "ae") is None
    for place in range(len(content)):
        changed = content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]
        (tmp_path / "record.json").write_bytes(changed)
        assert read_record(tmp_path / "record.json", "aé") in (None, right)
    values: list[Any] = [
        None,
        [],
        [1],
        1,
        "a",
        {},
        {"record": 1},
        {"record": record},
        {"record": [1], "sha256": []},
    ]
    for value in values:
        (tmp_path / "record.json").write_text(json.dumps(value))
        assert read_record(tmp_path / "record.json", "aé") is None


def test_other_content_of_the_same_size_and_time_is_another_text(config: DataConfig, tmp_path: Path) -> None:
    before, path = used(config), tmp_path / "text.txt"
    about = path.stat()
    path.write_text(TEXT.replace("not", "now"))
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert path.stat().st_size == about.st_size
    after = used(config)
    assert [bytes(ids[ids.index(ord("T")) :][:13]) for _, _, ids in (before[0][0], after[0][0])] == [
        b"To be, or not",
        b"To be, or now",
    ]
    path.write_text(TEXT)
    assert used(config) == before


def test_a_text_that_changes_while_it_is_read_is_refused_and_not_kept(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, line = tmp_path / "text.txt", r"text\.txt changed while it was read"
    with monkeypatch.context() as patch:  # between the hash and the first reading
        digests = corpus.digests_of

        def then_changed(files: list[Path]) -> tuple[str, ...]:
            found = digests(files)
            path.write_text(TEXT.upper())
            return found

        patch.setattr(corpus, "digests_of", then_changed)
        with pytest.raises(UserError, match=line):
            used(config)
    with monkeypatch.context() as patch:  # between the first reading and the last
        encode_pieces = token_file.encode_pieces

        def changed_before(*arguments: Any) -> Any:
            path.write_text(TEXT.lower())
            return encode_pieces(*arguments)

        patch.setattr(token_file, "encode_pieces", changed_before)
        with pytest.raises(UserError, match=line):
            used(config)
    assert not [*tmp_path.glob("cache/tokens/*")]
    (training, _), _ = used(config)
    assert bytes(token_id for token_id in training[2] if token_id < 256).startswith(b"to be, or not")


def _tokenise_for_ever(config: DataConfig) -> None:
    def never_ending(*arguments: Any) -> Any:
        while True:
            yield 0, np.zeros(1_000, dtype=np.uint32)
            time.sleep(0.01)

    pytest.MonkeyPatch().setattr(token_file, "encode_pieces", never_ending)  # in a process of its own
    token_files(config, BYTES)


def test_what_a_killed_tokeniser_left_is_removed(config: DataConfig, tmp_path: Path) -> None:
    killed = FORKED.Process(target=_tokenise_for_ever, args=(config,))
    killed.start()
    deadline = time.monotonic() + 60
    while not [*tmp_path.glob("cache/tokens/.*.tmp")] and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.kill()
    killed.join()
    assert [*tmp_path.glob("cache/tokens/.*.tmp")]
    used(config)
    assert not [*tmp_path.glob("cache/tokens/.*.tmp")]


def test_a_cache_that_cannot_be_written_is_one_line(config: DataConfig, tmp_path: Path) -> None:
    config.cache_dir = str(tmp_path / "text.txt" / "cache")
    with pytest.raises(UserError, match=r"cannot write .*/text\.txt/cache/texts.*: Not a directory"):
        used(config)
