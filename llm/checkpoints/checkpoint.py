"""Saved work: a folder a checkpoint, written whole, checked by its checksums, loaded without running code.

    checkpoints/
        step-00000400/      all that is needed to go on; `checkpoint.keep` of them are there
            model.safetensors           weights, under the book's names
            config.json                 the run's whole config
            training_state.safetensors  optimizer state by parameter, random states
            training_state.json         counters, position in the data, which run this is
            metrics.jsonl, samples.jsonl    what the run had recorded by then
            SHA256SUMS                  of all of these; `sha256sum -c` checks it too
        best-00000300/      the weights with the lowest validation loss by then
            model.safetensors, config.json, SHA256SUMS
        last -> step-00000400
        best -> best-00000300

The number is the count of updates done. A folder is complete, on disk and read back before it takes its
name; only then do the links move, and only after that are older folders deleted.
"""

import json
import logging
import os
import re
import secrets
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llm.config import ModelConfig, PretrainConfig, from_dict, validate
from llm.errors import UserError, first_line
from llm.files import as_json, replacing, sha256, write_text
from llm.model.gpt import GPTModel
from llm.run_folder import CHECKPOINT_NAME, CHECKPOINTS, RECORDS, RUN_ID, find_run, step_folders, steps_of

WEIGHTS, CONFIG, CHECKSUMS = "model.safetensors", "config.json", "SHA256SUMS"
STATE_TENSORS, STATE = "training_state.safetensors", "training_state.json"
BEST_FILES = (WEIGHTS, CONFIG)
STEP_FILES = (WEIGHTS, CONFIG, STATE_TENSORS, STATE, *RECORDS)

log = logging.getLogger(__name__)


@dataclass
class Snapshot:
    """What a checkpoint holds, in memory of its own, so that training goes on while it is written."""

    steps: int
    config: PretrainConfig
    weights: dict[str, Tensor]
    state_tensors: dict[str, Tensor]
    state: dict[str, Any]  # plain values
    record_sizes: dict[str, int]  # bytes of the run's RECORDS that belong to it


def copy_weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights, copied to the CPU's memory."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}


class CheckpointWriter:
    """Writes one snapshot at a time in a thread of its own.

    What the user can put right (a full disk) is logged, and kept for `wait`; the checkpoints there stay. Any
    other error of the thread is raised by the next `wait`.
    """

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.run_dir = run_dir
        self.keep = keep
        self.saved_steps: int | None = None  # of the last snapshot that is on disk
        self.best: tuple[int, dict[str, Tensor]] | None = None  # steps and weights; written with the next one
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[UserError | None] | None = None

    def write(self, snapshot: Snapshot) -> None:
        """Begin to write; `wait` first."""
        self._writing = self._pool.submit(self._write, snapshot)

    def has_saved(self, steps: int) -> bool:
        """Whether the state after `steps` updates is on disk, once what is going on is done."""
        self.wait()
        return self.saved_steps == steps

    def wait(self) -> UserError | None:
        """Wait for the write that is going on; why it failed, if it did."""
        return self._writing.result() if self._writing else None

    def _write(self, snapshot: Snapshot) -> UserError | None:
        best = self.best
        try:
            if best:
                write_best(self.run_dir, best[0], best[1], snapshot.config)
            write_step(self.run_dir, snapshot)
        except UserError as error:
            log.warning("checkpoint not saved: %s; training goes on, and the next one tries again", error)
            return error
        prune(self.run_dir, snapshot.steps, self.keep)
        self.saved_steps = snapshot.steps
        if self.best is best:
            self.best = None
        return None


def write_step(run_dir: Path, snapshot: Snapshot) -> None:
    """Write a step checkpoint and point `last` at it.

    Raises:
        UserError: it cannot be written; the checkpoints there are untouched.
    """
    _write_folder(
        run_dir / CHECKPOINTS / _name("step", snapshot.steps),
        tensors={WEIGHTS: snapshot.weights, STATE_TENSORS: snapshot.state_tensors},
        values={CONFIG: asdict(snapshot.config), STATE: snapshot.state},
        records={run_dir / name: size for name, size in snapshot.record_sizes.items()},
        link="last",
    )


def write_best(run_dir: Path, steps: int, weights: dict[str, Tensor], config: PretrainConfig) -> None:
    """Write weights as the best so far, after `steps` updates, and point `best` at them.

    Raises:
        UserError: they cannot be written; the checkpoints there are untouched.
    """
    folder = run_dir / CHECKPOINTS / _name("best", steps)
    _write_folder(
        folder, tensors={WEIGHTS: weights}, values={CONFIG: asdict(config)}, records={}, link="best"
    )


def _write_folder(
    folder: Path,
    tensors: dict[str, dict[str, Tensor]],
    values: dict[str, Any],
    records: dict[Path, int],
    link: str,
) -> None:
    size = sum(tensor.nbytes for content in tensors.values() for tensor in content.values())
    with replacing(folder, size + sum(records.values())) as temporary:
        temporary.mkdir()
        for name, content in tensors.items():
            save_tensors(content, temporary / name)
        for name, value in values.items():
            (temporary / name).write_text(as_json(value), encoding="utf-8")
        for record, size in records.items():
            _copy_start(record, size, temporary / record.name)
        checksums = {file.name: sha256(file) for file in sorted(temporary.iterdir())}
        for name, content in tensors.items():
            written = load_file(temporary / name)
            if not all(_same_bytes(tensor, written[key]) for key, tensor in content.items()):
                raise OSError(f"{name} was not read back as it was written: the disk or the memory fails")
        lines = [f"{checksum}  {name}\n" for name, checksum in checksums.items()]
        (temporary / CHECKSUMS).write_text("".join(lines), encoding="utf-8")
    with replacing(folder.with_name(link)) as temporary:
        temporary.symlink_to(folder.name)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that others may read.

    Raises:
        OSError: it cannot be written.
    """
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # how this library reports a full disk
        raise OSError(first_line(error)) from error
    path.chmod(0o644)  # it makes them for their owner alone


def _copy_start(source: Path, size: int, target: Path) -> None:
    """Copy the first `size` bytes of a file that grows."""
    with target.open("wb") as file:
        if size:
            with source.open("rb") as content:
                file.write(content.read(size))


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


def prune(run_dir: Path, steps: int, keep: int) -> None:
    """Delete all step checkpoints but the last `keep` up to `steps`, and all best ones but theirs.

    One with more steps is of a course that was given up: the run was resumed from before it.
    """
    kept = [folder for folder in step_folders(run_dir) if steps_of(folder) <= steps][:keep]
    names = {folder.name for folder in kept} | {_best_of(folder) for folder in kept}
    for folder in (run_dir / CHECKPOINTS).iterdir():
        if CHECKPOINT_NAME.fullmatch(folder.name) and folder.name not in names:
            shutil.rmtree(folder, ignore_errors=True)


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
    """What is wrong with the files of a checkpoint folder by its checksums; None if it is whole."""
    try:
        checksums = read_checksums(folder)
        for name in names:
            if name not in checksums:
                return f"{CHECKSUMS} does not list {name}"
            if sha256(folder / name) != checksums[name]:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        return f"it cannot be read: {first_line(error)}"
    return None


def read_checksums(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a checkpoint, as it was written."""
    lines = (folder / CHECKSUMS).read_text("utf-8").splitlines()
    return {name: checksum for checksum, _, name in (line.partition("  ") for line in lines)}


def newest_whole(run_dir: Path, names: tuple[str, ...], run_id: str | None = None) -> Path:
    """The newest step checkpoint of a run whose files are whole, and that says `run_id` if it is given. Logs
    which are passed over; the run has at least one.

    Raises:
        UserError: none is whole.
    """
    for folder in step_folders(run_dir):
        problem = damage(folder, names)
        if problem is None and run_id is not None and read_state(folder).get("run_id") != run_id:
            problem = "it is of another run"
        if problem is None:
            return folder
        log.warning("%s is passed over: %s", folder, problem)
    raise UserError(f"no checkpoint of {run_dir} is whole: in {folder.name} {problem}")


def load_checkpoint(folder: Path, device: torch.device | str = "cpu") -> tuple[GPTModel, PretrainConfig]:
    """The model of a checkpoint folder, in evaluation mode, and the config of its run.

    Raises:
        UserError: a file is missing, damaged, or does not fit the model that the config describes.
    """
    if problem := damage(folder, BEST_FILES):
        raise UserError(f"{folder} is damaged or no checkpoint: {problem}")
    config = read_config(folder)
    model = model_of_weights(config.model, read_tensors(folder / WEIGHTS), folder)
    return model.to(device).eval(), config


def read_config(folder: Path) -> PretrainConfig:
    """The config of a checkpoint's run.

    Raises:
        UserError: it is missing, damaged, or has keys that this version does not know.
    """
    file = folder / CONFIG
    config = _read(file, lambda file: from_dict(PretrainConfig, json.loads(file.read_text("utf-8"))))
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


def load_optimizer_state(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The optimizer state of a step checkpoint, by parameter and then by its own name in the optimizer.

    Raises:
        UserError: it is missing or damaged.
    """
    state: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_tensors(folder / STATE_TENSORS).items():
        kind, _, rest = name.partition("/")
        if kind == "optimizer":
            parameter, _, key = rest.rpartition("/")
            state.setdefault(parameter, {})[key] = tensor
    return state


def _read(file: Path, read: Any) -> Any:
    try:
        return read(file)
    except FileNotFoundError as error:
        raise UserError(f"{file.parent} is no whole checkpoint: {file.name} is missing") from error
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is damaged or of another format: {first_line(error)}") from error


def model_of_weights(config: ModelConfig, weights: dict[str, Tensor], source: Path | str) -> GPTModel:
    """A model that takes weights as its own, without making others first.

    Raises:
        UserError: a tensor is missing, of another shape, or too many.
    """
    layers = len({name.split(".")[1] for name in weights if name.startswith("trf_blocks.")})
    embeddings = weights.get("tok_emb.weight", torch.empty(0))
    found = {"n_layers": layers, "vocab_size": embeddings.shape[0], "emb_dim": embeddings.shape[-1]}
    for name, size in found.items():  # before a model of a billion layers is made
        if getattr(config, name) != size:
            raise UserError(f"{source} holds another model: {name}={size}, not {getattr(config, name)}")
    with torch.device("meta"):
        model = GPTModel(config)
    check_shapes(model, weights, source)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    return model


def check_shapes(model: nn.Module, weights: dict[str, Tensor], source: Path | str) -> None:
    """
    Raises:
        UserError: a tensor is missing, of another shape, or too many.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    compare_shapes(wanted, {name: tuple(tensor.shape) for name, tensor in weights.items()}, source)


def compare_shapes(
    wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], source: Path | str
) -> None:
    """
    Raises:
        UserError: a tensor is missing, of another shape, or too many.
    """
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{source} holds another model: {name} has shape {found.get(name, 'nothing')}, "
                f"and the config's model wants {wanted.get(name, 'nothing')}"
            )


def find_checkpoint(name: str) -> Path:
    """The checkpoint folder that a name means: one itself, or the newest whole one of a run.

    Raises:
        UserError: there is none.
    """
    if name != "latest" and (Path(name) / WEIGHTS).exists():
        return Path(name).resolve()
    return newest_whole(find_run(name), BEST_FILES).resolve()


def step_of(folder: Path) -> int | None:
    """The step, counted from 0, after which one of our checkpoint folders was saved."""
    return steps_of(folder) - 1 if CHECKPOINT_NAME.fullmatch(folder.name) else None


def run_id(run_dir: Path) -> str:
    """The id of the run in a folder, which is also its id in W&B: the one that an agent of a W&B sweep gave,
    or 8 hexadecimal digits made at the first call. If the file is lost, the newest checkpoint still knows."""
    file = run_dir / RUN_ID
    if file.exists() and _ID.fullmatch(content := file.read_text("utf-8", "replace")):
        return content
    folders = [folder for folder in step_folders(run_dir) if not damage(folder)]
    given = os.environ.get("WANDB_RUN_ID", "")
    new = given if _ID.fullmatch(given) else secrets.token_hex(4)
    made = read_state(folders[0])["run_id"] if folders else new
    write_text(file, made)
    return made


_ID = re.compile("[A-Za-z0-9_-]{1,64}")
