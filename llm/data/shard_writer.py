"""Texts of any size to a folder of shards, by several processes; see `shards` for what is there at the end.

A text is divided into units that depend on it alone. Whoever tokenises a unit writes its shards and, after
each, a record of it. So a folder is the same to the byte however many processes wrote it and however often
they were killed: what is recorded is kept, and the rest is made again.
"""

import hashlib
import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, islice
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import IO, Any

import numpy as np
import tiktoken
import torch

from llm.config import TokenizerConfig
from llm.data.accelerated import Checked, DifferentIds, accelerated
from llm.data.byte_level import as_files
from llm.data.cache import Record, read_record, write_record
from llm.data.documents import Dataset, Part, read_documents
from llm.data.shards import FORMAT, INDEX, SETTINGS, SPLITS, TOKENIZER
from llm.data.tokenizer import LEARNT, bytes_of_tokens, end_of_text_id, identity_of, load_tokenizer
from llm.errors import UserError
from llm.files import held, read_content, remove, remove_leftovers, replacing, write_json, write_text
from llm.progress import Progress, format_count

log = logging.getLogger(__name__)

RECORDS = "records"
BY_TIKTOKEN = "by_tiktoken"  # a mark in RECORDS: gigatoken's ids were others
COUNTED_BYTES = 1 << 22  # of text, before the progress is told of it


@dataclass(frozen=True)
class Job:
    """What the processes are told."""

    folder: Path
    tokenizer: str  # its name, or bpe where it is in the folder
    column: str
    validation: float
    shard_bytes: int
    dataset: Dataset | None
    units: list[list[Part]] = field(repr=False)

    def fingerprint(self, tokenizer: tiktoken.Encoding) -> str:
        """Of all that decides the shards. Files are told by name, size and time."""
        times = {
            part.path: Path(part.path).stat().st_mtime_ns if self.dataset is None else ""
            for part in chain.from_iterable(self.units)
        }
        parts = [[(Path(p.path).name, p.start, p.end, times[p.path]) for p in unit] for unit in self.units]
        how = (FORMAT, identity_of(tokenizer), self.column, self.validation, self.shard_bytes, self.dataset)
        return hashlib.sha256(repr((how, parts)).encode()).hexdigest()[:32]


def write_shards(job: Job, tokenizer: tiktoken.Encoding, asked: TokenizerConfig, workers: int) -> Record:
    """Tokenise a text into a folder of shards, or what is left of it; returns the index.

    Args:
        asked: the tokenizer, as a run asks for it.

    Raises:
        UserError: a text cannot be read, a shard cannot be written, the folder holds something else, or
            another process is writing there.
    """
    with held(job.folder / ".lock") as ours:
        if not ours:
            raise UserError(f"shards.path={job.folder}: another process is writing there")
        _claim(job, job.fingerprint(tokenizer))
        if asked.name == LEARNT:
            for name, content in as_files(tokenizer).items():
                write_json(job.folder / TOKENIZER / name, content)
        records = _by_workers(job, workers)
        index = _index(job, tokenizer, asked, records)
        write_record(job.folder / INDEX, FORMAT, index)
    return index


def _claim(job: Job, fingerprint: str) -> None:
    """Mark the folder with what is written to it.

    Raises:
        UserError: something else is there already.
    """
    settings = job.folder / SETTINGS
    if settings.exists():
        if read_content(settings).decode(errors="replace").strip() != fingerprint:
            raise UserError(
                f"shards.path={job.folder} holds shards of another text, or of other settings: give another "
                f"folder, or remove it"
            )
    elif {path.name for path in job.folder.iterdir()} - {".lock"}:
        raise UserError(f"shards.path={job.folder} holds other files: give an empty folder")
    else:
        write_text(settings, f"{fingerprint}\n")
    for folder in (job.folder, job.folder / RECORDS):
        remove_leftovers(folder)


def _by_workers(job: Job, workers: int) -> list[list[Record]]:
    """The records of each unit's shards."""
    while True:
        try:
            return _run(job, workers)
        except DifferentIds:
            log.warning("gigatoken gave other ids than tiktoken: beginning again with tiktoken alone")
            for path in [*job.folder.glob("*.bin"), *job.folder.glob("*.documents"), job.folder / RECORDS]:
                remove(path)
            write_text(job.folder / RECORDS / BY_TIKTOKEN, "")


def _run(job: Job, workers: int) -> list[list[Record]]:
    progress, total = Progress("tokenising"), max(1, sum(part.bytes for unit in job.units for part in unit))
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])  # or each process would import torch by itself
    counted = context.Array("q", 2)  # bytes of text, and tokens
    done: dict[int, list[Record]] = {}
    read = 0  # of the text, in units that are done

    def show() -> None:
        of_done = sum(record["read_bytes"] for records in done.values() for record in records)
        expected = total * of_done / read if read else total  # of a compressed text more than its size
        progress.update(min(1.0, counted[0] / max(1, expected)), f"{format_count(counted[1])} tokens")

    def finish(number: int, records: list[Record]) -> None:
        nonlocal read
        done[number] = records
        read += sum(part.bytes for part in job.units[number])

    if workers == 1 or len(job.units) == 1:
        threads = torch.get_num_threads()
        _begin(job, counted, alone=True)
        try:
            for number in range(len(job.units)):
                finish(number, write_unit(number, show))
        finally:
            torch.set_num_threads(threads)
    else:
        with ProcessPoolExecutor(
            min(workers, len(job.units)), context, initializer=_begin, initargs=(job, counted)
        ) as pool:
            tasks = {pool.submit(write_unit, number): number for number in range(len(job.units))}
            try:
                _wait(tasks, show, finish)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in [*pool._processes.values()]:
                    process.terminate()
                raise
    progress.clear()
    return [done[number] for number in range(len(job.units))]


def _wait(tasks: dict[Future[list[Record]], int], show: Any, finish: Any) -> None:
    left = {*tasks}
    while left:
        try:
            for task in as_completed(left, timeout=0.2):
                finish(tasks[task], task.result())
                left.discard(task)
                show()
        except TimeoutError:
            show()
        except BrokenProcessPool as error:
            raise UserError(
                "a process that tokenised was killed, perhaps as memory ran out: run the same command once "
                "more, which keeps the finished shards, perhaps with fewer shards.workers"
            ) from error


class _Worker:
    """What a process that tokenises has loaded."""

    job: Job
    tokenizer: tiktoken.Encoding
    encode: Checked
    counted: Any
    lengths: np.ndarray


def _begin(job: Job, counted: Any, alone: bool = False) -> None:
    if not alone:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _Worker.job, _Worker.counted = job, counted
    is_learnt = job.tokenizer == LEARNT
    _Worker.tokenizer = load_tokenizer(str(job.folder / TOKENIZER) if is_learnt else job.tokenizer)
    marked = (job.folder / RECORDS / BY_TIKTOKEN).exists()
    _Worker.encode = Checked(_Worker.tokenizer, None if marked else accelerated(_Worker.tokenizer))
    _Worker.lengths = bytes_of_tokens(_Worker.tokenizer, _Worker.tokenizer.n_vocab).numpy()


def _end_with_parent() -> None:
    """End when the process that began this one does, however it does: nobody would take what is made."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def write_unit(number: int, show: Any = None) -> list[Record]:
    """Write the shards of a unit that are not there yet; returns the records of all.

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
    """Whether a document is of the validation split: a share of all hashes are. So equal documents are of the
    same split, wherever they stand."""
    return int.from_bytes(hashlib.sha256(document).digest()[:8], "big") < share * 2**64


def integers(tokenizer: tiktoken.Encoding) -> str:
    """The type of a tokenizer's ids in shards, as numpy spells it."""
    return "<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4"


def _name(number: int, shard: int) -> str:
    return f"{number:06d}-{shard:03d}"


def _finished(number: int, shard: int) -> Record | None:
    """The record of a shard that is there, and whole."""
    folder, name = _Worker.job.folder, _name(number, shard)
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
    """A file of a shard while it is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, array: np.ndarray) -> None:
        self.file.write(array.data)
        self.digest.update(array.data)


def _write_shard(documents: Iterator[str], number: int, shard: int, show: Any) -> Record:
    """Write the next documents of a unit, until there is as much text as a shard holds."""
    job, tokenizer, name = _Worker.job, _Worker.tokenizer, _name(number, shard)
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
    return record


def _count(read_bytes: int, tokens: int) -> None:
    with _Worker.counted.get_lock():
        _Worker.counted[0] += read_bytes
        _Worker.counted[1] += tokens


def _index(
    job: Job, tokenizer: tiktoken.Encoding, asked: TokenizerConfig, records: list[list[Record]]
) -> Record:
    """What is in the folder: the shards of each split with their counts and hashes, in the text's order."""
    index: Record = {
        "tokenizer": {
            "asked": [asked.name, asked.vocab_size if asked.name == LEARNT else None],
            "identity": identity_of(tokenizer),
            "vocab_size": tokenizer.n_vocab,
        },
        "dtype": integers(tokenizer),
        "column": job.column,
        "held_out": job.validation,
    }
    for split in SPLITS:
        index[split] = [
            {
                "file": f"{split}-{_name(number, shard)}.bin",
                **{key: record[split][key] for key in ("tokens", "documents", "bytes")},
                "sha256": record[split]["sha256"][".bin"],
                "documents_sha256": record[split]["sha256"][".documents"],
            }
            for number, of_unit in enumerate(records)
            for shard, record in enumerate(of_unit)
            if record[split]["tokens"]
        ]
    return index
