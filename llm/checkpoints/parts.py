"""Reading tensors that several processes have written, each its own rows.

They are in the format of torch.distributed.checkpoint's `HuggingFaceStorageWriter`: safetensors files that
record for each tensor where in the whole it belongs. (The index of its other format is a pickle, which can
run code.) They can be read by any number of processes.
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
    """The file to which a process writes its part of `name`, such as model.safetensors; named as
    torch.distributed.checkpoint does."""
    return f"{name.removesuffix(SUFFIX)}/shard-{rank + 1:05d}-model-00001-of-00001{SUFFIX}"


def part_names(folder: Path, name: str, listed: Iterable[str] = ()) -> list[str]:
    """The parts of `name` in a checkpoint's folder, both those that exist and those in its list of checksums.
    Empty if `name` is a single file, or is missing."""
    if (folder / name).exists() or name in listed or not name.endswith(SUFFIX):
        return []
    place = name.removesuffix(SUFFIX)
    there = (f"{place}/{file.name}" for file in (folder / place).glob("*"))
    return sorted({*there, *(each for each in listed if each.startswith(f"{place}/"))})


def read_parts(files: list[Path], targets: Callable[[Found], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Read tensors from files in which they are whole or in parts; of a DTensor, only this process's rows.

    Args:
        targets: given the sizes and types of all stored tensors, returns tensors of these sizes to read into,
            by name, for those that are wanted.

    Raises:
        ValueError: a part of a tensor is missing, or the parts do not fit together.
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
            warnings.simplefilter("ignore")  # torch warns that every process reads by itself
            load(into, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise ValueError(str(next(iter(error.failures.values()))[0])) from error
    except (ArithmeticError, AssertionError, LookupError, RuntimeError) as error:
        raise ValueError(str(error)) from error
    return into


def read_whole(files: list[Path]) -> dict[str, Tensor]:
    """All tensors in the given files, put together from their parts.

    Raises:
        ValueError: see `read_parts`.
    """
    return read_parts(
        files,
        lambda found: {name: torch.zeros(size, dtype=dtype) for name, (size, dtype) in found.items()},
    )
