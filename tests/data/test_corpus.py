"""Where text comes from: files of any size, and The Verdict's download, from a server on this machine."""

import gzip
import hashlib
import http.server
import logging
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm.config import DataConfig
from llm.data import corpus, decoding
from llm.data.corpus import Corpus, find_corpus, find_splits
from llm.data.decoding import read_text
from llm.data.text_files import find_files
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
    text = "\ufeffnaïve\r\n café – 語 🎭\r\r\n\ufeff\n" * 5
    monkeypatch.setattr(decoding, "PIECE_BYTES", block)
    for length in range(len(text.encode()) + 1):  # a character that the end cuts in two
        content = text.encode()[:length]
        (tmp_path / "text.txt").write_bytes(content)
        try:
            content.decode()
        except UnicodeDecodeError as error:
            line = f"text.txt is not UTF-8: byte {content[error.start]:#04x} at offset {error.start};"
            with pytest.raises(UserError, match=line):
                read_text(tmp_path / "text.txt")
        else:
            assert read_text(tmp_path / "text.txt") == (tmp_path / "text.txt").read_text("utf-8-sig")


def test_a_text_is_split_by_characters_and_read_again_only_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "PIECE_BYTES", 5)
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


def test_a_line_of_json_is_a_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ['{"text": "one\\r\\ntwo", "id": 1}', "", '{"id": 2, "text": ""}', " \t", '{"text": "three"}']
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\r\n".join(lines) + "\n\n", encoding="utf-8")
    (tmp_path / "b.JSONL").write_text('\n{"text": "\ufefffour"}', encoding="utf-8")
    documents = ["one\ntwo", "", "three", "four"]
    for block in (1, 5, 1000):
        monkeypatch.setattr(decoding, "PIECE_BYTES", block)
        assert text_of(DataConfig("text", f"{tmp_path}/[ab].*")) == "<|endoftext|>".join(documents)
    deep = '{"text": ' + "[" * 100_000
    for bad in ("no json", "[1]", '{"content": "one"}', '{"text": 1}', '{"text": "\\ud800"}', "\udcff", deep):
        (tmp_path / "a.jsonl").write_text(f"{lines[0]}\n{bad}\n", encoding="utf-8", errors="surrogateescape")
        with pytest.raises(UserError, match=r"a\.jsonl, line 2: each line must be a JSON object"):
            text_of(DataConfig("text", str(tmp_path / "a.jsonl")))


def test_what_is_taken_from_a_folder_and_what_is_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "texts"
    taken = ["A.TXT", "b.md", "notes.md/c.txt", "sub/d.Md", "z.txt"]
    for name in [*taken, "._A.TXT", ".ipynb_checkpoints/b.md", "sub/.hidden/e.txt", "f.jsonl", "sub/g.png"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    os.mkfifo(folder / "pipe.txt")  # to open it would wait for whoever writes to it
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "s.txt"))
    (folder / "dead.txt").symlink_to("nowhere")
    (folder / "again.txt").symlink_to("z.txt")
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    config = DataConfig("text", str(folder))
    with caplog.at_level(logging.INFO):
        assert text_of(config) == "<|endoftext|>".join(["A.TXT", "z.txt", *taken[1:]])
    [line] = [record.getMessage() for record in caplog.records]
    assert line == (
        f"data.path={folder}: skipped hidden (3), links to folders (1), other kinds of file (2), "
        "pipes, sockets, devices or dead links (3)"
    )


def test_a_glob_means_what_it_means_to_a_shell(tmp_path: Path) -> None:
    for name in ("a.txt", "B.TXT", ".c.txt", "sub/d.txt", ".hidden/e.txt", "f[1].txt", "g.txt/h.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    os.mkfifo(tmp_path / "pipe.txt")

    def found(pattern: str) -> list[str]:
        return [str(file.relative_to(tmp_path)) for file in find_files(f"{tmp_path}/{pattern}", "path")]

    assert found("*.txt") == ["a.txt", "f[1].txt"]
    assert found("*.[tT][xX][tT]") == ["B.TXT", "a.txt", "f[1].txt"]
    assert found("**/*.txt") == ["a.txt", "f[1].txt", "sub/d.txt"]
    assert found("f[1].txt") == ["f[1].txt"]
    assert found(".c.txt") == [".c.txt"]
    for number in range(2):  # two loops, and a walk that follows them doubles at each of 40 levels
        (tmp_path / "sub" / f"loop{number}").symlink_to(tmp_path, target_is_directory=True)
    assert found("*/*.txt") == ["sub/d.txt"]
    with pytest.raises(
        UserError, match=r"sub/loop\d is a link back to .*: remove it, or give a glob without"
    ):
        found("**/*.txt")


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("pipe", r"path=pipe is a pipe, a socket or a device: give a file"),
        ("empty", r"path=empty: no \*\.txt or \*\.md file in that folder$"),
        ("loop", r"path=loop: no such file or folder$"),
        ("*.none", r"path=\*\.none: no file matches$"),
        ("a" * 300, r"path=a+ cannot be read: File name too long"),
        ("zero\0byte", r"path=zero\\x00byte: no such file"),
        ("~nobody-of-this-name/a.txt", r"path=~nobody-of-this-name/a.txt: no such file"),
    ],
)
def test_paths_without_a_text_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("empty").mkdir()
    Path("loop").symlink_to("loop")
    with pytest.raises(UserError, match=line) as error:
        find_files(path, "path")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (
            "naïve".encode("utf-16"),
            "is not UTF-8: byte 0xff at offset 0, as in UTF-16; convert the file to UTF-8",
        ),
        (gzip.compress(b"to be", mtime=0), r"is compressed \(gzip\): unpack it, or make shards of it"),
        (b"\x28\xb5\x2f\xfd to be", r"is compressed \(zstd\): unpack it"),
        (
            "to be".encode("utf-16-le"),
            "is not text: a zero byte at offset 1, as in UTF-16 or in binary files",
        ),
        (b"to be\0", "is not text: a zero byte at offset 5"),
        (b"\xef\xbb\xbfto \xe9", "is not UTF-8: byte 0xe9 at offset 6; convert the file"),
    ],
)
def test_what_is_no_text_is_one_line(tmp_path: Path, content: bytes, line: str) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"text.txt {line}"):
        text_of(DataConfig("text", str(tmp_path / "text.txt")))


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file that cannot be read, by root either")
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    config = DataConfig("text", "/proc/self/mem", cache_dir=str(tmp_path))
    with pytest.raises(UserError, match="cannot read /proc/self/mem: "):
        text_of(config)
    assert not [*tmp_path.glob("*/*")]
