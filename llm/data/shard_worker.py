"""A process that tokenises: it writes the shards of one unit of a text after the other, and their records."""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import tiktoken
import torch

from llm.data.accelerated import Checked, accelerated
from llm.data.cache import Record, read_record, write_record
from llm.data.dataset import Dataset
from llm.data.documents import Part, read_documents
from llm.data.shards import FORMAT, SPLITS, TOKENIZER
from llm.data.tokenizer import LEARNT, bytes_of_tokens, end_of_text_id, identity_of, load_tokenizer
from llm.files import replacing
from llm.processes import end_with_parent

log = logging.getLogger(__name__)

RECORDS = "records"
BY_TIKTOKEN = "by_tiktoken"  # a mark in RECORDS: gigatoken's ids differed
COUNTED_BYTES = 1 << 22  # of text, from one report of progress to the next


@dataclass(frozen=True)
class Job:
    """What to tokenise, and how; the same for all processes."""

    folder: Path
    tokenizer: str  # its name; bpe: it is in the folder
    column: str
    validation: float
    shard_bytes: int
    dataset: Dataset | None
    units: list[list[Part]] = field(repr=False)

    def fingerprint(self, tokenizer: tiktoken.Encoding) -> str:
        """A hash of everything that determines the shards. Files are identified by name, size and time."""
        times = {
            part.path: Path(part.path).stat().st_mtime_ns if self.dataset is None else ""
            for part in chain.from_iterable(self.units)
        }
        parts = [[(Path(p.path).name, p.start, p.end, times[p.path]) for p in unit] for unit in self.units]
        how = (FORMAT, identity_of(tokenizer), self.column, self.validation, self.shard_bytes, self.dataset)
        return hashlib.sha256(repr((how, parts)).encode()).hexdigest()[:32]


class _Worker:
    """Globals of a process that tokenises, set by `begin`."""

    job: Job
    tokenizer: tiktoken.Encoding
    encode: Checked
    counted: Any
    lengths: np.ndarray


def begin(job: Job, counted: Any, alone: bool = False) -> None:
    """Prepare this process to tokenise.

    Args:
        counted: a shared array, to which bytes of text and tokens are added.
        alone: whether it is the main process, which does all the work.
    """
    if not alone:
        end_with_parent()
    torch.set_num_threads(1)
    _Worker.job, _Worker.counted = job, counted
    is_learnt = job.tokenizer == LEARNT
    _Worker.tokenizer = load_tokenizer(str(job.folder / TOKENIZER) if is_learnt else job.tokenizer)
    marked = (job.folder / RECORDS / BY_TIKTOKEN).exists()
    _Worker.encode = Checked(_Worker.tokenizer, None if marked else accelerated(_Worker.tokenizer))
    _Worker.lengths = bytes_of_tokens(_Worker.tokenizer, _Worker.tokenizer.n_vocab).numpy()


def write_unit(number: int, show: Any = None) -> list[Record]:
    """Write the shards of a unit that do not exist yet, and return the records of all.

    Args:
        show: called now and then, to show progress.

    Raises:
        UserError: see `write_shards`.
        DifferentIds: see `Checked`.
    """
    job = _Worker.job
    _Worker.encode.begin()
    records: list[Record] = []
    while (record := _finished(number, len(records))) is not None:
        records.append(record)
        _count(record["read_bytes"], sum(record[split]["tokens"] for split in SPLITS))
        if record["is_last"]:
            return records
    parts = (read_documents(part, job.column, job.dataset) for part in job.units[number])
    skipped = sum(record["read"] for record in records)
    documents = islice(chain.from_iterable(parts), skipped, None)
    while not (records and records[-1]["is_last"]):
        records.append(_write_shard(documents, number, len(records), show))
    return records


def is_held_out(document: bytes, share: float) -> bool:
    """Whether a document belongs to the validation split, by its hash; so equal documents are always in the
    same split."""
    return int.from_bytes(hashlib.sha256(document).digest()[:8], "big") < share * 2**64


def integers(tokenizer: tiktoken.Encoding) -> str:
    """The numpy type of a tokenizer's ids in shards."""
    return "<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4"


def shard_name(number: int, shard: int) -> str:
    return f"{number:06d}-{shard:03d}"


def _finished(number: int, shard: int) -> Record | None:
    """The record of a shard; None unless the shard exists and is undamaged."""
    folder, name = _Worker.job.folder, shard_name(number, shard)
    record = read_record(folder / RECORDS / f"{name}.json", name)
    for split in SPLITS if record else ():
        for suffix, digest in record[split]["sha256"].items():  # type: ignore[index]
            path = folder / f"{split}-{name}{suffix}"
            try:
                with path.open("rb") as content:
                    if hashlib.file_digest(content, "sha256").hexdigest() == digest:
                        continue
            except OSError:
                pass
            log.warning("%s is damaged: tokenising it again", path)
            return None
    return record


class _File:
    """A file of a shard that is being written, and its hash so far."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, array: np.ndarray) -> None:
        self.file.write(array.data)
        self.digest.update(array.data)


def _write_shard(documents: Iterator[str], number: int, shard: int, show: Any) -> Record:
    """Write the next documents of a unit, up to the size of a shard."""
    job, tokenizer, name = _Worker.job, _Worker.tokenizer, shard_name(number, shard)
    dtype = np.dtype(integers(tokenizer))
    end = np.array([end_of_text_id(tokenizer)], dtype)
    totals = {split: {"tokens": 0, "documents": 0, "bytes": 0} for split in SPLITS}
    read = read_bytes = told_bytes = told_tokens = 0
    is_last = True
    with ExitStack() as stack:
        files = {
            (split, suffix): _File(
                stack.enter_context(
                    stack.enter_context(replacing(job.folder / f"{split}-{name}{suffix}")).open("wb")
                )
            )
            for split in SPLITS
            for suffix in (".bin", ".documents")
        }
        for text in documents:
            content = text.encode()
            split, ids = SPLITS[is_held_out(content, job.validation)], _Worker.encode(text)
            files[split, ".bin"].write(ids.astype(dtype))
            files[split, ".bin"].write(end)
            total = totals[split]
            total["tokens"] += len(ids) + 1
            total["documents"] += 1
            total["bytes"] += int(_Worker.lengths[ids].sum())
            files[split, ".documents"].write(np.array([total["tokens"]], "<i8"))
            read, read_bytes = read + 1, read_bytes + len(content)
            if read_bytes - told_bytes >= COUNTED_BYTES or read_bytes >= job.shard_bytes:
                tokens = sum(each["tokens"] for each in totals.values())
                _count(read_bytes - told_bytes, tokens - told_tokens)
                told_bytes, told_tokens = read_bytes, tokens
                if show:
                    show()
            if read_bytes >= job.shard_bytes:
                is_last = False
                break
        record: Record = {"read": read, "read_bytes": read_bytes, "is_last": is_last}
        for split in SPLITS:
            suffixes = (".bin", ".documents")
            digests = {suffix: files[split, suffix].digest.hexdigest() for suffix in suffixes}
            record[split] = {**totals[split], "sha256": digests}
    _count(read_bytes - told_bytes, sum(each["tokens"] for each in totals.values()) - told_tokens)
    write_record(job.folder / RECORDS / f"{name}.json", name, record)
    if show:
        show()
    return record


def _count(read_bytes: int, tokens: int) -> None:
    with _Worker.counted.get_lock():
        _Worker.counted[0] += read_bytes
        _Worker.counted[1] += tokens
