"""Hugging Face's layouts: which models each can describe, and how it names, orders and transposes their
tensors.

A layout is data, in a module of its own, and is listed in llm/checkpoints/huggingface.py, which reads and
writes the files.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from llm.config import ModelConfig
from llm.errors import UserError
from llm.model.gpt import GPTModel, without_weights

Described = dict[str, Any]  # the content of a config.json
# Names of tensors in a block, theirs and ours: the rows of the former, one after the other, are those of the
# latter.
Names = tuple[tuple[str, ...], tuple[str, ...]]

# Our key that turns biases on, and the names in which they end.
_BIASES = {
    "qkv_bias": ("W_query.bias", "W_key.bias", "W_value.bias"),
    "bias": ("out_proj.bias", "layers.0.bias", "layers.2.bias"),
}


@dataclass(frozen=True)
class Layout:
    """The form in which transformers stores one architecture."""

    name: str  # of the architecture, for messages
    keys: tuple[str, ...]  # of a model's config, which it describes whatever their value
    read: Callable[[Described], ModelConfig]  # raises UserError, without naming the file
    describe: Callable[[ModelConfig], Described]
    prefix: str  # before the names of all tensors but the head's
    layers: str  # config.json's key for the number of blocks
    blocks: str  # before the number of each
    outside: dict[str, str]  # names outside of blocks, theirs to ours
    block: Callable[[Described], list[Names]]
    parts: dict[str, Any] = field(default_factory=dict)  # values of other keys; those not here: the defaults
    tied: bool = False  # what a config.json means that does not say whether the head is tied
    turned: bool = False  # whether blocks keep matrices as (in, out), where nn.Linear has (out, in)
    buffers: tuple[str, ...] = ()  # ends of names that old versions saved, and that mean nothing


def misfits(layout: Layout, config: ModelConfig) -> list[str]:
    """The keys of a model's config, such as `norm`, whose values a layout cannot describe."""
    wanted = {item.name: getattr(ModelConfig(), item.name) for item in fields(config)} | layout.parts
    return [
        name
        for name, value in wanted.items()
        if getattr(config, name) != value and (name in layout.parts or name not in layout.keys)
    ]


def spelled(config: ModelConfig, names: list[str]) -> str:
    """Keys of a model and their values, as on the command line."""
    return ", ".join(f"model.{name}={getattr(config, name)}" for name in names)


def refuse_unsupported(described: Described, supported: dict[str, tuple]) -> None:
    """Check the values in a config.json against those supported, of which the first is the default.

    Raises:
        UserError: a value is not supported.
    """
    for name, values in supported.items():
        if described.get(name, values[0]) not in values:
            listed = " or ".join(map(str, values))
            raise UserError(f"{name}={described[name]} is not supported; it must be {listed}")


def whole_numbers(described: Described, names: dict[str, str]) -> dict[str, Any]:
    """The sizes in a config.json by our names, given theirs.

    Raises:
        UserError: one is missing, or no whole number.
    """
    sizes = {ours: described.get(theirs) for ours, theirs in names.items()}
    for ours, size in sizes.items():
        if type(size) is not int:
            raise UserError(f"{names[ours]}={size} is no whole number")
    return sizes


def their_shapes(layout: Layout, described: Described, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's tensors under a layout's names, without its prefix and without the head.
    Nothing is allocated."""
    outside, inside = _our_shapes(config)
    block: dict[str, tuple[int, ...]] = {}
    for theirs, ours in layout.block(described):
        rows, inputs = sum(inside[name][0] for name in ours), inside[ours[0]][1:]
        shape = (rows // len(theirs), *inputs)
        block |= dict.fromkeys(theirs, shape[::-1] if layout.turned else shape)
    wanted = {theirs: outside[ours] for theirs, ours in layout.outside.items()}
    for layer in range(config.n_layers):
        wanted |= {f"{layout.blocks}{layer}.{name}": shape for name, shape in block.items()}
    return wanted


def _our_shapes(config: ModelConfig) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """The shapes of a model's tensors outside of blocks, and of those in a block."""
    model = without_weights(replace(config, n_layers=1))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    first = "trf_blocks.0."
    return shapes, {name.removeprefix(first): shapes[name] for name in shapes if name.startswith(first)}


def to_ours(
    layout: Layout, described: Described, config: ModelConfig, tensors: dict[str, Tensor]
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A layout's tensors, which have the shapes of `their_shapes`, under our names and without the head; and
    the config of their model. Biases that the layout lacks become 0; those that an export had added are
    removed again, unless somebody has trained them."""
    _, block = _our_shapes(config)
    weights = {ours: tensors[theirs] for theirs, ours in layout.outside.items()}
    for there, here in _blocks(layout, config):
        for theirs, ours in layout.block(described):
            whole = _joined([_turned(layout, tensors[there + name]) for name in theirs])
            parts = whole.split([block[name][0] for name in ours])
            weights |= {here + name: part for name, part in zip(ours, parts, strict=True)}
        missing = {name: shape for name, shape in block.items() if here + name not in weights}
        weights |= {here + name: torch.zeros(shape) for name, shape in missing.items()}
    if (key := described.get("zero_biases")) in ("qkv_bias", "bias"):
        added = {name for name in weights if name.endswith(_BIASES[key])}
        if not any(weights[name].any() for name in added):
            off: dict[str, Any] = {key: False}
            config = replace(config, **off)
            weights = {name: tensor for name, tensor in weights.items() if name not in added}
    return config, {name: tensor.contiguous() for name, tensor in weights.items()}


def to_theirs(layout: Layout, described: Described, model: GPTModel) -> dict[str, Tensor]:
    """A model's tensors under a layout's names. Biases that the layout has and the model lacks are 0."""
    weights = model.state_dict()
    tensors = {layout.prefix + theirs: weights[ours] for theirs, ours in layout.outside.items()}
    for there, here in _blocks(layout, model.config):
        for theirs, ours in layout.block(described):
            whole = _joined([_or_zeros(weights, here + name) for name in ours])
            for name, part in zip(theirs, whole.chunk(len(theirs)), strict=True):
                tensors[layout.prefix + there + name] = _turned(layout, part)
    if not model.config.tie_weights:
        tensors["lm_head.weight"] = weights["out_head.weight"]
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _blocks(layout: Layout, config: ModelConfig) -> Iterator[tuple[str, str]]:
    """The prefixes of names in each block, theirs and ours."""
    for layer in range(config.n_layers):
        yield f"{layout.blocks}{layer}.", f"trf_blocks.{layer}."


def _turned(layout: Layout, tensor: Tensor) -> Tensor:
    return tensor.T if layout.turned and tensor.dim() == 2 else tensor


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)  # which would copy even one


def _or_zeros(weights: dict[str, Tensor], name: str) -> Tensor:
    if name in weights:
        return weights[name]
    return torch.zeros(len(weights[name.removesuffix("bias") + "weight"]))
