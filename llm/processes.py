"""The processes that share a run: spawned here, or launched by torchrun, perhaps on several machines.

The first one reads the config and starts the run; the others `follow` with what it sends them.
"""

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from llm.config import RuntimeConfig
from llm.errors import UserError
from llm.runtime import Runtime, launched_processes, start_runtime

ERROR = "error.txt"  # why a process other than the first one could not do its part
STARTED = ".started"  # after its rank, once it has


@contextlib.contextmanager
def processes(config: RuntimeConfig, work: Callable[..., Any], *arguments: Any) -> Iterator[Runtime]:
    """This process as the first of `config.processes`. The others `follow` with `work(*arguments, runtime)`:
    those that torchrun has launched, or else new ones."""
    if config.processes == 1:
        yield start_runtime(config)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        group: dict[str, Any] = {}
        others = []
        if not launched_processes():
            group = {"init_method": f"file://{folder / 'meeting-place'}", "world_size": config.processes}
            others = [
                mp.get_context("spawn").Process(
                    target=_other_process, args=(folder, work, {**group, "rank": rank}), daemon=True
                )
                for rank in range(1, config.processes)
            ]
            group["rank"] = 0
        runtime = start_runtime(config)
        for other in others:
            other.start()
        try:
            _wait_for(others, folder)
            _join(group)
            dist.broadcast_object_list([(config, arguments)])
            yield runtime
            dist.destroy_process_group()  # before `join`: NCCL's waits for the others'
            for other in others:
                other.join()
        except RuntimeError as error:  # what torch says when another process is gone
            if not (folder / ERROR).exists():
                raise
            raise UserError((folder / ERROR).read_text("utf-8")) from error
        finally:
            for other in others:
                other.kill()
            if dist.is_initialized():  # after an error: the next run in this process meets anew
                dist.distributed_c10d._abort_process_group()


def _wait_for(others: list[SpawnProcess], folder: Path) -> None:
    """
    Raises:
        UserError: one ended before it started, so that waiting for it would never end.
    """
    while len(list(folder.glob(f"*{STARTED}"))) < len(others):
        if any(other.exitcode for other in others):
            raise UserError(
                "runtime.processes: another process could not begin; a script of yours has to call "
                'pretrain() under `if __name__ == "__main__":`, as each process imports it'
            )
        time.sleep(0.05)


def _join(group: dict[str, Any]) -> None:
    """Objects and flags travel between CPUs by gloo, gradients between GPUs by NCCL. Left to itself, torch
    takes only NCCL where there is a GPU, and sends objects from GPU 0 of every process."""
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", **group)


def follow(work: Callable[..., Any], **group: Any) -> None:
    """Do this process's part of what the first one begins with `processes`.

    Args:
        group: where the processes meet; torchrun says it by itself.
    """
    _join(group)
    told: list[Any] = [None]
    dist.broadcast_object_list(told)
    config, arguments = told[0]
    work(*arguments, start_runtime(config, dist.get_rank()))
    dist.destroy_process_group()


def _other_process(folder: Path, work: Callable[..., Any], group: dict[str, Any]) -> None:
    (folder / f"{group['rank']}{STARTED}").touch()
    try:
        follow(work, **group)
    except UserError as error:  # only the main process reports it
        (folder / ERROR).write_text(str(error), encoding="utf-8")
        sys.exit(1)
