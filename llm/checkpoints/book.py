"""The book's model.pth and model_and_optimizer.pth, in and out.

Nothing here runs code that a file brings along, and no size that a file claims is allocated before the file
is seen to hold it.
"""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm.checkpoints.weights import (
    Weights,
    build_model,
    count_layers,
    in_fp32,
    new_folder,
    refuse_unless_gpt2,
)
from llm.config import ModelConfig, OptimizerConfig, validate
from llm.errors import UserError, first_line
from llm.model.gpt import GPTModel

HEAD_DIM = 64  # of all GPT-2 sizes; the book's files do not say how many heads there are


def read_book(path: Path) -> Weights:
    """The book's model.pth, a state dict, or model_and_optimizer.pth, that and AdamW's.

    Raises:
        UserError: the file is damaged, could run code, or does not hold such weights.
    """
    _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        saved = content.get("model_state_dict", content)
        weights = {name: tensor for name, tensor in saved.items() if not name.endswith("att.mask")}
        for name, tensor in weights.items():
            if not _is_stored(tensor):
                raise ValueError(f"{name} claims numbers that are not in the file")
        config = _sizes(weights)
    except pickle.UnpicklingError as error:  # its text tells how to load the file all the same
        raise UserError(
            f"{path} holds more than tensors, which could run code, or is damaged: it is not opened"
        ) from error
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged, or no state dict in the book's names: {first_line(error)}"
        ) from error
    tokenizer = "gpt2" if config.vocab_size == 50257 else None
    source = Weights(config, in_fp32(weights, str(path)), tokenizer, str(path))
    model = build_model(source)
    if (optimizer := content.get("optimizer_state_dict")) is not None:
        source.optimizer_state = _optimizer_state(model, optimizer, path)
    return source


def _is_stored(tensor: Tensor) -> bool:
    """Whether all of a tensor's numbers were in the file: it is not expanded, sparse, or just a shape."""
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


def _sizes(weights: dict[str, Tensor]) -> ModelConfig:
    vocab_size, emb_dim = weights["tok_emb.weight"].shape
    if emb_dim % HEAD_DIM:
        raise ValueError(f"its width {emb_dim} is no multiple of {HEAD_DIM}, the size of GPT-2's heads")
    config = ModelConfig(
        vocab_size=vocab_size,
        context_length=weights["pos_emb.weight"].shape[0],
        emb_dim=emb_dim,
        n_heads=emb_dim // HEAD_DIM,
        n_layers=count_layers(weights, "trf_blocks."),
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
        if saved["state"] and saved["state"].keys() != parameters.keys():  # empty before the first step
            raise ValueError("a parameter has no state")
        for number, averages in saved["state"].items():
            name, parameter = parameters[number]
            tensors = {key: torch.as_tensor(average) for key, average in averages.items()}
            shapes = {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
            if {key: tensor.shape for key, tensor in tensors.items()} != shapes:
                raise ValueError(f"{name} has averages of other names or shapes")
            if not all(map(_is_stored, tensors.values())):
                raise ValueError(f"{name} has averages that are not in the file")
            state[name] = dict(tensors)
        return state
    except (LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: its optimizer_state_dict is not AdamW's for this model") from error


def export_book(
    model: GPTModel,
    folder: Path,
    optimizer_state: dict[str, dict[str, Tensor | float]] | None,
    optimizer: OptimizerConfig,
) -> None:
    """Write the book's `model.pth`, and `model_and_optimizer.pth` if there is AdamW state: in its names and
    order, with its masks, a head of its own, and one group of parameters.

    Raises:
        UserError: it cannot be written, or the book's model is another one.
    """
    refuse_unless_gpt2(model.config, "format=book")
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
            adamw["state"] = {number: state[name] for number, name in enumerate(names) if name in state}
            both = {"model_state_dict": saved, "optimizer_state_dict": adamw}
            _save_pickle(both, temporary / "model_and_optimizer.pth")


def _save_pickle(content: Any, path: Path) -> None:
    with path.open("wb") as file:  # given a path, torch would not say why it cannot write
        torch.save(content, file)
