"""Documents in many formats, divided into parts that can be read independently: plain text and JSON lines,
also compressed, Parquet, and Hugging Face datasets."""

import codecs
import gzip
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

from llm.data.dataset import Dataset, load_dataset, optional
from llm.data.decoding import BYTE_ORDER_MARK, PIECE_BYTES, decoded, parse_document
from llm.data.tokenizer import END_OF_TEXT
from llm.errors import UserError

PASSAGE_CHARACTERS = 1 << 16  # longest document in a plain text without ends of text
ROWS = 256  # of a table, read at a time
SEARCHED_BYTES = 1 << 20  # within which a line has to end where a file is divided

COMPRESSED = (".gz", ".zst")
TEXTS, TABLES = (".txt", ".md"), (".jsonl", ".parquet")
SUFFIXES = {*TEXTS, *TABLES, *(kind + how for kind in (*TEXTS, ".jsonl") for how in COMPRESSED)}


@dataclass(frozen=True)
class Part:
    """A part of a text: bytes of a file, row groups of a Parquet file, or rows of a dataset."""

    path: str
    start: int
    end: int
    bytes: int  # its size in memory or on disk, as a measure of work


def kind_of(path: Path) -> str:
    """The suffix that determines a file's format, such as `.jsonl.gz`; `.txt` if it is unknown."""
    found = "".join(path.suffixes[-2:]).lower(), path.suffix.lower()
    return next((suffix for suffix in found if suffix in SUFFIXES), ".txt")


def divided(files: Iterable[Path], size: int) -> Iterator[list[Part]]:
    """Divide files into units of work of about `size` bytes: part of a large file, or many small files. The
    units depend on the files alone. A compressed file is a single part, as it has to be read from its start.

    Raises:
        UserError: a file cannot be read.
    """
    unit: list[Part] = []
    for part in chain.from_iterable(_parts(file, size) for file in files):
        if unit and sum(each.bytes for each in unit) + part.bytes > size:
            yield unit
            unit = []
        unit.append(part)
    if unit:
        yield unit


def _parts(file: Path, size: int) -> Iterator[Part]:
    with readable(file):
        kind, length = kind_of(file), file.stat().st_size
        if kind == ".parquet":
            yield from _row_groups(file, size)
        elif kind.endswith(COMPRESSED):
            yield Part(str(file), 0, length, length)
        else:
            starts = [*range(0, length - size // 2, size)] or [0]  # a last part is no smaller than a half
            if kind in TEXTS:
                starts = [_line_start(file, start) for start in starts]
            for start, end in zip(starts, [*starts[1:], length], strict=True):
                yield Part(str(file), start, end, end - start)


def _line_start(file: Path, place: int) -> int:
    """The first start of a document at or after a place in a file; else of a line, else of a character."""
    if not place:
        return 0
    with file.open("rb") as content:
        content.seek(place)
        block = content.read(SEARCHED_BYTES)
    for end in (END_OF_TEXT.encode(), b"\n"):
        if (found := block.find(end)) >= 0:
            return place + found + len(end)
    return place + next(index for index in range(4) if block[index] & 0xC0 != 0x80)


def _row_groups(file: Path, size: int) -> Iterator[Part]:
    metadata, start, taken = _parquet(file).metadata, 0, 0
    for group in range(metadata.num_row_groups):
        more = metadata.row_group(group).total_byte_size
        if taken and taken + more > size:
            yield Part(str(file), start, group, taken)
            start, taken = group, 0
        taken += more
    yield Part(str(file), start, metadata.num_row_groups, taken)


def divided_rows(dataset: Dataset, size: int) -> Iterator[list[Part]]:
    """Like `divided`, for the rows of a dataset.

    Raises:
        UserError: it cannot be loaded.
    """
    table = load_dataset(dataset)
    rows, length = len(table), table.data.nbytes
    step = max(1, rows * size // max(1, length))
    for start in range(0, rows, step):
        end = min(start + step, rows)
        yield [Part(dataset.path, start, end, length * (end - start) // rows)]


def read_documents(part: Part, column: str, dataset: Dataset | None = None) -> Iterator[str]:
    """The documents of a part, in order, with line ends as newlines and without byte-order marks. Blank
    documents are skipped.

    A plain text is divided at `<|endoftext|>`, and where these are far apart, at the end of a line.

    Args:
        column: the key of the text in JSON lines, or its column in tables.

    Raises:
        UserError: the part cannot be read, or has no such column.
    """
    if dataset:
        documents = _rows(dataset, part, column)
    else:
        documents = _READERS[kind_of(Path(part.path)).removesuffix(".gz").removesuffix(".zst")](part, column)
    for document in documents:
        if document.strip():
            yield document


def _read_text(part: Part, column: str) -> Iterator[str]:
    with _opened(part) as content:
        yield from passages(decoded(part.path, _limited(content, part), part.start))


def _limited(content: IO[bytes], part: Part) -> Iterator[bytes]:
    """The bytes of a part; of a compressed file, everything."""
    left = part.end - part.start
    is_compressed = kind_of(Path(part.path)).endswith(COMPRESSED)
    while block := content.read(PIECE_BYTES if is_compressed else min(PIECE_BYTES, left)):
        left -= len(block)
        yield block


def passages(pieces: Iterable[str]) -> Iterator[str]:
    """Documents of a text that comes in pieces, which may end anywhere. A document is the text between two
    ends of text; longer ones are divided into passages of at most PASSAGE_CHARACTERS, at the end of a line or
    else of a word."""
    text = ""
    for piece in pieces:
        text += piece
        *whole, text = text.split(END_OF_TEXT)
        for document in whole:
            yield from _cut(document, 0)
        *cut, text = _cut(text, len(END_OF_TEXT))  # the piece may end within an end of text
        yield from cut
    yield from _cut(text, 0)


def _cut(text: str, margin: int) -> Iterator[str]:
    start = 0
    while len(text) - start > PASSAGE_CHARACTERS + margin:
        limit = start + PASSAGE_CHARACTERS
        found = (text.rfind(end, start, limit) + 1 for end in ("\n", " "))
        end = next((place for place in found if place > start), limit)
        yield text[start:end]
        start = end
    yield text[start:]


def _read_json_lines(part: Part, column: str) -> Iterator[str]:
    is_compressed = kind_of(Path(part.path)).endswith(COMPRESSED)
    with _opened(part) as content:
        place = part.start
        if place:  # skip to the first line that starts in this part
            content.seek(place - 1)
            place += len(content.readline()) - 1
        for line in content:
            if place >= part.end and not is_compressed:
                break
            if not place:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                try:
                    yield parse_document(line, column)
                except ValueError as error:
                    raise UserError(
                        f"{part.path}, line {_line_number(part, place)}: each line must be a JSON object "
                        f'with a "{column}", in UTF-8; shards.column names another key'
                    ) from error
            place += len(line)


def _line_number(part: Part, place: int) -> int:
    with _opened(Part(part.path, 0, part.end, 0)) as content:
        number = 1
        while place > 0 and (block := content.read(min(PIECE_BYTES, place))):
            number, place = number + block.count(b"\n"), place - len(block)
    return number


def _read_parquet(part: Part, column: str) -> Iterator[str]:
    with readable(Path(part.path)):
        file = _parquet(Path(part.path))
        if column not in file.schema_arrow.names:
            _refuse_column(part.path, column, file.schema_arrow.names)
        groups = range(part.start, part.end)
        # Read in batches, as a row group may be larger than memory.
        for batch in file.iter_batches(ROWS, row_groups=groups, columns=[column]):
            yield from _texts(batch.column(0).to_pylist(), part.path, column)


def _parquet(file: Path) -> Any:
    parquet = optional("pyarrow.parquet", "Parquet")
    try:
        return parquet.ParquetFile(file, buffer_size=PIECE_BYTES, pre_buffer=False)
    except ValueError as error:  # pyarrow's ArrowInvalid
        raise _damaged(file, error) from error


def _rows(dataset: Dataset, part: Part, column: str) -> Iterator[str]:
    table = load_dataset(dataset)
    if column not in table.column_names:
        _refuse_column(part.path, column, table.column_names)
    texts = table.select_columns([column]).with_format(None)
    for start in range(part.start, part.end, ROWS):
        yield from _texts(texts[start : min(start + ROWS, part.end)][column], part.path, column)


def _refuse_column(path: str, column: str, there: list[str]) -> None:
    raise UserError(f"{path} has no column {column!r}: give shards.column=, one of {', '.join(there)}")


def _texts(values: list[Any], path: str, column: str) -> Iterator[str]:
    """The texts of a column; a missing value, as tables may have, is a blank text."""
    for value in values:
        if not isinstance(value, str | None):
            raise UserError(f"{path}: the column {column!r} holds no texts: name another with shards.column=")
        yield (value or "").removeprefix(BYTE_ORDER_MARK).replace("\r\n", "\n").replace("\r", "\n")


@contextmanager
def _opened(part: Part) -> Iterator[IO[bytes]]:
    """A file at the start of a part, decompressed."""
    path = Path(part.path)
    with readable(path):
        if kind_of(path).endswith(".gz"):
            with gzip.open(path) as content:
                yield cast(IO[bytes], content)
        elif kind_of(path).endswith(".zst"):
            arrow = optional("pyarrow", ".zst")
            with arrow.input_stream(str(path), compression="zstd") as stream:
                yield io.BufferedReader(stream, PIECE_BYTES)
        else:
            with path.open("rb") as content:
                content.seek(part.start)
                yield content


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Turn errors of reading a file, by any library, into one line.

    Raises:
        UserError: the file cannot be read, or is damaged.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        if error.errno is None:  # raised by gzip or pyarrow, about the content
            raise _damaged(file, error) from error
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except (EOFError, UnicodeDecodeError) as error:
        raise _damaged(file, error) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("zlib", "pyarrow"):
            raise _damaged(file, error) from error
        raise


def _damaged(file: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split()).rstrip(".")
    return UserError(f"{file} is damaged ({reason}): copy or download it once more, or leave it out")


_READERS: dict[str, Callable[[Part, str], Iterator[str]]] = {
    **dict.fromkeys(TEXTS, _read_text),
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
}
