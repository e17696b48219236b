"""What a sweep prints: a live table of its jobs on a terminal, lines elsewhere, and a table at its end."""

import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from llm.config import TrainingConfig
from llm.errors import shown
from llm.files import modified
from llm.progress import format_bar, format_count, format_figure, format_seconds
from llm.records import Record, figure_in, lines_from_end, read_config_text
from llm.run_folder import SUMMARY
from llm.sweeps.comparing import BITS_PER_BYTE, LOSS, Comparison, comparisons
from llm.sweeps.jobs import DONE, RECORD, Job, read_jobs, state_since
from llm.tables import fitted, format_table, table_rows, terminal_width
from llm.training.schedules import spent

POLL_SECONDS = 0.5
TAIL_BYTES = 4096  # read from the end of metrics.jsonl, whose last lines say how far a job is
WAITING_POLLED = 64  # jobs start roughly in order, so only the first waiting ones are looked at each time
NOT_DONE = ("failed", "interrupted", "killed")  # states of jobs that ended without a result
TABLE_ROWS = 40  # in the table at the end; a larger sweep shows its best
Written = Callable[[float], str]
THREE_DIGITS: Written = "{:.3f}".format
# Of summaries, with their titles in the table and how they are written. Figures `val_…` are of the evaluation
# at the end; the training loss is of `eval_iter` batches then, and the time that of training alone.
FIGURES: dict[str, tuple[str, Written]] = {
    "val_loss": ("val loss", THREE_DIGITS),
    "val_bits_per_byte": ("bits/byte", THREE_DIGITS),
    "loss": ("loss", THREE_DIGITS),  # of evaluate.py, this and the next
    "bits_per_byte": ("bits/byte", THREE_DIGITS),
    "train_loss": ("train loss", THREE_DIGITS),
}
COSTS: dict[str, tuple[str, Written]] = {
    "tokens_seen": ("tokens", format_count),
    "seconds": ("train time", format_seconds),
}
SPARE = ("tokens_seen", "train_loss", "seconds", "val_bits_per_byte", "val_loss")  # where there is no room


class SweepProgress:
    """How far the jobs of a sweep are. Read from their files, so it does not matter where they run."""

    def __init__(self, folder: Path, since: float, total: int) -> None:
        """
        Args:
            since: when this process started to run the sweep, in seconds since 1970.
            total: the number of jobs, including those to come.
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
        """Read the list of jobs, again whenever a search has added some."""
        if (written := modified(self.folder / RECORD)) != self._record_read:
            self._record_read = written
            self.jobs |= {job.name: job for job in read_jobs([self.folder]) if job.name not in self.jobs}
            self.total = max(self.total, len(self.jobs))  # a race has no number of jobs that is known ahead
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

    def compared(self) -> list[Comparison]:
        return comparisons(list(self.jobs.values()))

    def last_metrics(self, job: Job) -> Record:
        """The figures of the last whole line that a job wrote, and of its last known evaluation."""
        metrics = self._metrics.setdefault(job.name, {})
        for line in reversed([*lines_from_end(job.folder / "metrics.jsonl", TAIL_BYTES)]):
            metrics |= line
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
        ended = len(self.named(*DONE, "failed", "killed"))
        partly = self.named("running", "interrupted")
        return (ended + sum(self.job_share(job, self.last_metrics(job)) for job in partly)) / self.total

    def heading(self) -> str:
        """`4 of 12 jobs done · 2 running · 5 waiting · 1 failed · 4m10s left`; those that a rule stopped are
        done, those that were interrupted are not."""
        counts = {state: len(self.named(state)) for state in ("running", "waiting", *NOT_DONE)}
        counts["waiting"] += self.total - len(self.jobs)  # of a search, that are not chosen yet
        parts = [f"{len(self.named(*DONE))} of {self.total} jobs done"]
        if stopped := len(self.named("stopped")):
            parts[0] += f" ({stopped} stopped early)"
        parts += [f"{count} {state}" for state, count in counts.items() if count]
        share = self.share()
        advanced = share - self._share_at_start
        if advanced > 0 and share < 1:
            left = (time.monotonic() - self._started) * (1 - share) / advanced
            parts.append(f"{format_seconds(left)} left")
        return " · ".join(parts)

    def best_so_far(self) -> str:
        parts = []
        for compared in self.compared():
            if best := compared.best:
                measure, place = compared.measure, f" on {compared.title}" * bool(compared.title)
                figure = best.summary[measure.name]
                parts.append(f"best{place}: job {best.name}, {measure.column} {figure:.3f}")
        return " · ".join(parts)


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


def _training_seconds(job: Job) -> float | None:
    """Seconds of training, without evaluation and saving; None for a job that trains nothing."""
    return job.summary.get("seconds") if "tokens_seen" in job.summary else None


def _ended_line(job: Job, state: str) -> str:
    what = f"job {job.name} · {job.title} · {state}"
    loss, bits = job.final(LOSS.name), job.final(BITS_PER_BYTE.name)
    if loss is not None:
        what += f", val loss {loss:.3f}" + ("" if bits is None else f" ({bits:.3f} bits/byte)")
    if (seconds := _training_seconds(job)) is not None:
        what += f", {format_seconds(seconds)} of training"
    return what


@contextmanager
def _live_table(progress: SweepProgress) -> Iterator[None]:
    from rich.live import Live

    with Live(
        get_renderable=lambda: live_table(progress), refresh_per_second=1 / POLL_SECONDS, transient=True
    ):
        yield


def live_table(progress: SweepProgress) -> Any:
    """A bar and as many jobs as the screen holds: the last that ended, those that run, the next that wait.

    Each column is one measure, whatever the state: the losses of the last evaluation on `eval_iter` batches,
    the loss of the evaluation at the end, the time of training without evaluation and saving.
    """
    from rich.console import Group
    from rich.text import Text

    progress.poll()
    width, lines = shutil.get_terminal_size()
    above = [
        fitted(f"sweep folder {progress.folder}", width),
        fitted(f"{format_bar(progress.share())} {progress.heading()}", width),
        fitted(progress.best_so_far(), width),
    ]
    room = max(3, lines - 4 - sum(-(-len(line) // width) for text in above for line in text.split("\n")))
    running = progress.named("running")[:room]
    waiting = progress.named("waiting")
    ended = progress.named(*DONE, *NOT_DONE)
    ended.sort(key=lambda job: modified(job.folder / SUMMARY))
    left = room - len(running) - min(1, len(waiting))  # at least one that waits is shown
    lately = ended[max(0, len(ended) - max(0, left)) :]
    jobs = [*lately, *running, *waiting[: max(0, room - len(lately) - len(running))]]
    compared = progress.compared()
    best = [each.best for each in compared]
    measure = BITS_PER_BYTE if BITS_PER_BYTE in [each.measure for each in compared] else LOSS
    cells = [["job", "set", "state", "done", "train", "val", "final val", "tokens", "train time"]]
    for job in jobs:
        state, metrics = progress.states[job.name], progress.last_metrics(job)
        seconds = metrics.get("seconds") if state == "running" else _training_seconds(job)
        cells.append(
            [
                job.name,
                job.title + (f": {job.error}" if state == "failed" else ""),
                state + (" ★" if job in best else ""),
                f"{progress.job_share(job, metrics):.0%}" if state == "running" else "",
                format_figure(metrics.get("eval/train_loss") if measure == LOSS else None, "{:.3f}", ""),
                format_figure(metrics.get(measure.line), "{:.3f}", ""),
                format_figure(job.final(measure.name), "{:.3f}", ""),
                format_count(tokens) if (tokens := metrics.get("tokens_seen")) else "",
                "" if seconds is None or state == "waiting" else format_seconds(seconds),
            ]
        )
    for most_lines in (2, 1):  # of a job
        rows = table_rows(cells, {0, 1, 2}, 1, spare=(7, 4, 8, 6, 3, 5), width=width, most_lines=most_lines)
        if sum(map(len, rows)) <= room + 1:
            break
    styles = {"running": "bold", "failed": "red", "stopped": "dim", "waiting": "dim"}
    table = [
        Text("\n".join(row), styles.get(progress.states[job.name], ""))
        for job, row in zip(jobs, rows[1:], strict=True)
    ]
    note = f"{measure.unit}; train, val: on eval_iter batches; final val: at the end"
    return Group(*map(Text, above), Text(rows[0][0]), *table, Text(fitted(note, width), "dim"))


def sweep_table(jobs: list[Job], width: int | None = None) -> str:
    """A table of jobs with their settings and figures, with the best marked (of many jobs only the best
    ones); then the reasons why jobs have no figures. Jobs that were evaluated on different texts get a table
    for each text.

    Metrics of the validation split other than loss and bits per byte get a column each, under their names.

    Args:
        width: of the lines, in characters; None: that of the terminal.
    """
    width, compared = width or terminal_width(), comparisons(jobs)
    parts = [_table_of(each, width) for each in compared]
    if len(compared) > 1:
        note = "What was evaluated on different texts, or parts of one, does not compare: each table has its "
        parts.append(fitted(note + "own best. training.final_eval=full evaluates all of a text.", width))
    if any(each.measure == BITS_PER_BYTE for each in compared):
        parts.append(fitted("Losses of different tokenizers do not compare: ★ is by bits per byte.", width))
    return "\n\n".join(parts)


def _table_of(compared: Comparison, width: int) -> str:
    jobs, measure, best = compared.jobs, compared.measure, compared.best
    shown = jobs
    if len(jobs) > TABLE_ROWS:
        ranked = [(job.final(measure.name), number) for number, job in enumerate(jobs)]
        ranked.sort(key=lambda each: (each[0] is None, each[0]))
        shown = [jobs[number] for _, number in ranked[:TABLE_ROWS]]
    measured = dict.fromkeys(key for job in shown for key, value in job.summary.items() if value is not None)
    others = [key for key in measured if key.startswith("val_") and key not in (*FIGURES, "val_perplexity")]
    titles = FIGURES | {key: (key.replace("_", " "), THREE_DIGITS) for key in others} | COSTS
    figures = [key for key in titles if key in measured]
    cells = [["job", "set", "state", *(titles[key][0] for key in figures)]]
    for job in shown:
        values = [job.summary.get(key) if key in COSTS else job.final(key) for key in figures]
        written = [
            "–" if value is None else titles[key][1](value)
            for key, value in zip(figures, values, strict=True)
        ]
        cells.append([job.name, job.title, job.state + " ★" * (job is best), *written])
    spare = [3 + figures.index(key) for key in (*SPARE, *others) if key in figures and key != measure.name]
    lines = [fitted(compared.title + ":", width)] if compared.title else []
    lines.append(format_table(cells, {0, 1, 2}, wrapped=1, spare=spare, width=width))
    if len(jobs) > len(shown):
        lines.append(f"… and {len(jobs) - len(shown)} more")
    lines += [fitted(f"job {job.name}: {error}", width) for job in shown if (error := job.error)]
    return "\n".join(lines)
