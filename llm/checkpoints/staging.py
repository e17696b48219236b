"""Copying tensors to shared memory, from which another process writes them to safetensors files."""

import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from llm.checkpoints import file_writer

ALIGNMENT = mmap.PAGESIZE  # of files in the shared memory
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Rows(NamedTuple):
    """The rows of a sharded tensor that one process keeps."""

    own: Tensor  # (rows, …)
    first: int  # number of the first row
    shape: tuple[int, ...]  # of the whole tensor


Tensors = Mapping[str, Tensor | Rows]
Place = tuple[int, int]  # begin and end in the shared memory


class Staging:
    """Shared memory for the contents of files, and the process that writes them."""

    def __init__(self) -> None:
        if hasattr(os, "memfd_create"):  # on Linux; /dev/shm may be small, as in containers
            self._descriptor = os.memfd_create("checkpoint")
        else:
            with tempfile.TemporaryFile() as file:
                self._descriptor = os.dup(file.fileno())
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._writer: subprocess.Popen[bytes] | None = None

    def stage(self, files: Mapping[Path, Tensors]) -> dict[Path, Place]:
        """Copy tensors from any device, as the contents of safetensors files; returns where each file is in
        the memory. Overwrites what was staged before, and reuses its memory."""
        headers = {name: _header(tensors) for name, tensors in files.items()}
        places: dict[Path, Place] = {}
        end = 0
        for name, (header, sizes) in headers.items():
            begin = -(-end // ALIGNMENT) * ALIGNMENT
            end = begin + len(header) + sum(sizes.values())
            places[name] = begin, end
        if end > len(self._bytes):
            os.ftruncate(self._descriptor, end)
            self._bytes = torch.frombuffer(mmap.mmap(self._descriptor, end), dtype=torch.uint8)
        for name, (header, sizes) in headers.items():
            place = places[name][0]
            self._bytes[place : place + len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
            place += len(header)
            for key, size in sizes.items():
                tensor = _own(files[name][key])
                if size:
                    self._bytes[place : place + size].view(tensor.dtype).view(tensor.shape).copy_(tensor)
                place += size
        return places

    def write(self, files: Mapping[Path, Place]) -> dict[Path, str]:
        """Write staged files to new paths, wait for that, and return their SHA-256 checksums.

        Raises:
            OSError: a file cannot be written, or the writing process has died.
        """
        if self._writer is None or self._writer.poll() is not None:
            self._writer = subprocess.Popen(
                [sys.executable, "-I", "-S", file_writer.__file__, str(self._descriptor)],
                pass_fds=[self._descriptor],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        writer = self._writer
        assert writer.stdin
        assert writer.stdout
        request = json.dumps({str(path): place for path, place in files.items()})
        try:
            writer.stdin.write(f"{request}\n".encode())
            writer.stdin.flush()
            answer = json.loads(writer.stdout.readline() or "{}")
        except BrokenPipeError:
            answer = {}
        if "error" in answer:
            raise OSError(answer["error"])
        if not answer:
            status = writer.wait()
            how = (
                f"was killed by {signal.Signals(-status).name}"
                if status < 0
                else f"ended with status {status}"
            )
            raise OSError(f"the process that writes checkpoints {how}")
        return {path: answer[str(path)] for path in files}

    def close(self) -> None:
        """End the writing process, and free the memory."""
        if self._writer and self._writer.stdin and self._writer.stdout:
            self._writer.stdin.close()
            self._writer.wait()
            self._writer.stdout.close()
        self._writer = None
        self._bytes = torch.empty(0, dtype=torch.uint8)
        os.close(self._descriptor)


def bytes_of(tensors: Tensors) -> int:
    """The size of tensors in bytes; rows count as the whole tensors that they belong to."""
    return sum(prod(tensor.shape) * _own(tensor).itemsize for tensor in tensors.values())


def _own(tensor: Tensor | Rows) -> Tensor:
    return tensor.own if isinstance(tensor, Rows) else tensor


def _header(tensors: Tensors) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file, as its library writes it, and the size of each tensor in bytes, in
    the file's order. If some are rows of larger tensors, the header says which, as `HuggingFaceStorageWriter`
    of torch.distributed.checkpoint does."""
    ordered = sorted(tensors, key=lambda name: (-_own(tensors[name]).itemsize, name))
    header: dict[str, object] = {}
    if any(isinstance(tensor, Rows) for tensor in tensors.values()):
        offsets = {}
        for name in ordered:
            part = tensors[name]
            begin = [0] * len(part.shape)
            if isinstance(part, Rows):
                begin[0] = part.first
            offsets[name] = {"saved_offsets": begin}
        header["__metadata__"] = {
            "DCP_SHARDING_INFO": json.dumps(offsets),
            "DCP_VERSION": "1.0",
            "format": "pt",
        }
    sizes, end = {}, 0
    for name in ordered:
        tensor = _own(tensors[name])
        sizes[name] = tensor.itemsize * prod(tensor.shape)
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + sizes[name]],
        }
        end += sizes[name]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, sizes
