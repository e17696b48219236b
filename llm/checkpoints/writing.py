"""Writing checkpoints: from a copy in memory, whole and read back, while training continues."""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm.checkpoints.checkpoint import (
    CHECKSUMS,
    CONFIG,
    FORMAT_VERSION,
    STATE,
    STATE_TENSORS,
    WEIGHTS,
    TrainingState,
    damage,
    name_of,
    read_config,
    split,
)
from llm.checkpoints.pruning import point, prune
from llm.config import PretrainConfig
from llm.errors import UserError, first_line
from llm.files import as_json, remove, replacing, sha256
from llm.run_folder import CHECKPOINTS, step_folders

NOT_SAVED = "checkpoint not saved: %s; training continues, and the next one tries again"

log = logging.getLogger(__name__)


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
    state_tensors, state = split(snapshot.state)
    _write_folder(
        run_dir / CHECKPOINTS / name_of("step", snapshot.steps),
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
    folder = run_dir / CHECKPOINTS / name_of("best", steps)
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
    folder = run_dir / CHECKPOINTS / name_of("start", steps)
    for other in step_folders(run_dir, "start"):
        if other != folder:
            remove(other)
    if damage(folder, (CONFIG,)) or read_config(folder) != config:
        _write_folder(folder, tensors={}, values={CONFIG: _versioned(config)}, files={}, records={})


def _versioned(config: PretrainConfig) -> dict[str, Any]:
    return {"format_version": FORMAT_VERSION, **asdict(config)}


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
        point(folder.with_name(link), folder.name)


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
