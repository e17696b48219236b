"""Device, precision, threads, seeds and the processes that share a run."""

import contextlib
import ctypes
import os
import platform
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from llm.config import RuntimeConfig
from llm.errors import UserError, first_line

ERROR = "error.txt"  # what another process than the main one could not do
BEGUN = ".begun"  # after its rank, once it has


@dataclass(frozen=True)
class Runtime:
    """Where a process computes, in which precision, and which of how many it is."""

    device: torch.device
    precision: str  # fp32, bf16, or int8: weights in int8, products in bf16, for inference
    rank: int = 0
    processes: int = 1
    compile: bool = False  # see `RuntimeConfig`

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.precision == "fp32" else torch.bfloat16

    def autocast(self) -> contextlib.AbstractContextManager:
        """Matrix products in bf16 over fp32 weights, or nothing at all in fp32."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def share(self, batch: Tensor) -> Tensor:
        """This process's rows of a batch (batch, …), on the device."""
        rows = batch[self.rank :: self.processes]
        if self.device.type == "cuda":  # from pinned memory, a copy does not wait for what the GPU is doing
            return rows.pin_memory().to(self.device, non_blocking=True)
        return rows.to(self.device)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a scalar over all processes."""
        if self.processes > 1:
            dist.all_reduce(value)
            value /= self.processes
        return value

    def agree(self, value: float) -> float:
        """The main process's value, in every process."""
        if self.processes == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64)  # on the CPU, where gloo does not wait for the GPU
        dist.broadcast(shared, src=0)
        return shared.item()

    def gather(self, value: Any) -> list[Any]:
        """One value of each process, in order of rank."""
        if self.processes == 1:
            return [value]
        values: list[Any] = [None] * self.processes
        dist.all_gather_object(values, value)
        return values


def launched_processes() -> int | None:
    """How many processes torchrun has launched, if this is one of them."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


def start_runtime(config: RuntimeConfig, rank: int = 0) -> Runtime:
    """Choose the device and the precision.

    Raises:
        UserError: the device asked for is not there, or cannot do the precision asked for.
    """
    local_rank, local_processes = rank, config.processes
    if launched_processes():  # perhaps on several machines
        local_rank, local_processes = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    elif config.processes > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_processes))
    kind = config.device
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind == "auto":
        kind = next(name for name in ("cuda", "mps", "cpu") if available[name])
    if not available[kind]:
        raise UserError(
            f"runtime.device={kind}: torch {torch.__version__} finds no such device here; "
            f"use runtime.device=auto or cpu"
        )
    if kind == "cuda" and local_processes > torch.cuda.device_count():
        raise UserError(
            f"runtime.processes={local_processes}: each needs a GPU of its own, "
            f"and there are {torch.cuda.device_count()}"
        )
    if kind == "mps" and config.processes > 1:
        raise UserError(
            f"runtime.processes={config.processes}: Apple has one GPU; use 1, or runtime.device=cpu"
        )
    if kind == "cpu":
        _keep_freed_memory()
    device = torch.device(kind)
    if kind == "cuda":
        device = torch.device(kind, local_rank)
        torch.cuda.set_device(device)
    precision = config.precision
    if precision == "int8" and kind != "cpu":
        raise UserError(f"runtime.precision=int8 is for the CPU, and this is {kind}: use auto, bf16 or fp32")
    if precision == "auto":
        precision = "bf16" if computes_in_bf16(device) else "fp32"
    return Runtime(device, precision, rank, config.processes, config.compile)


def _keep_freed_memory() -> None:
    """Let glibc reuse large freed blocks. By default it gives each back to the kernel and asks for it anew
    at every update; the page faults took a quarter of the time of a small model's update."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 arithmetic of its own, so that it is not emulated and slow."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


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
        UserError: one ended before it began; it would be waited for in vain.
    """
    while len(list(folder.glob(f"*{BEGUN}"))) < len(others):
        if any(other.exitcode for other in others):
            raise UserError(
                "runtime.processes: another process could not begin; a script of yours has to call "
                'pretrain() under `if __name__ == "__main__":`, as each process imports it'
            )
        time.sleep(0.05)


def _join(group: dict[str, Any]) -> None:
    """Objects and flags travel between CPUs by gloo, gradients between GPUs by NCCL. Left to itself, torch
    takes NCCL alone where there is a GPU, and sends objects from GPU 0 of every process."""
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
    (folder / f"{group['rank']}{BEGUN}").touch()
    try:
        follow(work, **group)
    except UserError as error:  # the main process says it, and alone
        (folder / ERROR).write_text(str(error), encoding="utf-8")
        sys.exit(1)


@contextlib.contextmanager
def device_errors_in_one_line(sizes: Callable[[], str]) -> Iterator[None]:
    """
    Args:
        sizes: gives, once memory is out, the sizes at play and the keys to lower.

    Raises:
        UserError: memory is out, or torch cannot compile here.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's own OutOfMemoryError is a RuntimeError
        text = str(error)
        if "torch._dynamo" in sys.modules and isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise UserError(
                f"runtime.compile=true: torch cannot compile here ({first_line(error)}); leave it out"
            ) from error
        if not isinstance(error, MemoryError) and not re.search(
            "out of memory|can't allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED",
            text,
            re.IGNORECASE,
        ):
            raise
        wanted = re.search(r"tried to allocate ([\d.]+ ?\w+)", text, re.IGNORECASE)
        more = f" ({wanted[1]} more were asked for)" if wanted else ""
        raise UserError(f"out of memory{more}: {sizes()}") from error


def device_name(device: torch.device) -> str:
    """The device in words, as `AMD EPYC, 2 threads` or `NVIDIA H100`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU"
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def measure_matmul_flops(runtime: Runtime, seconds: float = 0.3) -> float:
    """Floating-point operations a second of a large square matrix product in the run's precision."""
    # So large that launching it and waiting for it take no time to speak of.
    size = {"cuda": 8192, "mps": 4096}.get(runtime.device.type, 1024)
    generator = torch.Generator(runtime.device).manual_seed(0)  # training's stream is not touched
    matrix = torch.randn(size, size, dtype=runtime.dtype, device=runtime.device, generator=generator)
    best = float("inf")
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        product = matrix @ matrix
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    if runtime.device.type == "cuda":  # else these matrices would count, and the jobs before
        torch.cuda.reset_peak_memory_stats(runtime.device)
    return 2 * size**3 / best


def peak_memory_bytes(runtime: Runtime) -> int:
    """The most memory held so far: on the GPU under CUDA, else of the whole process."""
    if runtime.device.type == "cuda":
        return torch.cuda.max_memory_allocated(runtime.device)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
