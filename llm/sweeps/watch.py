"""What a sweep prints: a live table of its jobs on a terminal, lines elsewhere, and a table at its end."""

import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from llm.config import TrainingConfig
from llm.errors import shown
from llm.files import modified, parse_json
from llm.progress import format_bar, format_count, format_figure, format_seconds, format_table
from llm.records import Record, figure_in, read_config_text, typed
from llm.run_folder import SUMMARY
from llm.sweeps.jobs import RECORD, Job, begun, read_jobs, state_since
from llm.training.schedules import spent

POLL_SECONDS = 0.5
TAIL_BYTES = 4096  # read from the end of metrics.jsonl: some lines, the last of which says how far a job is
WAITING_POLLED = 64  # jobs begin roughly in order, so not all that wait need looking at each time
TABLE_ROWS = 40  # in the table at the end; a larger sweep shows its best
FIGURES = {  # of summaries, with their titles in the table and how they are written
    "train_loss": ("train loss", "{:.3f}"),
    "val_loss": ("val loss", "{:.3f}"),
    "result": ("result", "{:.3f}"),  # of evaluate.py
    "val_bits_per_byte": ("bits/byte", "{:.3f}"),
}
COSTS = {
    "tokens_seen": ("tokens", "{:,}"),
    "seconds": ("time", "{:.0f}s"),
}


class SweepProgress:
    """How far the jobs of a sweep are, read from their files, wherever they run."""

    def __init__(self, folder: Path, since: float, total: int) -> None:
        """
        Args:
            since: when this process began to run the sweep, in seconds since the epoch.
            total: the number of jobs that there will be.
        """
        self.folder, self.since, self.total = folder, since, total
        self.jobs: dict[str, Job] = {}
        self.states: dict[str, str] = {}
        self._metrics: dict[str, Record] = {}
        self._limits: dict[str, TrainingConfig] = {}
        self._started = time.monotonic()
        self._record_read = 0.0
        self._read_record()
        self._share_at_start = self.share()

    def _read_record(self) -> None:
        """Take in the jobs, again whenever a search has added some."""
        if (written := modified(self.folder / RECORD)) != self._record_read:
            self._record_read = written
            self.jobs |= {job.name: job for job in read_jobs([self.folder]) if job.name not in self.jobs}
            for name, job in self.jobs.items():
                self.states.setdefault(name, state_since(job, self.since))

    def poll(self) -> list[str]:
        """Look at the jobs that have not ended; returns the names of those whose state has changed."""
        self._read_record()
        changed = []
        for name in self._not_ended():
            job = self.jobs[name].reread()
            state = state_since(job, self.since)
            if state != self.states[name]:
                self.states[name], self.jobs[name] = state, job
                changed.append(name)
        return changed

    def _not_ended(self) -> list[str]:
        # An interrupted job may continue: Slurm requeues it.
        running = [name for name, state in self.states.items() if state in ("running", "interrupted")]
        waiting = [name for name, state in self.states.items() if state == "waiting"]
        return running + waiting[:WAITING_POLLED]

    def named(self, *states: str) -> list[Job]:
        return [self.jobs[name] for name, state in self.states.items() if state in states]

    def best(self) -> Job | None:
        return best_of(self.named("finished"))

    def last_metrics(self, job: Job) -> Record:
        """The figures of the last whole line that a job wrote, and of the last evaluation seen."""
        file, metrics = job.folder / "metrics.jsonl", self._metrics.setdefault(job.name, {})
        if file.is_file():
            with file.open("rb") as content:
                content.seek(max(0, content.seek(0, 2) - TAIL_BYTES))
                for line in content.read().split(b"\n")[1:-1]:
                    metrics |= typed(parse_json(line))
        return metrics

    def job_share(self, job: Job, metrics: Record) -> float:
        """How much of its budget a running job has spent, 0 to 1."""
        step, epoch, seconds = (metrics.get(name) for name in ("step", "epoch", "seconds"))
        if step is None or epoch is None or seconds is None:
            return 0.0
        if job.name not in self._limits:
            names = ("max_steps", "max_epochs", "max_minutes")
            texts = {name: read_config_text(job.folder, f"training.{name}") for name in names}
            limits: dict[str, Any] = {name: value and figure_in(value) for name, value in texts.items()}
            if not any(value and value > 0 for value in limits.values()):  # it is still being written
                return 0.0
            self._limits[job.name] = TrainingConfig(**limits)
        shares = spent(self._limits[job.name], step + 1, epoch, seconds)
        return min(1.0, max(shares.values()))

    def share(self) -> float:
        """How much of the sweep is done, 0 to 1; all jobs count equally."""
        running = sum(self.job_share(job, self.last_metrics(job)) for job in self.named("running"))
        ended = len(self.jobs) - len(self.named("running", "waiting"))
        return (ended + running) / self.total

    def heading(self) -> str:
        """`4 of 12 jobs done · 2 running · 6 waiting · 1 failed · 4m10s left`."""
        running = len(self.named("running"))
        ended = len(self.jobs) - running - len(self.named("waiting"))
        waiting = self.total - running - ended
        parts = [f"{ended} of {self.total} jobs done"]
        parts += [f"{count} {name}" for name, count in (("running", running), ("waiting", waiting)) if count]
        for state in ("stopped", "failed"):
            if count := len(self.named(state)):
                parts.append(f"{count} {state}")
        share = self.share()
        advanced = share - self._share_at_start
        if advanced > 0 and share < 1:
            left = (time.monotonic() - self._started) * (1 - share) / advanced
            parts.append(f"{format_seconds(left)} left")
        return " · ".join(parts)

    def best_so_far(self) -> str:
        best = self.best()
        return f"best: job {best.name}, val loss {best.summary['val_loss']:.3f}" if best else ""


@contextmanager
def watching(progress: SweepProgress) -> Iterator[None]:
    """Show a sweep's progress while it runs."""
    with _live_table(progress) if sys.stdout.isatty() else _plain_lines(progress):
        yield


@contextmanager
def _plain_lines(progress: SweepProgress) -> Iterator[None]:
    ended = threading.Event()

    def look() -> None:
        for name in progress.poll():
            job, state = progress.jobs[name], progress.states[name]
            if state == "running":
                _print(f"job {name} · {job.title} · started")
            elif state == "failed":
                _print(f"error: job {name} ({job.title}): {job.error}", sys.stderr)
            else:
                parts = [_ended_line(job, state), progress.heading(), progress.best_so_far()]
                _print(" · ".join(filter(None, parts)))

    def watch() -> None:
        while not ended.wait(POLL_SECONDS):
            look()

    _print(f"sweep folder {progress.folder} · {progress.heading()}")
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        look()


def _print(line: str, file: TextIO | None = None) -> None:
    print(shown(line, keep=""), file=file, flush=True)


def _ended_line(job: Job, state: str) -> str:
    what = f"job {job.name} · {job.title} · {state}"
    if (loss := job.summary.get("val_loss")) is not None:
        what += f", val loss {loss:.3f}"
    if (seconds := job.summary.get("total_seconds")) is not None:
        what += f", {format_seconds(seconds)}"
    return what


@contextmanager
def _live_table(progress: SweepProgress) -> Iterator[None]:
    from rich.live import Live

    with Live(
        get_renderable=lambda: live_table(progress), refresh_per_second=1 / POLL_SECONDS, transient=True
    ):
        yield


def live_table(progress: SweepProgress) -> Any:
    """A bar and as many jobs as the screen holds: the last that ended, those that run, the next that wait."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    progress.poll()
    room = max(3, shutil.get_terminal_size().lines - 6)
    running = progress.named("running")[:room]
    waiting = progress.named("waiting")
    ended = progress.named("finished", "stopped", "failed", "interrupted")
    ended.sort(key=lambda job: modified(job.folder / SUMMARY))
    left = room - len(running) - min(1, len(waiting))  # at least one that waits is shown
    lately = ended[max(0, len(ended) - max(0, left)) :]
    table = Table(box=None, pad_edge=False, expand=True)
    for name in ("job", "set", "state"):
        table.add_column(name, no_wrap=True, overflow="ellipsis", ratio=1 if name == "set" else None)
    for name in ("done", "train loss", "val loss", "tokens", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    best = progress.best()
    styles = {"running": "bold", "failed": "red", "stopped": "dim"}
    for job in [*lately, *running, *waiting[: max(0, room - len(lately) - len(running))]]:
        state, metrics = progress.states[job.name], progress.last_metrics(job)
        share = progress.job_share(job, metrics) if state == "running" else None
        loss = job.summary.get("val_loss") if state != "running" else metrics.get("val/loss")
        started = begun(job)
        spent = time.time() - started if state == "running" and started else job.summary.get("total_seconds")
        what = job.title + (f": {job.error}" if state == "failed" else "")
        table.add_row(
            Text(shown(job.name, keep="")),  # a plain text would be read as rich's markup
            Text(shown(what, keep="")),
            state + (" ★" if job is best else ""),
            "" if share is None else f"{share:.0%}",
            format_figure(metrics.get("train/loss"), "{:.3f}", ""),
            format_figure(loss, "{:.3f}", ""),
            format_count(tokens) if (tokens := metrics.get("tokens_seen")) else "",
            "" if spent is None or state == "waiting" else format_seconds(spent),
            style=styles.get(state, "dim" if state == "waiting" else None),
        )
    heading = Text(f"{format_bar(progress.share())} {progress.heading()}")
    folder = Text(shown(f"sweep folder {progress.folder}", keep=""))
    return Group(folder, heading, Text(shown(progress.best_so_far(), keep="")), table)


def best_of(jobs: list[Job]) -> Job | None:
    """The job with the lowest loss over the whole validation split."""
    measured = [job for job in jobs if job.summary.get("val_loss") is not None]
    return min(measured, key=lambda job: job.summary["val_loss"], default=None)


def sweep_table(jobs: list[Job]) -> str:
    """A table of jobs with their settings, figures and errors, the best marked; of many jobs, the best ones.

    Figures of the validation split that only some runs measure get a column each.
    """
    best = best_of(jobs)
    shown = jobs
    if len(jobs) > TABLE_ROWS:
        shown = sorted(
            jobs, key=lambda job: (job.summary.get("val_loss") is None, job.summary.get("val_loss"))
        )
        shown = shown[:TABLE_ROWS]
    measured = dict.fromkeys(key for job in shown for key, value in job.summary.items() if value is not None)
    others = [key for key in measured if key.startswith("val_") and key not in (*FIGURES, "val_perplexity")]
    titles = FIGURES | {key: (key.replace("_", " "), "{:.3f}") for key in others} | COSTS
    figures = {key: title for key, title in titles.items() if key in measured}
    cells = [["job", "set", "state", *(title for title, _ in figures.values()), ""]]
    for job in shown:
        written = [format_figure(job.summary.get(key), form) for key, (_, form) in figures.items()]
        cells.append([job.name, job.title, job.state, *written, "best" if job is best else job.error or ""])
    table = format_table(cells, left={0, 1, 2, len(cells[0]) - 1})
    return table + (f"\n… and {len(jobs) - len(shown)} more" if len(jobs) > len(shown) else "")
