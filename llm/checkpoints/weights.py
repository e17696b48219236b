"""Weights in memory, from whatever format, and building a model from them."""

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llm.config import ModelConfig, PretrainConfig
from llm.errors import UserError, first_line
from llm.files import replacing
from llm.model.gpt import GPTModel


@dataclass
class Weights:
    """Weights, named and shaped as in `GPTModel(model)`, and what is known about them."""

    model: ModelConfig
    tensors: dict[str, Tensor]
    tokenizer: str | None  # a name or a folder for `load_tokenizer`; None: unknown
    origin: str  # where they come from, for messages
    optimizer_state: dict[str, dict[str, Tensor | float]] | None = None  # AdamW's, if it came with them
    trained: PretrainConfig | None = None  # the config of their run, if it is one of ours
    folder: Path | None = None  # the checkpoint that they come from, if it is one of ours


def build_model(weights: Weights) -> GPTModel:
    """Build the model of given weights, in fp32 and in evaluation mode. The model takes over the tensors.

    Raises:
        UserError: a tensor is missing, has another shape, or does not belong.
    """
    config, tensors = weights.model, weights.tensors
    layers = count_layers(tensors, "trf_blocks.")
    embeddings = tensors.get("tok_emb.weight", torch.empty(0))
    found = {"n_layers": layers, "vocab_size": embeddings.shape[0], "emb_dim": embeddings.shape[-1]}
    for name, size in found.items():  # before a model of a billion layers is built
        if getattr(config, name) != size:
            raise UserError(
                f"{weights.origin} holds another model: {name}={size}, not {getattr(config, name)}"
            )
    with _WithoutInitialisation():
        model = GPTModel(config)
    check_shapes(model, tensors, weights.origin)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return model.eval()


def count_layers(names: Iterable[str], prefix: str) -> int:
    """How many blocks there are, by the names of their tensors, such as `trf_blocks.0.norm1.scale`."""
    return len({name.split(".")[1] for name in names if name.startswith(prefix)})


class _WithoutInitialisation(TorchFunctionMode):
    """Skips random initialisation, so that memory that will be replaced is never touched. Unlike on the meta
    device, buffers that a checkpoint does not hold are computed as usual."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        return func(*args, **(kwargs or {}))


def check_shapes(model: nn.Module, tensors: dict[str, Tensor], origin: Path | str) -> None:
    """Check that tensors are those of a model.

    Raises:
        UserError: a tensor is missing, has another shape, or does not belong.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    compare_shapes(wanted, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, origin)


def compare_shapes(
    wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], origin: Path | str
) -> None:
    """Check that the shapes of tensors are as wanted.

    Raises:
        UserError: a tensor is missing, has another shape, or does not belong.
    """
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{origin} holds another model: {name} has shape {found.get(name, 'nothing')}, "
                f"and the config's model wants {wanted.get(name, 'nothing')}"
            )


def in_fp32(tensors: dict[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Foreign weights in fp32.

    Raises:
        UserError: a tensor holds other than floating-point numbers, or one that is not finite.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():  # quantised weights mean nothing without their scales
            raise UserError(f"{origin}: {name} is of {tensor.dtype}, and not of floating-point numbers")
    numbers = {name: tensor.float() for name, tensor in tensors.items()}
    refuse_not_finite(numbers, origin)
    return numbers


def refuse_not_finite(tensors: dict[str, Tensor], origin: str) -> None:
    """Refuse NaN and infinity, which come from diverged training or damage.

    Raises:
        UserError: a tensor holds one.
    """
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise UserError(
                f"{origin}: {name} holds numbers that are not finite (NaN or infinity): give other weights, "
                f"such as an earlier checkpoint"
            )


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are finite; in one pass, without a temporary tensor."""
    return not tensor.numel() or all(bound.isfinite() for bound in torch.aminmax(tensor.detach()))


# Prefixes that torch.compile, FSDP and activation checkpointing add to the names of wrapped modules.
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def without_wrappers(tensors: dict[str, Any]) -> dict[str, Any]:
    """Tensors under the names that they had before their model was compiled, or wrapped by DDP or FSDP."""
    plain = {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    if all(name.startswith("module.") for name in plain):
        plain = {name.removeprefix("module."): tensor for name, tensor in plain.items()}
    return plain if len(plain) == len(tensors) else tensors


@contextlib.contextmanager
def new_folder(folder: Path, size: int) -> Iterator[Path]:
    """`replacing`, for a folder with `size` bytes of tensors."""
    with replacing(folder, size) as temporary:
        temporary.mkdir()
        try:
            yield temporary
        except RuntimeError as error:  # how torch reports a full disk
            cause = error.__context__
            raise (cause if isinstance(cause, OSError) else OSError(first_line(error))) from error


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, with the permissions of any new file.

    Raises:
        OSError: it cannot be written.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # how this library reports a full disk
        raise OSError(first_line(error)) from error
    if path.stat().st_mode != mode:  # safetensors makes it readable for the owner only
        path.chmod(mode)
