"""Tensors that several processes have written, each its own rows: where they lie, and reading them.

They are in the format of torch.distributed.checkpoint's `HuggingFaceStorageWriter`: safetensors files that
say of each tensor where in the whole one it belongs. (The index of its other format is a pickle, which can
run code.) Whoever reads them need not be as many processes.
"""

import warnings
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SUFFIX = ".safetensors"

Found = dict[str, tuple[torch.Size, torch.dtype]]  # sizes and types of whole tensors, by name


def part_name(name: str, rank: int) -> str:
    """Under which a process writes its part of what is `name`, as model.safetensors, when it is in one file;
    torch.distributed.checkpoint gives such names."""
    return f"{name.removesuffix(SUFFIX)}/shard-{rank + 1:05d}-model-00001-of-00001{SUFFIX}"


def part_names(folder: Path, name: str, listed: Iterable[str] = ()) -> list[str]:
    """The names of the parts in a checkpoint's folder of what is `name` when it is in one file: of those that
    are there, and those that its checksums list. None if it is in one file, or missing."""
    if (folder / name).exists() or name in listed or not name.endswith(SUFFIX):
        return []
    place = name.removesuffix(SUFFIX)
    there = (f"{place}/{file.name}" for file in (folder / place).glob("*"))
    return sorted({*there, *(each for each in listed if each.startswith(f"{place}/"))})


def read_parts(files: list[Path], targets: Callable[[Found], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Read tensors, or of DTensors the rows that this process keeps, from files in which they lie whole or in
    parts.

    Args:
        targets: given the sizes and types of all that there is, gives tensors to read into, by name: some of
            them, of these sizes.

    Raises:
        ValueError: a part of a tensor is missing, or they do not fit together.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load
    from torch.distributed.checkpoint.api import CheckpointException

    reader = HuggingFaceStorageReader(str(files[0].parent))
    reader.fs.ls = lambda path: [str(file) for file in files]  # type: ignore[method-assign]
    try:
        chunks: dict[str, Any] = reader.read_metadata().state_dict_metadata
        for name, tensor in chunks.items():
            if sum(prod(chunk.sizes) for chunk in tensor.chunks) != prod(tensor.size):
                raise ValueError(f"a part of {name} is missing")
        into = targets({name: (each.size, each.properties.dtype) for name, each in chunks.items()})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that each process reads for itself
            load(into, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise ValueError(str(next(iter(error.failures.values()))[0])) from error
    except (ArithmeticError, AssertionError, LookupError, RuntimeError) as error:
        raise ValueError(str(error)) from error
    return into


def read_whole(files: list[Path]) -> dict[str, Tensor]:
    """All tensors that lie in parts in given files.

    Raises:
        ValueError: see `read_parts`.
    """
    return read_parts(
        files,
        lambda found: {name: torch.zeros(size, dtype=dtype) for name, (size, dtype) in found.items()},
    )
