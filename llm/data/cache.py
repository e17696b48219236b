"""The cache: files are made once and verified at every use. A damaged one is made again."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from math import inf
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch

from llm.errors import UserError
from llm.files import held, is_held, remove_leftovers, replacing, write_json

log = logging.getLogger(__name__)

BLOCK_BYTES = 1 << 24  # hashed at a time by a thread
READ_BYTES = 1 << 18  # small enough to stay in a core's cache until it is hashed

Record = dict[str, Any]
Made = TypeVar("Made")


def made_once(path: Path, read: Callable[[], Made | None], make: Callable[[], None], doing: str) -> Made:
    """What `read` finds at a path of the cache. If it finds nothing, or it is damaged, `make` writes it,
    while other processes wait.

    Args:
        doing: what `make` does, for the log, such as "tokenising the text".

    Raises:
        UserError: it cannot be written.
    """
    if (found := read()) is not None:
        return found
    lock = path.parent.with_suffix(".lock")
    try:
        if is_held(lock):
            log.info("waiting for another process, which is %s", doing)
        with held(lock, seconds=inf):
            if (found := read()) is None:
                remove_leftovers(path.parent)  # safe, as nobody writes there without the lock
                if path.exists():
                    log.warning("%s is damaged, or of another version: %s again", path, doing)
                make()
                found = read()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    if found is None:
        raise UserError(f"{path} was not read back as it was written: the disk or the memory is faulty")
    return found


def read_array(path: Path, fingerprint: str) -> tuple[np.ndarray, Record] | None:
    """The array at a path, memory-mapped, and its record; None unless both are as `write_array` left them.

    Args:
        fingerprint: identifies what the array was made from.
    """
    record = read_record(path.with_suffix(".json"), fingerprint)
    try:
        if record and record["blocks"] == block_hashes([path])[0]:
            return np.load(path, mmap_mode="r"), record
    except (OSError, ValueError, KeyError):
        pass
    return None


def write_array(path: Path, fingerprint: str, write: Callable[[IO[bytes]], Record]) -> None:
    """Write an array's file, and beside it the record by which `read_array` verifies it.

    Args:
        write: writes the array in numpy's format, and returns what else to record.
    """
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            record = write(file)
        [blocks] = block_hashes([temporary])
    write_record(path.with_suffix(".json"), fingerprint, {**record, "blocks": blocks})


def read_record(path: Path, fingerprint: str) -> Record | None:
    """The record at a path; None unless it is as `write_record` left it, with this fingerprint."""
    try:
        content = json.loads(path.read_text("utf-8"))
        record = content["record"]
        if content == _signed(record) and record["fingerprint"] == fingerprint:
            return record
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass
    return None


def write_record(path: Path, fingerprint: str, record: Record) -> None:
    write_json(path, _signed({"fingerprint": fingerprint, **record}))


def _signed(record: Record) -> Record:
    as_text = json.dumps(record, sort_keys=True)
    return {"record": record, "sha256": hashlib.sha256(as_text.encode()).hexdigest()}


def block_hashes(files: Sequence[Path], block_bytes: int | None = None) -> list[list[str]]:
    """SHA-256 of each block of each file, computed in threads; a core with SHA instructions hashes 1.8 GB per
    second."""
    size, threads = block_bytes or BLOCK_BYTES, torch.get_num_threads()
    starts = [range(0, file.stat().st_size, size) for file in files]
    blocks = [(file, start) for file, of_file in zip(files, starts, strict=True) for start in of_file]
    hashes = [""] * len(blocks)

    def hash_every(first: int) -> None:
        for number in range(first, len(blocks), threads):
            hashes[number] = _block_hash(*blocks[number], size)

    with ThreadPoolExecutor(threads) as pool:
        [*pool.map(hash_every, range(threads))]
    in_order = iter(hashes)
    return [[*islice(in_order, len(of_file))] for of_file in starts]


def _block_hash(file: Path, start: int, size: int) -> str:
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as content:
        content.seek(start)
        while size and (read := content.read(min(size, READ_BYTES))):
            digest.update(read)
            size -= len(read)
    return digest.hexdigest()
