"""Where text comes from: files of any size, and The Verdict's download, from a server on this machine."""

import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm.config import DataConfig
from llm.data import corpus
from llm.data.corpus import Corpus, find_corpus, find_splits, read_text
from llm.errors import UserError

TEXT = b"I HAD always thought Jack Gisburn rather a cheap genius"


def text_of(config: DataConfig) -> str:
    return "".join(find_corpus(config).pieces())


class _Handler(http.server.BaseHTTPRequestHandler):
    requests = 0

    def do_GET(self) -> None:
        type(self).requests += 1
        self.send_response(200)
        self.end_headers()
        self.wfile.write(TEXT)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    _Handler.requests = 0
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(corpus, "VERDICT_URL", f"http://127.0.0.1:{server.server_port}/the-verdict.txt")
    yield corpus.VERDICT_URL
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("address")
def test_downloaded_once_if_it_is_the_books(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "VERDICT_BYTES", len(TEXT))
    monkeypatch.setattr(corpus, "VERDICT_SHA256", hashlib.sha256(TEXT).hexdigest())
    config = DataConfig(source="the_verdict", cache_dir=str(tmp_path))
    assert text_of(config) == text_of(config) == TEXT.decode()
    assert _Handler.requests == 1
    (tmp_path / "the-verdict.txt").write_bytes(TEXT[:-1])  # damaged: fetched again
    assert text_of(config) == TEXT.decode()
    assert _Handler.requests == 2


@pytest.mark.usefixtures("address")
def test_another_text_is_refused_and_not_kept(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not the book's text .* data\.path=FILE"):
        text_of(DataConfig(source="the_verdict", cache_dir=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1000])
def test_files_are_read_the_same_in_blocks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    text = "naïve\r\n café – 語 🎭\n" * 5
    (tmp_path / "text.txt").write_bytes(text.encode())
    monkeypatch.setattr(corpus, "PIECE_BYTES", block)
    assert read_text(tmp_path / "text.txt") == text
    for length in range(len(text.encode())):  # a character that the end cuts in two
        content = text.encode()[:length]
        (tmp_path / "text.txt").write_bytes(content)
        try:
            content.decode()
        except UnicodeDecodeError as error:
            line = f"text.txt is not UTF-8: byte {content[error.start]:#04x} at offset {error.start};"
            with pytest.raises(UserError, match=line):
                read_text(tmp_path / "text.txt")
        else:
            assert read_text(tmp_path / "text.txt") == content.decode()


def test_a_text_is_split_by_characters_and_read_again_only_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "PIECE_BYTES", 5)
    config = DataConfig("text", str(tmp_path / "*.txt"), train_ratio=0.7, cache_dir=str(tmp_path / "cache"))
    for content in ("naïve 語 🎭" * 3, "changed " * 9):
        (tmp_path / "a.txt").write_text(content, encoding="utf-8")
        (tmp_path / "b.txt").write_text("end", encoding="utf-8")
        whole = f"{content}<|endoftext|>end"
        cut = int(0.7 * len(whole))
        splits = find_splits(config)
        for split, expected in zip(splits, (whole[:cut], whole[cut:]), strict=True):
            assert "".join(split.pieces()) == expected
            assert split.sha256 == hashlib.sha256(expected.encode()).hexdigest()
        with monkeypatch.context() as patch:
            patch.setattr(Corpus, "pieces", lambda self: pytest.fail("it was read again"))
            assert find_splits(config) == splits


def test_a_line_of_json_is_a_document(tmp_path: Path) -> None:
    lines = ['{"text": "one\\ntwo", "id": 1}', '{"id": 2, "text": ""}', '{"text": "three"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "four"}', encoding="utf-8")
    documents = ["one\ntwo", "", "three", "four"]
    assert text_of(DataConfig("text", f"{tmp_path}/*.jsonl")) == "<|endoftext|>".join(documents)
    for bad in ("no json", "[1]", '{"content": "one"}', '{"text": 1}', '{"text": "\\ud800"}', ""):
        (tmp_path / "a.jsonl").write_text(f"{lines[0]}\n{bad}\n", encoding="utf-8")
        with pytest.raises(UserError, match=r"a\.jsonl, line 2: each line must be a JSON object"):
            text_of(DataConfig("text", str(tmp_path / "a.jsonl")))
