"""What lies in a run's folder, which process holds it, and which folder a name means."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm.errors import UserError
from llm.files import held, is_held, write_json

RECORDS = ("metrics.jsonl", "samples.jsonl")  # the files that grow line by line
SUMMARY = "summary.json"
RUN_ID = "run-id.txt"
LOCK = ".run.lock"  # locked by the process that trains the run; never replaced, so that the lock holds
CHECKPOINTS = "checkpoints"  # see llm/checkpoints/checkpoint.py
CHECKPOINT_NAME = re.compile(r"(step|best)-\d{8,}")


def holds_run(folder: Path) -> bool:
    """Whether a folder holds a run that got as far as its first line of metrics or its first checkpoint."""
    return any((folder / name).exists() for name in (*RECORDS, CHECKPOINTS))


def refuse_to_overwrite(run_dir: Path) -> None:
    """
    Raises:
        UserError: the folder holds a run.
    """
    if holds_run(run_dir):
        raise UserError(
            f"{run_dir} already holds a run: continue it with resume={run_dir}, or write to another folder "
            f"(hydra.run.dir=FOLDER)"
        )


@contextmanager
def claimed(run_dir: Path) -> Iterator[None]:
    """Hold a run folder for this process.

    Raises:
        UserError: another process holds it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with held(run_dir / LOCK) as ours:
        if not ours:
            raise UserError(f"{run_dir} is being trained by another process: wait for it, or stop it")
        yield


def is_claimed(run_dir: Path) -> bool:
    """Whether a process is training the run in this folder."""
    return is_held(run_dir / LOCK)


def read_summary(run_dir: Path) -> dict[str, Any]:
    """A run folder's `summary.json`; empty if there is none yet, or if it is damaged."""
    try:
        summary = json.loads((run_dir / SUMMARY).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """The inverse of `read_summary`.

    Raises:
        UserError: it cannot be written.
    """
    write_json(run_dir / SUMMARY, summary)


def mark_failed(run_dir: Path, reason: str) -> None:
    """Let a job's summary say why it has no result: a sweep knows its jobs by their summaries."""
    write_summary(run_dir, {**read_summary(run_dir), "status": "failed", "error": reason})


def steps_of(folder: Path) -> int:
    """The number of updates behind a checkpoint folder of ours, from its name."""
    return int(folder.name.partition("-")[2])


def step_folders(run_dir: Path) -> list[Path]:
    """The step checkpoints of a run, newest first."""
    folders = [
        folder
        for folder in (run_dir / CHECKPOINTS).glob("step-*")
        if CHECKPOINT_NAME.fullmatch(folder.name) and folder.is_dir()
    ]
    return sorted(folders, key=steps_of, reverse=True)


def find_run(name: str, root: Path = Path("outputs"), with_checkpoint: bool = True) -> Path:
    """The run folder that a name means: a path to it or to one of its checkpoints, or `latest`, the run under
    `root` that was started or saved last.

    Raises:
        UserError: there is none.
    """
    if name == "latest":
        marks = [*root.glob("**/checkpoints/last"), *([] if with_checkpoint else root.glob(f"**/{RUN_ID}"))]
        if not marks:
            what = "run with a checkpoint" if with_checkpoint else "run"
            raise UserError(f"latest: there is no {what} under {root}/; run experiments/pretrain.py first")
        newest = max(marks, key=lambda mark: mark.lstat().st_mtime_ns)
        return newest.parent if newest.name == RUN_ID else newest.parent.parent
    folder = Path(name)
    if folder.parent.name == CHECKPOINTS:
        folder = folder.parent.parent
    if not step_folders(folder) and (with_checkpoint or not (folder / RUN_ID).exists()):
        raise UserError(f"{name} is not a run folder{' with a checkpoint' if with_checkpoint else ''}")
    return folder
