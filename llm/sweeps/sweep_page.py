"""The content of a sweep's page, as plain values; templates/sweep.html shows it."""

import math
import shlex
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from llm.files import as_typed
from llm.overrides import as_command, as_override, compact, short_key, title_of, unquoted_where_plain
from llm.progress import format_count, format_seconds
from llm.records import Record, read_samples
from llm.sweeps.commands import printable, train_again
from llm.sweeps.comparing import LOSS
from llm.sweeps.jobs import DONE, RECORD
from llm.sweeps.pictures import COLOURS, FEW
from llm.sweeps.ranking import (
    Ranking,
    is_numeric,
    loss_cells,
    loss_grid,
    means_over,
    plotted_keys,
    settings_of,
    swept_keys,
    values_of,
    wants_log,
)
from llm.sweeps.results import FINAL, SMOOTHED_SHARE, Result

SHOWN_VALUES = 12

Axis = dict[str, float | str]  # the values of a key, each as it is plotted


def sweep_page(results: list[Result], rankings: list[Ranking], folders: list[Path]) -> dict[str, Any]:
    """The content of the page.

    Args:
        results: those of all jobs, in order.
        rankings: the same, by the text that they were evaluated on.
        folders: the sweeps or runs that were asked for.
    """
    settings = settings_of(results)
    axes = _axes(results)
    return {
        "kind": "Run" if folders == [results[0].job.folder] else "Sweep",
        "folders": ", ".join(str(as_typed(folder)) for folder in folders),
        "about": _about(results),
        "varied": [[key, _listed(values_of(settings, key))] for key in swept_keys(settings)],
        "common": [[name, _listed(values)] for name, values in _common(results).items() if values],
        "names": {key: short_key(key) for key in swept_keys(settings)},
        "keys": [_key(rankings, key, axis) for key, axis in axes.items()],
        "texts": _texts(rankings),
        "groups": [
            {
                "title": title_of(group[0].setting) or "the one setting",
                "cell": cell,
                "text": number,
                "possibly_best": may,
            }
            for number, ranking in enumerate(rankings)
            for group, cell, may in zip(
                ranking.groups, loss_cells(ranking), ranking.possibly_best, strict=True
            )
        ],
        "jobs": _jobs(results, rankings, axes),
        "samples": _samples(results, rankings),
        "resume": _resume_all(results, folders),
        "smoothed_share": SMOOTHED_SHARE,
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
    """The overrides that all jobs share, and where they ran."""
    first, *others = [result.job.overrides for result in results]
    sets = [set(other) for other in others]
    shared = [override for override in first if all(override in other for other in sets)]
    return {
        "overrides": [shlex.join(map(unquoted_where_plain, shared)) or "none"],
        "parameters": _facts(results, lambda summary: format_count(summary["parameters"] or math.nan)),
        "device": _facts(results, lambda summary: summary["device"] + ", " + summary["precision"]),
        "machine": _facts(results, lambda summary: summary["machine"]),
        "torch": _facts(results, lambda summary: summary["versions"]["torch"]),
        "commit": _facts(
            results, lambda summary: summary["git_commit"][:10] + " with changes" * (not summary["git_clean"])
        ),
    }


def _facts(results: list[Result], fact: Callable[[Record], str | None]) -> list[str]:
    """The distinct values of a fact in the summaries, without those that lack it."""
    found = {}
    for result in results:
        with suppress(LookupError, TypeError):
            found[fact(result.job.summary)] = True
    return [value for value in found if value and value.strip(", ") and value != "nan"]


# Jobs and settings, as the charts need them


def _axes(results: list[Result]) -> dict[str, Axis]:
    """The keys to plot losses over, with the values of jobs that have a final loss, or of all jobs if none
    has."""
    shown = [result for result in results if result.final is not None] or results
    axes: dict[str, Axis] = {}
    for key in plotted_keys(settings_of(results)):
        values = values_of(settings_of(shown), key)
        plotted: Iterable[float | str] = map(float, values) if is_numeric(values) else values
        axes[key] = dict(zip(values, plotted, strict=True))
    return axes


def _texts(rankings: list[Ranking]) -> list[dict[str, Any]]:
    """The texts that jobs were evaluated on: their names, and the measure by which their jobs are ranked."""
    texts, first = [], 0
    for ranking in rankings:
        grid = loss_grid(ranking.groups)
        cells = grid and [[None if cell is None else first + cell for cell in row] for row in grid.cells]
        texts.append(
            {
                "title": ranking.of.title,
                "measure": asdict(ranking.of.measure),
                "per_token": ranking.of.measure == LOSS,
                "grid": grid and {**asdict(grid), "cells": cells},
                "noise": ranking.noise,
            }
        )
        first += len(ranking.groups)
    return texts


def _key(rankings: list[Ranking], key: str, axis: Axis) -> dict[str, Any]:
    return {
        "name": short_key(key),
        "values": [*dict.fromkeys(axis.values())],
        "numeric": is_numeric([*axis]),
        "log": is_numeric([*axis]) and wants_log(key, [*axis]),
        "means": [
            [[axis[value], loss] for value, loss in means_over(ranking.results, key)] for ranking in rankings
        ],
    }


def _jobs(results: list[Result], rankings: list[Ranking], axes: dict[str, Axis]) -> list[dict[str, Any]]:
    groups = [group for ranking in rankings for group in ranking.groups]
    group_of = {result: number for number, group in enumerate(groups) for result in group}
    text_of = {result: number for number, ranking in enumerate(rankings) for result in ranking.results}
    return [
        {
            "name": result.job.name,
            "title": result.job.title,
            "state": result.state,
            "reason": _reason(result),
            "group": group_of[result],
            "text": text_of[result],
            "setting": {key: compact(value) for key, value in result.job.setting.items()},
            "figures": _figures(result),
            "values": [axis.get(result.job.setting.get(key, "")) for key, axis in axes.items()],
            "loss": result.final,
            "last": result.last,
            "training": _rounded(_drawn(result)),
            "validation": _rounded(result.evaluations),
            **asdict(train_again(result.job)),
            "resume": _resume(result),
        }
        for result in results
    ]


def _drawn(result: Result) -> np.ndarray:
    """The training curve, without losses if these are not comparable with other jobs'."""
    position, losses = np.split(result.training, [3])
    return np.vstack([position, losses if result.measure == LOSS else np.full_like(losses, math.nan)])


def _figures(result: Result) -> dict[str, float | None]:
    """The figures in the tables: all metrics of the final evaluation, and how far the job is."""
    return {
        **{name: value for name, value in result.figures.items() if name.startswith(FINAL)},
        "last_evaluated": result.last,
        "steps": result.steps,
        "tokens_seen": result.tokens_seen,
        "seconds": result.seconds or None,
        "tokens_per_second": result.tokens_per_second,
    }


def _reason(result: Result) -> str:
    """Why a job has no final figures."""
    if result.state == "running":
        return f"{result.steps:,} updates"
    return (result.error or "").removeprefix("stopped early: ")


def _rounded(rows: np.ndarray) -> list[list[float | None]]:
    """Rows of numbers with as many digits as can be seen; null for those that are not finite."""
    steps, tokens_seen, seconds, *losses = rows
    whole = [
        [None if value != value else int(value) for value in row.tolist()] for row in (steps, tokens_seen)
    ]
    rounded = [np.round(seconds, 2), *(np.round(loss, 4) for loss in losses)]
    return whole + [[value if math.isfinite(value) else None for value in row.tolist()] for row in rounded]


def _resume(result: Result) -> str | None:
    if result.state == "waiting":
        return None
    return printable(as_command("pretrain", as_override("resume", as_typed(result.job.folder))))


def _resume_all(results: list[Result], folders: list[Path]) -> list[str]:
    """How to resume each sweep that is not done."""
    unfinished = {result.job.folder.parent for result in results if result.state not in DONE}
    commands = [
        printable(as_command("pretrain", "-m", as_override("sweep.resume", as_typed(folder))))
        for folder in folders
        if folder in unfinished and (folder / RECORD).exists()
    ]
    return [*filter(None, commands)]


# Samples


def _samples(results: list[Result], rankings: list[Ranking]) -> list[dict[str, Any]]:
    """The last samples of the best and the worst job on each text."""
    number_of = {result: number for number, result in enumerate(results)}
    samples = []
    for ranking in rankings:
        finished = [each for each in ranking.results if each.final is not None]
        finished.sort(key=lambda each: each.rank)
        on = f" on {ranking.of.title}" * bool(ranking.of.title)
        for place, chosen in (("The best", finished[:1]), ("The worst", finished[1:][-1:])):
            samples += [
                {"place": place + on, "job": number_of[each], **_last_sample(each.job.folder)}
                for each in chosen
            ]
    return samples


def _last_sample(folder: Path) -> dict[str, str]:
    """The prompt and its continuation, of the last whole line."""
    if not (samples := read_samples(folder / "samples.jsonl")):
        return {"prompt": "", "text": "(it left no sample)"}
    prompt, text = samples[-1]["prompt"], samples[-1]["text"]
    return {"prompt": prompt, "text": text.removeprefix(prompt)}
