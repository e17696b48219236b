"""What the page of a sweep of training runs shows, as plain values; templates/sweep.html draws it."""

import json
import math
import shlex
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from llm.files import as_typed
from llm.progress import format_count, format_seconds
from llm.sweeps.jobs import DONE, RECORD, short_key, title_of
from llm.sweeps.page import Column, column, setting_columns
from llm.sweeps.pictures import COLOURS, FEW
from llm.sweeps.ranking import (
    is_numeric,
    loss_cells,
    loss_grid,
    mean_rank,
    means_over,
    plotted_keys,
    settings_of,
    swept_keys,
    values_of,
    wants_log,
)
from llm.sweeps.results import SMOOTHED_SHARE, Result

SHOWN_VALUES = 12
NAMES = {"val_bits_per_byte": "bits/byte"}  # of columns; other metrics have their own, with spaces
REDUNDANT = "val_perplexity"  # follows from the loss

Axis = dict[str, float | str]  # the values of a key, each as it is plotted
Figure = Callable[[Result], float | None]


def sweep_page(results: list[Result], groups: list[list[Result]], folders: list[Path]) -> dict[str, Any]:
    """
    Args:
        groups: the results by setting, the best first.
        folders: those that were asked for.
    """
    settings = settings_of(results)
    grid = loss_grid(groups)
    axes = _axes(results)
    return {
        "kind": "Run" if folders == [results[0].job.folder] else "Sweep",
        "folders": ", ".join(str(as_typed(folder)) for folder in folders),
        "about": _about(results),
        "varied": [[key, _listed(values_of(settings, key))] for key in swept_keys(settings)],
        "common": [[name, _listed(values)] for name, values in _common(results).items() if values],
        "keys": [_key(results, key, axis) for key, axis in axes.items()],
        "groups": [_group(group, cell) for group, cell in zip(groups, loss_cells(groups), strict=True)],
        "jobs": _jobs(results, groups, axes),
        "grid": grid and asdict(grid),
        "ranked": _group_columns(groups),
        "table": _job_columns(results),
        "samples": _samples(results),
        "resume": _resume_all(results, folders),
        "smoothedShare": SMOOTHED_SHARE,
        "few": FEW,
        "colours": COLOURS,
    }


def _about(results: list[Result]) -> str:
    states = [result.state for result in results]
    counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    tokens, seconds = sum(result.tokens_seen for result in results), sum(result.seconds for result in results)
    return (
        f"{datetime.now():%Y-%m-%d %H:%M} · {len(results)} job{'s' * (len(results) > 1)}: {counted} · "
        f"{format_count(tokens)} tokens in {format_seconds(seconds)} of training"
    )


def _listed(values: list[str]) -> str:
    shown = ", ".join(values[:SHOWN_VALUES])
    more = len(values) > SHOWN_VALUES
    return shown + f", … {values[-1]} ({len(values)} values)" * more


def _common(results: list[Result]) -> dict[str, list[str]]:
    """The overrides of all jobs, and where they ran."""
    first, *others = [result.job.overrides for result in results]
    sets = [set(other) for other in others]
    shared = [override for override in first if all(override in other for other in sets)]
    return {
        "overrides": [shlex.join(shared) or "none"],
        "parameters": _facts(results, lambda summary: format_count(summary["parameters"] or math.nan)),
        "device": _facts(results, lambda summary: f"{summary['device']}, {summary['precision']}"),
        "machine": _facts(results, lambda summary: str(summary["machine"])),
        "torch": _facts(results, lambda summary: str(summary["versions"]["torch"])),
        "commit": _facts(
            results, lambda summary: summary["git_commit"][:10] + " with changes" * (not summary["git_clean"])
        ),
    }


def _facts(results: list[Result], fact: Callable[[dict[str, Any]], str]) -> list[str]:
    """What the summaries say, each thing once; nothing from those that have no such thing."""
    found = {}
    for result in results:
        with suppress(LookupError, TypeError, ValueError):
            found[fact(result.job.summary)] = True
    return [value for value in found if value.strip(", ") and value != "nan"]


# Jobs and settings, as the charts need them


def _axes(results: list[Result]) -> dict[str, Axis]:
    """The keys that a loss may depend on, with the values of the jobs that came to a loss, if any did."""
    shown = [result for result in results if result.rank < (math.inf, math.inf)] or results
    axes: dict[str, Axis] = {}
    for key in plotted_keys(settings_of(results)):
        values = values_of(settings_of(shown), key)
        plotted: Iterable[float | str] = map(float, values) if is_numeric(values) else values
        axes[key] = dict(zip(values, plotted, strict=True))
    return axes


def _key(results: list[Result], key: str, axis: Axis) -> dict[str, Any]:
    return {
        "name": short_key(key),
        "values": [*dict.fromkeys(axis.values())],
        "numeric": is_numeric([*axis]),
        "log": is_numeric([*axis]) and wants_log(key, [*axis]),
        "means": [[axis[value], loss] for value, loss in means_over(results, key)],
    }


def _group(group: list[Result], cell: tuple[float | None, str]) -> dict[str, Any]:
    """A setting, with its cell in the heatmap."""
    losses = [result.val_loss for result in group if result.val_loss is not None]
    return {
        "title": title_of(group[0].setting) or "the one setting",
        "loss": _spread(losses) if losses else None,
        "seeds": len(losses),
        "cell": cell,
    }


def _jobs(results: list[Result], groups: list[list[Result]], axes: dict[str, Axis]) -> list[dict[str, Any]]:
    group_of = {result: number for number, group in enumerate(groups) for result in group}
    return [
        {
            "name": result.job.name,
            "title": result.job.title,
            "state": result.state,
            "reason": _reason(result),
            "group": group_of[result],
            "values": [axis.get(result.job.setting.get(key, "")) for key, axis in axes.items()],
            "loss": result.last_val_loss if result.val_loss is None else result.val_loss,
            "final": result.val_loss is not None,
            "training": _rounded(result.training),
            "validation": _rounded(result.evaluations),
            "again": _command(*result.job.overrides_alone),
            "resume": _resume(result),
        }
        for result in results
    ]


def _reason(result: Result) -> str:
    """Why it has no final figures."""
    if result.state == "running":
        return f"{result.steps:,} updates"
    return (result.error or "").removeprefix("stopped early: ")


def _rounded(rows: np.ndarray) -> list[list[float | None]]:
    """Rows of numbers with as many digits as can be seen; null for what is not finite."""
    steps, tokens_seen, seconds, *losses = rows
    whole = [
        [None if value != value else int(value) for value in row.tolist()] for row in (steps, tokens_seen)
    ]
    rounded = [np.round(seconds, 2), *(np.round(loss, 4) for loss in losses)]
    return whole + [[value if math.isfinite(value) else None for value in row.tolist()] for row in rounded]


def _command(*arguments: str) -> str:
    return shlex.join(["python", "experiments/pretrain.py", *arguments])


def _resume(result: Result) -> str | None:
    if result.state == "waiting":
        return None
    return _command(f"resume={as_typed(result.job.folder)}")


def _resume_all(results: list[Result], folders: list[Path]) -> list[str]:
    """How to resume each sweep that is not done."""
    unfinished = {result.job.folder.parent for result in results if result.state not in DONE}
    return [
        _command("-m", f"sweep.resume={as_typed(folder)}")
        for folder in folders
        if folder in unfinished and (folder / RECORD).exists()
    ]


# Tables


def _group_columns(groups: list[list[Result]]) -> list[Column]:
    """A row for each setting: means over its seeds."""
    incomplete = any(result.val_loss is None for group in groups for result in group)
    ranks = [min(mean_rank(group)) < math.inf for group in groups]
    finished = [sum(result.val_loss is not None for result in group) for group in groups]
    return [
        column("rank", [(n, str(n) if ranked else "–") for n, ranked in enumerate(ranks, 1)]),
        *setting_columns([group[0].setting for group in groups]),
        column(
            "n",
            [
                (n, str(n) if n == len(group) else f"{n} of {len(group)}")
                for n, group in zip(finished, groups, strict=True)
            ],
        ),
        *_loss_columns(groups, incomplete),
        *_speed_columns(groups),
    ]


def _job_columns(results: list[Result]) -> list[Column]:
    """A row for each job."""
    alone = [[result] for result in results]
    return [
        column("job", [(number, result.job.name) for number, result in enumerate(results)]),
        *setting_columns(settings_of(results)),
        column("state", [(result.state, result.state) for result in results], text=True),
        *_loss_columns(alone, True),
        _figures("steps", alone, lambda result: result.steps, _whole),
        _figures("tokens", alone, lambda result: result.tokens_seen, _whole),
        *_speed_columns(alone),
    ]


def _loss_columns(groups: list[list[Result]], with_last: bool) -> list[Column]:
    """The losses, and between them whatever else evaluations have measured."""
    found = dict.fromkeys(name for group in groups for result in group for name in result.figures)
    metrics = [name for name in found if name.startswith("val_") and name not in ("val_loss", REDUNDANT)]
    columns = [
        _figures(NAMES.get(name, name.replace("_", " ")), groups, _figure(name), _spread)
        for name in ("val_loss", *metrics, "train_loss")
    ]
    if with_last:
        columns.append(_figures("last evaluated", groups, lambda result: result.last_val_loss, _spread))
    return columns


def _speed_columns(groups: list[list[Result]]) -> list[Column]:
    return [
        _figures("time", groups, lambda result: result.seconds or None, _duration),
        _figures("tokens/s", groups, lambda result: result.tokens_per_second, _whole),
    ]


def _figures(
    name: str, groups: list[list[Result]], figure: Figure, shown: Callable[[list[float]], str]
) -> Column:
    """A column of means over each group of those results that have the figure."""
    there = [[value for result in group if (value := figure(result)) is not None] for group in groups]
    return column(name, [(mean(values), shown(values)) if values else (None, "–") for values in there])


def _figure(name: str) -> Figure:
    return lambda result: result.figures.get(name)


def _spread(values: list[float]) -> str:
    """The mean, and the sample standard deviation where there is more than one."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def _duration(values: list[float]) -> str:
    return format_seconds(mean(values))


def _whole(values: list[float]) -> str:
    return f"{mean(values):,.0f}"


# Samples


def _samples(results: list[Result]) -> list[dict[str, Any]]:
    """The last sample of the best job and of the worst."""
    finished = sorted(
        (number for number, result in enumerate(results) if result.val_loss is not None),
        key=lambda number: results[number].rank,
    )
    chosen = {"The best": finished[:1], "The worst": finished[1:][-1:]}
    return [
        {"place": place, "job": number, **_last_sample(results[number].job.folder)}
        for place, numbers in chosen.items()
        for number in numbers
    ]


def _last_sample(folder: Path) -> dict[str, str]:
    """The prompt and its continuation, of the last whole line; nothing if there is none."""
    file = folder / "samples.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    for line in reversed(lines):
        with suppress(ValueError, LookupError, TypeError, AttributeError):
            sample = json.loads(line)
            return {"prompt": sample["prompt"], "text": sample["text"].removeprefix(sample["prompt"])}
    return {"prompt": "", "text": ""}
