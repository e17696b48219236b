"""Files decoded to text, piece by piece: UTF-8 and JSON lines."""

import codecs
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import orjson

from llm.data.cache import block_hashes
from llm.data.tokenizer import END_OF_TEXT
from llm.errors import UserError

PIECE_BYTES = 1 << 20  # read at a time
DECODING = 1  # increase it whenever the same bytes would be read as another text

BYTE_ORDER_MARK = "\ufeff"
MAGIC_BYTES = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}  # by the bytes that such files begin with


def read_text(file: Path) -> str:
    """The whole text of a UTF-8 file; see `Corpus`.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    return "".join(decoded(str(file), blocks_of(file)))


def text_of(content: bytes, name: str) -> str:
    """Like `read_text`, for content that is in memory already."""
    return "".join(decoded(name, [content]))


def is_jsonl(file: Path) -> bool:
    return file.suffix.lower() == ".jsonl"


def digests_of(files: list[Path]) -> tuple[str, ...]:
    """A hash of each file's bytes, as `blocks_of` compares it."""
    with reading("the text"):
        return tuple(map(_digest, block_hashes(files, PIECE_BYTES)))


def _digest(block_hashes: list[str]) -> str:
    return hashlib.sha256("".join(block_hashes).encode()).hexdigest()


@contextmanager
def reading(name: object) -> Iterator[None]:
    """Turn errors of reading a file into one line.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {error.filename or name}: {error.strerror}") from error


def blocks_of(file: Path, digest: str | None = None) -> Iterator[bytes]:
    """A file's content in blocks.

    Raises:
        UserError: it cannot be read, or does not have this digest.
    """
    hashes = []
    with reading(file), file.open("rb") as content:
        while block := content.read(PIECE_BYTES):
            hashes.append(hashlib.sha256(block).hexdigest())
            yield block
    if digest not in (None, _digest(hashes)):
        raise UserError(f"{file} changed while it was read: begin again once nothing writes to it any more")


def decoded(name: object, blocks: Iterable[bytes], offset: int = 0) -> Iterator[str]:
    """The text of UTF-8 content, with newlines as Python's `open` reads them.

    Args:
        offset: where these bytes start in the file.

    Raises:
        UserError: it is not UTF-8, or holds a zero byte, which text does not; the message names `name`.
    """
    utf8, newlines = codecs.getincrementaldecoder("utf-8")(), io.IncrementalNewlineDecoder(None, True)
    known = offset  # bytes decoded so far, whereas `offset` counts all bytes of the blocks before
    is_start = not offset
    for block in chain(blocks, [b""]):
        try:
            text = utf8.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise UserError(_not_utf8(name, error, known)) from error
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


def _not_utf8(name: object, error: UnicodeDecodeError, known: int) -> str:
    """Why a file cannot be read as text, and what to do.

    Args:
        known: the offset in the file of what could not be decoded.
    """
    hint = ""
    if not known:
        for start, kind in MAGIC_BYTES.items():
            if error.object.startswith(start):
                return (
                    f"{name} is compressed ({kind}): unpack it, or make shards of it, "
                    f"experiments/prepare.py shards.path=FOLDER"
                )
        if error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            hint = ", as in UTF-16"
    return (
        f"{name} is not UTF-8: byte {error.object[error.start]:#04x} at offset {known + error.start}{hint}; "
        f"convert the file to UTF-8"
    )


def documents_of(file: Path, blocks: Iterable[bytes]) -> Iterator[str]:
    """The `text` of each line of a JSON-lines file, with the end-of-text token between documents. Blank lines
    are skipped."""
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
        ValueError: it is no JSON object, or has no text under this key.
    """
    try:
        try:
            text = orjson.loads(line)[key]
        except orjson.JSONDecodeError:  # json reads what orjson does not: NaN, and integers of any length
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
