"""The work of `experiments/runs.py`: listing runs. It reads only small files, and does not import torch."""

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from llm.config import RunsConfig
from llm.config_rules import validate
from llm.errors import UserError, shown
from llm.files import as_typed
from llm.outcome import Outcome
from llm.overrides import title_of
from llm.progress import format_figure, format_seconds
from llm.records import Record, lines_from_end
from llm.run_folder import CHECKPOINTS, SUMMARY, read_summary
from llm.runs import OUTPUTS, begun, folders_with, has_begun, run_title, state_of
from llm.sweeps.jobs import RECORD, SweepRecord, read_record, setting_of
from llm.tables import format_table, terminal_width

METRICS = "metrics.jsonl"
TAIL_BYTES = 1 << 18  # of metrics.jsonl, in which the last evaluation is sought
HEADING = ["state", "updates", "bits/byte", "trained", "run", "asked for"]
ALONG_THE_WAY = "~"
SILENT_SECONDS = 600.0  # from which on a run that should live may hang: heartbeats come every 15 seconds


@dataclass(frozen=True)
class Listed:
    """A run in the list."""

    folder: Path
    state: str
    updates: int | None
    bits_per_byte: float | None
    along_the_way: bool  # those are of an evaluation on the way, not of the end
    seconds: float | None  # of training
    asked_for: str

    def cells(self, folder: str) -> list[str]:
        return [
            self.state,
            format_figure(self.updates, "{:,}"),
            ALONG_THE_WAY * self.along_the_way + format_figure(self.bits_per_byte, "{:.3f}"),
            "–" if self.seconds is None else format_seconds(self.seconds),
            folder,
            self.asked_for,
        ]


def list_runs(config: RunsConfig) -> Outcome:
    """Print a table of the training runs below a folder, newest first; on a terminal, grouped by folder, with
    no line longer than the terminal's width.

    Raises:
        UserError: there is no such folder.
    """
    validate(config)
    root = Path(config.path)
    if not root.is_dir() and root != OUTPUTS:
        raise UserError(f"path={config.path}: there is no such folder")
    listed: list[Listed] = []
    count, sweeps = 0, _Sweeps()
    for run in sorted(training_runs(root, sweeps), key=begun, reverse=True):
        summary = read_summary(run)
        state = "damaged" if not summary and (run / SUMMARY).exists() else state_of(run, summary)
        if config.state in (None, state):
            count += 1
            if config.limit is None or count <= config.limit:
                about = sweeps.title(run) or run_title(run, summary)
                if state == "failed" and summary.get("error"):
                    about += f": {summary['error']}"
                if state == "running" and (silent := _silent_seconds(run, summary)) > SILENT_SECONDS:
                    about += f": not heard of for {format_seconds(silent)}"
                listed.append(Listed(as_typed(run), state, *_figures(run, summary, state), about))
    if not listed:
        print(shown(f"there is no run under {root}/{f' that is {config.state}' if config.state else ''}"))
        return Outcome({"runs": []})
    print(_grouped(listed, terminal_width()) if sys.stdout.isatty() else _flat(listed))
    if count > len(listed):
        print(f"… and {count - len(listed)} more: limit=null lists all")
    if any(run.along_the_way for run in listed):
        print(f"{ALONG_THE_WAY} over a few batches, along the way; the others at the end of the run")
    runs = [{**asdict(run), "folder": str(run.folder)} for run in listed]
    return Outcome({"runs": runs, "more": count - len(listed)})


def _silent_seconds(run: Path, summary: Record) -> float:
    """Seconds since a run's last heartbeat, or its start."""
    return time.time() - max(summary.get("heartbeat") or 0.0, begun(run))


class _Sweeps:
    """The records of sweeps, each read once."""

    def __init__(self) -> None:
        self.records: dict[Path, SweepRecord | None] = {}

    def record(self, folder: Path) -> SweepRecord | None:
        if folder not in self.records:
            self.records[folder] = None
            with suppress(UserError):
                self.records[folder] = read_record(folder) if (folder / RECORD).exists() else None
        return self.records[folder]

    def title(self, job: Path) -> str:
        """What distinguishes a job from the others; empty if the folder is no job of a sweep."""
        record, number = self.record(job.parent), int(job.name) if job.name.isdecimal() else -1
        if not record or not 0 <= number < len(record["jobs"]):
            return ""
        return title_of(setting_of(record["jobs"][number], record["varied"]))


def training_runs(root: Path, sweeps: _Sweeps) -> Iterator[Path]:
    """The folders of runs of pretrain.py, including jobs that failed before they began."""
    for folder in folders_with(root, CHECKPOINTS, METRICS, SUMMARY):
        record = sweeps.record(folder.parent)
        is_job = (folder / SUMMARY).exists() and record and record["script"] == "pretrain"
        if is_job or has_begun(folder) or (folder / METRICS).exists():
            yield folder


def _figures(run: Path, summary: Record, state: str) -> tuple[int | None, float | None, bool, float | None]:
    """Updates, bits per byte, whether these are from an evaluation during training, and seconds of training.
    For a run that has not finished, from its last lines of metrics."""
    updates, seconds = summary.get("steps"), summary.get("seconds")
    bits, along_the_way = summary.get("val_bits_per_byte"), False
    if state != "finished":
        for line in lines_from_end(run / METRICS, TAIL_BYTES):
            if "train/loss" in line and state in ("running", "killed", "damaged"):
                updates, seconds, state = line.get("step", -1) + 1, line.get("seconds"), ""
            if (bits := line.get("val/bits_per_byte")) is not None:
                along_the_way = True
                break
    return updates, bits, along_the_way, seconds


def _flat(listed: list[Listed]) -> str:
    """For pipes: one line per run, with its whole path and all its overrides."""
    return format_table([HEADING, *(run.cells(str(run.folder)) for run in listed)], left={0, 4, 5})


def _grouped(listed: list[Listed], width: int) -> str:
    cells = [run.cells(run.folder.name) for run in listed]
    heading, *lines = format_table([HEADING, *cells], left={0, 4, 5}).splitlines()
    table = [heading]
    for folder, group in groupby(zip(listed, lines, strict=True), key=lambda pair: pair[0].folder.parent):
        table += [shown(f"{folder}/", keep=""), *(f"  {line}" for _, line in group)]
    table[0] = f"  {heading}"
    return "\n".join(line if len(line) <= width else f"{line[: width - 1]}…" for line in table)
