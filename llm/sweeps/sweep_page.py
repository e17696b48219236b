"""What the page of a sweep of training runs shows, as plain values; templates/sweep.html draws it."""

import math
import shlex
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from llm.config import PretrainConfig
from llm.files import as_typed
from llm.overrides import as_command, as_override, compact, short_key, title_of
from llm.progress import format_count, format_seconds
from llm.records import Record, read_samples
from llm.sweeps.jobs import DONE, RECORD, command_again, printable
from llm.sweeps.pictures import COLOURS, FEW
from llm.sweeps.ranking import (
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
from llm.sweeps.results import SMOOTHED_SHARE, Result

SHOWN_VALUES = 12

Axis = dict[str, float | str]  # the values of a key, each as it is plotted


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
        "groups": [
            {"title": title_of(group[0].setting) or "the one setting", "cell": cell}
            for group, cell in zip(groups, loss_cells(groups), strict=True)
        ],
        "jobs": _jobs(results, groups, axes),
        "grid": grid and asdict(grid),
        "samples": _samples(results),
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
    """The overrides of all jobs, and where they ran."""
    first, *others = [result.job.overrides for result in results]
    sets = [set(other) for other in others]
    shared = [override for override in first if all(override in other for other in sets)]
    return {
        "overrides": [shlex.join(shared) or "none"],
        "parameters": _facts(results, lambda summary: format_count(summary["parameters"] or math.nan)),
        "device": _facts(results, lambda summary: summary["device"] + ", " + summary["precision"]),
        "machine": _facts(results, lambda summary: summary["machine"]),
        "torch": _facts(results, lambda summary: summary["versions"]["torch"]),
        "commit": _facts(
            results, lambda summary: summary["git_commit"][:10] + " with changes" * (not summary["git_clean"])
        ),
    }


def _facts(results: list[Result], fact: Callable[[Record], str | None]) -> list[str]:
    """What the summaries say, each thing once; nothing from those that have no such thing."""
    found = {}
    for result in results:
        with suppress(LookupError, TypeError):
            found[fact(result.job.summary)] = True
    return [value for value in found if value and value.strip(", ") and value != "nan"]


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


def _jobs(results: list[Result], groups: list[list[Result]], axes: dict[str, Axis]) -> list[dict[str, Any]]:
    group_of = {result: number for number, group in enumerate(groups) for result in group}
    return [
        {
            "name": result.job.name,
            "title": result.job.title,
            "state": result.state,
            "reason": _reason(result),
            "group": group_of[result],
            "setting": {key: compact(value) for key, value in result.job.setting.items()},
            "figures": _figures(result),
            "values": [axis.get(result.job.setting.get(key, "")) for key, axis in axes.items()],
            "loss": result.last_val_loss if result.val_loss is None else result.val_loss,
            "final": result.val_loss is not None,
            "training": _rounded(result.training),
            "validation": _rounded(result.evaluations),
            "again": command_again("pretrain", PretrainConfig, result.job),
            "resume": _resume(result),
        }
        for result in results
    ]


def _figures(result: Result) -> dict[str, float | None]:
    """What the tables show: all metrics of the final evaluation, and how far the job is."""
    final = {name: value for name, value in result.figures.items() if name.startswith(("val_", "train_"))}
    return {
        **final,
        "last_val_loss": result.last_val_loss,
        "steps": result.steps,
        "tokens_seen": result.tokens_seen,
        "seconds": result.seconds or None,
        "tokens_per_second": result.tokens_per_second,
    }


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
    """The prompt and its continuation, of the last whole line."""
    if not (samples := read_samples(folder / "samples.jsonl")):
        return {"prompt": "", "text": "(it left no sample)"}
    prompt, text = samples[-1]["prompt"], samples[-1]["text"]
    return {"prompt": prompt, "text": text.removeprefix(prompt)}
