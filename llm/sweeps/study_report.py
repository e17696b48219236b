"""A sampling study as a page, a table and a picture, from the files of its jobs alone."""

import csv
import html
import io
import json
import math
import shlex
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any

from llm.files import read_json_lines, replacing, write_text
from llm.sweeps.jobs import Job, order, short_key
from llm.sweeps.page import filled_page

# What is shown of each setting: its title, how its number is written, and what it means.
METRICS = {
    "perplexity": ("Perplexity", "{:.1f}", "of the samples under the model itself, at temperature 1"),
    "log_probability": ("Log-probability", "{:.2f}", "mean under the model, nats per token"),
    "entropy": ("Entropy", "{:.2f}", "mean of the distributions drawn from, nats per token"),
    "distinct_1": ("Distinct-1", "{:.3f}", "share of different tokens among all"),
    "distinct_2": ("Distinct-2", "{:.3f}", "share of different pairs of tokens"),
    "distinct_3": ("Distinct-3", "{:.3f}", "share of different triples of tokens"),
    "repetition": ("Repetition", "{:.1%}", "share of 4-grams that stood before in their own sample"),
    "length": ("Length", "{:.1f}", "mean new tokens of a sample"),
    "copied": (
        "Copied",
        "{:.1%}",
        "share of new tokens in runs of 8 or more that stand in the training text",
    ),
    "longest_copy": ("Longest copy", "{:.0f}", "tokens of the longest run that stands in the training text"),
}
MAIN_METRICS = ("perplexity", "entropy", "distinct_2", "repetition", "copied", "longest_copy")


class StudyJob(Job):
    """One setting of a study."""

    @property
    def samples(self) -> list[dict[str, Any]]:
        return read_json_lines(self.folder / "samples.jsonl")

    def figure(self, metric: str) -> float | None:
        return self.summary.get(metric)

    def written(self, metric: str) -> str:
        value = self.figure(metric)
        return "–" if value is None else METRICS[metric][1].format(value)

    def row(self) -> dict[str, Any]:
        """What was set, and all figures."""
        return {"job": self.name, **self.setting, **{metric: self.figure(metric) for metric in METRICS}}


def as_study(jobs: list[Job]) -> list[StudyJob]:
    return [StudyJob(**vars(job)) for job in jobs]


def is_study(jobs: list[Job]) -> bool:
    """Whether jobs have measured samples, and trained nothing."""
    return any("sampling" in job.summary and "val_loss" not in job.summary for job in jobs)


def study_report(jobs: list[StudyJob], folder: Path) -> Path:
    """Write `report.html`, which needs nothing but itself, `report.csv` and `report.png` into a sweep folder.

    Returns the page.
    """
    write_text(folder / "report.csv", _csv(jobs))
    _draw(jobs, folder / "report.png")
    write_text(folder / "report.html", _page(folder, jobs))
    return folder / "report.html"


def _csv(jobs: list[StudyJob]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(jobs[0].row()), lineterminator="\n")
    writer.writeheader()
    writer.writerows(job.row() for job in jobs)
    return text.getvalue()


def _axes(jobs: list[StudyJob]) -> tuple[str | None, str | None, list[str]]:
    """The swept keys: the one down the side of a heatmap, the one along its top, and the others."""
    keys = list(jobs[0].setting)
    if len(keys) < 2:
        return None, keys[0] if keys else None, []
    longest = sorted(keys, key=lambda key: -len(_values(jobs, key)))[:2]
    down, along = sorted(longest, key=lambda key: (short_key(key) != "temperature", keys.index(key)))
    return down, along, [key for key in keys if key not in longest]


def _subject(jobs: list[StudyJob]) -> str:
    """The checkpoint and its step; nothing if no job got so far as to load it."""
    summary = next((job.summary for job in jobs if "checkpoint" in job.summary), None)
    return f"{summary['checkpoint']}, step {summary['step']}" if summary else ""


def _values(jobs: list[StudyJob], key: str | None) -> list[str]:
    """The values of a swept key, numbers first and in order; one empty value for no key."""
    return sorted({job.setting[key] for job in jobs} if key else [""], key=order)


def _job_at(jobs: list[StudyJob], fixed: dict[str, str], *places: tuple[str | None, str]) -> StudyJob | None:
    """The job of a cell."""
    setting = {**fixed, **{key: value for key, value in places if key}}
    return next((job for job in jobs if job.setting == setting), None)


def _range(jobs: list[StudyJob], metric: str) -> tuple[float, float]:
    """The least and the most of a metric; zeros if no job has it."""
    values = [value for job in jobs if (value := job.figure(metric)) is not None]
    return (min(values), max(values)) if values else (0.0, 0.0)


# The picture


def _draw(jobs: list[StudyJob], path: Path) -> None:
    """Heatmaps over two swept keys, at the first value of any others, or curves over the only one."""
    from matplotlib.figure import Figure  # not pyplot, which would change a notebook's backend
    from matplotlib.ticker import PercentFormatter

    down, along, others = _axes(jobs)
    fixed = {key: _values(jobs, key)[0] for key in others}
    columns, rows = _values(jobs, along), _values(jobs, down)
    height = 2.8 + 0.8 * len(rows) if down else 5
    figure = Figure(figsize=(max(9, 1.5 + 2.2 * len(columns)), height), dpi=150)
    for axes, metric in zip(figure.subplots(2, 3).flat, MAIN_METRICS, strict=True):
        low, high = _range(jobs, metric)  # of all slices, as on the page
        grid = [[_job_at(jobs, fixed, (down, row), (along, column)) for column in columns] for row in rows]
        figures = [[job.figure(metric) if job else None for job in line] for line in grid]
        numbers = [[math.nan if value is None else value for value in line] for line in figures]
        if down is None:
            axes.plot(range(len(columns)), numbers[0], "o-", color="#1f6fb4")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
            if METRICS[metric][1].endswith("%}"):
                axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        else:
            axes.imshow(numbers, cmap="Blues", aspect="auto", vmin=low, vmax=high)
            axes.set_yticks(range(len(rows)), map(_tick, rows))
            axes.set_ylabel(short_key(down))
            for y, x in product(range(len(rows)), range(len(columns))):
                if job := grid[y][x]:
                    colour = "white" if numbers[y][x] > low + 0.6 * (high - low) else "black"
                    axes.text(x, y, job.written(metric), ha="center", va="center", fontsize=8, color=colour)
        axes.set_title(METRICS[metric][0], fontsize=10, loc="left")
        axes.set_xticks(range(len(columns)), map(_tick, columns))
        axes.set_xlabel(short_key(along or ""))
        axes.tick_params(labelsize=8)
    shown = ", ".join(f"{short_key(key)} {_tick(value)}" for key, value in fixed.items())
    slice_shown = f"\nonly {shown} is shown" if fixed else ""
    figure.suptitle(f"Sampling study\n{_tick(_subject(jobs), 90)}{slice_shown}", fontsize=10)
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _tick(value: str, most: int = 20) -> str:
    """A value, as a prompt, that fits beside an axis and is not taken for mathematics."""
    shown = value if len(value) <= most else "…" + value[1 - most :]
    return shown.replace("$", r"\$")


# The page


def _page(folder: Path, jobs: list[StudyJob]) -> str:
    finished = [job for job in jobs if job.state == "finished"]
    summary = finished[0].summary if finished else {}
    tokens = sum(job.summary["new_tokens"] for job in finished)
    about = (
        f"{datetime.now():%Y-%m-%d %H:%M} · {len(jobs)} setting{'s' * (len(jobs) > 1)} · "
        f"{sum(len(job.samples) for job in jobs)} samples · {tokens:,} tokens"
    )
    if summary:
        about += f" · {summary['precision']} · seed {summary['seed']}"
    samples = [
        {
            "title": f"Job {job.name}: {job.title}",
            "error": job.error,
            "copy": _longest_copy(job),
            "samples": [
                {"prompt": line["prompt"], "text": line["text"][len(line["prompt"]) :], "about": _about(line)}
                for line in job.samples
            ],
        }
        for job in jobs
    ]
    return filled_page(
        "study",
        folder=html.escape(str(folder)),
        subject=html.escape(_subject(jobs)),
        about=html.escape(about),
        failed="".join(
            f"<p class=failed>{html.escape(f'Job {job.name} ({job.title}) failed: {job.error}')}</p>"
            for job in jobs
            if job.error
        ),
        maps="".join(_heatmaps(jobs, metric) for metric in METRICS),
        table=_job_table(jobs),
        commands="".join(
            f"<li value={job.name}><code>python experiments/generate.py "
            f"{html.escape(shlex.join([*job.overrides_alone, 'study=true']))}</code></li>"
            for job in jobs
        ),
        data=json.dumps(samples, ensure_ascii=False).replace("<", "\\u003c"),
    )


def _about(line: dict[str, Any]) -> str:
    """The figures of a sample, in a line."""
    tokens = len(line["token_ids"])
    parts = [f"sample {line['sample']}"]
    if tokens:
        parts.append(f"perplexity {math.exp(-line['log_probability'] / tokens):.1f}")
    parts.append(f"{tokens} tokens, ended by {line['stop_reason']}")
    if line.get("copied") is not None:
        parts.append(f"{line['copied']:.0%} copied, at most {line['longest_copy']} tokens in a row")
    return " · ".join(parts)


def _longest_copy(job: StudyJob) -> str | None:
    """What a setting copied at most, and from where."""
    if not job.summary.get("longest_copy_text"):
        return None
    place = job.summary["longest_copy_token"]
    return (
        f"Longest copy, {job.written('longest_copy')} tokens, from training token {place:,} on: "
        f"{job.summary['longest_copy_text']}"
    )


def _heatmaps(jobs: list[StudyJob], metric: str) -> str:
    """A metric over the first two swept keys, once for each setting of the others."""
    down, along, others = _axes(jobs)
    title, _, meaning = METRICS[metric]
    maps = "".join(
        _heatmap(jobs, metric, down, along, dict(zip(others, values, strict=True)))
        for values in product(*(_values(jobs, key) for key in others))
    )
    return f"<figure><figcaption><b>{title}</b> {meaning}</figcaption>{maps}</figure>"


def _heatmap(
    jobs: list[StudyJob], metric: str, down: str | None, along: str | None, fixed: dict[str, str]
) -> str:
    columns = _values(jobs, along)
    corner = " \\ ".join(short_key(key) for key in (down, along) if key)
    caption = ", ".join(f"{short_key(key)} {value}" for key, value in fixed.items())
    head = "".join(f"<th scope=col>{html.escape(column)}</th>" for column in columns)
    body = []
    for row in _values(jobs, down):
        there = [_job_at(jobs, fixed, (down, row), (along, column)) for column in columns]
        cells = "".join(f"<td>{_cell(jobs, job, metric) if job else ''}</td>" for job in there)
        body.append(f"<tr><th scope=row>{html.escape(row)}</th>{cells}</tr>")
    return (
        f"<table>{f'<caption>{html.escape(caption)}</caption>' if caption else ''}"
        f"<thead><tr><th>{html.escape(corner)}</th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    )


def _cell(jobs: list[StudyJob], job: StudyJob, metric: str) -> str:
    value, (low, high) = job.figure(metric), _range(jobs, metric)
    heat = round(100 * (value - low) / (high - low)) if value is not None and high > low else 0
    missing = " class=missing" if value is None else ""
    name = html.escape(f"{METRICS[metric][0]}, {job.title}", quote=True)
    return (
        f'<button data-job={jobs.index(job)}{missing} style="--heat:{heat}%" title="{name}">'
        f"{job.written(metric)}</button>"
    )


def _job_table(jobs: list[StudyJob]) -> str:
    keys = list(jobs[0].setting)
    names = ["job", *map(short_key, keys), *(METRICS[metric][0] for metric in METRICS)]
    head = "".join(f"<th scope=col><button>{html.escape(name)}</button></th>" for name in names)
    rows = []
    for job in jobs:
        cells = [(job.name, job.name), *((value := job.setting.get(key, ""), value) for key in keys)]
        cells += [
            (
                "" if job.figure(metric) is None else str(job.figure(metric)),
                job.written(metric),
            )
            for metric in METRICS
        ]
        rows.append(
            "<tr>"
            + "".join(f'<td data-value="{html.escape(raw)}">{html.escape(text)}</td>' for raw, text in cells)
            + "</tr>"
        )
    return f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
