"""Reading and writing folders of weights in Hugging Face's layouts.

No code in a file is ever run, and no size that a file claims is allocated before the file is known to hold
that much.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from llm.checkpoints.gpt2_layout import GPT2
from llm.checkpoints.layout import Described, Layout, misfits, spelled, their_shapes, to_ours, to_theirs
from llm.checkpoints.llama_layout import LLAMA, MISTRAL, QWEN2, QWEN3
from llm.checkpoints.weights import (
    Weights,
    compare_shapes,
    count_layers,
    in_fp32,
    new_folder,
    save_tensors,
    without_wrappers,
)
from llm.config import ModelConfig
from llm.config_rules import validate
from llm.data.byte_level import as_files
from llm.data.tokenizer import end_of_text_id, load_tokenizer
from llm.data.tokenizer_files import holds_tokenizer, kept_files, with_class
from llm.errors import UserError, first_line
from llm.files import as_json, refuse_stand_in
from llm.model.gpt import GPTModel

# By a config.json's `model_type`; the first is the default.
LAYOUTS: dict[str, Layout] = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "qwen3": QWEN3,
    "qwen2": QWEN2,
    "mistral": MISTRAL,
}
_EXPORTED = (GPT2, LLAMA, QWEN3)  # a model is written in the first that describes it

WHAT_TO_GIVE = (
    "give a run or checkpoint folder, a folder in Hugging Face's GPT-2 or Llama layout, the book's .pth "
    "file, or a name on Hugging Face's hub, as gpt2"
)


def read_huggingface(folder: Path, origin: str, tokenizer: str | None = None) -> Weights:
    """The weights of a folder in one of Hugging Face's layouts.

    Args:
        tokenizer: for `load_tokenizer`, if the folder has no tokenizer of its own.

    Raises:
        UserError: a file is missing or damaged, or they are those of a model that is not made of our parts.
    """
    files = _safetensors_files(folder)
    layout, described, config = _read_config(folder / "config.json")
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        for file in files:
            refuse_stand_in(file)
            with safe_open(file, framework="pt") as content:
                found = {name: tuple(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118
            if twice := shapes.keys() & found.keys():
                raise UserError(
                    f"{file} holds {min(twice)} a second time: which of the two counts is unknown"
                )
            shapes |= found
        _check_shapes(layout, described, config, _named_plainly(layout, shapes, origin), origin)
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{origin} is damaged or of another format: {first_line(error)}") from error
    tensors = _named_plainly(layout, in_fp32(tensors, origin), origin)
    config, weights = to_ours(layout, described, config, tensors)
    head = tensors.get("lm_head.weight")
    if head is not None and not config.tie_weights:
        weights["out_head.weight"] = head.contiguous()
    elif head is not None and not torch.equal(head, weights["tok_emb.weight"]):
        raise UserError(
            f"{origin}: config.json says tie_word_embeddings=true{', or nothing' if layout.tied else ''}, "
            f"and lm_head.weight is not {next(iter(layout.outside))}: say false there if the head is one of "
            f"its own, or remove that tensor"
        )
    if holds_tokenizer(folder):  # an absolute path, as a relative one may read like the name of an encoding
        tokenizer = tokenizer or str(folder.absolute())
    return Weights(config, weights, tokenizer or described.get("tiktoken_encoding"), origin)


def _read_config(file: Path) -> tuple[Layout, Described, ModelConfig]:
    """The layout that a config.json is for, its content, and the model that it describes."""
    try:
        refuse_stand_in(file)
        described = dict(json.loads(file.read_text("utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {first_line(error)}") from error
    kind = described.get("model_type", next(iter(LAYOUTS)))
    if not isinstance(kind, str) or kind not in LAYOUTS:
        raise UserError(f"{file}: model_type={kind} is not supported; it must be one of {', '.join(LAYOUTS)}")
    encoding = described.get("tiktoken_encoding")
    if encoding is not None and not re.fullmatch(r"[\w.-]+", str(encoding)):
        raise UserError(f"{file}: tiktoken_encoding={encoding} is not the name of an encoding")
    try:
        config = LAYOUTS[kind].read(described)
        validate(config, "model.")
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    return LAYOUTS[kind], described, config


def _safetensors_files(folder: Path) -> list[Path]:
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if (folder / "model.safetensors.index.json").exists():
        files = [folder / name for name in shards(folder / "model.safetensors.index.json")]
        if missing := [file.name for file in files if not file.exists()]:
            raise UserError(f"{folder}: {missing[0]}, which its index names, is missing: download it too")
        return files
    if list(folder.glob("*.bin")):
        raise UserError(
            f"{folder} holds its weights as a pickle, which can run code: give one with model.safetensors"
        )
    raise UserError(f"{folder} holds no model.safetensors; {WHAT_TO_GIVE}")


def shards(index: Path) -> list[str]:
    """The file names in a model.safetensors.index.json, none of which leads out of its folder."""
    try:
        refuse_stand_in(index)
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        outside = [name for name in names if not re.fullmatch(r"[\w-][\w.-]*", name)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is damaged or of another format: {first_line(error)}") from error
    if outside:
        raise UserError(f"{index} names {outside[0]}, which is not a file of its folder")
    return names


def _named_plainly(layout: Layout, tensors: dict[str, Any], origin: str) -> dict[str, Any]:
    """Tensors without the prefixes of a layout and of wrappers, and without buffers that old versions
    saved."""
    plain: dict[str, Any] = {}
    for name, tensor in without_wrappers(tensors).items():
        short = name.removeprefix(layout.prefix)
        if short in plain:
            raise UserError(f"{origin} holds {short} a second time: which of the two counts is unknown")
        if not short.endswith(layout.buffers):
            plain[short] = tensor
    return plain


def _check_shapes(
    layout: Layout,
    described: Described,
    config: ModelConfig,
    found: dict[str, tuple[int, ...]],
    origin: str,
) -> None:
    layers = count_layers(found, layout.blocks)
    if layers != config.n_layers:  # before a list for a billion layers is made
        raise UserError(
            f"{origin}: config.json says {layout.layers}={config.n_layers}, and the weights have {layers}"
        )
    wanted = their_shapes(layout, described, config)
    if not config.tie_weights and "lm_head.weight" not in found:
        raise UserError(
            f"{origin}: config.json says tie_word_embeddings=false{'' if layout.tied else ', or nothing'}, "
            f"and there is no lm_head.weight"
        )
    if "lm_head.weight" in found:
        wanted["lm_head.weight"] = (config.vocab_size, config.emb_dim)
    compare_shapes(wanted, found, origin)


def export_huggingface(model: GPTModel, tokenizer: str, folder: Path) -> Described:
    """Write a folder for transformers' `from_pretrained`, including the tokenizer's files: those that it was
    read from, if there are any. Returns its config.json.

    Raises:
        UserError: it cannot be written, or no layout can describe the model.
    """
    layout = _layout_of(model.config)
    described = layout.describe(model.config)
    described |= {"bos_token_id": None, "eos_token_id": None, "dtype": "float32"}
    tensors = to_theirs(layout, described, model)
    with new_folder(folder, sum(tensor.nbytes for tensor in tensors.values())) as temporary:
        save_tensors(tensors, temporary / "model.safetensors", {"format": "pt"})
        encoding = load_tokenizer(tokenizer)
        described |= {f"{end}_token_id": end_of_text_id(encoding) for end in ("bos", "eos")}
        if files := kept_files(encoding):
            # transformers knows GPT-2's class by the model's type, and no longer where that is another
            for name, content in (files if layout is GPT2 else with_class(files)).items():
                (temporary / name).write_bytes(content)
        else:
            described |= {"tiktoken_encoding": tokenizer}
            contents = as_files(encoding)
            contents["tokenizer_config.json"]["model_max_length"] = model.config.context_length
            for name, value in contents.items():
                _write(temporary / name, value)
        _write(temporary / "config.json", described)
    return described


def _layout_of(config: ModelConfig) -> Layout:
    """The layout in which a model is written.

    Raises:
        UserError: none describes it.
    """
    other = {layout.name: misfits(layout, config) for layout in _EXPORTED}
    for layout in _EXPORTED:
        if not other[layout.name]:
            return layout
    first, *rest = other.values()
    if shared := [name for name in first if all(name in each for each in rest)]:
        what = f"no model that can be written for transformers has {spelled(config, shared)}"
    else:
        lacks = [f"{name} has no {spelled(config, names)}" for name, names in other.items()]
        what = f"transformers has no model of all these parts: {'; '.join(lacks)}"
    raise UserError(
        f"format=huggingface: {what} (what can be exported: GPT-2's parts; rmsnorm, rotary and swiglu, as "
        f"Llama; these with qk_norm and without model.bias, as Qwen 3)"
    )


def _write(file: Path, value: Any) -> None:
    file.write_text(as_json(value), encoding="utf-8")
