"""A sweep of training runs as a page, a table and a picture, from the files of its jobs alone."""

import csv
import html
import io
import json
import math
import shlex
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from llm.files import as_typed, write_text
from llm.progress import format_count, format_seconds
from llm.sweeps.jobs import (
    DONE,
    RECORD,
    Job,
    compact,
    short_key,
    title_of,
)
from llm.sweeps.page import filled_page
from llm.sweeps.pictures import COLOURS, FEW, draw_sweep
from llm.sweeps.results import (
    SMOOTHED_SHARE,
    Result,
    as_plotted,
    by_setting,
    is_numeric,
    mean_of,
    mean_rank,
    means_over,
    plotted_keys,
    read_results,
    swept_keys,
    values_of,
    wants_log,
    writable,
)

SHOWN_VALUES = 12
LONG_VALUE = 40  # characters, in a table


def sweep_report(jobs: list[Job], folders: list[Path], target: Path) -> Path:
    """Write the report of training runs that lie in `folders`; returns the page."""
    results = read_results(jobs)
    write_text(target / "report.csv", _csv(results))
    draw_sweep(results, target / "report.png")
    write_text(target / "report.html", _page(results, folders))
    return target / "report.html"


# The table


def _csv(results: list[Result]) -> str:
    keys = swept_keys(results)
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
    return writable(text.getvalue()) or ""


# The page


Cell = tuple[Any, str]  # what a column is sorted by, and what is shown, as HTML


def _page(results: list[Result], folders: list[Path]) -> str:
    settings = by_setting(results)
    numeric = {key: is_numeric(values_of(results, key)) for key in swept_keys(results)}
    return filled_page(
        "sweep",
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
    return html.escape(writable(text) or "")


def _data(results: list[Result], settings: list[list[Result]]) -> str:
    """What the page's charts are drawn from, as JSON that may stand in a script element."""
    plotted = plotted_keys(results)
    shown = [result for result in results if result.rank < (math.inf, math.inf)] or results
    values = {key: values_of(shown, key) for key in plotted}
    numeric = {key: is_numeric(values[key]) for key in plotted}
    keys = [
        {
            "name": writable(short_key(key)),
            "values": [*dict.fromkeys(as_plotted(value, numeric[key]) for value in values[key])],
            "numeric": numeric[key],
            "log": numeric[key] and wants_log(key, values[key]),
            "means": means_over(results, key, numeric[key]),
        }
        for key in plotted
    ]
    group_of = {result: number for number, group in enumerate(settings) for result in group}
    jobs = [
        {
            "title": writable(f"job {result.job.name}: {result.job.title}"),
            "state": result.state,
            "group": group_of[result],
            "values": [
                as_plotted(value, numeric[key])
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
    groups = [writable(title_of(group[0].setting) or "the one setting") for group in settings]
    content = {"keys": keys, "groups": groups, "few": FEW, "colours": COLOURS, "jobs": jobs}
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


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
    if not (keys := swept_keys(results)):
        return "<p>Nothing.</p>" if len(results) > 1 else "<p>Nothing: it is one run.</p>"
    return f"<dl>{''.join(_term(key, values_of(results, key)) for key in keys)}</dl>"


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
    return mean_of(values), _spread(values, form)


def _spread(values: Iterable[float | None], form: str) -> str:
    """The mean of what is there, and the sample standard deviation where it is of more than one."""
    there = [value for value in values if value is not None]
    if not there:
        return "–"
    deviation = f" ± {form.format(stdev(there))}" if len(there) > 1 else ""
    return form.format(mean(there)) + deviation


def _setting_table(settings: list[list[Result]], results: list[Result], numeric: dict[str, bool]) -> str:
    keys = [key for key in swept_keys(results) if key != "seed"]
    incomplete = any(result.val_loss is None for result in results)
    rows = []
    for number, group in enumerate(settings):
        first, losses = group[0].setting, [result.val_loss for result in group]
        n = sum(loss is not None for loss in losses)
        ranked = mean_rank(group)[0] < math.inf or mean_rank(group)[1] < math.inf
        rows.append(
            [
                (number + 1, f"<button data-group={number}>{number + 1 if ranked else '–'}</button>"),
                *(_value_cell(first, key) for key in keys),
                (n, str(n) if n == len(group) else f"{n} of {len(group)}"),
                _spread_cell(losses, "{:.3f}"),
                _spread_cell((result.figures.get("val_bits_per_byte") for result in group), "{:.3f}"),
                _spread_cell((result.figures.get("train_loss") for result in group), "{:.3f}"),
                *([_spread_cell((r.last_val_loss for r in group), "{:.3f}")] if incomplete else []),
                _time_cell(mean_of(result.seconds for result in group)),
                _figure_cell(mean_of(result.tokens_per_second for result in group), "{:,.0f}"),
            ]
        )
    heads = ["rank", *map(short_key, keys), "n", "val loss", "bits/byte", "train loss"]
    heads += ["last evaluated"] * incomplete + ["time", "tokens/s"]
    texts = {column for column, key in enumerate(keys, 1) if not numeric[key]}
    marks = [f"data-groups={number}" for number in range(len(settings))]
    return _table("settings", heads, rows, 0, texts, marks)


def _job_table(results: list[Result], numeric: dict[str, bool]) -> str:
    keys = swept_keys(results)
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
    keys = plotted_keys(results)
    if len(keys) != 2:
        return ""
    down, along = sorted(keys, key=lambda key: len(values_of(results, key)))
    columns = values_of(results, along)
    means = [mean_of(result.val_loss for result in group) for group in settings]
    ordered = sorted(value for value in means if value is not None)
    places = {
        (group[0].setting.get(down), group[0].setting.get(along)): number
        for number, group in enumerate(settings)
    }
    head = "".join(f"<th scope=col>{_value_cell({along: column}, along)[1]}</th>" for column in columns)
    body = []
    for row in values_of(results, down):
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
    unfinished = {result.job.folder.parent for result in results if result.state not in DONE}
    commands = "".join(
        _command("-m", f"sweep.resume={as_typed(folder)}")
        for folder in folders
        if folder in unfinished and (folder / RECORD).exists()
    )
    return f"<p>All that is unfinished:</p>{commands}" if commands else ""


def _commands(results: list[Result]) -> str:
    """How to run each job again, and how to go on with it."""
    return "".join(
        f"<li><p>{_html(f'Job {result.job.name}: {result.job.title}')} <small>({result.state})</small></p>"
        f"{_command(*result.job.overrides_alone)}{_resume(result)}</li>"
        for result in results
    )


def _resume(result: Result) -> str:
    if result.state == "waiting":
        return ""
    note = " <small>it is finished: add a higher limit, as training.max_steps=…</small>"
    return _command(f"resume={as_typed(result.job.folder)}") + note * (result.state == "finished")


def _command(*arguments: str) -> str:
    return f"<code>{_html(shlex.join(['python', 'experiments/pretrain.py', *arguments]))}</code>"
