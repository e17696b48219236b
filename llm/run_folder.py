"""The files in a run's folder, and claiming a folder for a process."""

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from llm.errors import UserError
from llm.files import as_typed, held, is_held, read_content, remove, write_json, write_text
from llm.overrides import as_argument
from llm.records import Record, read_record

RECORDS = ("metrics.jsonl", "samples.jsonl")  # the files that grow line by line
SUMMARY = "summary.json"
LOSS_PLOT = "loss.png"
RUN_ID = "run-id.txt"
FINGERPRINT = "fingerprint.json"  # see llm/commands/done.py
LOCK = ".run.lock"  # locked by the process that trains the run; never replaced, or the lock would be lost
CHECKPOINTS = "checkpoints"  # see llm/checkpoints/checkpoint.py
# What a run writes before its first update, besides a log.
AT_FIRST = (".hydra", FINGERPRINT, LOCK, CHECKPOINTS, RUN_ID, "wandb")
LINKS = ("last", "best")  # in the folder of checkpoints
# These, and temporary ones that a killed process left.
LINK = re.compile(rf"({'|'.join(LINKS)})|\.({'|'.join(LINKS)})\.[0-9a-f]{{8}}\.tmp")
SWEEP = "sweep.json"  # of a sweep's folder; see llm/sweeps/jobs.py
SWEEP_LOCK = ".sweep.lock"  # of a sweep's folder; locked by the process that runs the sweep
CHECKPOINT_NAME = re.compile(r"(abandoned-)?(start|step|best)-\d{8,}")
GOING_BACK = "going-back-to.txt"  # in the folder of checkpoints, while those after its number are set aside


def holds_run(folder: Path) -> bool:
    """Whether a folder holds a run that has begun, or a sweep."""
    saved = any(CHECKPOINT_NAME.fullmatch(path.name) for path in folder.glob(f"{CHECKPOINTS}/*"))
    return saved or any((folder / name).exists() for name in (*RECORDS, SWEEP))


@contextmanager
def claimed(run_dir: Path, old: bool = False, beside: bool = False) -> Iterator[Path]:
    """Claim a run's folder for this process. If the run ends before it has begun, a new folder is removed
    again.

    Args:
        old: the folder may hold a run, which is to be resumed.
        beside: the folder's name was generated, so if it is taken, claim one beside it, such as `12-00-00-2`.

    Raises:
        UserError: another process holds the folder, it holds a run, or it has links to elsewhere.
    """
    for folder in folders_beside(run_dir):
        before = {path.name for path in folder.iterdir()} if folder.exists() else set()
        if old:
            refuse_links(folder)
        with held(folder / LOCK) as ours:
            if ours and (old or not holds_run(folder)):
                try:
                    yield folder
                except (UserError, KeyboardInterrupt, SystemExit):
                    if not any((folder / name).exists() for name in (*RECORDS, SUMMARY)):
                        _remove_what_is_new(folder, before)
                    raise
                finally:
                    if {path.name for path in folder.glob("*")} == {LOCK}:
                        _remove_what_is_new(folder, before)
                return
        if not beside:
            raise UserError(_taken(folder, ours))


def folders_beside(folder: Path) -> Iterator[Path]:
    """A folder, and alternatives if it is taken: `12-00-00`, `12-00-00-2`, `12-00-00-3`, …"""
    yield folder
    for number in count(2):
        yield folder.with_name(f"{folder.name}-{number}")


def _remove_what_is_new(folder: Path, before: set[str]) -> None:
    """Remove what a run has written before its first update."""
    for path in folder.iterdir():
        if path.name not in before and (path.name in AT_FIRST or path.suffix == ".log"):
            remove(path)
    if not before:
        with suppress(OSError):  # something else is in it
            folder.rmdir()


def _taken(folder: Path, is_free: bool) -> str:
    folder = as_typed(folder)
    if not is_free:
        return f"{folder} is being written by another process: wait for it, or stop it"
    return (
        f"{folder} already holds a run: continue it with {as_argument('resume', folder)}, or write to "
        f"another folder (hydra.run.dir=FOLDER)"
    )


def refuse_links(folder: Path) -> None:
    """Check that a run that is resumed in this folder writes nowhere else.

    Raises:
        UserError: an entry is a link, through which the run would write elsewhere, or a pipe, for which it
            would wait.
    """
    for place in (folder, folder / CHECKPOINTS):
        for entry in place.iterdir() if place.is_dir() else ():
            if entry.is_symlink() and LINK.fullmatch(entry.name):
                continue
            if entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
                kind = "link" if entry.is_symlink() else "pipe or device"
                raise UserError(
                    f"{as_typed(entry)} is a {kind}: a run writes only in its own folder; remove it"
                )


def is_claimed(run_dir: Path) -> bool:
    """Whether a process is training the run in this folder."""
    return is_held(run_dir / LOCK)


def read_summary(run_dir: Path) -> Record:
    """The `summary.json` of a run folder; empty if there is none yet, or it is damaged."""
    return read_record(run_dir / SUMMARY)


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """The inverse of `read_summary`.

    Raises:
        UserError: it cannot be written.
    """
    write_json(run_dir / SUMMARY, summary)


def mark_failed(run_dir: Path, reason: str) -> None:
    """Record in a job's summary why it has no result, which is where a sweep looks."""
    write_summary(run_dir, {**read_summary(run_dir), "status": "failed", "error": reason})


def steps_of(folder: Path) -> int:
    """The number of updates in the name of a checkpoint folder."""
    return int(folder.name.rpartition("-")[2])


def step_folders(run_dir: Path, kind: str = "step") -> list[Path]:
    """The step checkpoints of a run, newest first, without those that are being set aside; or its folders of
    another kind, see CHECKPOINT_NAME."""
    mark = run_dir / CHECKPOINTS / GOING_BACK
    steps = read_content(mark).decode("utf-8", "replace").strip()
    newest = int(steps) if steps.isdecimal() and len(steps) < 20 else math.inf
    folders = [
        folder
        for folder in (run_dir / CHECKPOINTS).glob(f"{kind}-*")
        if CHECKPOINT_NAME.fullmatch(folder.name) and folder.is_dir() and steps_of(folder) <= newest
    ]
    return sorted(folders, key=steps_of, reverse=True)


def checkpoint_folder(path: Path) -> Path:
    """The folder that a path to a checkpoint means. `last` and `best` are links; or, if the file system has
    no links, files with the folder's name."""
    try:
        name = path.read_text("utf-8") if path.is_file() and path.stat().st_size < 100 else ""
    except (OSError, ValueError):
        name = ""
    return Path(os.path.realpath(path.with_name(name) if CHECKPOINT_NAME.fullmatch(name) else path))


def correct_record(run_dir: Path, values: dict[str, int]) -> None:
    """Put values that a run has chosen itself into the config that Hydra recorded, if there is one.

    Args:
        values: by keys such as `data.batch_size`.
    """
    file = run_dir / ".hydra" / "config.yaml"
    if values and file.exists():
        config = yaml.safe_load(file.read_text("utf-8"))
        for key, value in values.items():
            group, _, name = key.partition(".")
            config[group][name] = value
        write_text(file, yaml.safe_dump(config, allow_unicode=True, sort_keys=False))
