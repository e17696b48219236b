"""Our own checkpoints: a folder each, written whole, verified by checksums, loaded without running code.

    checkpoints/
        start-00000000/     until the next checkpoint: the config that the run began or was resumed with
            config.json, SHA256SUMS
        step-00000400/      all that is needed to continue; the last `checkpoint.keep` of them are kept
            model.safetensors           weights, under the book's names
            config.json                 the run's whole config, and the version of this format
            training_state.safetensors  optimizer state by parameter, random states
            training_state.json         counters, position in the data, which run this is
            metrics.jsonl, samples.jsonl    what the run had recorded by then
            SHA256SUMS                  of all of these; `sha256sum -c` checks it too
            tokenizer.json, vocab.json, …   the tokenizer's, if it came in files
        best-00000300/      the weights with the lowest validation loss so far
            model.safetensors, config.json, the tokenizer's files, SHA256SUMS
        abandoned-step-00000500/, abandoned-best-…      what came after, when the run has gone back to 400
        last -> step-00000400       a link; where there are none, a file with this name
        best -> best-00000300

The number counts the updates done. A folder gets its name only when it is complete, on disk and read back;
only then do the links move, and only after that are older folders deleted.
"""

import json
import logging
import os
import re
import secrets
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm.checkpoints.weights import Weights
from llm.config import PretrainConfig, from_dict, validate
from llm.data.tokenizer_files import TOKENIZER_FILES, holds_tokenizer
from llm.errors import UserError, first_line
from llm.files import as_json, as_typed, flush, read_content, remove, replacing, sha256, write_text
from llm.overrides import as_command, as_override
from llm.run_folder import (
    CHECKPOINT_NAME,
    CHECKPOINTS,
    GOING_BACK,
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
FORMAT_VERSION = 2

ABANDONED = "abandoned-"  # before the name of a checkpoint that was set aside

NOT_SAVED = "checkpoint not saved: %s; training continues, and the next one tries again"

log = logging.getLogger(__name__)


@dataclass
class TrainingState:
    """What a run needs to continue exactly, besides its weights and its config."""

    run_id: str
    counters: dict[str, Any]
    batches: dict[str, int]  # position in the data
    data: list[str]  # fingerprints of the training and of the validation tokens
    resumed: list[dict[str, Any]]
    optimizer: dict[str, dict[str, Tensor | float]]  # by the parameter's name and the optimizer's own
    generators: list[dict[str, Tensor]]  # random states of each process, by kind of device
    epoch_generator: Tensor | None  # the book's order: the CPU's random state when the epoch began


@dataclass
class Snapshot:
    """What a checkpoint holds, in memory of its own, so that training continues while it is written."""

    steps: int
    config: PretrainConfig
    weights: dict[str, Tensor]
    state: TrainingState
    record_sizes: dict[str, int]  # bytes of the run's RECORDS that belong to it
    tokenizer: dict[str, bytes] = field(default_factory=dict)  # its files, if it came in files


class CheckpointWriter:
    """Writes one snapshot at a time, in a thread of its own.

    An error that the user can fix (a full disk) is logged and returned by `wait`; existing checkpoints stay.
    Any other error of the thread is raised by the next `wait`.
    """

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.run_dir = run_dir
        self.keep = keep
        self.saved_steps: int | None = None  # of the newest snapshot on disk
        # Steps and weights with the lowest validation loss, written with the next snapshot.
        self.best: tuple[int, dict[str, Tensor]] | None = None
        # With one CPU thread: were there others for this one, they would be more than there are cores, and
        # OpenMP would put all of them to sleep between the pieces of an update, which then takes 1.7 times as
        # long, for the rest of the run.
        self._pool = ThreadPoolExecutor(1, "checkpoint", initializer=torch.set_num_threads, initargs=(1,))
        self._writing: Future[UserError | None] | None = None

    def write(self, snapshot: Snapshot) -> None:
        """Start writing; `wait` first. The best weights are those of now, as the snapshot is: by the time the
        thread runs, training may have found better ones, which this snapshot does not know."""
        self._writing = self._pool.submit(self._write, snapshot, self.best)

    def has_saved(self, steps: int) -> bool:
        """Whether the state after `steps` updates is on disk, once a write in progress is done."""
        self.wait()
        return self.saved_steps == steps

    def wait(self) -> UserError | None:
        """Wait for a write in progress; returns why it failed, if it did."""
        return self._writing.result() if self._writing else None

    def _write(self, snapshot: Snapshot, best: tuple[int, dict[str, Tensor]] | None) -> UserError | None:
        try:
            if best:
                write_best(self.run_dir, best[0], best[1], snapshot.config, snapshot.tokenizer)
            write_step(self.run_dir, snapshot)
            prune(self.run_dir, snapshot.steps, self.keep)
        except (UserError, OSError) as error:  # of a disk that is full, read-only, or gone
            log.warning(NOT_SAVED, error)
            return error if isinstance(error, UserError) else UserError(str(error))
        self.saved_steps = snapshot.steps
        if self.best is best:
            self.best = None
        return None


def write_step(run_dir: Path, snapshot: Snapshot) -> None:
    """Write a step checkpoint and point `last` at it.

    Raises:
        UserError: it cannot be written; existing checkpoints are untouched.
    """
    state_tensors, state = _split(snapshot.state)
    _write_folder(
        run_dir / CHECKPOINTS / _name("step", snapshot.steps),
        tensors={WEIGHTS: snapshot.weights, STATE_TENSORS: state_tensors},
        values={CONFIG: _versioned(snapshot.config), STATE: state},
        files=snapshot.tokenizer,
        records={run_dir / name: size for name, size in snapshot.record_sizes.items()},
        link="last",
    )


def write_best(
    run_dir: Path,
    steps: int,
    weights: dict[str, Tensor],
    config: PretrainConfig,
    tokenizer: dict[str, bytes],
) -> None:
    """Write weights as the best so far, after `steps` updates, and point `best` at them.

    Raises:
        UserError: they cannot be written; existing checkpoints are untouched.
    """
    folder = run_dir / CHECKPOINTS / _name("best", steps)
    _write_folder(
        folder,
        tensors={WEIGHTS: weights},
        values={CONFIG: _versioned(config)},
        files=tokenizer,
        records={},
        link="best",
    )


def write_start(run_dir: Path, steps: int, config: PretrainConfig) -> None:
    """Write the config that a run begins with, or is resumed with after `steps` updates. A run that is killed
    before its next checkpoint, whose writing deletes this, is resumed with it.

    Raises:
        UserError: it cannot be written.
    """
    folder = run_dir / CHECKPOINTS / _name("start", steps)
    for other in step_folders(run_dir, "start"):
        if other != folder:
            remove(other)
    if damage(folder, (CONFIG,)) or read_config(folder) != config:
        _write_folder(folder, tensors={}, values={CONFIG: _versioned(config)}, files={}, records={})


def start_config(run_dir: Path, steps: int) -> PretrainConfig | None:
    """What `write_start` wrote for a start after so many updates, if it did and it is whole."""
    folder = run_dir / CHECKPOINTS / _name("start", steps)
    return None if damage(folder, (CONFIG,)) else read_config(folder)


def recorded_config(run_dir: Path) -> PretrainConfig | None:
    """The config that a run was last begun or saved with, by its checksum; None if that cannot be read."""
    for folder in (*step_folders(run_dir, "start"), *step_folders(run_dir)):
        with suppress(UserError):
            if damage(folder, (CONFIG,)) is None:
                return read_config(folder)
    return None


def _versioned(config: PretrainConfig) -> dict[str, Any]:
    return {"format_version": FORMAT_VERSION, **asdict(config)}


def _split(state: TrainingState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a training state by name, and its plain values."""
    values = {item.name: getattr(state, item.name) for item in fields(state)}
    optimizer, generators, epoch_generator = (
        values.pop(name) for name in ("optimizer", "generators", "epoch_generator")
    )
    tensors = {
        f"generator/{rank}/{kind}": tensor
        for rank, states in enumerate(generators)
        for kind, tensor in states.items()
    }
    if epoch_generator is not None:
        tensors["epoch_generator"] = epoch_generator
    numbers: dict[str, dict[str, float]] = {}
    for parameter, kept in optimizer.items():
        for key, value in kept.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{parameter}/{key}"] = value
            else:
                numbers.setdefault(parameter, {})[key] = value
    return tensors, {**values, "optimizer_numbers": numbers}


def _joined(tensors: dict[str, Tensor], values: dict[str, Any]) -> TrainingState:
    """The inverse of `_split`."""
    optimizer: dict[str, dict[str, Tensor | float]] = {
        name: dict(numbers) for name, numbers in values.get("optimizer_numbers", {}).items()
    }
    generators: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "optimizer":
            parameter, _, key = rest.rpartition("/")
            optimizer.setdefault(parameter, {})[key] = tensor
        elif kind == "generator":
            rank, _, device = rest.partition("/")
            generators.setdefault(int(rank), {})[device] = tensor
    return TrainingState(
        **{name: values[name] for name in ("run_id", "counters", "batches", "data", "resumed")},
        optimizer=optimizer,
        generators=[generators[rank] for rank in sorted(generators)],
        epoch_generator=tensors.get("epoch_generator"),
    )


def _write_folder(
    folder: Path,
    tensors: dict[str, dict[str, Tensor]],
    values: dict[str, Any],
    files: dict[str, bytes],
    records: dict[Path, int],
    link: str | None = None,
) -> None:
    size = sum(tensor.nbytes for content in tensors.values() for tensor in content.values())
    with replacing(folder, size + sum(records.values())) as temporary:
        temporary.mkdir()
        for name, content in tensors.items():
            save_tensors(content, temporary / name)
        for name, value in values.items():
            (temporary / name).write_text(as_json(value), encoding="utf-8")
        for name, kept in files.items():
            (temporary / name).write_bytes(kept)
        for record, size in records.items():
            _copy_start(record, size, temporary / record.name)
        checksums = {file.name: sha256(file) for file in sorted(temporary.iterdir())}
        for name, content in tensors.items():
            written = load_file(temporary / name)
            if not all(_same_bytes(tensor, written[key]) for key, tensor in content.items()):
                raise OSError(f"{name} was not read back as it was written: the disk or the memory is faulty")
        lines = [f"{checksum}  {name}\n" for name, checksum in checksums.items()]
        (temporary / CHECKSUMS).write_text("".join(lines), encoding="utf-8")
    if link:
        _link(folder.with_name(link), folder.name)


def _link(link: Path, name: str) -> None:
    with replacing(link) as temporary:
        try:
            temporary.symlink_to(name)
        except OSError:  # a file system without links, as vfat
            temporary.write_text(name, encoding="utf-8")


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, as readable for others as any new file.

    Raises:
        OSError: it cannot be written.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # how this library reports a full disk
        raise OSError(first_line(error)) from error
    if path.stat().st_mode != mode:  # safetensors lets only the owner read it
        path.chmod(mode)


def _copy_start(source: Path, size: int, target: Path) -> None:
    """Copy the first `size` bytes of a file that grows."""
    with target.open("wb") as file:
        if size:
            with source.open("rb") as content:
                if file.write(content.read(size)) < size:
                    raise OSError(f"{source} is shorter than it was")


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


def prune(run_dir: Path, steps: int, keep: int) -> None:
    """Delete all step checkpoints but the last `keep`, and all best ones but theirs. Those that were set
    aside are deleted once the run has come as far again."""
    kept = step_folders(run_dir)[:keep]
    names = {folder.name for folder in kept} | {_best_of(folder) for folder in kept}
    folders = list((run_dir / CHECKPOINTS).iterdir())
    old = [each for each in folders if CHECKPOINT_NAME.fullmatch(each.name) and each.name not in names]
    aside = [each for each in old if each.name.startswith(ABANDONED)]
    keeps_aside = any(steps_of(each) > steps for each in aside)
    for folder in old:
        if not (keeps_aside and folder in aside):
            shutil.rmtree(folder, ignore_errors=True)


def go_back(run_dir: Path, checkpoint: Path | None) -> Path | None:
    """Set aside the checkpoints of a run that come after the one it continues from, all of them if there is
    none; returns that one, which may have been set aside itself.

    Killed at any point, this leaves a run that continues from the given checkpoint: until the mark is there,
    nothing has happened; from then on nobody sees the later ones, and the next resume sets aside the rest.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = run_dir / CHECKPOINTS
    if checkpoint and checkpoint.name.startswith(ABANDONED):
        if best := _best_of(checkpoint):
            _move(folder / f"{ABANDONED}{best}", folder / best)
        checkpoint = _move(checkpoint, checkpoint.with_name(checkpoint.name.removeprefix(ABANDONED)))
    steps = steps_of(checkpoint) if checkpoint else 0
    later = [
        each
        for each in sorted([*folder.glob("step-*"), *folder.glob("best-*")])
        if CHECKPOINT_NAME.fullmatch(each.name) and steps_of(each) > steps
    ]
    if not later and not (folder / GOING_BACK).exists():
        return checkpoint
    write_text(folder / GOING_BACK, f"{steps}\n")
    best = _best_of(checkpoint) if checkpoint else None
    for link, name in (("last", checkpoint and checkpoint.name), ("best", best)):
        if name and (folder / name).exists():
            _link(folder / link, name)
        else:
            remove(folder / link)
    for each in later:
        aside = _move(each, folder / f"{ABANDONED}{each.name}")
        if each.name.startswith("step"):
            log.info(
                "%s is set aside until the run has come as far again; to return to it: %s",
                as_typed(aside),
                as_command("pretrain", as_override("resume", as_typed(aside))),
            )
    remove(folder / GOING_BACK)
    return checkpoint


def _move(folder: Path, target: Path) -> Path:
    if folder.exists():
        remove(target)
        folder.replace(target)
        flush(target.parent)
    return target


def _best_of(folder: Path) -> str | None:
    """The name of the best checkpoint as of a step checkpoint; None if that has none, or is damaged."""
    try:
        step = read_state(folder)["counters"]["best_step"]
    except (UserError, KeyError):
        return None
    return None if step is None else _name("best", step + 1)


def _name(kind: str, steps: int) -> str:
    return f"{kind}-{steps:08d}"


def damage(folder: Path, names: tuple[str, ...] = STEP_FILES) -> str | None:
    """What is wrong with the files of a checkpoint folder by its checksums; None if it is whole. The
    tokenizer's are always among them."""
    if not (folder / CHECKSUMS).is_file():
        return f"{CHECKSUMS} is missing"
    try:
        checksums = read_checksums(folder)
        tokenizer = [name for name in TOKENIZER_FILES if name in checksums or (folder / name).exists()]
        for name in (*names, *tokenizer):
            if name not in checksums:
                return f"{CHECKSUMS} does not list {name}"
            if not (folder / name).is_file():  # to open a pipe would wait for its other end
                return f"{name} is missing"
            if sha256(folder / name) != checksums[name]:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        return f"it cannot be read: {first_line(error)}"
    return None


def read_checksums(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a checkpoint, as it was written; empty if that cannot be read.

    Raises:
        UnicodeDecodeError: it is damaged.
    """
    lines = read_content(folder / CHECKSUMS).decode().splitlines()
    return {name: checksum for checksum, _, name in (line.partition("  ") for line in lines)}


def newest_whole(run_dir: Path, names: tuple[str, ...], run_id: str | None = None) -> Path:
    """The newest step checkpoint of a run whose files are whole, and that belongs to `run_id` if it is given.
    Logs those that are skipped. The run has at least one.

    Raises:
        UserError: none is whole.
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
    """The checkpoint folder that a name means, verified: one itself, or the newest whole one of a run.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = path_of(name)
    folder = named_checkpoint(path) or checkpoint_folder(path)
    if path.parent.name == CHECKPOINTS or (folder / WEIGHTS).exists():
        if problem := damage(folder, BEST_FILES):
            raise UserError(f"{folder} is damaged or no checkpoint: {problem}")
        return folder
    return newest_whole(find_run(name), BEST_FILES).resolve()


def read_weights(folder: Path) -> Weights:
    """The weights of a checkpoint of ours that was verified, see `damage`.

    Raises:
        UserError: a file does not fit the model that the config describes, or is of another version.
    """
    config = read_config(folder)
    return Weights(
        config.model,
        read_tensors(folder / WEIGHTS),
        kept_tokenizer(folder, config),
        origin=str(as_typed(folder)),
        trained=config,
        folder=folder,
    )


def kept_tokenizer(folder: Path, config: PretrainConfig) -> str:
    """What `load_tokenizer` is to load for a checkpoint: its folder, if that holds a tokenizer's files."""
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


def read_state(folder: Path) -> dict[str, Any]:
    """The plain values of a step checkpoint's training state.

    Raises:
        UserError: they are missing or damaged.
    """
    return _read(folder / STATE, lambda file: dict(json.loads(file.read_text("utf-8"))))


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        UserError: it is missing or damaged.
    """
    return _read(file, load_file)


def read_training_state(folder: Path) -> TrainingState:
    """What a step checkpoint holds besides weights and config.

    Raises:
        UserError: it is missing, damaged or of another format.
    """
    tensors, values = read_tensors(folder / STATE_TENSORS), read_state(folder)
    return _read(folder / STATE, lambda file: _joined(tensors, values))


_DAMAGE = (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError)


def _read(file: Path, read: Any) -> Any:
    try:
        return read(file)
    except FileNotFoundError as error:
        raise UserError(f"{file.parent} is not a whole checkpoint: {file.name} is missing") from error
    except _DAMAGE as error:
        raise UserError(f"{file} is damaged or of another format: {first_line(error)}") from error


def step_of(folder: Path) -> int | None:
    """The update, counted from 0, after which one of our checkpoint folders was saved."""
    return steps_of(folder) - 1 if CHECKPOINT_NAME.fullmatch(folder.name) else None


def run_id(run_dir: Path) -> str:
    """The id of the run in a folder, which is also its id in W&B: the one that an agent of a W&B sweep gave,
    or 8 hexadecimal digits made now. If RUN_ID is lost, the newest checkpoint still knows."""
    file = run_dir / RUN_ID
    if _ID.fullmatch(content := read_content(file).decode("utf-8", "replace")):
        return content
    folders = [folder for folder in step_folders(run_dir) if not damage(folder)]
    if folders:
        return read_state(folders[0])["run_id"]
    given = os.environ.get("WANDB_RUN_ID", "")
    return given if _ID.fullmatch(given) else secrets.token_hex(4)


_ID = re.compile("[A-Za-z0-9_-]{1,64}")
