"""The runtime of a process: its device, its precision, and its rank among the processes of a run."""

import contextlib
import ctypes
import os
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm.config import RuntimeConfig
from llm.errors import UserError
from llm.files import cache_folder
from llm.launched import launched_processes


@dataclass(frozen=True)
class Runtime:
    """Where a process computes, in which precision, and its rank among the processes of a run."""

    device: torch.device
    precision: str  # fp32, tf32, bf16, or int8: weights in int8, products in bf16, for inference
    rank: int = 0
    processes: int = 1
    compile: bool = False  # see `RuntimeConfig`
    graph: str = "auto"
    # Pinned buffers by shape and type, each with an event that follows the newest copy from it; see `share`.
    pinned: dict[tuple[torch.Size, torch.dtype], deque[tuple[Tensor, torch.cuda.Event]]] = field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def queues(self) -> bool:
        """Whether the device works through a queue, so that this process should never wait for the newest
        work in it. (Apple's GPUs do too, but that was not tried.)"""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.precision in ("fp32", "tf32") else torch.bfloat16

    def autocast(self) -> contextlib.AbstractContextManager:
        """Matrix products in bf16 over fp32 weights, or nothing at all in fp32 and tf32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        # A cache of bf16 weights must be off when a CUDA graph is captured; each weight is used once anyway.
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)

    def share(self, batch: Tensor) -> Tensor:
        """This process's rows of a batch (batch, …), on the device."""
        rows = batch[self.rank :: self.processes]
        if self.device.type != "cuda":
            return rows.to(self.device)
        # A copy from pinned memory does not wait for the GPU's current work. Pinning is slow, so buffers are
        # reused in turn: four, for the inputs and targets of two batches.
        kind = rows.shape, rows.dtype
        if kind not in self.pinned:
            self.pinned[kind] = deque(
                (torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True), torch.cuda.Event())
                for _ in range(4)
            )
        buffers = self.pinned[kind]
        buffers.rotate()
        buffer, copied = buffers[0]
        copied.synchronize()  # until the last copy from this buffer is done, if there was one
        buffer.copy_(rows)
        shared = buffer.to(self.device, non_blocking=True)
        copied.record()
        return shared

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
        shared = torch.tensor(value, dtype=torch.float64)  # on the CPU, as gloo does not wait for the GPU
        dist.broadcast(shared, src=0)
        return shared.item()

    def told(self, value: Any) -> Any:
        """The main process's value, of any type, in every process."""
        values = [value]
        if self.processes > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in order of rank."""
        if self.processes == 1:
            return [value]
        values: list[Any] = [None] * self.processes
        dist.all_gather_object(values, value)
        return values


class Late:
    """Numbers that the device may still be computing; their copy to the CPU is queued behind that work."""

    def __init__(self, numbers: Tensor) -> None:
        # From CUDA, torch makes a non-blocking copy in pinned memory.
        self.numbers = numbers.to("cpu", non_blocking=numbers.is_cuda, copy=True)
        self.copied = torch.cuda.Event() if numbers.is_cuda else None
        if self.copied is not None:
            self.copied.record()

    def read(self) -> Any:
        """Wait for the numbers; returns nested lists of the tensor's shape."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.numbers.tolist()


def start_runtime(config: RuntimeConfig, rank: int = 0) -> Runtime:
    """Choose the device and the precision.

    Raises:
        UserError: the device does not exist, or does not support what the config asks for.
    """
    local_rank, local_processes = rank, config.processes
    if launched_processes():  # perhaps on several machines
        local_rank, local_processes = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    elif config.processes > 1:
        torch.set_num_threads(max(1, _own_cores(local_processes)))
    kind = device_kind(config)
    if kind == "cuda" and local_processes > torch.cuda.device_count():
        raise UserError(
            f"runtime.processes={local_processes}: each needs a GPU of its own, "
            f"and there are {torch.cuda.device_count()}"
        )
    if config.sharding != "none" and config.processes == 1:
        raise UserError(
            f"runtime.sharding={config.sharding} shares a model among the processes of training, and "
            f"runtime.processes=1: set more of them, or runtime.sharding=none"
        )
    if kind == "mps" and config.processes > 1:
        raise UserError(
            f"runtime.processes={config.processes}: Apple has one GPU; use 1, or runtime.device=cpu"
        )
    if config.deterministic and kind == "mps":
        raise UserError("runtime.deterministic=true: torch has such kernels for CUDA, not for MPS; remove it")
    if config.graph == "on" and (kind != "cuda" or config.processes > 1):
        raise UserError(
            f"runtime.graph=on is for CUDA and one process, and this is {kind} with "
            f"runtime.processes={config.processes}: use runtime.graph=auto or off"
        )
    if kind == "cuda" or config.compile is True:
        # Set before torch's compiler is imported, which otherwise keeps compiled code in a temporary folder.
        # As it is code that will run, it belongs in the user's own cache, not in data.cache_dir.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder(None) / "compiled"))
    if kind == "cpu":
        _keep_freed_memory()
    device = torch.device(kind)
    if kind == "cuda":
        device = torch.device(kind, local_rank)
        torch.cuda.set_device(device)
        # cuBLAS reads this once, before the first product; torch demands it for deterministic products.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        use_deterministic_kernels(config.deterministic)
    precision = config.precision
    if precision == "int8" and kind != "cpu":
        raise UserError(f"runtime.precision=int8 is for the CPU, and this is {kind}: use auto, bf16 or fp32")
    if precision == "tf32" and not computes_in_tf32(device):
        raise UserError(
            f"runtime.precision=tf32 is for NVIDIA's GPUs from Ampere on, and this is "
            f"{torch.cuda.get_device_name(device) if kind == 'cuda' else kind}: use auto, bf16 or fp32"
        )
    if precision == "auto":
        precision = "bf16" if computes_in_bf16(device) else "fp32"
    set_product_precision(precision)
    return Runtime(device, precision, rank, config.processes, config.compile is True, config.graph)


def _own_cores(local_processes: int) -> int:
    """The cores for one of the processes on this machine: those that Slurm bound it to, or its share of all
    that may be used."""
    there_are = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else there_are
    is_task = launched_processes() is not None and not dist.is_torchelastic_launched()
    return usable if is_task and usable < there_are else usable // local_processes


def device_kind(config: RuntimeConfig) -> str:
    """`cpu`, `cuda` or `mps`: what was asked for, or the fastest available.

    Raises:
        UserError: it is not available.
    """
    kind = config.device
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind == "auto":
        kind = next(name for name in ("cuda", "mps", "cpu") if available[name])
    if not available[kind]:
        raise UserError(
            f"runtime.device={kind}: torch {torch.__version__} finds no such device here; "
            f"use runtime.device=auto or cpu"
        )
    return kind


def set_product_precision(precision: str) -> None:
    """Let CUDA compute products of fp32 exactly or in tf32 (factors rounded to 10 bits, accumulated in fp32).

    torch has newer settings for this, such as `torch.backends.cuda.matmul.fp32_precision`. If only those are
    set, reading the older ones, as its compiler does, is an error; this call sets both.
    """
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def use_deterministic_kernels(wanted: bool) -> None:
    """Set whether CUDA may use only kernels that always give the same numbers. Operations without one are
    then an error; a warning would not do, as attention's backward pass is deterministic in this mode only."""
    if wanted != torch.are_deterministic_algorithms_enabled():  # the call imports torch's compiler
        torch.use_deterministic_algorithms(wanted)
        # Filling uninitialised memory takes time, and none is read here.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextlib.contextmanager
def any_kernels() -> Iterator[None]:
    """Allow all kernels, whatever `runtime.deterministic` says. Sampling needs cumulative sums, for which
    CUDA has no deterministic kernel; in fp64, the order of summation changes the 16th digit only."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    use_deterministic_kernels(False)
    try:
        yield
    finally:
        use_deterministic_kernels(deterministic)


def _keep_freed_memory() -> None:
    """Let glibc reuse large freed blocks. By default it returns each to the kernel and requests it again in
    every update; the page faults took a quarter of the time of a small model's update."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def precisions_of(device: torch.device) -> list[str]:
    """The precisions that the device supports natively, the most exact first."""
    has = {"fp32": True, "tf32": computes_in_tf32(device), "bf16": computes_in_bf16(device)}
    return [precision for precision in has if has[precision]]


def computes_in_tf32(device: torch.device) -> bool:
    """Whether the device is an NVIDIA GPU with TF32, as all since Ampere are."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) >= (8, 0)


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the device supports bf16 natively, rather than emulating it slowly."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        has_instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        # torch may be told not to use them, by ATEN_CPU_CAPABILITY=avx2
        return has_instructions and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return False
