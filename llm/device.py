"""A device's name, memory, speed of matrix products, and its errors in one line."""

import contextlib
import ctypes
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from llm.errors import UserError, first_line
from llm.runtime import Runtime, computes_in_bf16

# Rows of the square matrices whose product is timed, by the kind of device: so many that the time to launch
# it, and to wait for it, does not matter.
LARGE_PRODUCT = {"cuda": 8192, "mps": 4096, "cpu": 1024}


@contextlib.contextmanager
def device_errors_in_one_line(sizes: Callable[[], str]) -> Iterator[None]:
    """Turn torch's errors about memory and compiling into one line.

    Args:
        sizes: returns the sizes involved and the keys to lower; called when out of memory.

    Raises:
        UserError: out of memory, or torch cannot compile here.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's own OutOfMemoryError is a RuntimeError
        text = str(error)
        if "torch._dynamo" in sys.modules and isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise UserError(
                f"runtime.compile=true: torch cannot compile here ({first_line(error)}); "
                f"use runtime.compile=false"
            ) from error
        if not isinstance(error, MemoryError) and not re.search(
            "out of memory|can't allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED",
            text,
            re.IGNORECASE,
        ):
            raise
        wanted = re.search(r"tried to allocate ([\d.]+ ?\w+)", text, re.IGNORECASE)
        more = f" ({wanted[1]} more requested)" if wanted else ""
        raise UserError(f"out of memory{more}: {sizes()}") from error


def device_name(device: torch.device) -> str:
    """A device's name, such as `AMD EPYC, 2 threads` or `NVIDIA H100`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU"
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def precision_in_words(asked: str, runtime: Runtime) -> str:
    """A run's precision, and the reason if it is not the fastest.

    Args:
        asked: the config's `runtime.precision`.
    """
    kind, fast = runtime.device.type, computes_in_bf16(runtime.device)
    if runtime.precision in ("fp32", "tf32") and fast:
        return f"{runtime.precision}, as runtime.precision={asked} says (bf16 is faster here)"
    why = {
        "cuda": "this GPU has no bf16 arithmetic",
        "mps": "bf16 is not used on Apple's GPUs",
        "cpu": "this processor has no bf16 instructions",
    }[kind]
    if runtime.precision == "fp32":
        return f"fp32: {why}"
    if runtime.precision == "bf16" and not fast and kind != "mps":
        return f"bf16, emulated: {why} (runtime.precision=fp32 is faster)"
    return runtime.precision


def exactness_in_words(runtime: Runtime, deterministic: bool) -> str:
    """What `runtime.deterministic` does on this device; empty if it is off."""
    if not deterministic:
        return ""
    if runtime.device.type == "cuda":
        return "deterministic kernels"
    return "runtime.deterministic=true changes nothing, as CPUs repeat their numbers anyway"


@dataclass(frozen=True)
class Device:
    """A device for which a run is planned."""

    kind: str  # cpu, cuda or mps
    memory_bytes: float  # per process
    bf16_flops: float | None = None  # peak of matrix products, per second; None: to be measured


# By `plan.device`. From NVIDIA's data sheets: without sparsity, accumulating in fp32.
DEVICES: dict[str, Device] = {
    "rtx3090": Device("cuda", 24e9, 71e12),
    "rtx4090": Device("cuda", 24e9, 165e12),
    "l4": Device("cuda", 24e9, 121e12),
    "l40s": Device("cuda", 48e9, 362e12),
    "a100_40gb": Device("cuda", 40e9, 312e12),
    "a100": Device("cuda", 80e9, 312e12),
    "h100": Device("cuda", 80e9, 989e12),
    "h200": Device("cuda", 141e9, 989e12),
    "b200": Device("cuda", 180e9, 2250e12),
}


def device_of(runtime: Runtime, processes: int | None = None) -> Device:
    """This device, as the main process of a run sees it. Processes on a CPU share its memory.

    Args:
        processes: how many share it; None: those of the run.
    """
    kind = runtime.device.type
    if kind == "cuda":
        return Device(kind, runtime.agree(gpu_memory_bytes(runtime.device)))
    return Device(kind, runtime.agree(memory_bytes() / (processes or runtime.processes)))


_stood_for: ContextVar[float | None] = ContextVar("memory of the GPU that is stood for", default=None)


@contextlib.contextmanager
def standing_for_gpu(memory_bytes: float) -> Iterator[None]:
    """Let tensors on the CPU stand for those on a CUDA GPU with this much memory: they are then computed with
    torch's own kernels, in chunks as large as on that GPU. See llm/training/memory.py."""
    token = _stood_for.set(memory_bytes)
    try:
        yield
    finally:
        _stood_for.reset(token)


def gpu_stood_for() -> float | None:
    """The memory of the GPU that tensors on the CPU stand for; None if they stand for none."""
    return _stood_for.get()


def memory_bytes() -> int:
    """The memory of this machine, or the limit of a container or a cluster's job."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_limits()])


def _limits(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """The memory limits of this process's control groups and their parents. Linux has two versions of control
    groups, and a machine may use either or both (cgroups(7))."""
    for line in groups.read_text().splitlines() if groups.exists() else []:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            top, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = top / path.lstrip("/")
        for folder in [group, *group.parents]:
            if folder.is_relative_to(top) and (file := folder / name).is_file():
                limit = file.read_text().strip()
                if limit != "max":
                    yield int(limit)


@cache
def gpu_memory_bytes(device: torch.device) -> int:
    """The memory of a CUDA GPU, used or not."""
    return torch.cuda.get_device_properties(device).total_memory


def measure_matmul_flops(runtime: Runtime, seconds: float = 0.3) -> float:
    """Floating-point operations per second of a large square matrix product in the run's precision."""
    size = LARGE_PRODUCT[runtime.device.type]
    generator = torch.Generator(runtime.device).manual_seed(0)  # training's stream is not touched
    matrix = torch.randn(size, size, dtype=runtime.dtype, device=runtime.device, generator=generator)
    best = float("inf")
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        product = matrix @ matrix
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    if runtime.device.type == "cuda":  # else these matrices and earlier jobs would count
        torch.cuda.reset_peak_memory_stats(runtime.device)
    return 2 * size**3 / best


def forget_peak_memory() -> None:
    """Measure the peak of resident memory from here on: jobs of a sweep may share a process, and each would
    report the largest peak of all before it. Only Linux with glibc can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what is freed, see `start_runtime`
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak; see proc_pid_clear_refs(5)


def peak_memory_bytes(runtime: Runtime) -> int:
    """Peak memory so far: with CUDA, allocated on the GPU; with MPS, which records no peak, what torch holds
    now; otherwise the resident memory of the whole process since `forget_peak_memory`."""
    if runtime.device.type == "cuda":
        return torch.cuda.max_memory_allocated(runtime.device)
    if runtime.device.type == "mps":
        return torch.mps.driver_allocated_memory()
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
