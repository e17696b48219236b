"""Saved work: a folder a checkpoint, written whole, loaded without running anyone's code.

    checkpoints/
        step-00000400/      the latest state: all that is needed to go on
            model.safetensors     weights, under the book's names
            config.json           the run's whole config
            training_state.pt     optimizer, schedule position, data position, random states
        best-00000300/      the weights with the lowest validation loss: model.safetensors, config.json
        last -> step-00000400
        best -> best-00000300

The number is the count of updates done. A new folder is complete and on disk before its link moves,
and only then is the old folder deleted.
"""

import json
import pickle
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llm.config import PretrainConfig, UserError, from_dict
from llm.files import replacing
from llm.model import GPTModel

WEIGHTS, CONFIG, TRAINING_STATE = "model.safetensors", "config.json", "training_state.pt"


def save_checkpoint(
    run_dir: Path,
    kind: str,
    steps: int,
    model: GPTModel,
    config: PretrainConfig,
    training_state: dict | None = None,
) -> Path:
    """Write a checkpoint of `kind` step or best, point its link at it, and delete the older of its kind.

    Raises:
        UserError: it cannot be written; the older checkpoint is still there.
    """
    folder = run_dir / "checkpoints" / f"{kind}-{steps:08d}"
    with replacing(folder) as temporary:
        temporary.mkdir()
        save_file(
            {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, temporary / WEIGHTS
        )
        (temporary / CONFIG).write_text(json.dumps(asdict(config), indent=2), encoding="utf-8")
        if training_state is not None:
            torch.save(training_state, temporary / TRAINING_STATE)
    link = folder.with_name("last" if kind == "step" else "best")
    with replacing(link) as temporary:
        temporary.symlink_to(folder.name)
    for older in folder.parent.glob(f"{kind}-*"):
        if older != folder:
            shutil.rmtree(older)
    return folder


def load_checkpoint(folder: Path, device: torch.device | str = "cpu") -> tuple[GPTModel, PretrainConfig]:
    """The model of a checkpoint folder, in evaluation mode, and the config of its run.

    Raises:
        UserError: a file is missing, damaged, or does not fit the model that the config describes.
    """
    try:
        config: PretrainConfig = from_dict(PretrainConfig, json.loads((folder / CONFIG).read_text("utf-8")))
        weights = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise UserError(f"{folder} is no whole checkpoint: {error.filename or error} is missing") from error
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder} is damaged or of another format: {_first_line(error)}") from error
    model = GPTModel(config.model)
    load_weights(model, weights, folder)
    return model.to(device).eval(), config


def load_weights(model: GPTModel, weights: dict[str, torch.Tensor], source: Path) -> None:
    """Take weights over into a model.

    Raises:
        UserError: a tensor is missing, of another shape, or too many.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in wanted.keys() | found.keys():
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{source} holds another model: {name} has shape {found.get(name, 'nothing')}, "
                f"and the config's model wants {wanted.get(name, 'nothing')}"
            )
    model.load_state_dict(weights)


def load_training_state(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights of a checkpoint, and what `save_checkpoint` was given as training_state.

    Raises:
        UserError: a file is missing or damaged, or would run code.
    """
    try:
        return load_file(folder / WEIGHTS), torch.load(
            folder / TRAINING_STATE, weights_only=True, map_location="cpu"
        )
    except FileNotFoundError as error:
        raise UserError(f"{folder} cannot be resumed: {error.filename or error} is missing") from error
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{folder} is damaged or of another format: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def find_run(name: str, root: Path = Path("outputs")) -> Path:
    """The run folder that a name means: a path to it, or `latest`, the one under `root` saved last.

    Raises:
        UserError: there is none.
    """
    if name != "latest":
        if not (Path(name) / "checkpoints" / "last").exists():
            raise UserError(f"{name} is no run folder with a checkpoint: it has no checkpoints/last")
        return Path(name)
    links = [link for link in root.glob("**/checkpoints/last") if link.exists()]
    if not links:
        raise UserError(
            f"latest: there is no run with a checkpoint under {root}/; run experiments/pretrain.py first"
        )
    return max(links, key=lambda link: link.lstat().st_mtime_ns).parent.parent


def find_checkpoint(name: str) -> Path:
    """The checkpoint folder that a name means: a checkpoint folder itself, or the last one of a run.

    Raises:
        UserError: there is none.
    """
    if name != "latest" and (Path(name) / WEIGHTS).exists():
        return Path(name).resolve()
    return (find_run(name) / "checkpoints" / "last").resolve()


def step_of(folder: Path) -> int | None:
    """The step, counted from 0, after which one of our checkpoint folders was saved."""
    number = re.fullmatch(r"(?:step|best)-(\d+)", folder.name)
    return int(number[1]) - 1 if number else None
