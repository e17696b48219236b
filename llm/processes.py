"""The processes that share a run: spawned here, or launched, perhaps on several machines.

The first one reads the config and starts the run; the others `follow` with what it sends them.
"""

import contextlib
import functools
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.rendezvous import rendezvous

from llm.config import RuntimeConfig
from llm.errors import UserError, first_line, shown
from llm.launched import launched_processes
from llm.runtime import Runtime, start_runtime

STARTED = ".started"  # suffix of a file that a process makes when it has started
LAUNCHED_SECONDS = 300.0  # within which all launched processes have to meet
BEGINS = "begins"  # set by the first process once it has read the text, which may take hours
FOREVER = timedelta(days=1000)
FAREWELL_BYTES = 2048  # of a process's last message: empty, or why it could not do its part
NOTICED_SECONDS = 3.0  # after a failed exchange, time until the loss of a process is known everywhere
ENDED_SECONDS = 10.0  # after which a process that still waits for a lost one is ended


class Watch:
    """Notices when other processes of a run are gone: the first one watches all others, and they watch it. A
    broken connection shows it at once, even while this process waits for a GPU that waits for another
    one's."""

    def __init__(self) -> None:
        self.lost: dict[int, str] = {}  # by rank: the last message of a lost process
        self._ended = threading.Event()
        # A separate group, because exchanges within a group wait for each other.
        self._group = dist.new_group(backend="gloo", timeout=FOREVER)
        others = range(1, dist.get_world_size()) if dist.get_rank() == 0 else range(1)
        self._threads = {n: threading.Thread(target=self._wait_for, args=(n,), daemon=True) for n in others}
        for thread in self._threads.values():
            thread.start()

    def _wait_for(self, rank: int) -> None:
        said = torch.zeros(FAREWELL_BYTES, dtype=torch.uint8)
        with contextlib.suppress(RuntimeError):  # the process is gone
            dist.recv(said, src=rank, group=self._group)
            if not said.any():
                return  # it has done its part
        if self._ended.is_set():
            return
        if rank == 0:
            os._exit(1)  # the first process has reported why, if it could
        self.lost[rank] = bytes(said.tolist()).rstrip(b"\0").decode("utf-8", "replace")
        if dist.is_nccl_available() and torch.cuda.is_available():
            # Otherwise this GPU would wait for the lost process's, and this process for its GPU.
            with contextlib.suppress(Exception):
                dist.distributed_c10d._get_default_group()._get_backend(torch.device("cuda")).abort()
        if not self._ended.wait(ENDED_SECONDS):
            _end(loss_in_words(rank, dist.get_world_size(), self.lost[rank]))

    def has_lost(self) -> bool:
        """Whether a process is gone, now that an exchange has failed."""
        deadline = time.monotonic() + NOTICED_SECONDS
        while not self.lost and time.monotonic() < deadline:
            time.sleep(0.01)
        return bool(self.lost)

    def end(self, why: str = "") -> None:
        """Tell the others that this process has done its part, or why it could not; and wait for theirs."""
        self._ended.set()  # a process that is lost from here on has no part left to do
        said = why.encode()[:FAREWELL_BYTES]
        message = torch.zeros(FAREWELL_BYTES, dtype=torch.uint8)
        message[: len(said)] = torch.tensor([*said], dtype=torch.uint8)
        for rank in self._threads:
            with contextlib.suppress(RuntimeError):  # it is gone
                dist.send(message, dst=rank, group=self._group)
        for thread in self._threads.values():
            # If a thread woke up while the interpreter shuts down, that would abort the process.
            thread.join(NOTICED_SECONDS if why else None)


def loss_in_words(rank: int, processes: int, said: str = "", exit_code: int | None = None) -> str:
    """Why a process was lost.

    Args:
        processes: how many there were.
        said: its last message.
        exit_code: as in `multiprocessing`; None: unknown.
    """
    if said:
        return said
    how = "has ended before its work was done"
    if exit_code is not None and exit_code < 0:
        how = f"was killed by {signal.Signals(-exit_code).name}"
    return (
        f"process {rank} of {processes} {how}, as when a machine runs out of memory; "
        f"the run can be resumed from its last checkpoint"
    )


@contextlib.contextmanager
def processes(config: RuntimeConfig, work: Callable[..., Any] | None, *arguments: Any) -> Iterator[Runtime]:
    """Start the processes of a run, with this one as the first, and yield its runtime.

    The others, which were launched beside it or are spawned here, `follow` with `work(*arguments, runtime)`,
    or do nothing if `work` is None.
    """
    if config.processes == 1:
        yield start_runtime(config)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        others = []
        if launched_processes():
            group = meet()
            group["store"].set(BEGINS, "")
        else:
            group = {"init_method": f"file://{folder / 'meeting-place'}", "world_size": config.processes}
            others = [
                mp.get_context("spawn").Process(
                    target=_other_process, args=(folder, work, {**group, "rank": rank}), daemon=True
                )
                for rank in range(1, config.processes)
            ]
            group["rank"] = 0
        runtime, watch = start_runtime(config), None
        for other in others:
            other.start()
        try:
            _wait_for(others, folder)
            with _ended_by_loss_of(others):
                _join(group)
            watch = Watch()
            dist.broadcast_object_list([(config, arguments if work else None)])
            yield runtime
            watch.end()
            dist.destroy_process_group()  # before `join`: NCCL's waits for the others'
            for other in others:
                other.join()
        except RuntimeError as error:  # torch raises it when another process is gone
            if not watch or not watch.has_lost():
                raise
            rank, said = min(watch.lost.items())
            exit_code = None
            if others:
                others[rank - 1].join(NOTICED_SECONDS)
                exit_code = others[rank - 1].exitcode
            raise UserError(loss_in_words(rank, config.processes, said, exit_code)) from error
        finally:
            if watch and dist.is_initialized():
                watch.end("the first process has failed")
            for other in others:
                other.kill()
            if dist.is_initialized():  # after an error, so that the next run in this process can start anew
                dist.distributed_c10d._abort_process_group()


def _wait_for(others: list[SpawnProcess], folder: Path) -> None:
    """Wait until all other processes have started.

    Raises:
        UserError: one ended before it started, so that waiting for it would never end.
    """
    while len(list(folder.glob(f"*{STARTED}"))) < len(others):
        for rank, other in enumerate(others, 1):
            if not other.exitcode:
                continue
            if other.exitcode < 0:
                raise UserError(loss_in_words(rank, len(others) + 1, exit_code=other.exitcode))
            raise UserError(
                "runtime.processes: another process could not begin; a script of yours has to call "
                'pretrain() under `if __name__ == "__main__":`, as each process imports it'
            )
        time.sleep(0.05)


@contextlib.contextmanager
def _ended_by_loss_of(others: list[SpawnProcess]) -> Iterator[None]:
    """End this process if another one is gone before they have met; torch would wait for half an hour."""
    met = threading.Event()

    def watch() -> None:
        while not met.wait(0.2):
            for rank, other in enumerate(others, 1):
                if other.exitcode is not None:
                    _end(loss_in_words(rank, len(others) + 1, exit_code=other.exitcode))

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        met.set()


def _end(why: str) -> NoReturn:
    """End this process at once, whatever it waits for."""
    print(f"error: {shown(why, keep='')}", file=sys.stderr, flush=True)
    os._exit(1)


def end_with_parent() -> None:
    """End this process when its parent ends, in whatever way, as nobody would use its results."""
    parent = mp.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@functools.cache
def meet() -> dict[str, Any]:
    """Let launched processes meet; returns arguments for `init_process_group`. The first one waits for the
    others, and once it has ended, whatever they wait for in its store fails.

    Raises:
        UserError: they did not all arrive in time.
    """
    try:
        store, rank, count = next(rendezvous("env://", timeout=timedelta(seconds=LAUNCHED_SECONDS)))
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"the {launched_processes()} processes of this run did not meet at {where}: {first_line(error)}"
        ) from error
    return {"store": store, "rank": rank, "world_size": count}


def _wait_for_the_first() -> None:
    """Wait until the first of the launched processes begins the run.

    Raises:
        UserError: it has ended before.
    """
    try:
        meet()["store"].wait([BEGINS], FOREVER)
    except dist.DistError as error:
        raise UserError("the first process has ended before the run began") from error


def _join(group: dict[str, Any]) -> None:
    """Join the processes: gloo exchanges objects and flags between CPUs, NCCL gradients between GPUs. By
    default torch would use only NCCL if there is a GPU, and send objects from GPU 0 of every process."""
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", **group)


def follow(work: Callable[..., Any], **group: Any) -> None:
    """Do this process's part of a run that the first process starts with `processes`.

    Args:
        group: arguments of `init_process_group`; launched processes get them from `meet`.

    Raises:
        UserError: this process cannot do its part.
    """
    logging.disable()  # only the first process logs
    if not group:
        _wait_for_the_first()
        group = meet()
    _join(group)
    watch = Watch()
    try:
        told: list[Any] = [None]
        dist.broadcast_object_list(told)
        config, arguments = told[0]
        if arguments is not None:
            work(*arguments, start_runtime(config, dist.get_rank()))
    except UserError as error:
        watch.end(str(error))
        raise
    except RuntimeError:
        watch.has_lost()  # if the first process is gone, this one is ended meanwhile
        raise
    watch.end()
    dist.destroy_process_group()


def _other_process(folder: Path, work: Callable[..., Any], group: dict[str, Any]) -> None:
    end_with_parent()  # the parent may be gone before they have met
    (folder / f"{group['rank']}{STARTED}").touch()
    try:
        follow(work, **group)
    except UserError:  # the main process reports it
        sys.exit(1)
