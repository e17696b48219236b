"""Texts of any size tokenised into a folder of shards by several processes; llm/data/shards.py has the
format.

A text is divided into units that depend on the text alone. The process that tokenises a unit writes its
shards, and a record after each. So a folder is byte for byte the same, however many processes wrote it and
however often they were killed: recorded shards are kept, the rest is made again.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import tiktoken
import torch

from llm.config import TokenizerConfig
from llm.data import shard_worker
from llm.data.accelerated import DifferentIds
from llm.data.byte_level import as_files
from llm.data.cache import Record, read_record, write_record
from llm.data.shard_worker import BY_TIKTOKEN, RECORDS, Job, begin, integers, shard_name, write_unit
from llm.data.shards import FORMAT, INDEX, SETTINGS, SPLITS, TOKENIZER
from llm.data.tokenizer import LEARNT, identity_of
from llm.errors import UserError
from llm.files import held, read_content, remove, remove_leftovers, write_json, write_text
from llm.progress import Progress, format_count

log = logging.getLogger(__name__)


def write_shards(job: Job, tokenizer: tiktoken.Encoding, asked: TokenizerConfig, workers: int) -> Record:
    """Tokenise a text into a folder of shards, continuing if some are there already; returns the index.

    Args:
        asked: the tokenizer's config.

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
        try:
            records = _by_workers(job, workers, lambda: _publisher(job, tokenizer, asked))
        finally:  # processes may have been ended in the middle of a shard
            remove_leftovers(job.folder)
        index = _index(job, tokenizer, asked, records, complete=True)
        write_record(job.folder / INDEX, FORMAT, index)
    return index


def _claim(job: Job, fingerprint: str) -> None:
    """Mark the folder with a fingerprint of what is written to it.

    Raises:
        UserError: the folder holds something else.
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


def _by_workers(job: Job, workers: int, publisher: Callable[[], Callable[[], None]]) -> list[list[Record]]:
    """The records of each unit's shards."""
    while True:
        try:
            return _run(job, workers, publisher())
        except DifferentIds:
            log.warning("gigatoken gave other ids than tiktoken: beginning again with tiktoken alone")
            remove(job.folder / INDEX)
            for path in [*job.folder.glob("*.bin"), *job.folder.glob("*.documents"), job.folder / RECORDS]:
                remove(path)
            write_text(job.folder / RECORDS / BY_TIKTOKEN, "")


def _run(job: Job, workers: int, publish: Callable[[], None]) -> list[list[Record]]:
    progress, total = Progress("tokenising"), max(1, sum(part.bytes for unit in job.units for part in unit))
    context = get_context("forkserver")
    context.set_forkserver_preload([shard_worker.__name__])  # or every process would import torch itself
    counted = context.Array("q", 2)  # bytes of text, and tokens
    done: dict[int, list[Record]] = {}
    read = 0  # bytes of the units that are done

    def show() -> None:
        publish()
        of_done = sum(record["read_bytes"] for records in done.values() for record in records)
        expected = total * of_done / read if read else total  # more than the size of a compressed text
        progress.update(min(1.0, counted[0] / max(1, expected)), f"{format_count(counted[1])} tokens")

    def finish(number: int, records: list[Record]) -> None:
        nonlocal read
        done[number] = records
        read += sum(part.bytes for part in job.units[number])

    if workers == 1 or len(job.units) == 1:
        threads = torch.get_num_threads()
        begin(job, counted, alone=True)
        try:
            for number in range(len(job.units)):
                finish(number, write_unit(number, show))
        finally:
            torch.set_num_threads(threads)
    else:
        with ProcessPoolExecutor(
            min(workers, len(job.units)), context, initializer=begin, initargs=(job, counted)
        ) as pool:
            tasks = {pool.submit(write_unit, number): number for number in range(len(job.units))}
            try:
                _wait(tasks, show, finish)
            except BaseException:
                begun = [*pool._processes.values()]
                pool.shutdown(wait=False, cancel_futures=True)
                for process in begun:
                    process.terminate()
                for process in begun:
                    process.join()
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


def _publisher(job: Job, tokenizer: tiktoken.Encoding, asked: TokenizerConfig) -> Callable[[], None]:
    """A function that publishes finished shards: whenever there are more, it writes an index of all shards
    before the first missing one. Runs may start on these, as later indices keep them in the same places."""
    published = read_record(job.folder / INDEX, FORMAT) or {split: [] for split in SPLITS}
    records: list[list[Record]] = [[]]

    def publish() -> None:
        nonlocal published
        known = sum(map(len, records))
        while len(records) <= len(job.units):
            name = shard_name(len(records) - 1, len(records[-1]))
            record = read_record(job.folder / RECORDS / f"{name}.json", name)
            if record is None:
                break
            records[-1].append(record)
            if record["is_last"]:
                records.append([])
        if sum(map(len, records)) == known or published.get("complete"):
            return  # nothing is new, or a complete folder is being checked
        index = _index(job, tokenizer, asked, records)
        if all(len(index[split]) >= max(1, len(published[split])) for split in SPLITS):  # a run needs both
            published = index
            write_record(job.folder / INDEX, FORMAT, index)

    return publish


def _index(
    job: Job,
    tokenizer: tiktoken.Encoding,
    asked: TokenizerConfig,
    records: list[list[Record]],
    complete: bool = False,
) -> Record:
    """The index of a folder: the shards of each split, in the order of the text, with their counts and
    hashes."""
    sizes = [sum(part.bytes for part in unit) for unit in job.units]
    done = [size for size, of_unit in zip(sizes, records, strict=False) if of_unit and of_unit[-1]["is_last"]]
    index: Record = {
        "tokenizer": {
            "asked": [asked.name, asked.vocab_size if asked.name == LEARNT else None],
            "identity": identity_of(tokenizer),
            "vocab_size": tokenizer.n_vocab,
        },
        "dtype": integers(tokenizer),
        "column": job.column,
        "held_out": job.validation,
        "complete": complete,
        "share": sum(done) / max(1, sum(sizes)),  # of the text that is in complete units
    }
    for split in SPLITS:
        index[split] = [
            {
                "file": f"{split}-{shard_name(number, shard)}.bin",
                **{key: record[split][key] for key in ("tokens", "documents", "bytes")},
                "sha256": record[split]["sha256"][".bin"],
                "documents_sha256": record[split]["sha256"][".documents"],
            }
            for number, of_unit in enumerate(records)
            for shard, record in enumerate(of_unit)
            if record[split]["tokens"]
        ]
    return index
