"""Reading and writing the book's model.pth and model_and_optimizer.pth.

No code in a file is ever run, and no size that a file claims is allocated before the file is known to hold
that much.
"""

import json
import logging
import pickle
import re
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm.checkpoints.gpt2_layout import refuse_unless_gpt2
from llm.checkpoints.weights import (
    Weights,
    build_model,
    count_layers,
    in_fp32,
    is_finite,
    new_folder,
    without_wrappers,
)
from llm.config import ModelConfig, OptimizerConfig
from llm.config_rules import validate
from llm.config_values import from_dict
from llm.data.tokenizer import load_tokenizer
from llm.data.tokenizer_files import kept_files
from llm.errors import UserError, first_line
from llm.files import as_json, read_content, refuse_stand_in, sha256
from llm.model.gpt import GPTModel

log = logging.getLogger(__name__)

# The book's models, by emb_dim and n_layers: how many attention heads they have, which its files do not say.
BOOKS_HEADS = {(768, 12): 12, (1024, 24): 16, (1280, 36): 20, (1600, 48): 25}
_STATE_DICTS = ("model_state_dict", "model", "state_dict")  # of the book, nanoGPT and Lightning


def read_book(path: Path, n_heads: int | None = None) -> Weights:
    """Read the book's model.pth (a state dict) or model_and_optimizer.pth (that and AdamW's). For files
    written by `export_book`, a .json beside them has what they cannot hold.

    Args:
        n_heads: number of attention heads, if nothing else tells.

    Raises:
        UserError: the file is damaged, could run code, or does not hold such weights; or its number of heads
            is not known.
    """
    _check_archive(path)
    content = _load(path)
    try:
        saved = _state_dict(content, path)
        weights = {name: tensor for name, tensor in saved.items() if not name.endswith("att.mask")}
        for name, tensor in weights.items():
            if not _is_stored(tensor):
                raise ValueError(f"{name} claims numbers that are not in the file")
        weights = in_fp32(weights, str(path))
        described, tokenizer = _read_beside(path)
        config = replace(described, tie_weights=False) if described else _sizes(weights, n_heads, path)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged, or no state dict in the book's names: {first_line(error)}"
        ) from error
    source = Weights(config, weights, tokenizer, str(path))
    model = build_model(source)
    if (optimizer := content.get("optimizer_state_dict")) is not None:
        source.optimizer_state = _optimizer_state(model, optimizer, path)
    if described and described.tie_weights:
        source.model = described
        head = weights.pop("out_head.weight")
        (source.optimizer_state or {}).pop("out_head.weight", None)
        if not torch.equal(head, weights["tok_emb.weight"]):
            raise UserError(f"{path} has a head of its own, and {_beside(path)} says that it is tied")
    return source


def _load(path: Path) -> dict[str, Any]:
    """The content of a file written by torch.save, without running any code in it."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}")
        return content
    except pickle.UnpicklingError as error:  # its text tells how to load the file all the same
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        advice = f", for its {found[1]}; of a model, save model.state_dict()" if found else ""
        raise UserError(
            f"{path} holds more than tensors, which could run code, or is damaged: it is not opened{advice}"
        ) from error
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged, or no state dict in the book's names: {first_line(error)}"
        ) from error


def _state_dict(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The tensors in a file, under the book's names.

    Raises:
        UserError: they are those of another model.
    """
    saved = next((content[key] for key in _STATE_DICTS if isinstance(content.get(key), dict)), content)
    plain = without_wrappers(saved)
    for name in plain:
        prefix, embeddings, rest = name.partition("tok_emb.weight")  # Lightning's attribute comes before it
        if embeddings and not rest and all(each.startswith(prefix) for each in plain):
            return {each.removeprefix(prefix): tensor for each, tensor in plain.items()}
    if "transformer.wte.weight" in plain and "model_args" in content:
        raise UserError(
            f"{path} is a checkpoint of nanoGPT, which does not say with which of nanoGPT's two GELUs it was "
            f"trained: if with the tanh form, bring it into Hugging Face's layout (gelu_new)"
        )
    if any(name.endswith("wte.weight") for name in plain):
        raise UserError(
            f"{path} has Hugging Face's names, which say nothing of its sizes: give the folder with its "
            f"config.json and model.safetensors"
        )
    found = ", ".join(list(map(str, plain))[:4])
    raise UserError(f"{path} holds no state dict in the book's names, but {found or 'nothing'}")


def _beside(path: Path) -> Path:
    return path.with_suffix(".json")


def _read_beside(path: Path) -> tuple[ModelConfig | None, str | None]:
    """The model and the tokenizer of a .pth file, from the file beside it; None if that does not exist.

    Raises:
        UserError: that file is damaged.
    """
    file = _beside(path)
    try:
        described = json.loads(read_content(file).decode()) if file.exists() else {}
        if not isinstance(described, dict) or not described.keys() >= {"model", "tokenizer", "sha256"}:
            return None, None  # somebody else's
        if described["sha256"] != sha256(path):
            log.warning("%s is not used: %s has changed since it was written", file, path.name)
            return None, None
        config = from_dict(ModelConfig, described["model"])
        validate(config, "model.")
        refuse_unless_gpt2(config, f"{path}, by {file.name} beside it,")
        tokenizer = described["tokenizer"]
        if not re.fullmatch(r"[\w.-]{1,100}", tokenizer):
            raise ValueError(f"tokenizer={tokenizer:.40} is no name")
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is damaged or of another format: {first_line(error)}") from error
    return config, str(path.parent.absolute()) if tokenizer == "." else tokenizer


def _is_stored(tensor: Tensor) -> bool:
    """Whether all of a tensor's numbers were in the file: it is not expanded, sparse, or only a shape."""
    if tensor.layout != torch.strided or tensor.is_meta:
        return False
    return tensor.nbytes <= tensor.untyped_storage().nbytes()


def _check_archive(path: Path) -> None:
    """Refuse files that would take more memory than they hold.

    Raises:
        UserError: a file is no archive written by torch.save, or unpacks to more than its own size.
    """
    try:
        refuse_stand_in(path)
        with path.open("rb") as content:
            begin = content.read(40)
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, zipfile.BadZipFile) as error:
        if path.suffix == ".safetensors":
            raise UserError(f"{path}: give the folder that holds it and its config.json") from error
        what = f"it begins with {begin!r}"
        if begin.startswith(b"PK"):
            what = "it is cut short"
        elif begin.startswith(b"\x80"):
            what = "an older one is a plain pickle, which can run code, and is not opened"
        raise UserError(f"{path} is no .pth file as torch.save writes them today; {what}") from error
    size = sum(entry.file_size for entry in entries)
    if size > path.stat().st_size:  # compressed, or entries that lie over each other
        raise UserError(f"{path} unpacks to {size} bytes, more than the file has")
    names = {Path(entry.filename).name for entry in entries}
    if "data.pkl" not in names or "constants.pkl" in names:
        what = "a program of TorchScript" if "constants.pkl" in names else "a zip archive without a data.pkl"
        raise UserError(f"{path} is {what}, not what torch.save writes of a state dict")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{path}: {entry.filename} is compressed, which torch.save does not do")
        if entry.filename.startswith("/") or ".." in Path(entry.filename).parts:
            raise UserError(f"{path}: {entry.filename} leads out of the archive")


def _sizes(weights: dict[str, Tensor], n_heads: int | None, path: Path) -> ModelConfig:
    """The config of a model, as far as its tensors' shapes tell.

    Raises:
        UserError: the number of heads is unknown, or does not fit.
    """
    vocab_size, emb_dim = weights["tok_emb.weight"].shape
    layers = count_layers(weights, "trf_blocks.")
    assumed = BOOKS_HEADS.get((emb_dim, layers))
    if n_heads is None and assumed is None:
        raise UserError(
            f"{path} does not say how many attention heads its model has: add model.n_heads=NUMBER "
            f"(emb_dim is {emb_dim}, in {layers} layers)"
        )
    if n_heads is None:
        log.info(
            "%s does not say how many attention heads its model has: %d are assumed, as in the book's of "
            "this size; if it has others, add model.n_heads=NUMBER",
            path,
            assumed,
        )
    config = ModelConfig(
        vocab_size=vocab_size,
        context_length=weights["pos_emb.weight"].shape[0],
        emb_dim=emb_dim,
        n_heads=n_heads or assumed or 0,
        n_layers=layers,
        qkv_bias="trf_blocks.0.att.W_query.bias" in weights,
        tie_weights=False,
    )
    validate(config, "model.")
    return config


def _optimizer_state(model: GPTModel, saved: Any, path: Path) -> dict[str, dict[str, Tensor | float]]:
    """AdamW's state by parameter name; torch numbers parameters in the model's order."""
    parameters = dict(enumerate(model.named_parameters()))
    state: dict[str, dict[str, Tensor | float]] = {}
    try:
        for number, averages in saved["state"].items():
            state[parameters[number][0]] = {key: torch.as_tensor(kept) for key, kept in averages.items()}
    except (LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: its optimizer_state_dict is not AdamW's for this model") from error
    if state:  # there is none before the first step
        check_adamw_state(model, state, str(path))
    return state


def check_adamw_state(model: GPTModel, state: dict[str, dict[str, Tensor | float]], origin: str) -> None:
    """Check optimizer state that came from a file.

    Raises:
        UserError: it is not that of AdamW over all parameters of the model, or is damaged.
    """
    begin = f"{origin}: its optimizer state is not AdamW's for this model"
    parameters = dict(model.named_parameters())
    if other := state.keys() ^ parameters.keys():
        raise UserError(f"{begin}: {min(other)} has {'no' if min(other) in parameters else 'a'} state")
    for name, parameter in parameters.items():
        tensors = {key: torch.as_tensor(kept) for key, kept in state[name].items()}
        shapes = {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
        if {key: tensor.shape for key, tensor in tensors.items()} != shapes:
            raise UserError(f"{begin}: {name} has averages of other names or shapes")
        if not all(map(_is_stored, tensors.values())):
            raise UserError(f"{begin}: {name} has averages that are not in the file")
        numbers = [tensors["exp_avg"], tensors["exp_avg_sq"], tensors["step"].float()]
        if not all(tensor.is_floating_point() and is_finite(tensor) for tensor in numbers):
            raise UserError(f"{begin}: {name} has averages that are not finite numbers")
        if tensors["exp_avg_sq"].min() < 0 or tensors["step"] < 1:
            raise UserError(f"{begin}: {name} has negative averages of squares, or averages of no step")


def export_book(
    model: GPTModel,
    tokenizer: str,
    folder: Path,
    optimizer_state: dict[str, dict[str, Tensor | float]] | None,
    optimizer: OptimizerConfig,
) -> None:
    """Write the book's `model.pth`, and `model_and_optimizer.pth` if there is AdamW state: with the book's
    names, order and masks, an untied head, and a single parameter group. A .json beside each has what they
    cannot hold, for `read_book`.

    Args:
        tokenizer: a name or folder for `load_tokenizer`; if it has files, they are written too.

    Raises:
        UserError: the files cannot be written, the book's model cannot be this one, or the state is not this
            model's.
    """
    refuse_unless_gpt2(model.config, "format=book")
    if optimizer_state:
        check_adamw_state(model, optimizer_state, "this checkpoint")
    weights = model.state_dict()
    context = model.config.context_length
    mask = torch.triu(torch.ones(context, context), diagonal=1)
    saved: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name.endswith("att.W_query.weight"):  # buffers stand before the weights of a module's children
            saved[name.replace("W_query.weight", "mask")] = mask
        saved[name] = tensor.clone()
    saved.setdefault("out_head.weight", weights["tok_emb.weight"].clone())
    files = kept_files(load_tokenizer(tokenizer))
    copies = 4 if optimizer_state else 1  # the weights twice, and AdamW's two averages
    with new_folder(folder, copies * sum(tensor.nbytes for tensor in saved.values())) as temporary:
        _save_pickle(saved, temporary / "model.pth")
        if optimizer_state:
            names = [name for name in saved if not name.endswith("att.mask")]
            state = dict(optimizer_state)
            if model.config.tie_weights:  # as the head began: a copy, of averages as of weights
                state["out_head.weight"] = {
                    key: torch.as_tensor(average).clone() for key, average in state["tok_emb.weight"].items()
                }
            adamw = torch.optim.AdamW(
                [saved[name] for name in names],
                lr=optimizer.lr,
                betas=(optimizer.betas[0], optimizer.betas[1]),
                eps=optimizer.eps,
                weight_decay=optimizer.weight_decay,
            ).state_dict()
            adamw["state"] = {number: state[name] for number, name in enumerate(names)}
            both = {"model_state_dict": saved, "optimizer_state_dict": adamw}
            _save_pickle(both, temporary / "model_and_optimizer.pth")
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        for file in sorted(temporary.glob("*.pth")):
            described = {
                "model": asdict(model.config),
                "tokenizer": "." if files else tokenizer,
                "sha256": sha256(file),
            }
            _beside(file).write_text(as_json(described), encoding="utf-8")


def _save_pickle(content: Any, path: Path) -> None:
    with path.open("wb") as file:  # given a path, torch would not say why it cannot write
        torch.save(content, file)
