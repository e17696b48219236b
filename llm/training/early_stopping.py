"""Early stopping of hopeless jobs in a sweep, judged by the validation losses of all its jobs so far.

Each job judges itself after each of its evaluations. It only reads the `metrics.jsonl` files of its sibling
jobs, so it works with any launcher and sweeper, on any number of machines. Runs may be limited by updates,
epochs or minutes, so jobs are compared at the same share of their budgets: the job that judges places all
lines of metrics by its own limits.

A rule's verdict depends on what the other jobs have written by then, so it is recorded before it is acted
upon. If a job is killed and reaches the same evaluation again, the recorded verdict holds.

Losses are comparable only between jobs with the same tokenizer. If the jobs of a sweep have several, bits per
byte are compared instead; jobs that are evaluated on another text are ignored.

A stopped job may be resumed. The rule then applies again: median at its next evaluation, halving at its next
rung. With `early_stopping.rule=none` the job runs to its end.
"""

import logging
import math
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from llm.config import EarlyStoppingConfig, TrainingConfig
from llm.errors import UserError
from llm.files import append_json_lines, flush, parse_json, read_json_lines
from llm.records import count, tokenizer_and_text, typed
from llm.run_folder import read_summary
from llm.training.run import Run
from llm.training.schedules import spent

JUDGEMENTS = "judgements.jsonl"  # in a job's folder; if a step was judged twice, the last line counts

log = logging.getLogger(__name__)


class Point(NamedTuple):
    """An evaluation."""

    progress: float  # share of the budget spent, 0 to 1
    loss: float  # on the validation split, nats per token or bits per byte; infinity in place of NaN


Curve = list[Point]  # the evaluations of one job, in order; at least one
LOSS, BITS_PER_BYTE = "val/loss", "val/bits_per_byte"  # in the lines of evaluations


def median_rule(own: Curve, others: Collection[Curve], settings: EarlyStoppingConfig) -> str | None:
    """The median stopping rule (Golovin et al. 2017, "Google Vizier"), on best losses: stop if the best loss
    of this job so far is above the median of the best losses that the other jobs had at this point.

    Another job counts if it has evaluations both up to this progress and from it on, even if it was stopped
    or failed later. The paper compares with the others' running means, not their best losses; but a mean
    includes the high losses that every run starts with, so hardly any job would be stopped.

    Returns:
        Why to stop; None to continue, as always if fewer than `min_jobs` others count.
    """
    now, best = own[-1].progress, min(loss for _, loss in own)
    reached = [curve for curve in others if curve[0].progress <= now <= curve[-1].progress]
    if len(reached) < settings.min_jobs:
        return None
    middle = median(min(loss for progress, loss in curve if progress <= now) for curve in reached)
    if best <= middle:
        return None
    return f"best validation loss {best:.4f} is above {middle:.4f}, the median of {len(reached)} other jobs"


def halving_rule(own: Curve, others: Collection[Curve], settings: EarlyStoppingConfig) -> str | None:
    """Asynchronous successive halving (Li et al. 2018, arXiv:1810.05934), except that jobs which the paper
    would pause are stopped.

    The rungs are at 1/reduction, 1/reduction², … of the run, down to `from_progress`. A job's loss at a rung
    is that of its first evaluation there or later. At that evaluation, and no other, it is compared with the
    losses of all jobs that have reached the rung so far, itself included: of n jobs, the best n/reduction
    (rounded down, but at least one) continue, as does any that ties with the last of these.

    Returns:
        Why to stop; None to continue.
    """
    before = own[-2].progress if len(own) > 1 else 0.0
    now, loss = own[-1]
    for denominator in rungs(settings.reduction, settings.from_progress):
        rung = 1 / denominator
        if not before < rung <= now:
            continue
        reached = [curve for curve in (own, *others) if curve[-1].progress >= rung]
        losses = sorted(next(loss for progress, loss in curve if progress >= rung) for curve in reached)
        kept = max(1, len(losses) // settings.reduction)
        if loss > losses[kept - 1]:
            return (
                f"validation loss {loss:.4f} at 1/{denominator} of the run is above "
                f"{losses[kept - 1]:.4f}, the highest among the best {kept} of {len(losses)} jobs"
            )
    return None


def rungs(reduction: int, from_progress: float) -> list[int]:
    """The denominators of halving's rungs, earliest rung first: [9, 3] for 1/9 and 1/3 of the run."""
    denominators = [reduction]
    while 1 / denominators[0] >= from_progress:
        denominators.insert(0, denominators[0] * reduction)
    return denominators[1:]


# By `early_stopping.rule`: functions of a job's own evaluations, those of the other jobs, and the settings,
# that return why the job should stop, or None. They speak of the "validation loss", whatever is compared.
RULES: dict[str, Callable[[Curve, Collection[Curve], EarlyStoppingConfig], str | None]] = {
    "none": lambda own, others, settings: None,
    "median": median_rule,
    "halving": halving_rule,
}


class EarlyStopping:
    """Judges one run. Of the other jobs' metrics, each judgement reads only what is new."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._judgements = read_judgements(run.run_dir / JUDGEMENTS)
        self._read: dict[tuple[Path, str], CurveReader] = {}
        self._evaluated_on: dict[Path, tuple[str, str]] = {}  # by job: fingerprints of its tokenizer and text

    def reason_to_stop(self) -> str | None:
        """Why the run should stop after the evaluation it has just recorded; None to continue.

        The jobs of a sweep are sibling folders with numbers as names, as Hydra makes them. A run in any other
        folder, a run without siblings, and a rerun, which must repeat the original, always continue.
        """
        run, settings = self.run, self.run.config.early_stopping
        if settings.rule == "none" or run.config.rerun:
            return None
        if not settings.from_progress <= run.progress() < 1:  # at 1, nothing would be saved by stopping
            return None
        own = self._curve(run.run_dir, LOSS)
        if not run.run_dir.name.isdecimal() or not own or own[-1].progress != run.progress():
            return None  # not a job of a sweep; or the disk is full, and the evaluation is not in the file
        case = self._case(own)
        if (judgement := self._recorded(case)) is None:
            reason = self._judge()
            judgement = self._record({**case, "reason": reason})
        return _announced(judgement["reason"])

    def _judge(self) -> str | None:
        run, settings = self.run, self.run.config.early_stopping
        jobs = self._comparable_jobs()
        compared = self._compared(jobs)
        own, *others = (self._curve(job, compared) for job in (run.run_dir, *jobs))
        others = [curve for curve in others if curve]
        reason = RULES[settings.rule](own, others, settings)
        if reason and compared == BITS_PER_BYTE:
            reason = reason.replace("validation loss", "validation bits per byte")
        return reason and f"{settings.rule} rule at step {run.counters.step}: {reason}"

    def pending_reason(self, was_carried_out: bool) -> str | None:
        """Why a resumed run should stop at once: it was judged so, and was killed before it had stopped.

        Args:
            was_carried_out: whether the run did stop, in which case resuming it means that it shall continue.
        """
        own = self._curve(self.run.run_dir, LOSS)
        if not own or own[-1].progress != self.run.progress():
            return None
        judgement = self._judgements.get(self.run.counters.step)
        if was_carried_out and judgement and judgement["reason"]:
            self._record({**judgement, "reason": None})
        judgement = self._recorded(self._case(own))
        return _announced(judgement["reason"]) if judgement else None

    def _case(self, own: Curve) -> dict[str, Any]:
        """What is judged: the newest evaluation, and by which rule."""
        progress, loss = own[-1]
        return {
            "step": self.run.counters.step,
            "progress": progress,
            "val/loss": loss if math.isfinite(loss) else None,
            "early_stopping": asdict(self.run.config.early_stopping),
        }

    def _recorded(self, case: dict[str, Any]) -> dict[str, Any] | None:
        """The recorded judgement of exactly this case, if there is one."""
        judgement = self._judgements.get(case["step"])
        return judgement if judgement == {**case, "reason": (judgement or {}).get("reason")} else None

    def _record(self, judgement: dict[str, Any]) -> dict[str, Any]:
        self._judgements[judgement["step"]] = judgement
        file = self.run.run_dir / JUDGEMENTS
        try:
            append_json_lines(file, [judgement])
            if judgement["reason"]:  # about to be acted upon
                flush(file)
        except (UserError, OSError) as error:
            log.warning("%s; a run that is killed now may be judged anew", error)
        return judgement

    def _comparable_jobs(self) -> list[Path]:
        """The folders of the other jobs, without those known to be evaluated on another text."""
        _, text = tokenizer_and_text(self.run.data[-1])
        jobs = [job for job in self.run.run_dir.parent.iterdir() if job.name.isdecimal()]
        for job in jobs:
            if job not in self._evaluated_on:
                summary = read_summary(job)
                tokenizer, evaluated_text = summary.get("tokenizer"), summary.get("validation_text")
                if tokenizer and evaluated_text:
                    self._evaluated_on[job] = tokenizer, evaluated_text
        known = self._evaluated_on
        return [job for job in jobs if job != self.run.run_dir and known.get(job, ("", text))[1] == text]

    def _compared(self, jobs: list[Path]) -> str:
        """The metric by which this run and `jobs` are compared."""
        tokenizer, _ = tokenizer_and_text(self.run.data[-1])
        known = [self._evaluated_on[job][0] for job in jobs if job in self._evaluated_on]
        return BITS_PER_BYTE if {*known} - {tokenizer} else LOSS

    def _curve(self, job: Path, compared: str) -> Curve:
        """The evaluations of a job; empty if it has none yet."""
        key = job, compared
        if key not in self._read:
            self._read[key] = CurveReader(job / "metrics.jsonl", self.run.config.training, compared)
        return self._read[key].curve()


def _announced(reason: str | None) -> str | None:
    if reason:
        log.info("stopped early: %s", reason)
    return reason


def read_judgements(file: Path) -> dict[int, dict[str, Any]]:
    """The judgements of a job, by step. Damaged lines are skipped."""
    return {
        step: line
        for line in read_json_lines(file)
        if (step := count(line.get("step"))) is not None and isinstance(line.get("reason", 0), str | None)
    }


class CurveReader:
    """Follows a growing `metrics.jsonl`: each call reads only what is new. Evaluations are placed by the
    limits of `training`. Damaged lines are skipped, such as one cut off when its job was killed."""

    def __init__(self, metrics: Path, training: TrainingConfig, compared: str) -> None:
        self.metrics, self.training, self.compared = metrics, training, compared
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._file = 0  # inode; changes when a resumed job replaces the file
        self._end = 0  # bytes read so far
        self._curve: Curve = []

    def curve(self) -> Curve:
        """All evaluations so far; empty if there are none, or the file cannot be read."""
        try:
            with self.metrics.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._file or status.st_size < self._end:
                    self._begin_anew()
                    self._file = status.st_ino
                file.seek(self._end)
                new = file.read()
        except OSError:
            self._begin_anew()
            return []
        whole = new[: new.rfind(b"\n") + 1]
        self._end += len(whole)
        self._curve += self._points(whole)
        return self._curve

    def _points(self, lines: bytes) -> Iterator[Point]:
        for line in lines.splitlines():
            if b'"val/loss"' not in line:  # parse no lines of updates: there are far more of those
                continue
            values = typed(parse_json(line))
            step, epoch, seconds = (values.get(name) for name in ("step", "epoch", "seconds"))
            if self.compared not in values or step is None or epoch is None or seconds is None:
                continue
            loss = values[self.compared]
            shares = spent(self.training, step + 1, epoch, seconds)
            yield Point(max(shares.values()), math.inf if loss is None else loss)
