"""GPT-2 weights in and out: Hugging Face's layout, from a folder or its hub, and the book's two .pth files.

Nothing here runs code that a file brings along, and no size that a file claims is allocated before the file
is seen to hold it.
"""

import json
import logging
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from llm.checkpoints.checkpoint import (
    CHECKSUMS,
    compare_shapes,
    find_checkpoint,
    load_checkpoint,
    model_of_weights,
    save_tensors,
)
from llm.config import ModelConfig, OptimizerConfig, validate
from llm.data.tokenizer import END_OF_TEXT, as_huggingface, load_tokenizer
from llm.errors import UserError, first_line
from llm.files import as_json, as_typed, replacing, sha256
from llm.model.gpt import GPTModel

log = logging.getLogger(__name__)

HEAD_DIM = 64  # of all GPT-2 sizes; the book's files do not say how many heads there are

# OpenAI's weights on the hub: the revision, and the SHA-256 of model.safetensors where it is known here. The
# revision fixes the others too, through what the hub states for it.
GPT2_ON_HUB = {
    "openai-community/gpt2": (
        "607a30d783dfa663caf39e06633721c8d4cfcd7e",
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    ),
    "openai-community/gpt2-medium": ("6dcaa7a952f72f9298047fd5137cd6e4f05f41da", None),
    "openai-community/gpt2-large": ("32b71b12589c2f8d625668d2335a01cac3249519", None),
    "openai-community/gpt2-xl": (
        "15ea56dee5df4983c59b2538573817e1667135e2",
        "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
    ),
}

_WHAT_TO_GIVE = (
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
_SUPPORTED: dict[str, tuple] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
}  # the values with which GPT-2 is the book's model; the first is what a config means that does not say


@dataclass
class Pretrained:
    """Weights as `GPTModel(model)` names and shapes them, in fp32, and what is known of them."""

    model: ModelConfig
    weights: dict[str, Tensor]
    tokenizer: str | None  # a name for load_tokenizer; None: not known
    origin: str  # where they come from, for messages
    optimizer_state: dict[str, dict[str, Tensor]] | None = None  # AdamW's, by parameter name


def open_weights(name: str) -> Pretrained:
    """Weights by name: a run or checkpoint folder of ours, `latest`, a folder in Hugging Face's GPT-2 layout,
    a .pth file of the book's, or a name on Hugging Face's hub, as gpt2-medium or user/name@revision.

    Raises:
        UserError: there are none of that name, they are damaged, or they are not those of a GPT-2.
    """
    try:
        return _open(name)
    except UserError as error:  # names in a file can hold line breaks and a terminal's control codes
        line = "".join(letter if letter.isprintable() else "\ufffd" for letter in str(error))
        raise UserError(line) from error


def _open(name: str) -> Pretrained:
    path = Path(name)
    if is_ours(name):
        folder = find_checkpoint(name)
        model, config = load_checkpoint(folder)
        return Pretrained(config.model, model.state_dict(), config.tokenizer.name, str(as_typed(folder)))
    if path.is_dir():
        return _from_huggingface(path, name)
    if path.is_file():
        return _from_book(path)
    if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?(@[\w.-]+)?", name):
        return _from_hub(name)
    raise UserError(f"{name}: no such file or folder; {_WHAT_TO_GIVE}")


def is_ours(name: str) -> bool:
    """Whether a name means a run or a checkpoint of this program."""
    path = Path(name)
    return name == "latest" or (path / "checkpoints").exists() or (path / CHECKSUMS).exists()


def resolve(name: str) -> str:
    """A name that keeps its meaning: of a run, the path of its newest whole checkpoint.

    Raises:
        UserError: the run has none.
    """
    return str(as_typed(find_checkpoint(name))) if is_ours(name) else name


def _from_hub(name: str) -> Pretrained:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, _, asked = name.partition("@")
    if f"openai-community/{repository}" in GPT2_ON_HUB:
        repository = f"openai-community/{repository}"
    revision, checksum = GPT2_ON_HUB.get(repository, (None, None))
    if asked:
        revision, checksum = asked, checksum if asked == revision else None

    cached_only = not _hub_answers()

    def download(file: str) -> Path:
        return Path(hf_hub_download(repository, file, revision=revision, local_files_only=cached_only))

    try:
        folder = download("config.json").parent
        # one commit for all, also where the name is of a branch that moves
        revision = folder.name
        try:
            files = [download("model.safetensors")]
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            index = download("model.safetensors.index.json")
            files = [download(file) for file in _shards(index)]
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{name} is no file or folder here, and Hugging Face's hub cannot be reached: give a local "
            f"folder that holds config.json and model.safetensors"
        ) from error
    except UserError:
        raise
    except Exception as error:  # a lost connection is an error of whichever HTTP library it uses by now
        raise UserError(f"{name} cannot be had from Hugging Face's hub: {first_line(error)}") from error
    for file in files:
        # The hub's cache keeps a large file under the SHA-256 that the hub states for it.
        kept = file.resolve()  # a link to it would be made anew
        expected = checksum or kept.name
        if re.fullmatch("[0-9a-f]{64}", expected) and sha256(kept) != expected:
            raise UserError(f"{kept} is not what the hub has (its SHA-256 differs): delete it and try again")
    return _from_huggingface(folder, f"{repository} at revision {revision}")


def _hub_answers() -> bool:
    """Whether the hub can be reached; asked once, where its library would try for half a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=constants.DEFAULT_ETAG_TIMEOUT)
    except Exception:  # of whichever HTTP library it uses by now
        return False
    return True


def _from_huggingface(folder: Path, origin: str) -> Pretrained:
    files = _safetensors_files(folder)
    config, described = _huggingface_config(folder / "config.json")
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        for file in files:
            with safe_open(file, framework="pt") as content:
                shapes |= {name: tuple(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118
        _check_huggingface_shapes(config, _named_plainly(shapes), origin)
        tensors = _named_plainly({name: tensor for file in files for name, tensor in load_file(file).items()})
    except (SafetensorError, OSError) as error:
        raise UserError(f"{origin} is damaged or of another format: {first_line(error)}") from error
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
    if head is not None and not torch.equal(head, weights["tok_emb.weight"]):
        config.tie_weights = False
        weights["out_head.weight"] = head
    weights = _in_fp32(weights, origin)
    tokenizer = described.get("tiktoken_encoding") or ("gpt2" if config.vocab_size == 50257 else None)
    return Pretrained(config, weights, tokenizer, origin)


def _huggingface_config(file: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The sizes that a config.json describes, and all that stands there."""
    try:
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
    config = ModelConfig(**sizes, qkv_bias=True, tie_weights=True)  # type: ignore[arg-type]
    try:
        validate(config, "model.")
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    return config, described


def _safetensors_files(folder: Path) -> list[Path]:
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if (folder / "model.safetensors.index.json").exists():
        return [folder / name for name in _shards(folder / "model.safetensors.index.json")]
    if list(folder.glob("*.bin")):
        raise UserError(
            f"{folder} holds its weights as a pickle, which can run code: give one with model.safetensors"
        )
    raise UserError(f"{folder} holds no model.safetensors; {_WHAT_TO_GIVE}")


def _shards(index: Path) -> list[str]:
    """The file names in a model.safetensors.index.json, none of which leaves its folder."""
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        outside = [name for name in names if not re.fullmatch(r"[\w-][\w.-]*", name)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is damaged or of another format: {first_line(error)}") from error
    if outside:
        raise UserError(f"{index} names {outside[0]}, which is not a file of its folder")
    return names


def _in_fp32(weights: dict[str, Tensor], origin: str) -> dict[str, Tensor]:
    for name, tensor in weights.items():
        if not tensor.is_floating_point():  # quantised weights are no weights without their scales
            raise UserError(f"{origin}: {name} is of {tensor.dtype}, and not of floating-point numbers")
    return {name: tensor.float().contiguous() for name, tensor in weights.items()}


def _named_plainly(tensors: dict[str, Any]) -> dict[str, Any]:
    """Without the prefix that GPT2LMHeadModel gives to names, and without the buffers of old versions."""
    plain = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    return {
        name: tensor
        for name, tensor in plain.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))
    }


def _check_huggingface_shapes(config: ModelConfig, found: dict[str, tuple[int, ...]], origin: str) -> None:
    layers = len({name.split(".")[1] for name in found if name.startswith("h.")})
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
    if "lm_head.weight" in found:
        wanted["lm_head.weight"] = vocabulary
    compare_shapes(wanted, found, origin)


def _from_book(path: Path) -> Pretrained:
    """The book's model.pth, a state dict, or model_and_optimizer.pth, that and AdamW's."""
    _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        saved = content.get("model_state_dict", content)
        weights = {name: tensor for name, tensor in saved.items() if not name.endswith("att.mask")}
        for name, tensor in weights.items():
            if not _is_stored(tensor):
                raise ValueError(f"{name} claims numbers that are not in the file")
        config = _book_sizes(weights)
    except pickle.UnpicklingError as error:  # its text tells how to load the file all the same
        raise UserError(
            f"{path} holds more than tensors, which could run code, or is damaged: it is not opened"
        ) from error
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged, or no state dict in the book's names: {first_line(error)}"
        ) from error
    weights = _in_fp32(weights, str(path))
    model = model_of_weights(config, weights, path)
    optimizer = content.get("optimizer_state_dict")
    state = None if optimizer is None else _book_optimizer_state(model, optimizer, path)
    return Pretrained(config, weights, "gpt2" if config.vocab_size == 50257 else None, str(path), state)


def _is_stored(tensor: Tensor) -> bool:
    """Whether all of a tensor's numbers were in the file: it is not expanded, sparse, or a shape alone."""
    if tensor.layout != torch.strided or tensor.is_meta:
        return False
    return tensor.nbytes <= tensor.untyped_storage().nbytes()


def _check_archive(path: Path) -> None:
    """
    Raises:
        UserError: a file is no archive of torch.save's, or one that unpacks to more than it holds.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is no .pth file as torch.save writes them today; an older one is a plain pickle, which "
            f"can run code, and is not opened"
        ) from error
    size = sum(entry.file_size for entry in entries)
    if size > path.stat().st_size:  # compressed, or entries that lie over each other
        raise UserError(f"{path} unpacks to {size} bytes, more than the file has")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{path}: {entry.filename} is compressed, which torch.save does not do")
        if entry.filename.startswith("/") or ".." in Path(entry.filename).parts:
            raise UserError(f"{path}: {entry.filename} leads out of the archive")


def _book_sizes(weights: dict[str, Tensor]) -> ModelConfig:
    vocab_size, emb_dim = weights["tok_emb.weight"].shape
    if emb_dim % HEAD_DIM:
        raise ValueError(f"its width {emb_dim} is no multiple of {HEAD_DIM}, the size of GPT-2's heads")
    config = ModelConfig(
        vocab_size=vocab_size,
        context_length=weights["pos_emb.weight"].shape[0],
        emb_dim=emb_dim,
        n_heads=emb_dim // HEAD_DIM,
        n_layers=len({name.split(".")[1] for name in weights if name.startswith("trf_blocks.")}),
        qkv_bias="trf_blocks.0.att.W_query.bias" in weights,
        tie_weights=False,
    )
    validate(config, "model.")
    return config


def _book_optimizer_state(model: GPTModel, saved: Any, path: Path) -> dict[str, dict[str, Tensor]]:
    """AdamW's state by parameter name; torch numbers parameters in the model's order."""
    parameters = dict(enumerate(model.named_parameters()))
    state: dict[str, dict[str, Tensor]] = {}
    try:
        for number, averages in saved["state"].items():
            name, parameter = parameters[number]
            state[name] = {key: torch.as_tensor(average) for key, average in averages.items()}
            for key, average in state[name].items():
                if average.shape not in ((), parameter.shape) or not _is_stored(average):
                    raise ValueError(f"{key} of {name} has shape {tuple(average.shape)}")
        return state
    except (LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: its optimizer_state_dict is not AdamW's for this model") from error


def export_huggingface(model: GPTModel, tokenizer: str | None, folder: Path) -> None:
    """Write a folder that transformers' `from_pretrained` opens, with the tokenizer's files if it is known.

    Raises:
        UserError: it cannot be written.
    """
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
    with _new_folder(folder, sum(tensor.nbytes for tensor in tensors.values())) as temporary:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_tensors(contiguous, temporary / "model.safetensors", {"format": "pt"})
        described = _describe(model.config)
        if tokenizer:
            encoding = load_tokenizer(tokenizer)
            described |= {"tiktoken_encoding": tokenizer}
            described |= {f"{end}_token_id": encoding.eot_token for end in ("bos", "eos")}
            _write(temporary / "tokenizer.json", as_huggingface(encoding))
            ends = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
            about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
            length = {"model_max_length": model.config.context_length}
            _write(temporary / "tokenizer_config.json", about | ends | length)
        _write(temporary / "config.json", described)


@contextmanager
def _new_folder(folder: Path, size: int) -> Iterator[Path]:
    """`replacing` for a folder of tensors."""
    with replacing(folder, size) as temporary:
        temporary.mkdir()
        try:
            yield temporary
        except RuntimeError as error:  # how torch reports a full disk
            cause = error.__context__
            raise (cause if isinstance(cause, OSError) else OSError(first_line(error))) from error


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
        **{f"{place}_pdrop": config.drop_rate for place in ("embd", "attn", "resid")},
        "tie_word_embeddings": config.tie_weights,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "float32",
    }


def export_book(
    model: GPTModel,
    folder: Path,
    optimizer_state: dict[str, dict[str, Tensor]] | None,
    optimizer: OptimizerConfig,
) -> None:
    """Write the book's `model.pth`, and `model_and_optimizer.pth` if there is AdamW state: in its names and
    order, with its masks, a head of its own, and one group of parameters.

    Raises:
        UserError: it cannot be written.
    """
    weights = model.state_dict()
    context = model.config.context_length
    mask = torch.triu(torch.ones(context, context), diagonal=1)
    saved: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name.endswith("att.W_query.weight"):  # buffers stand before the weights of a module's children
            saved[name.replace("W_query.weight", "mask")] = mask
        saved[name] = tensor.clone()
    saved.setdefault("out_head.weight", weights["tok_emb.weight"].clone())
    copies = 4 if optimizer_state else 1  # the weights twice, and AdamW's two averages
    with _new_folder(folder, copies * sum(tensor.nbytes for tensor in saved.values())) as temporary:
        _save_pickle(saved, temporary / "model.pth")
        if optimizer_state:
            names = [name for name in saved if not name.endswith("att.mask")]
            state = dict(optimizer_state)
            if model.config.tie_weights:  # as the head began: a copy, of averages as of weights
                state["out_head.weight"] = {
                    key: average.clone() for key, average in state["tok_emb.weight"].items()
                }
            adamw = torch.optim.AdamW(
                [saved[name] for name in names],
                lr=optimizer.lr,
                betas=(optimizer.betas[0], optimizer.betas[1]),
                eps=optimizer.eps,
                weight_decay=optimizer.weight_decay,
            ).state_dict()
            adamw["state"] = {number: state[name] for number, name in enumerate(names) if name in state}
            both = {"model_state_dict": saved, "optimizer_state_dict": adamw}
            _save_pickle(both, temporary / "model_and_optimizer.pth")


def _save_pickle(content: Any, path: Path) -> None:
    with path.open("wb") as file:  # given a path, torch would not say why it cannot write
        torch.save(content, file)
