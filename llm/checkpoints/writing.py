"""Writing checkpoints from a copy in memory, each whole or not at all, while training continues."""

import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from llm.checkpoints.checkpoint import (
    CHECKSUMS,
    CONFIG,
    FORMAT_VERSION,
    STATE,
    STATE_TENSORS,
    WEIGHTS,
    damage,
    name_of,
    read_config,
)
from llm.checkpoints.parts import part_name
from llm.checkpoints.pruning import point, prune
from llm.checkpoints.staging import Place, Staging, Tensors, bytes_of
from llm.checkpoints.training_state import TrainingState, split
from llm.config import PretrainConfig
from llm.errors import UserError
from llm.files import as_json, flush, remove, replacing, sha256
from llm.processes import FOREVER
from llm.run_folder import CHECKPOINTS, step_folders
from llm.runtime import Runtime

NOT_SAVED = "checkpoint not saved: %s; training continues, and the next one tries again"

log = logging.getLogger(__name__)


@dataclass
class Snapshot:
    """The content of a checkpoint. The tensors are the run's own and are copied before it continues; in a
    sharded run each process has its part of them."""

    steps: int
    config: PretrainConfig
    weights: Tensors
    state: TrainingState
    record_sizes: dict[str, int]  # how many bytes of each of the run's RECORDS belong to it
    tokenizer: dict[str, bytes] = field(default_factory=dict)  # its files, if its name is not enough


class Lost(UserError):
    """Another process of the run is gone, and its part of a checkpoint with it."""


@dataclass
class _Begun:
    """Folders that are being written, and get their final names when `unfinished` is closed."""

    folders: dict[str, Path]  # temporary names of the folder `step`, and of `best` if there is one
    checksums: dict[Path, dict[str, str]]  # by folder: those of its files of tensors
    unfinished: ExitStack


class CheckpointWriter:
    """Copies one snapshot at a time, and writes it while training continues: tensors by a separate process
    (see `Staging`), everything else by a thread that waits for that process.

    In a sharded run each process has a writer for its part. The main process's creates and finishes the
    folder, and is the only one that logs and knows what is on disk.

    An error that the user can fix, such as a full disk, is logged and returned by `wait`; existing
    checkpoints are kept. Any other error is raised by the next `wait`.
    """

    def __init__(self, run_dir: Path, keep: int, sharing: Runtime | None = None) -> None:
        """
        Args:
            sharing: in a sharded run, its runtime; all processes then have to create a writer.
        """
        self.run_dir, self.keep, self.sharing = run_dir, keep, sharing
        self.saved_steps: int | None = None  # updates of the newest snapshot on disk
        # Updates and copied weights at the lowest validation loss; written with the next snapshot.
        self.best: tuple[int, Tensors] | None = None
        self._staging = Staging()
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[UserError | None] | None = None
        # For the threads, separate from what the processes exchange in training.
        self._group = dist.new_group(backend="gloo", timeout=FOREVER) if sharing else None

    def write(self, snapshot: Snapshot | None) -> None:
        """Copy a snapshot and start writing it; call `wait` first. In a sharded run all processes have to
        call it, and nothing is written if the main one has no snapshot."""
        begun = None
        if snapshot and (self.sharing is None or self.sharing.is_main):
            try:
                begun = self._begin(snapshot)
            except UserError as error:
                self._writing = Future()
                self._writing.set_result(_not_saved(error))
        folders = begun.folders if begun else None
        if self.sharing:
            folders = self.sharing.told(folders)
        if not snapshot or not folders:
            return
        if "best" not in folders:  # the best weights are saved already
            self.best = None
        contents = {"step": {WEIGHTS: snapshot.weights, STATE_TENSORS: split(snapshot.state)[0]}}
        if self.best:
            contents["best"] = {WEIGHTS: self.best[1]}
        files = {
            folders[kind] / (part_name(name, self.sharing.rank) if self.sharing else name): tensors
            for kind, content in contents.items()
            for name, tensors in content.items()
        }
        staged = self._staging.stage(files)
        best_steps = self.best[0] if self.best else None
        self._writing = self._pool.submit(self._write, snapshot.steps, best_steps, staged, begun)

    def has_saved(self, steps: int) -> bool:
        """Whether the state after `steps` updates is on disk; waits for a write in progress."""
        self.wait()
        return self.saved_steps == steps

    def wait(self) -> UserError | None:
        """Wait for a write in progress; returns why it failed, if it did."""
        return self._writing.result() if self._writing else None

    def close(self) -> None:
        """Wait, and end the thread and the process."""
        self._pool.shutdown()
        self._staging.close()

    def _begin(self, snapshot: Snapshot) -> _Begun:
        """Create the folders.

        Raises:
            UserError: there is not enough room.
        """
        place = self.run_dir / CHECKPOINTS
        records = {self.run_dir / name: size for name, size in snapshot.record_sizes.items()}
        tensors, state = split(snapshot.state)
        config, tokenizer = _versioned(snapshot.config, in_parts=bool(self.sharing)), snapshot.tokenizer
        with ExitStack() as stack:
            folder = place / name_of("step", snapshot.steps)
            size = bytes_of(snapshot.weights) + bytes_of(tensors)
            values = {CONFIG: config, STATE: state}
            begun = {
                "step": stack.enter_context(_new_folder(folder, size, values, tokenizer, records, "last"))
            }
            if self.best:  # finished first
                folder, size = place / name_of("best", self.best[0]), bytes_of(self.best[1])
                values = {CONFIG: config}
                begun["best"] = stack.enter_context(_new_folder(folder, size, values, tokenizer, {}, "best"))
            if self.sharing:
                for kind, (folder, _) in begun.items():
                    for name in (WEIGHTS, STATE_TENSORS)[: 2 if kind == "step" else 1]:
                        (folder / part_name(name, 0)).parent.mkdir()
            return _Begun(
                {kind: folder for kind, (folder, _) in begun.items()},
                dict(begun.values()),
                stack.pop_all(),
            )

    def _write(
        self, steps: int, best_steps: int | None, staged: dict[Path, Place], begun: _Begun | None
    ) -> UserError | None:
        """Write what was staged, and finish the folders; runs in the thread.

        Args:
            staged: where the contents of files are in the shared memory.
            begun: the folders, in the main process.
        """
        written: dict[Path, str] | OSError
        try:
            written = self._staging.write(staged)
            for file in written:  # by the process that wrote it, as another machine cannot
                flush(file)
        except OSError as error:
            written = error
        if not begun:
            dist.send_object_list([written], dst=0, group=self._group)
            return None
        try:
            with begun.unfinished:
                for part in (written, *self._of_others()):
                    if isinstance(part, OSError):
                        raise part
                    for file, checksum in part.items():
                        folder = next(each for each in begun.checksums if file.is_relative_to(each))
                        begun.checksums[folder][str(file.relative_to(folder))] = checksum
            prune(self.run_dir, steps, self.keep)
        except Lost as error:
            return error
        except (UserError, OSError) as error:  # the disk is full, read-only, or gone
            return _not_saved(error)
        self.saved_steps = steps
        if self.best and self.best[0] == best_steps:  # unless training has found better ones meanwhile
            self.best = None
        return None

    def _of_others(self) -> list[dict[Path, str] | OSError]:
        """What the other processes of a sharded run have written, or why they could not. Waits for all of
        them, so that none is still writing.

        Raises:
            Lost: one of them is gone.
        """
        parts = []
        for rank in range(1, self.sharing.processes if self.sharing else 1):
            received: list[Any] = [None]
            try:
                dist.recv_object_list(received, src=rank, group=self._group)
            except RuntimeError as error:
                raise Lost(f"process {rank} is gone, and with it its part of a checkpoint") from error
            parts += received
        return parts


def _not_saved(error: UserError | OSError) -> UserError:
    log.warning(NOT_SAVED, error)
    return error if isinstance(error, UserError) else UserError(str(error))


def write_start(run_dir: Path, steps: int, config: PretrainConfig) -> None:
    """Write the config with which a run starts, or is resumed after `steps` updates. If the run is killed
    before its next checkpoint, it is resumed with this config; writing that checkpoint deletes it.

    Raises:
        UserError: it cannot be written.
    """
    folder = run_dir / CHECKPOINTS / name_of("start", steps)
    for other in step_folders(run_dir, "start"):
        if other != folder:
            remove(other)
    if damage(folder, (CONFIG,)) or read_config(folder) != config:
        with _new_folder(folder, 0, {CONFIG: _versioned(config)}, {}, {}):
            pass


def _versioned(config: PretrainConfig, in_parts: bool = False) -> dict[str, Any]:
    return {"format_version": FORMAT_VERSION if in_parts else 2, **asdict(config)}


@contextmanager
def _new_folder(
    folder: Path,
    size: int,
    values: dict[str, Any],
    files: dict[str, bytes],
    records: dict[Path, int],
    link: str | None = None,
) -> Iterator[tuple[Path, dict[str, str]]]:
    """Write a checkpoint, except for its tensors. Yields the temporary folder for these, and a dict for their
    checksums; when the context ends, everything else is written, and the folder gets its name.

    Args:
        size: bytes of the tensors.
        values: what to write as JSON, by file name.
        files: other files' contents, by name.
        records: how many bytes to copy of each growing file.
        link: name of a link that will point to the folder.

    Raises:
        UserError: it cannot be written; existing checkpoints are untouched.
    """
    with replacing(folder, size + sum(records.values())) as temporary:
        temporary.mkdir()
        checksums: dict[str, str] = {}
        yield temporary, checksums
        for name, value in values.items():
            (temporary / name).write_text(as_json(value), encoding="utf-8")
        for name, kept in files.items():
            (temporary / name).write_bytes(kept)
        for record, length in records.items():
            _copy_start(record, length, temporary / record.name)
        others = [temporary / name for name in (*values, *files, *(record.name for record in records))]
        checksums |= {file.name: sha256(file) for file in others}
        lines = [f"{checksum}  {name}\n" for name, checksum in sorted(checksums.items())]
        (temporary / CHECKSUMS).write_text("".join(lines), encoding="utf-8")
    if link:
        point(folder.with_name(link), folder.name)


def _copy_start(source: Path, size: int, target: Path) -> None:
    """Copy the first `size` bytes of a growing file."""
    with target.open("wb") as file:
        if size:
            with source.open("rb") as content:
                if file.write(content.read(size)) < size:
                    raise OSError(f"{source} is shorter than it was")
