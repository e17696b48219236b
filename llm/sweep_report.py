"""A sweep of training runs as a page, a table and a picture, from the files of its jobs alone."""

import csv
import html
import io
import json
import math
import os
import shlex
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from itertools import repeat
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path
from statistics import mean, stdev
from string import Template
from typing import Any

import numpy as np
import orjson

from llm.config import ReportConfig, UserError
from llm.files import as_typed, replacing, write_text
from llm.progress import Progress, format_count, format_seconds
from llm.study_report import StudyJob, study_report
from llm.sweep import ENDED, RECORD, Job, compact, order, read_jobs, read_record, short_key, title_of

POSITION = ("step", "tokens_seen", "seconds")  # of a line of metrics; the x axes
SMOOTHED_SHARE = 50  # the moving average spans a fiftieth of a job's updates
PARTS = 100_000  # into which all curves together are cut; of each, two points are drawn
MOST_PARTS, LEAST_PARTS = 1000, 50  # of one curve
MUCH = 100e6  # bytes of metrics, which are worth a process a core
FEW = 8  # settings that can be told apart by colour
SHOWN_VALUES = 12
MEANS = 20  # at most twice as many values have a mean each
LONG_VALUE = 40  # characters, in a table

# Colours that people see apart who do not see all of them: an order from good to bad, and eight kinds.
COLOURS = {
    "light": {
        "ramp": ["#2a1a6e", "#1f5fa8", "#17868c", "#6c942c", "#c98500"],
        "kinds": ["#0072b2", "#d55e00", "#009e73", "#b0508a", "#a67c00", "#3a9ad0", "#5b4bb7", "#6b6b6b"],
    },
    "dark": {
        "ramp": ["#ffe26b", "#9fd67a", "#4fb3b0", "#5a8fd8", "#9078d8"],
        "kinds": ["#56b4e9", "#ff9040", "#2fc79a", "#e08cc0", "#f0d060", "#9ec9ff", "#a99bff", "#a8a8a8"],
    },
}


# What was run


@dataclass(frozen=True, eq=False)
class Result:
    """A job and what its files said when they were read, once: a process may be writing to them."""

    job: Job
    state: str
    error: str | None
    figures: dict[str, float]  # of summary.json
    training: np.ndarray  # a row each of POSITION, the loss and the smoothed loss; the points that are drawn
    evaluations: np.ndarray  # a row each of POSITION and the validation loss
    steps: int
    tokens_seen: int
    seconds: float
    last_val_loss: float | None  # on a few batches, on the way

    @property
    def val_loss(self) -> float | None:
        """Over the whole validation split, at the end."""
        return self.figures.get("val_loss")

    @property
    def tokens_per_second(self) -> float | None:
        so_far = self.tokens_seen / self.seconds if self.seconds else None
        return self.figures.get("tokens_per_second", so_far)

    @property
    def setting(self) -> dict[str, str]:
        """What sets it apart from all but its repetitions with other seeds."""
        return {key: value for key, value in self.job.setting.items() if key != "seed"}

    @property
    def rank(self) -> tuple[float, float]:
        """What jobs are ordered by: the final loss, then, of those without, the loss so far."""
        return _or_infinite(self.val_loss), _or_infinite(self.last_val_loss)


def write_report(config: ReportConfig, run_dir: Path) -> Path:
    """Write `report.html`, which needs nothing but itself, `report.csv` and `report.png`: into the folder of
    the sweep or run, for several into `run_dir`, or where `config.to` says.

    Returns the page.

    Raises:
        UserError: there is no such sweep or run, it has no jobs, or the files cannot be written.
    """
    names = config.sweep if isinstance(config.sweep, list) else [config.sweep]
    folders = [latest_sweep() if name == "latest" else Path(str(name)) for name in names]
    jobs = read_jobs(folders)
    if not jobs:
        raise UserError(f"{' '.join(map(str, folders))} has no job yet: wait until one has begun")
    target = Path(config.to) if config.to else folders[0] if len(folders) == 1 else run_dir
    if _is_study(folders, jobs):
        page = study_report([StudyJob(**vars(job)) for job in jobs], target)
    else:
        page = sweep_report(jobs, folders, target)
    print(f"report      {page}\ntable       {target / 'report.csv'}\npicture     {target / 'report.png'}")
    return page


def latest_sweep() -> Path:
    """
    Raises:
        UserError: there is none.
    """
    sweeps = [folder for folder in Path("outputs").glob("*/sweeps/*/*") if folder.is_dir()]
    if not sweeps:
        raise UserError("sweep=latest: there is no sweep under outputs/*/sweeps; name one with sweep=FOLDER")
    return max(sweeps, key=lambda folder: folder.parts[-2:])  # its date and its time


def _is_study(folders: list[Path], jobs: list[Job]) -> bool:
    """Whether the jobs measured samples, and trained nothing."""
    scripts = {read_record(folder)["script"] for folder in folders if (folder / RECORD).exists()}
    measured = any("sampling" in job.summary and "val_loss" not in job.summary for job in jobs)
    return measured or scripts == {"generate"}


def sweep_report(jobs: list[Job], folders: list[Path], target: Path) -> Path:
    """Write the report of training runs that lie in `folders`; returns the page."""
    results = _read_results(jobs)
    write_text(target / "report.csv", _csv(results))
    _draw(results, target / "report.png")
    write_text(target / "report.html", _page(results, folders))
    return target / "report.html"


def _read_results(jobs: list[Job]) -> list[Result]:
    parts = max(LEAST_PARTS, min(MOST_PARTS, PARTS // len(jobs)))
    files = [job.folder / "metrics.jsonl" for job in jobs]
    size = sum(file.stat().st_size for file in files if file.exists())
    progress = Progress("reading")
    results = []
    with ExitStack() as stack:
        read: Iterable[Result] = map(read_result, jobs, repeat(parts))
        if size > MUCH:  # spawned, not forked, for torch may run in this process and has threads
            pool = stack.enter_context(ProcessPoolExecutor(os.cpu_count(), get_context("spawn")))
            read = pool.map(read_result, jobs, repeat(parts), chunksize=4)
        for number, result in enumerate(read, 1):
            results.append(result)
            progress.update(number / len(jobs), f"job {number} of {len(jobs)}")
    progress.clear()
    return results


def read_result(job: Job, parts: int) -> Result:
    """What the files of a job say, with curves of at most `2 * parts + 2` points."""
    training, evaluations = read_metrics(job.folder / "metrics.jsonl")
    span = max(1, training.shape[1] // SMOOTHED_SHARE)
    training = np.vstack([training, smoothed(training[-1], span)])
    step, tokens_seen, seconds = training[:3, -1].tolist() if training.size else (-1, 0, 0.0)
    figures = {name: value for name, value in job.summary.items() if _is_figure(value)}
    return Result(
        job,
        job.state,
        _clean(job.error),
        figures,
        training[:, thinned(training[3], parts)],
        evaluations[:, thinned(evaluations[3], parts // 2)],
        # a process that was killed, or still runs, has not written these to its summary
        int(max(figures.get("steps", 0), step + 1)),
        int(max(figures.get("tokens_seen", 0), tokens_seen)),
        max(figures.get("seconds", 0.0), seconds),
        next((loss for loss in evaluations[3, ::-1].tolist() if math.isfinite(loss)), None),
    )


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _clean(text: str | None) -> str | None:
    """Half a surrogate pair, which JSON may hold, cannot be written."""
    return text and text.encode("utf-8", "replace").decode()


def read_metrics(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """The updates and the evaluations of a `metrics.jsonl`, each as rows of POSITION and the loss.

    What is null there is NaN here. A last line that was cut off is passed over, as is any that is damaged.
    """
    content = file.read_bytes() if file.exists() else b""
    found: dict[str, list[tuple[float | None, ...]]] = {"train/loss": [], "val/loss": []}
    pick = {loss: itemgetter(*POSITION, loss) for loss in found}
    for line in content.split(b"\n")[:-1]:
        try:
            metrics = orjson.loads(line)
            loss = "train/loss" if "train/loss" in metrics else "val/loss"
            found[loss].append(pick[loss](metrics))
        except (orjson.JSONDecodeError, LookupError, TypeError):
            continue
    training, evaluations = (
        np.array(lines, dtype=float).reshape(-1, len(POSITION) + 1).T for lines in found.values()
    )
    return training, evaluations


def smoothed(values: np.ndarray, span: int) -> np.ndarray:
    """An exponential moving average with weight 2 / (span + 1) for the newest value. The weights are divided
    by their sum, so that the first values count no more than others; NaN is passed over."""
    keep = 1 - 2 / (span + 1)
    total = weight = 0.0
    averages = []
    for value in values.tolist():
        if value == value:
            total, weight = keep * total + value, keep * weight + 1
        averages.append(total / weight if weight else math.nan)
    return np.array(averages)


def thinned(values: np.ndarray, parts: int) -> np.ndarray:
    """Which points to draw: the first, the last, and the least and the greatest of each of `parts` equal
    parts, so that no spike is lost. Of a part with NaN alone one is kept, as a gap."""
    count = len(values)
    if count <= 2 * parts + 2:
        return np.arange(count)
    length = math.ceil(count / parts)
    starts = np.arange(0, count, length)
    padded = np.pad(values, (0, len(starts) * length - count), constant_values=np.nan).reshape(-1, length)
    missing = np.isnan(padded)
    least = starts + np.where(missing, np.inf, padded).argmin(axis=1)
    greatest = starts + np.where(missing, -np.inf, padded).argmax(axis=1)
    return np.unique(np.concatenate([[0], least, greatest, [count - 1]]))


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value


def _settings(results: list[Result]) -> list[list[Result]]:
    """The results that differ in their seed alone, together; the best mean loss first."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(json.dumps(result.setting, sort_keys=True), []).append(result)
    return sorted(found.values(), key=_mean_rank)


def _mean_rank(group: list[Result]) -> tuple[float, float]:
    return _or_infinite(_mean(result.val_loss for result in group)), _or_infinite(
        _mean(result.last_val_loss for result in group)
    )


def _mean(values: Iterable[float | None]) -> float | None:
    """Of those that are there; None if there is none."""
    there = [value for value in values if value is not None]
    return mean(there) if there else None


def _keys(results: list[Result]) -> list[str]:
    """The swept keys, the seed last."""
    keys = dict.fromkeys(key for result in results for key in result.job.setting)
    return sorted(keys, key=lambda key: key == "seed")


def _plotted_keys(results: list[Result]) -> list[str]:
    """The keys that a loss may depend on: the seed only if it is all that varies."""
    keys = _keys(results)
    return [key for key in keys if key != "seed"] or keys


def _values(results: list[Result], key: str) -> list[str]:
    """The values of a swept key, numbers first and in order."""
    return sorted({result.job.setting[key] for result in results if key in result.job.setting}, key=order)


def _number(value: str) -> float | None:
    with suppress(ValueError):
        return number if math.isfinite(number := float(value)) else None
    return None


def _is_numeric(values: list[str]) -> bool:
    return all(_number(value) is not None for value in values)


def _wants_log(key: str, values: list[str]) -> bool:
    """Whether numbers span a decade, or are learning rates."""
    numbers = [_number(value) or 0.0 for value in values]
    low, high = min(numbers, default=0.0), max(numbers, default=0.0)
    return 0 < low < high and (high >= 10 * low or short_key(key) == "lr")


# The table


def _csv(results: list[Result]) -> str:
    keys = _keys(results)
    names = dict.fromkeys(name for result in results for name in result.figures if name not in keys)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["job", *keys, "state", *names, "error", "folder"])
    for result in results:
        writer.writerow(
            [
                result.job.name,
                *(result.job.setting.get(key, "") for key in keys),
                result.state,
                *(result.figures.get(name, "") for name in names),
                result.error or "",
                as_typed(result.job.folder),
            ]
        )
    return _clean(text.getvalue()) or ""


# The page


Cell = tuple[Any, str]  # what a column is sorted by, and what is shown, as HTML


def _page(results: list[Result], folders: list[Path]) -> str:
    settings = _settings(results)
    numeric = {key: _is_numeric(_values(results, key)) for key in _keys(results)}
    template = files("llm").joinpath("sweep_report.html").read_text("utf-8")
    return Template(template).substitute(
        kind="Run" if folders == [results[0].job.folder] else "Sweep",
        title=_html(", ".join(str(as_typed(folder)) for folder in folders)),
        about=_html(_about(results)),
        best=_best(settings),
        varied=_varied(results),
        common=_common(results),
        problems=_problems(results),
        settings=_setting_table(settings, results, numeric) if len(results) > 1 else "",
        heatmap=_heatmap(settings, results),
        jobs=_job_table(results, numeric),
        samples=_samples(results),
        sweep_commands=_sweep_commands(results, folders),
        commands=_commands(results),
        smoothing="an exponential moving average (the newest weighs 2 / (span + 1)) with a span of "
        f"1/{SMOOTHED_SHARE} of the job's updates, computed from every update",
        data=_data(results, settings),
    )


def _html(text: str) -> str:
    return html.escape(_clean(text) or "")


def _data(results: list[Result], settings: list[list[Result]]) -> str:
    """What the page's charts are drawn from, as JSON that may stand in a script element."""
    plotted = _plotted_keys(results)
    shown = [result for result in results if result.rank < (math.inf, math.inf)] or results
    values = {key: _values(shown, key) for key in plotted}
    numeric = {key: _is_numeric(values[key]) for key in plotted}
    keys = [
        {
            "name": _clean(short_key(key)),
            "values": [*dict.fromkeys(_plotted(value, numeric[key]) for value in values[key])],
            "numeric": numeric[key],
            "log": numeric[key] and _wants_log(key, values[key]),
            "means": _means(results, key, numeric[key]),
        }
        for key in plotted
    ]
    group_of = {result: number for number, group in enumerate(settings) for result in group}
    jobs = [
        {
            "title": _clean(f"job {result.job.name}: {result.job.title}"),
            "state": result.state,
            "group": group_of[result],
            "values": [
                _plotted(value, numeric[key])
                if (value := result.job.setting.get(key)) in values[key]
                else None
                for key in plotted
            ],
            "loss": result.last_val_loss if result.val_loss is None else result.val_loss,
            "final": result.val_loss is not None,
            "training": _columns(result.training),
            "validation": _columns(result.evaluations),
        }
        for result in results
    ]
    groups = [_clean(title_of(group[0].setting) or "the one setting") for group in settings]
    content = {"keys": keys, "groups": groups, "few": FEW, "colours": COLOURS, "jobs": jobs}
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _plotted(value: str, numeric: bool) -> float | str:
    return float(value) if numeric else _clean(value) or ""


def _means(results: list[Result], key: str, numeric: bool) -> list[tuple[float | str, float]]:
    """The mean final loss at each value of a key, in order; where numbers are too many for that, as when they
    were drawn at random, the mean of each of MEANS parts, at the number in its middle."""
    finished = [result for result in results if result.val_loss is not None and key in result.job.setting]
    finished.sort(key=lambda result: order(result.job.setting[key]))
    values = [result.job.setting[key] for result in finished]
    if numeric and len(set(values)) > 2 * MEANS:
        size = math.ceil(len(finished) / MEANS)
        parts = [finished[start : start + size] for start in range(0, len(finished), size)]
    else:
        parts = [
            [result for result in finished if result.job.setting[key] == value]
            for value in dict.fromkeys(values)
        ]
    return [
        (
            _plotted(part[len(part) // 2].job.setting[key], numeric),
            mean(result.figures["val_loss"] for result in part),
        )
        for part in parts
    ]


def _columns(rows: np.ndarray) -> list[list[float | None]]:
    """Rows of numbers with as many digits as can be seen; null for what is not finite."""
    steps, tokens_seen, seconds, *losses = rows
    whole = [
        [None if value != value else int(value) for value in row.tolist()] for row in (steps, tokens_seen)
    ]
    rounded = [np.round(seconds, 2), *(np.round(loss, 4) for loss in losses)]
    return whole + [[value if math.isfinite(value) else None for value in row.tolist()] for row in rounded]


def _about(results: list[Result]) -> str:
    states = [result.state for result in results]
    counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    tokens, seconds = sum(result.tokens_seen for result in results), sum(result.seconds for result in results)
    return (
        f"{datetime.now():%Y-%m-%d %H:%M} · {len(results)} job{'s' * (len(results) > 1)}: {counted} · "
        f"{format_count(tokens)} tokens in {format_seconds(seconds)} of training"
    )


def _best(settings: list[list[Result]]) -> str:
    losses = [result.val_loss for result in settings[0] if result.val_loss is not None]
    if not losses:
        return "<p>No job has a final validation loss yet.</p>"
    title = title_of(settings[0][0].setting)
    return (
        f"<p class=best>Least validation loss: <b>{_spread(losses, '{:.3f}')}</b>"
        f"{f' with <b>{_html(title)}</b>' if title else ''}{f', n = {len(losses)}' * (len(losses) > 1)}</p>"
    )


def _varied(results: list[Result]) -> str:
    if not (keys := _keys(results)):
        return "<p>Nothing.</p>" if len(results) > 1 else "<p>Nothing: it is one run.</p>"
    return f"<dl>{''.join(_term(key, _values(results, key)) for key in keys)}</dl>"


def _term(name: str, values: list[str]) -> str:
    shown = ", ".join(values[:SHOWN_VALUES])
    if len(values) > SHOWN_VALUES:
        shown += f", … {values[-1]} ({len(values)} values)"
    return f"<dt>{_html(name)}</dt><dd>{_html(shown)}</dd>"


def _common(results: list[Result]) -> str:
    """The overrides of all jobs, and where they ran."""
    first, *others = [result.job.overrides for result in results]
    sets = [set(other) for other in others]
    shared = [override for override in first if all(override in other for other in sets)]
    facts = {
        "overrides": [shlex.join(shared)] if shared else ["none"],
        "parameters": _facts(results, lambda summary: format_count(summary["parameters"] or math.nan)),
        "device": _facts(results, lambda summary: f"{summary['device']}, {summary['precision']}"),
        "machine": _facts(results, lambda summary: str(summary["machine"])),
        "torch": _facts(results, lambda summary: str(summary["versions"]["torch"])),
        "commit": _facts(
            results, lambda summary: summary["git_commit"][:10] + " with changes" * (not summary["git_clean"])
        ),
    }
    return f"<dl>{''.join(_term(name, values) for name, values in facts.items() if values)}</dl>"


def _facts(results: list[Result], fact: Callable[[dict[str, Any]], str]) -> list[str]:
    """What the summaries say, each thing once; nothing from those that have no such thing."""
    found = {}
    for result in results:
        with suppress(LookupError, TypeError, ValueError):
            found[fact(result.job.summary)] = True
    return [value for value in found if value.strip(", ") and value != "nan"]


def _problems(results: list[Result]) -> str:
    """Jobs that have no final figures, and why."""
    return "".join(
        _problem_list(title, [result for result in results if result.state in states])
        for title, states in (
            ("failed", ("failed",)),
            ("stopped early", ("stopped",)),
            ("interrupted or killed", ("interrupted", "killed")),
            ("running: figures are those so far", ("running",)),
            ("waiting", ("waiting",)),
        )
    )


def _problem_list(title: str, results: list[Result]) -> str:
    if not results:
        return ""
    items = "".join(
        f"<li>{_html(f'Job {result.job.name} ({result.job.title})')}"
        f"{_html(f': {reason}') if (reason := _reason(result)) else ''}</li>"
        for result in results
    )
    shown = " open" if len(results) <= FEW else ""
    return (
        f"<details{shown}><summary>{len(results)} {title}</summary><ul class=reasons>{items}</ul></details>"
    )


def _reason(result: Result) -> str:
    if result.state == "running":
        return f"{result.steps:,} updates"
    return (result.error or "").removeprefix("stopped early: ")


# Its tables


def _table(
    kind: str, heads: list[str], rows: list[list[Cell]], sorted_by: int, texts: set[int], marks: list[str]
) -> str:
    """A table that the page's script sorts; columns in `texts` start at the left, and a row has its mark."""
    head = "".join(
        f"<th scope=col{' aria-sort=ascending' if column == sorted_by else ''}"
        f"{' class=text' if column in texts else ''}><button>{_html(name)}</button></th>"
        for column, name in enumerate(heads)
    )
    body = "".join(
        f"<tr {mark}>"
        + "".join(
            f'<td data-value="{"" if value is None else _html(str(value))}"'
            f"{' class=text' if column in texts else ''}>{shown}</td>"
            for column, (value, shown) in enumerate(row)
        )
        + "</tr>"
        for row, mark in zip(rows, marks, strict=True)
    )
    return (
        f'<div class="wide" tabindex=0 role=region aria-label="{kind}"><table class="sortable {kind}">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _value_cell(setting: dict[str, str], key: str) -> Cell:
    value = setting.get(key)
    if value is None:
        return None, "–"
    if len(value) > LONG_VALUE:
        return value, f'<span title="{_html(value)}">{_html(value[:LONG_VALUE])}…</span>'
    return value, _html(compact(value))


def _figure_cell(value: float | None, form: str) -> Cell:
    return value, "–" if value is None else form.format(value)


def _time_cell(seconds: float | None) -> Cell:
    return seconds, format_seconds(seconds) if seconds else "–"


def _spread_cell(values: Iterable[float | None], form: str) -> Cell:
    values = list(values)
    return _mean(values), _spread(values, form)


def _spread(values: Iterable[float | None], form: str) -> str:
    """The mean of what is there, and the sample standard deviation where it is of more than one."""
    there = [value for value in values if value is not None]
    if not there:
        return "–"
    deviation = f" ± {form.format(stdev(there))}" if len(there) > 1 else ""
    return form.format(mean(there)) + deviation


def _setting_table(settings: list[list[Result]], results: list[Result], numeric: dict[str, bool]) -> str:
    keys = [key for key in _keys(results) if key != "seed"]
    incomplete = any(result.val_loss is None for result in results)
    rows = []
    for number, group in enumerate(settings):
        first, losses = group[0].setting, [result.val_loss for result in group]
        n = sum(loss is not None for loss in losses)
        ranked = _mean_rank(group)[0] < math.inf or _mean_rank(group)[1] < math.inf
        rows.append(
            [
                (number + 1, f"<button data-group={number}>{number + 1 if ranked else '–'}</button>"),
                *(_value_cell(first, key) for key in keys),
                (n, str(n) if n == len(group) else f"{n} of {len(group)}"),
                _spread_cell(losses, "{:.3f}"),
                _spread_cell((result.figures.get("val_bits_per_byte") for result in group), "{:.3f}"),
                _spread_cell((result.figures.get("train_loss") for result in group), "{:.3f}"),
                *([_spread_cell((r.last_val_loss for r in group), "{:.3f}")] if incomplete else []),
                _time_cell(_mean(result.seconds for result in group)),
                _figure_cell(_mean(result.tokens_per_second for result in group), "{:,.0f}"),
            ]
        )
    heads = ["rank", *map(short_key, keys), "n", "val loss", "bits/byte", "train loss"]
    heads += ["last evaluated"] * incomplete + ["time", "tokens/s"]
    texts = {column for column, key in enumerate(keys, 1) if not numeric[key]}
    marks = [f"data-groups={number}" for number in range(len(settings))]
    return _table("settings", heads, rows, 0, texts, marks)


def _job_table(results: list[Result], numeric: dict[str, bool]) -> str:
    keys = _keys(results)
    rows = []
    for number, result in enumerate(results):
        figures = result.figures
        rows.append(
            [
                (number, f"<button data-job={number}>{_html(result.job.name)}</button>"),
                *(_value_cell(result.job.setting, key) for key in keys),
                (result.state, result.state),
                _figure_cell(result.val_loss, "{:.3f}"),
                _figure_cell(figures.get("val_bits_per_byte"), "{:.3f}"),
                _figure_cell(figures.get("train_loss"), "{:.3f}"),
                _figure_cell(result.last_val_loss, "{:.3f}"),
                _figure_cell(result.steps, "{:,}"),
                _figure_cell(result.tokens_seen, "{:,}"),
                _time_cell(result.seconds),
                _figure_cell(result.tokens_per_second, "{:,.0f}"),
            ]
        )
    heads = ["job", *map(short_key, keys), "state", "val loss", "bits/byte", "train loss", "last evaluated"]
    heads += ["steps", "tokens", "time", "tokens/s"]
    texts = {column for column, key in enumerate(keys, 1) if not numeric[key]} | {len(keys) + 1}
    marks = [f"data-jobs={number}" for number in range(len(results))]
    return _table("jobs", heads, rows, 0, texts, marks)


def _heatmap(settings: list[list[Result]], results: list[Result]) -> str:
    """The mean loss over two swept keys; nothing for more or fewer."""
    keys = _plotted_keys(results)
    if len(keys) != 2:
        return ""
    down, along = sorted(keys, key=lambda key: len(_values(results, key)))
    columns = _values(results, along)
    means = [_mean(result.val_loss for result in group) for group in settings]
    ordered = sorted(value for value in means if value is not None)
    places = {
        (group[0].setting.get(down), group[0].setting.get(along)): number
        for number, group in enumerate(settings)
    }
    head = "".join(f"<th scope=col>{_value_cell({along: column}, along)[1]}</th>" for column in columns)
    body = []
    for row in _values(results, down):
        cells = []
        for column in columns:
            number = places.get((row, column))
            value = None if number is None else means[number]
            heat = 0 if value is None else 100 - round(100 * ordered.index(value) / max(1, len(ordered) - 1))
            missing = " class=missing" if value is None else ""
            shown = "–" if value is None else f"{value:.3f}"
            button = f'<button data-group={number}{missing} style="--heat:{heat}%">{shown}</button>'
            cells.append(f"<td>{'' if number is None else button}</td>")
        body.append(f"<tr><th scope=row>{_value_cell({down: row}, down)[1]}</th>{''.join(cells)}</tr>")
    corner = f"{_html(short_key(down))} ↓<br>{_html(short_key(along))} →"
    return (
        "<figure class=heat><figcaption><b>Mean validation loss over two keys</b> "
        "the lower, the darker (by rank); a cell shows its jobs in the charts</figcaption>"
        f"<div class=wide tabindex=0><table><thead><tr><th>{corner}</th>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div></figure>"
    )


# What it quotes


def _samples(results: list[Result]) -> str:
    finished = sorted((result for result in results if result.val_loss is not None), key=lambda r: r.rank)
    chosen = {"The best": finished[:1], "The worst": finished[1:][-1:]}
    shown = []
    for place, found in chosen.items():
        for result in found:
            prompt, text = _last_sample(result.job.folder)
            heading = f"{place}, job {result.job.name}: {result.job.title}"
            shown.append(
                f"<article><h3>{_html(heading)} <small>validation loss {result.val_loss:.3f}</small></h3>"
                f"<pre><span>{_html(prompt)}</span>{_html(text) or '(it left no sample)'}</pre></article>"
            )
    return "".join(shown) or "<p>No job has finished yet.</p>"


def _last_sample(folder: Path) -> tuple[str, str]:
    """The prompt and what went on from it, of the last whole line; nothing if there is none."""
    file = folder / "samples.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    for line in reversed(lines):
        with suppress(ValueError, LookupError, TypeError):
            sample = json.loads(line)
            return sample["prompt"], sample["text"].removeprefix(sample["prompt"])
    return "", ""


def _sweep_commands(results: list[Result], folders: list[Path]) -> str:
    """How to go on with each sweep that is not done."""
    unfinished = {result.job.folder.parent for result in results if result.state not in ENDED}
    commands = "".join(
        _command("-m", f"sweep.resume={as_typed(folder)}")
        for folder in folders
        if folder in unfinished and (folder / RECORD).exists()
    )
    return f"<p>All that is unfinished:</p>{commands}" if commands else ""


def _commands(results: list[Result]) -> str:
    return "".join(
        f"<li><p>{_html(f'Job {result.job.name}: {result.job.title}')} <small>({result.state})</small></p>"
        f"{_command(*result.job.overrides)}{_resume(result)}</li>"
        for result in results
    )


def _resume(result: Result) -> str:
    if result.state == "waiting":
        return ""
    note = " <small>it is finished: add a higher limit, as training.max_steps=…</small>"
    return _command(f"resume={as_typed(result.job.folder)}") + note * (result.state == "finished")


def _command(*arguments: str) -> str:
    return f"<code>{_html(shlex.join(['python', 'experiments/pretrain.py', *arguments]))}</code>"


# The picture


def _draw(results: list[Result], path: Path) -> None:
    """The curves, and beside them the loss against what was swept."""
    from matplotlib.figure import Figure  # not pyplot, which would change a notebook's backend

    keys = _plotted_keys(results)
    if not any(result.val_loss is not None for result in results):
        keys = []
    panels = keys[:1] if len(keys) == 2 else keys[:4]
    across = 2 if len(panels) == 4 else 1
    rows = max(1, len(panels) // across)
    figure = Figure(figsize=(15 if panels else 9, 6.2 if rows < 3 else 8), dpi=130, layout="constrained")
    grid = figure.add_gridspec(rows, 3, width_ratios=[1.2, 0.5, 0.5])
    _draw_curves(figure.add_subplot(grid[:, 0] if panels else grid[:, :]), results)
    for number, key in enumerate(panels):
        row, column = divmod(number, across)
        axes = figure.add_subplot(grid[row, 1 + column] if across == 2 else grid[row, 1:])
        if len(keys) == 2:
            _draw_heatmap(axes, results, *keys)
        else:
            _draw_values(axes, results, key)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw_curves(axes: Any, results: list[Result]) -> None:
    """Validation loss of all jobs, and the smoothed training loss where they are few."""
    from matplotlib.collections import LineCollection
    from matplotlib.ticker import EngFormatter

    settings = _settings(results)
    few_jobs = len(results) <= 5 * FEW
    colours, legend = _job_colours(results, settings)
    best_last = sorted(results, key=lambda result: result.rank, reverse=True)
    shown = [result.evaluations for result in best_last]
    axes.add_collection(
        LineCollection(
            [np.column_stack([rows[1], rows[3]]) for rows in shown],
            colors=[colours[result] for result in best_last],
            linewidths=1.8 if few_jobs else 0.6,
            alpha=1 if few_jobs else 0.7,
        )
    )
    if few_jobs:
        shown += [result.training[[0, 1, 2, 4]] for result in best_last]
        for result in best_last:
            axes.plot(result.training[1], result.training[4], ":", lw=0.9, color=colours[result])
    losses = np.concatenate([rows[3] for rows in shown])
    tokens = np.concatenate([rows[1] for rows in shown])
    if np.isfinite(losses).any():
        low, high = _loss_range(shown, losses[np.isfinite(losses)])
        axes.set_ylim(low - 0.03 * (high - low), high + 0.03 * (high - low))
        axes.set_xlim(0, 1.01 * max(tokens))
    axes.set_title(
        "Validation loss" + ", and dotted the smoothed training loss" * few_jobs, loc="left", fontsize=10
    )
    axes.set_xlabel("Tokens seen")
    axes.set_ylabel("Loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        handles = [axes.plot([], [], lw=2, color=colour)[0] for colour in legend.values()]
        axes.legend(handles, [_label(name, 40) for name in legend], frameon=False, fontsize=8)
    else:
        _draw_colour_bar(axes, [result.val_loss for result in results if result.val_loss is not None])


def _loss_range(curves: list[np.ndarray], losses: np.ndarray) -> tuple[float, float]:
    """From the least loss to the greatest, or, where some diverged, to where a usual job begins."""
    begins = [rows[3][np.isfinite(rows[3])][:1] for rows in curves]
    usual = 1.1 * float(np.median(np.concatenate(begins)))
    low, high = float(losses.min()), float(losses.max())
    return low, high if high < 1.5 * usual else usual


def _job_colours(
    results: list[Result], settings: list[list[Result]]
) -> tuple[dict[Result, Any], dict[str, Any]]:
    """A colour for each result: by its setting, with a legend, or of many settings by rank of the loss."""
    from matplotlib.colors import LinearSegmentedColormap

    ramp = LinearSegmentedColormap.from_list("ramp", COLOURS["light"]["ramp"])
    if len(settings) <= FEW:
        [*keys] = settings[0][0].setting
        ordered = len(keys) == 1 and _is_numeric(_values(results, keys[0]))
        by_value = (
            sorted(settings, key=lambda group: order(group[0].setting.get(keys[0], "")))
            if ordered
            else settings
        )
        shades = [
            ramp(place / max(1, len(by_value) - 1)) if ordered else COLOURS["light"]["kinds"][place]
            for place in range(len(by_value))
        ]
        titles = [title_of(group[0].setting) or "the one setting" for group in by_value]
        colours = {result: shade for group, shade in zip(by_value, shades, strict=True) for result in group}
        return colours, dict(zip(titles, shades, strict=True))
    ranked = sorted(results, key=lambda result: result.rank)
    return {result: ramp(place / (len(ranked) - 1)) for place, result in enumerate(ranked)}, {}


def _draw_colour_bar(axes: Any, losses: list[float]) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap

    bar = axes.figure.colorbar(
        ScalarMappable(cmap=LinearSegmentedColormap.from_list("ramp", COLOURS["light"]["ramp"])),
        cax=axes.inset_axes([0.42, 0.95, 0.54, 0.02]),  # where losses have fallen from by then
        orientation="horizontal",
    )
    places = [0, 0.25, 0.5, 0.75, 1]
    bar.set_ticks(places, labels=[f"{value:.3f}" for value in np.quantile(losses, places)] if losses else [])
    bar.set_label("Final validation loss; colour by rank", fontsize=8)
    bar.ax.tick_params(labelsize=8)


def _draw_values(axes: Any, results: list[Result], key: str) -> None:
    """Final losses over a swept key, the mean at each value, and a ring about the least."""
    finished = [result for result in results if result.val_loss is not None and key in result.job.setting]
    values = _values(finished, key)
    numeric = _is_numeric(values)
    place = {value: float(value) if numeric else float(number) for number, value in enumerate(values)}
    losses = [result.figures["val_loss"] for result in finished]
    axes.plot(
        [place[result.job.setting[key]] for result in finished],
        losses,
        "o",
        color=COLOURS["light"]["kinds"][0],
        alpha=0.6 if len(results) < 100 else 0.15,
        markersize=5,
        markeredgewidth=0,
    )
    means = _means(finished, key, numeric)
    spots = [value if numeric else place[str(value)] for value, _ in means]
    axes.plot(spots, [loss for _, loss in means], "-", color=COLOURS["light"]["kinds"][1], lw=1.8)
    if means:
        least = min(range(len(means)), key=lambda each: means[each][1])
        name, loss = means[least]
        ring = {"ms": 11, "mfc": "none", "mew": 1.8, "color": COLOURS["light"]["kinds"][1]}
        axes.plot([spots[least]], [loss], "o", **ring)
        title = f"Final loss, least mean {loss:.3f} at {short_key(key)}={compact(str(name))}"
        axes.set_title(_label(title, 60), loc="left", fontsize=10 if len(_plotted_keys(results)) < 4 else 8)
    if numeric and _wants_log(key, values):
        axes.set_xscale("log")
    elif not numeric:
        axes.set_xticks(range(len(values)), [_label(value) for value in values], fontsize=8)
    if losses and min(losses) > 0 and max(losses) > 4 * min(losses):
        axes.set_yscale("log")
    axes.set_xlabel(_label(short_key(key)))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_heatmap(axes: Any, results: list[Result], *keys: str) -> None:
    """The mean final loss over two keys, shaded by rank."""
    down, along = sorted(keys, key=lambda key: len(_values(results, key)))
    rows, columns = _values(results, down), _values(results, along)
    means = {
        (group[0].setting.get(down), group[0].setting.get(along)): _mean(result.val_loss for result in group)
        for group in _settings(results)
    }
    ordered = sorted(value for value in means.values() if value is not None)
    shades = [
        [
            math.nan if (value := means.get((row, column))) is None else -ordered.index(value)
            for column in columns
        ]
        for row in rows
    ]
    axes.imshow(shades, cmap="Blues", aspect="auto", vmin=-1.6 * len(ordered), vmax=0.6 * len(ordered))
    if len(rows) * len(columns) <= 150:
        for (row, column), value in means.items():
            if value is not None and row in rows and column in columns:
                axes.text(
                    columns.index(column),
                    rows.index(row),
                    f"{value:.3f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                )
    axes.set_xticks(range(len(columns)), [_label(compact(value)) for value in columns], fontsize=8)
    axes.set_yticks(range(len(rows)), [_label(compact(value)) for value in rows], fontsize=8)
    axes.set_xlabel(_label(short_key(along)))
    axes.set_ylabel(_label(short_key(down)))
    axes.set_title("Mean final validation loss, the lower the darker (by rank)", loc="left", fontsize=10)


def _label(text: str, most: int = 20) -> str:
    """A text that fits beside an axis and is not taken for mathematics."""
    shown = text if len(text) <= most else text[: most - 1] + "…"
    return (_clean(shown) or "").replace("$", r"\$")
