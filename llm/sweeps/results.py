"""Results of a sweep's jobs, read from their files: figures, and curves thinned for drawing."""

import math
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path

import numpy as np
import orjson

from llm.errors import UserError
from llm.files import read_content
from llm.progress import Progress
from llm.records import LARGEST, figure
from llm.sweeps.comparing import LOSS, Measure
from llm.sweeps.jobs import Job

POSITION = ("step", "tokens_seen", "seconds")  # of a line of metrics; the x axes
FINAL = ("val_", "train_")  # prefixes of figures of the evaluation at the end
SMOOTHED_SHARE = 50  # the moving average spans a fiftieth of a job's updates
PARTS = 100_000  # into which all curves together are divided; two points of each are drawn
MOST_PARTS, LEAST_PARTS = 1000, 50  # of one curve
NUMBERS, NUMBERS_OR_NULL = {int, float}, {int, float, type(None)}  # as orjson reads them
MUCH = 100e6  # bytes of metrics from which a process per core pays


@dataclass(frozen=True, eq=False)
class Result:
    """A job, and the content of its files at one time, as a process may still be writing to them."""

    job: Job
    state: str
    error: str | None
    figures: dict[str, float]  # all figures of summary.json
    training: np.ndarray  # points to draw: rows of POSITION, the loss and the smoothed loss
    evaluations: np.ndarray  # points to draw: rows of POSITION and the measure, on `eval_iter` batches
    steps: int
    tokens_seen: int
    seconds: float  # of training
    last: float | None  # the measure at the last evaluation
    measure: Measure

    @property
    def final(self) -> float | None:
        """The measure at the end of a finished job."""
        return self.figures.get(self.measure.name)

    @property
    def tokens_per_second(self) -> float | None:
        so_far = self.tokens_seen / self.seconds if self.seconds else None
        return self.figures.get("tokens_per_second", so_far)

    @property
    def setting(self) -> dict[str, str]:
        """What distinguishes it from other jobs, except for the seed."""
        return self.job.seedless

    @property
    def rank(self) -> tuple[float, float]:
        """For sorting jobs of the same text: the final measure; jobs without one come last, by their last
        evaluation."""
        return or_infinite(self.final), or_infinite(self.last)


def or_infinite(value: float | None) -> float:
    return math.inf if value is None else value


def read_results(jobs: list[Job], measures: list[Measure]) -> list[Result]:
    """Read the results of jobs.

    Args:
        measures: the measure of each job.
    """
    parts = max(LEAST_PARTS, min(MOST_PARTS, PARTS // len(jobs)))
    files = [job.folder / "metrics.jsonl" for job in jobs]
    size = sum(file.stat().st_size for file in files if file.is_file())
    progress = Progress("reading")
    results = []
    with ExitStack() as stack:
        read: Iterable[Result] = map(read_result, jobs, measures, repeat(parts))
        if size > MUCH:  # spawned, not forked, as torch may have threads in this process
            pool = stack.enter_context(ProcessPoolExecutor(os.cpu_count(), get_context("spawn")))
            read = pool.map(read_result, jobs, measures, repeat(parts), chunksize=4)
        try:
            for number, result in enumerate(read, 1):
                results.append(result)
                progress.update(number / len(jobs), f"job {number} of {len(jobs)}")
        except BrokenProcessPool as error:
            raise UserError(
                "a process that read the metrics of jobs was killed, perhaps as memory ran out: run the same "
                "command once more"
            ) from error
    progress.clear()
    return results


def read_result(job: Job, measure: Measure, parts: int) -> Result:
    """Read the result of a job, with curves of at most `2 * parts + 2` points."""
    training, evaluations = read_metrics(job.folder / "metrics.jsonl", measure.line)
    span = max(1, training.shape[1] // SMOOTHED_SHARE)
    training = np.vstack([training, smoothed(training[-1], span)])
    step, tokens_seen, seconds = training[:3, -1].tolist() if training.size else (-1, 0, 0.0)
    state = job.state
    figures = {
        name: value
        for name, value in job.summary.items()
        if figure(value) is not None and (state == "finished" or not name.startswith(FINAL))
    }
    return Result(
        job,
        state,
        job.error,
        figures,
        training[:, thinned(training[3], parts)],
        evaluations[:, thinned(evaluations[3], parts // 2)],
        # The summary of a process that was killed or is still running lags behind its metrics.
        int(max(figures.get("steps", 0), step + 1)),
        int(max(figures.get("tokens_seen", 0), tokens_seen)),
        max(figures.get("seconds", 0.0), seconds),
        next((value for value in evaluations[3, ::-1].tolist() if math.isfinite(value)), None),
        measure,
    )


def read_metrics(file: Path, evaluated: str = LOSS.line) -> tuple[np.ndarray, np.ndarray]:
    """The updates and evaluations in a `metrics.jsonl`: rows of POSITION and the loss, for evaluations the
    figure `evaluated`.

    A null becomes NaN. Damaged lines are skipped, such as a last one that was cut off.
    """
    found: dict[str, list[tuple[float | None, ...]]] = {"train/loss": [], evaluated: []}
    pick = {loss: itemgetter(*POSITION, loss) for loss in found}
    for line in read_content(file).split(b"\n")[:-1]:
        try:
            metrics = orjson.loads(line)
            loss = "train/loss" if "train/loss" in metrics else evaluated
            values = pick[loss](metrics)
        except (orjson.JSONDecodeError, LookupError, TypeError):
            continue
        if all(type(value) in NUMBERS for value in values[:-1]) and type(values[-1]) in NUMBERS_OR_NULL:
            found[loss].append(values)
    training, evaluations = (
        _within_reason(np.array(lines, dtype=float).reshape(-1, len(POSITION) + 1).T)
        for lines in found.values()
    )
    return training, evaluations


def _within_reason(rows: np.ndarray) -> np.ndarray:
    """The points whose numbers are all in the range of figures; see llm/records.py."""
    return rows[:, (np.abs(np.nan_to_num(rows)) <= LARGEST).all(axis=0)]


def smoothed(values: np.ndarray, span: int) -> np.ndarray:
    """An exponential moving average with weight 2 / (span + 1) for the newest value. Weights are normalised
    by their sum, so that the first values count no more than others. NaN is skipped."""
    keep = 1 - 2 / (span + 1)
    total = weight = 0.0
    averages = []
    for value in values.tolist():
        if value == value:
            total, weight = keep * total + value, keep * weight + 1
        averages.append(total / weight if weight else math.nan)
    return np.array(averages)


def thinned(values: np.ndarray, parts: int) -> np.ndarray:
    """Which points to draw: the first, the last, and the lowest and highest of each of `parts` equal parts,
    so that no spike is lost. A part with only NaN keeps one of them, as a gap."""
    count = len(values)
    if count <= 2 * parts + 2:
        return np.arange(count)
    length = math.ceil(count / parts)
    starts = np.arange(0, count, length)
    padded = np.pad(values, (0, len(starts) * length - count), constant_values=np.nan).reshape(-1, length)
    missing = np.isnan(padded)
    lowest = starts + np.where(missing, np.inf, padded).argmin(axis=1)
    highest = starts + np.where(missing, -np.inf, padded).argmax(axis=1)
    return np.unique(np.concatenate([[0], lowest, highest, [count - 1]]))
