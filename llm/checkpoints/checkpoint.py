"""Our own checkpoints: a folder each, written whole or not at all, verified by checksums, read without
running code.

    checkpoints/
        start-00000000/     until the next checkpoint: the config with which the run started or was resumed
            config.json, SHA256SUMS
        step-00000400/      all that is needed to continue; the last `checkpoint.keep` of them are kept
            model.safetensors           weights, under the book's names
            config.json                 the run's whole config, and the version of this format
            training_state.safetensors  optimizer state by parameter, random states
            training_state.json         counters, position in the data, which run this is
            metrics.jsonl, samples.jsonl    what the run had recorded by then
            model/, training_state/     of a sharded run, in place of the two .safetensors: a file of each
                                        process, with its rows, see llm/checkpoints/parts.py
            SHA256SUMS                  of all of these; `sha256sum -c` checks it too
            tokenizer.json, vocab.json, …   the tokenizer's, if it came in files
        best-00000300/      the weights with the lowest validation loss so far
            model.safetensors, config.json, the tokenizer's files, SHA256SUMS
        abandoned-step-00000500/, abandoned-best-…      what came after, when the run has gone back to 400
        last -> step-00000400       a link; where there are none, a file with this name
        best -> best-00000300

The numbers count updates. A folder gets its name only when it is complete, on disk and read back; only then
are the links changed, and only after that are older folders deleted.
"""

import json
import logging
import os
import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llm.checkpoints.parts import SUFFIX, Found, part_names, read_parts, read_whole
from llm.checkpoints.training_state import TrainingState, joined
from llm.checkpoints.weights import Weights
from llm.config import PretrainConfig
from llm.config_rules import validate
from llm.config_values import from_dict
from llm.data.tokenizer_files import TOKENIZER_FILES, holds_tokenizer
from llm.errors import UserError, first_line
from llm.files import as_typed, read_content, sha256
from llm.run_folder import (
    CHECKPOINT_NAME,
    CHECKPOINTS,
    RECORDS,
    RUN_ID,
    checkpoint_folder,
    step_folders,
    steps_of,
)
from llm.runs import find_run, named_checkpoint, path_of

WEIGHTS, CONFIG, CHECKSUMS = "model.safetensors", "config.json", "SHA256SUMS"
STATE_TENSORS, STATE = "training_state.safetensors", "training_state.json"
BEST_FILES = (WEIGHTS, CONFIG)
STEP_FILES = (WEIGHTS, CONFIG, STATE_TENSORS, STATE, *RECORDS)

# Written to config.json. Version 1, before November 2026, did not say so. Version 2 adds the numbers that an
# optimizer keeps (`optimizer_numbers`) to training_state.json, and the parts of the model to its config.
# Version 3 may hold tensors in files of several processes; what holds none of these says that it is of 2.
FORMAT_VERSION = 3

log = logging.getLogger(__name__)


def damage(folder: Path, names: tuple[str, ...] = STEP_FILES) -> str | None:
    """What is wrong with files of a checkpoint folder, by its checksums; None if nothing is. The tokenizer's
    files are always checked too."""
    if not (folder / CHECKSUMS).is_file():
        return f"{CHECKSUMS} is missing"
    try:
        checksums = read_checksums(folder)
        tokenizer = [name for name in TOKENIZER_FILES if name in checksums or (folder / name).exists()]
        parts = [part for name in names for part in part_names(folder, name, checksums) or [name]]
        for name in (*parts, *tokenizer):
            if name not in checksums:
                return f"{CHECKSUMS} does not list {name}"
            if not (folder / name).is_file():  # opening a pipe would wait for its other end
                return f"{name} is missing"
            if sha256(folder / name) != checksums[name]:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        return f"it cannot be read: {first_line(error)}"
    return None


def read_checksums(folder: Path) -> dict[str, str]:
    """The recorded SHA-256 of each file of a checkpoint; empty if the record cannot be read.

    Raises:
        UnicodeDecodeError: it is damaged.
    """
    lines = read_content(folder / CHECKSUMS).decode().splitlines()
    return {name: checksum for checksum, _, name in (line.partition("  ") for line in lines)}


def newest_whole(run_dir: Path, names: tuple[str, ...], run_id: str | None = None) -> Path:
    """The newest undamaged step checkpoint of a run that has at least one; if `run_id` is given, one that
    belongs to it. Logs those that are skipped.

    Raises:
        UserError: all are damaged.
    """
    for folder in step_folders(run_dir):
        problem = damage(folder, names)
        if problem is None and run_id is not None and read_state(folder).get("run_id") != run_id:
            problem = "it belongs to another run"
        if problem is None:
            return folder
        log.warning("%s is skipped: %s", folder, problem)
    raise UserError(f"no checkpoint of {run_dir} is whole: in {folder.name} {problem}")


def find_checkpoint(name: str) -> Path:
    """The verified checkpoint folder that a name means: the one that it names, or a run's newest undamaged
    one.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = path_of(name)
    folder = named_checkpoint(path) or checkpoint_folder(path)
    if path.parent.name == CHECKPOINTS or holds(folder, WEIGHTS):
        if problem := damage(folder, BEST_FILES):
            raise UserError(f"{folder} is damaged or no checkpoint: {problem}")
        return folder
    return newest_whole(find_run(name), BEST_FILES).resolve()


def read_weights(folder: Path) -> Weights:
    """Read the weights of one of our checkpoints, which was verified; see `damage`.

    Raises:
        UserError: a file does not fit the model that the config describes, or is of another version.
    """
    config = read_config(folder)
    return Weights(
        config.model,
        read_tensors(folder, WEIGHTS),
        kept_tokenizer(folder, config),
        origin=str(as_typed(folder)),
        trained=config,
        folder=folder,
    )


def kept_tokenizer(folder: Path, config: PretrainConfig) -> str:
    """The tokenizer of a checkpoint, for `load_tokenizer`: its folder, if that has a tokenizer's files; else
    a name."""
    return str(folder.absolute()) if holds_tokenizer(folder) else config.tokenizer.name


def read_config(folder: Path) -> PretrainConfig:
    """The config of a checkpoint's run.

    Raises:
        UserError: it is missing, damaged, or has keys that this version does not know.
    """
    file = folder / CONFIG
    values = _read(file, lambda file: dict(json.loads(file.read_text("utf-8"))))
    if (version := values.pop("format_version", 1)) not in range(1, FORMAT_VERSION + 1):
        raise UserError(
            f"{folder} has format version {version}, and this program reads up to {FORMAT_VERSION}: "
            f"update the program"
        )
    values.setdefault("training", {}).setdefault("final_eval", "full")  # as it was before it could be chosen
    config = _read(file, lambda file: from_dict(PretrainConfig, values))
    try:
        validate(config)
    except UserError as error:
        raise UserError(f"{file} is damaged or of another version: {error}") from error
    return config


def start_config(run_dir: Path, steps: int) -> PretrainConfig | None:
    """The config that `write_start` wrote for a start after `steps` updates; None if it is missing or
    damaged."""
    folder = run_dir / CHECKPOINTS / name_of("start", steps)
    return None if damage(folder, (CONFIG,)) else read_config(folder)


def recorded_config(run_dir: Path) -> PretrainConfig | None:
    """The config with which a run was last started or saved; None if it is missing or damaged."""
    for folder in (*step_folders(run_dir, "start"), *step_folders(run_dir)):
        with suppress(UserError):
            if damage(folder, (CONFIG,)) is None:
                return read_config(folder)
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """The plain values of a step checkpoint's training state.

    Raises:
        UserError: they are missing or damaged.
    """
    return _read(folder / STATE, lambda file: dict(json.loads(file.read_text("utf-8"))))


def trained_on(folder: Path) -> list[str] | None:
    """The fingerprints of the training and validation tokens of a checkpoint's run. A `best` checkpoint does
    not record them, but the step checkpoints beside it do. None if none of these can be read."""
    beside = folder.parent.glob("step-*") if folder.parent.name == CHECKPOINTS else ()
    for each in (folder, *beside):
        with suppress(UserError, KeyError):
            return [*map(str, read_state(each)["data"])]
    return None


def holds(folder: Path, name: str) -> bool:
    """Whether a checkpoint has tensors of this name (WEIGHTS or STATE_TENSORS), in one file or in parts."""
    return (folder / name).exists() or bool(part_names(folder, name))


def files_of(folder: Path, name: str) -> list[Path]:
    """The files with these tensors: one, or a part from each process."""
    return [folder / part for part in part_names(folder, name) or [name]]


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """All tensors of a checkpoint's WEIGHTS or STATE_TENSORS.

    Raises:
        UserError: they are missing or damaged.
    """
    files = files_of(folder, name)
    if files == [folder / name]:
        return _read(folder / name, load_file)
    return _read(folder / name.removesuffix(SUFFIX), lambda _: read_whole(files))


def read_training_state(folder: Path) -> TrainingState:
    """Read what a step checkpoint holds besides weights and config.

    Raises:
        UserError: it is missing, damaged or of another format.
    """
    return state_of(folder, read_tensors(folder, STATE_TENSORS))


def state_of(folder: Path, tensors: dict[str, Tensor]) -> TrainingState:
    """The training state of a step checkpoint, with its tensors (or one process's part of them) given.

    Raises:
        UserError: it is missing, damaged or of another format.
    """
    values = read_state(folder)
    return _read(folder / STATE, lambda file: joined(tensors, values))


def read_shard(folder: Path, name: str, targets: Callable[[Found], dict[str, Tensor]]) -> dict[str, Tensor]:
    """`read_parts` of a checkpoint's WEIGHTS or STATE_TENSORS.

    Raises:
        UserError: they are missing or damaged, or `targets` raised it.
    """
    return _read(folder / name, lambda _: read_parts(files_of(folder, name), targets))


_DAMAGE = (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError)


def _read(file: Path, read: Any) -> Any:
    try:
        return read(file)
    except FileNotFoundError as error:
        raise UserError(f"{file.parent} is not a whole checkpoint: {file.name} is missing") from error
    except _DAMAGE as error:
        raise UserError(f"{file} is damaged or of another format: {first_line(error)}") from error


def name_of(kind: str, steps: int) -> str:
    return f"{kind}-{steps:08d}"


def best_of(folder: Path) -> str | None:
    """The name of the checkpoint that was best at a step checkpoint; None if there was none, or it is
    damaged."""
    try:
        step = read_state(folder)["counters"]["best_step"]
    except (UserError, KeyError):
        return None
    return None if step is None else name_of("best", step + 1)


def step_of(folder: Path) -> int | None:
    """The update, counted from 0, after which one of our checkpoint folders was saved."""
    return steps_of(folder) - 1 if CHECKPOINT_NAME.fullmatch(folder.name) else None


def run_id(run_dir: Path) -> str:
    """The id of the run in a folder, also used by W&B. A new run gets the one that a W&B sweep's agent
    assigned, or 8 random hexadecimal digits. If RUN_ID is lost, the newest checkpoint still has it."""
    file = run_dir / RUN_ID
    if _ID.fullmatch(content := read_content(file).decode("utf-8", "replace")):
        return content
    folders = [folder for folder in step_folders(run_dir) if not damage(folder)]
    if folders:
        return read_state(folders[0])["run_id"]
    given = os.environ.get("WANDB_RUN_ID", "")
    return given if _ID.fullmatch(given) else secrets.token_hex(4)


_ID = re.compile("[A-Za-z0-9_-]{1,64}")
