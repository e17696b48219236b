"""GPT-2 weights in Hugging Face's layout, in and out.

Nothing here runs code that a file brings along, and no size that a file claims is allocated before the file
is seen to hold it.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from llm.checkpoints.checkpoint import save_tensors
from llm.checkpoints.weights import (
    Weights,
    compare_shapes,
    count_layers,
    in_fp32,
    new_folder,
    refuse_unless_gpt2,
    without_wrappers,
)
from llm.config import ModelConfig, validate
from llm.data.tokenizer import END_OF_TEXT, end_of_text_id, load_tokenizer
from llm.data.tokenizer_files import as_huggingface, holds_tokenizer, kept_files
from llm.errors import UserError, first_line
from llm.files import as_json, refuse_stand_in
from llm.model.gpt import GPTModel

WHAT_TO_GIVE = (
    "give a run or checkpoint folder, a folder in Hugging Face's GPT-2 layout, the book's .pth file, or a "
    "name on Hugging Face's hub, as gpt2"
)

# Hugging Face's names in a block, to ours. Its Conv1D keeps matrices as (in, out), nn.Linear as (out, in).
_BLOCK = {
    "ln_1.weight": "norm1.scale",
    "ln_1.bias": "norm1.shift",
    "attn.c_proj.weight": "att.out_proj.weight",
    "attn.c_proj.bias": "att.out_proj.bias",
    "ln_2.weight": "norm2.scale",
    "ln_2.bias": "norm2.shift",
    "mlp.c_fc.weight": "ff.layers.0.weight",
    "mlp.c_fc.bias": "ff.layers.0.bias",
    "mlp.c_proj.weight": "ff.layers.2.weight",
    "mlp.c_proj.bias": "ff.layers.2.bias",
}
_OUTSIDE = {
    "wte.weight": "tok_emb.weight",
    "wpe.weight": "pos_emb.weight",
    "ln_f.weight": "final_norm.scale",
    "ln_f.bias": "final_norm.shift",
}
_PROJECTIONS = ("W_query", "W_key", "W_value")  # c_attn holds the three side by side
_DROPPED = ("embd", "attn", "resid")  # where dropout is
_SUPPORTED: dict[str, tuple] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True, False),
    "quantization_config": (None,),
}  # the values with which GPT-2 is the book's model; the first is what a config means that does not say


def read_huggingface(folder: Path, origin: str, tokenizer: str | None = None) -> Weights:
    """The weights of a folder in Hugging Face's GPT-2 layout.

    Args:
        tokenizer: where it is not the folder's own files that say.

    Raises:
        UserError: a file is missing or damaged, or they are not those of a GPT-2.
    """
    files = _safetensors_files(folder)
    config, described = _huggingface_config(folder / "config.json")
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
        _check_huggingface_shapes(config, _named_plainly(shapes), origin)
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{origin} is damaged or of another format: {first_line(error)}") from error
    tensors = _named_plainly(in_fp32(tensors, origin))
    head = tensors.pop("lm_head.weight", None)
    weights = {ours: tensors[theirs] for theirs, ours in _OUTSIDE.items()}
    for layer in range(config.n_layers):
        block, theirs = f"trf_blocks.{layer}.", f"h.{layer}."
        for name, ours in _BLOCK.items():
            tensor = tensors[theirs + name]
            weights[block + ours] = tensor.T if tensor.dim() == 2 else tensor
        for kind in ("weight", "bias"):
            thirds = tensors[f"{theirs}attn.c_attn.{kind}"].chunk(3, dim=-1)
            for projection, third in zip(_PROJECTIONS, thirds, strict=True):
                weights[f"{block}att.{projection}.{kind}"] = third.T if third.dim() == 2 else third
    if head is not None and not config.tie_weights:
        weights["out_head.weight"] = head
    elif head is not None and not torch.equal(head, weights["tok_emb.weight"]):
        raise UserError(
            f"{origin}: config.json says tie_word_embeddings=true, or nothing, and lm_head.weight is not "
            f"wte.weight: say false there if the head is one of its own, or remove that tensor"
        )
    if holds_tokenizer(folder):  # an absolute path, as a relative one may read like the name of an encoding
        tokenizer = tokenizer or str(folder.absolute())
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    return Weights(config, weights, tokenizer or described.get("tiktoken_encoding"), origin)


def _huggingface_config(file: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The sizes that a config.json describes, and all that stands there."""
    try:
        refuse_stand_in(file)
        described = dict(json.loads(file.read_text("utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {first_line(error)}") from error
    for name, supported in _SUPPORTED.items():
        if described.get(name, supported[0]) not in supported:
            raise UserError(f"{file}: {name}={described[name]} is not supported; it must be {supported[0]}")
    names = {
        "vocab_size": "vocab_size",
        "context_length": "n_positions",
        "emb_dim": "n_embd",
        "n_heads": "n_head",
        "n_layers": "n_layer",
    }
    sizes = {ours: described.get(theirs) for ours, theirs in names.items()}
    for ours, size in sizes.items():
        if type(size) is not int:
            raise UserError(f"{file}: {names[ours]}={size} is no whole number")
    if described.get("n_inner") not in (None, 4 * sizes["emb_dim"]):  # type: ignore[operator]
        raise UserError(f"{file}: n_inner={described['n_inner']} is not supported; it must be 4 times n_embd")
    encoding = described.get("tiktoken_encoding")
    if encoding is not None and not re.fullmatch(r"[\w.-]+", str(encoding)):
        raise UserError(f"{file}: tiktoken_encoding={encoding} is not the name of an encoding")
    config = ModelConfig(**sizes, qkv_bias=True)  # type: ignore[arg-type]
    config.tie_weights = bool(described.get("tie_word_embeddings", True))
    rates = {described.get(f"{place}_pdrop", 0.1) for place in _DROPPED}
    if len(rates) == 1 and type(rate := rates.pop()) in (int, float):
        config.drop_rate = rate  # of no effect but on an export: a run that begins here says its own
    try:
        validate(config, "model.")
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    return config, described


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


def _named_plainly(tensors: dict[str, Any]) -> dict[str, Any]:
    """Without the prefix that GPT2LMHeadModel gives to names, those of wrappers, and the buffers of old
    versions."""
    plain = {name.removeprefix("transformer."): tensor for name, tensor in without_wrappers(tensors).items()}
    return {
        name: tensor
        for name, tensor in plain.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))
    }


def _check_huggingface_shapes(config: ModelConfig, found: dict[str, tuple[int, ...]], origin: str) -> None:
    layers = count_layers(found, "h.")
    if layers != config.n_layers:  # before a list for a billion layers is made
        raise UserError(
            f"{origin}: config.json says n_layer={config.n_layers}, and the weights have {layers}"
        )
    width, vocabulary = config.emb_dim, (config.vocab_size, config.emb_dim)
    vector, inner = (width,), (4 * width,)
    block: dict[str, tuple[int, ...]] = {
        **{f"{norm}.{kind}": vector for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")},
        "attn.c_attn.weight": (width, 3 * width),
        "attn.c_attn.bias": (3 * width,),
        "attn.c_proj.weight": (width, width),
        "attn.c_proj.bias": vector,
        "mlp.c_fc.weight": (width, 4 * width),
        "mlp.c_fc.bias": inner,
        "mlp.c_proj.weight": (4 * width, width),
        "mlp.c_proj.bias": vector,
    }
    wanted: dict[str, tuple[int, ...]] = {
        "wte.weight": vocabulary,
        "wpe.weight": (config.context_length, width),
        "ln_f.weight": vector,
        "ln_f.bias": vector,
        **{f"h.{layer}.{name}": shape for layer in range(layers) for name, shape in block.items()},
    }
    if not config.tie_weights and "lm_head.weight" not in found:
        raise UserError(
            f"{origin}: config.json says tie_word_embeddings=false, and there is no lm_head.weight"
        )
    if "lm_head.weight" in found:
        wanted["lm_head.weight"] = vocabulary
    compare_shapes(wanted, found, origin)


def export_huggingface(model: GPTModel, tokenizer: str, folder: Path) -> None:
    """Write a folder that transformers' `from_pretrained` opens, with the tokenizer's files: those that it
    came in, if it came in files.

    Raises:
        UserError: it cannot be written, or the layout cannot describe the model.
    """
    refuse_unless_gpt2(model.config, "format=huggingface")
    weights = model.state_dict()
    tensors = {f"transformer.{theirs}": weights[ours] for theirs, ours in _OUTSIDE.items()}
    for layer in range(model.config.n_layers):
        block, theirs = f"trf_blocks.{layer}.", f"transformer.h.{layer}."
        for name, ours in _BLOCK.items():
            tensor = weights[block + ours]
            tensors[theirs + name] = tensor.T if tensor.dim() == 2 else tensor
        matrices = [weights[f"{block}att.{projection}.weight"] for projection in _PROJECTIONS]
        no_bias = torch.zeros(model.config.emb_dim)
        biases = [weights.get(f"{block}att.{projection}.bias", no_bias) for projection in _PROJECTIONS]
        tensors[f"{theirs}attn.c_attn.weight"] = torch.cat(matrices).T
        tensors[f"{theirs}attn.c_attn.bias"] = torch.cat(biases)
    if not model.config.tie_weights:
        tensors["lm_head.weight"] = weights["out_head.weight"]
    with new_folder(folder, sum(tensor.nbytes for tensor in tensors.values())) as temporary:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_tensors(contiguous, temporary / "model.safetensors", {"format": "pt"})
        described = _describe(model.config)
        encoding = load_tokenizer(tokenizer)
        described |= {f"{end}_token_id": end_of_text_id(encoding) for end in ("bos", "eos")}
        if files := kept_files(encoding):
            for name, content in files.items():
                (temporary / name).write_bytes(content)
        else:
            described |= {"tiktoken_encoding": tokenizer}
            _write(temporary / "tokenizer.json", as_huggingface(encoding))
            ends = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
            about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
            length = {"model_max_length": model.config.context_length}
            _write(temporary / "tokenizer_config.json", about | ends | length)
        _write(temporary / "config.json", described)


def _write(file: Path, value: Any) -> None:
    file.write_text(as_json(value), encoding="utf-8")


def _describe(config: ModelConfig) -> dict[str, Any]:
    """Hugging Face's config.json of a model."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        **{name: supported[0] for name, supported in _SUPPORTED.items()},
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_embd": config.emb_dim,
        "n_head": config.n_heads,
        "n_layer": config.n_layers,
        "n_inner": None,
        **{f"{place}_pdrop": config.drop_rate for place in _DROPPED},
        "tie_word_embeddings": config.tie_weights,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "float32",
    }
