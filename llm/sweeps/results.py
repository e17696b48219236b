"""What the jobs of a sweep came to, read from their files: figures, and curves thin enough to draw."""

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
FINAL = ("val_", "train_")  # figures of the evaluation at the end begin so
SMOOTHED_SHARE = 50  # the moving average spans a fiftieth of a job's updates
PARTS = 100_000  # into which all curves together are cut; two points of each are drawn
MOST_PARTS, LEAST_PARTS = 1000, 50  # of one curve
NUMBERS, NUMBERS_OR_NULL = {int, float}, {int, float, type(None)}  # as orjson reads them
MUCH = 100e6  # bytes of metrics, from which on a process per core pays off


@dataclass(frozen=True, eq=False)
class Result:
    """A job and what its files said when they were read, once: a process may be writing to them."""

    job: Job
    state: str
    error: str | None
    figures: dict[str, float]  # of summary.json, all that there are
    training: np.ndarray  # a row each of POSITION, the loss and the smoothed loss; the points that are drawn
    evaluations: np.ndarray  # a row each of POSITION and the measure, on `eval_iter` batches
    steps: int
    tokens_seen: int
    seconds: float  # of training
    last: float | None  # of the evaluations
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
        """What sets it apart from all but its repetitions with other seeds."""
        return self.job.seedless

    @property
    def rank(self) -> tuple[float, float]:
        """What jobs of one text are ordered by: the final measure, then, of those without, the one so far."""
        return or_infinite(self.final), or_infinite(self.last)


def or_infinite(value: float | None) -> float:
    return math.inf if value is None else value


def read_results(jobs: list[Job], measures: list[Measure]) -> list[Result]:
    """
    Args:
        measures: of each job.
    """
    parts = max(LEAST_PARTS, min(MOST_PARTS, PARTS // len(jobs)))
    files = [job.folder / "metrics.jsonl" for job in jobs]
    size = sum(file.stat().st_size for file in files if file.is_file())
    progress = Progress("reading")
    results = []
    with ExitStack() as stack:
        read: Iterable[Result] = map(read_result, jobs, measures, repeat(parts))
        if size > MUCH:  # spawned, not forked, for torch may run in this process and has threads
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
    """What the files of a job say, with curves of at most `2 * parts + 2` points."""
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
        # a process that was killed, or still runs, has not written these to its summary
        int(max(figures.get("steps", 0), step + 1)),
        int(max(figures.get("tokens_seen", 0), tokens_seen)),
        max(figures.get("seconds", 0.0), seconds),
        next((value for value in evaluations[3, ::-1].tolist() if math.isfinite(value)), None),
        measure,
    )


def read_metrics(file: Path, evaluated: str = LOSS.line) -> tuple[np.ndarray, np.ndarray]:
    """The updates and the evaluations of a `metrics.jsonl`, each as rows of POSITION and the loss, or of
    evaluations another figure.

    A loss that is null there is NaN here. A last line that was cut off is skipped, as is any that is damaged.
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
    """Without the points of which one number is larger than any figure; see llm/records.py."""
    return rows[:, (np.abs(np.nan_to_num(rows)) <= LARGEST).all(axis=0)]


def smoothed(values: np.ndarray, span: int) -> np.ndarray:
    """An exponential moving average with weight 2 / (span + 1) for the newest value. The weights are divided
    by their sum, so that the first values count no more than others; NaN is skipped."""
    keep = 1 - 2 / (span + 1)
    total = weight = 0.0
    averages = []
    for value in values.tolist():
        if value == value:
            total, weight = keep * total + value, keep * weight + 1
        averages.append(total / weight if weight else math.nan)
    return np.array(averages)


def thinned(values: np.ndarray, parts: int) -> np.ndarray:
    """Which points to draw: the first, the last, and the lowest and the highest of each of `parts` equal
    parts, so that no spike is lost. Of a part with NaN alone one is kept, as a gap."""
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
