"""The report of a sweep, a study or a run, made from its jobs' files alone."""

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm.files import as_typed, write_json, write_text
from llm.sweeps.comparing import comparisons
from llm.sweeps.jobs import Job
from llm.sweeps.page import writable, write_page
from llm.sweeps.pictures import draw_sweep
from llm.sweeps.ranking import Ranking, by_setting, settings_of, swept_keys
from llm.sweeps.results import Result, read_results
from llm.sweeps.study import METRICS, table_row
from llm.sweeps.study_page import study_page
from llm.sweeps.study_picture import draw_study
from llm.sweeps.sweep_page import sweep_page
from llm.sweeps.tracked import Findings, report_findings


@dataclass(frozen=True)
class Report:
    """The page that was written, lines to print (each with its head), and findings for W&B."""

    page: Path
    lines: list[tuple[str, str]]
    findings: Findings


def sweep_report(jobs: list[Job], folders: list[Path], target: Path, times: float | None = None) -> Report:
    """Write `report.html`, `report.csv` and `report.png` about training runs; for a ladder, also
    `scaling.json` and `scaling.png`.

    Args:
        folders: the sweeps or runs that were asked for.
        target: the folder to write to.
        times: for a ladder, predict a run with this many times the compute of its largest job.

    Raises:
        UserError: a prediction was asked for, and there is no law to predict by.
    """
    # These import torch, which the start of a sweep need not wait for.
    from llm.sweeps.scaling_picture import draw_scaling
    from llm.sweeps.scaling_report import scaling_of, scaling_section

    compared = comparisons(jobs)
    text_of = {job.name: number for number, each in enumerate(compared) for job in each.jobs}
    results = read_results(jobs, [compared[text_of[job.name]].measure for job in jobs])
    rankings = [
        Ranking(each, by_setting([result for result in results if text_of[result.job.name] == number]))
        for number, each in enumerate(compared)
    ]
    scaling = scaling_of(rankings, folders[0], times)
    write_text(target / "report.csv", _as_csv(_sweep_rows(results, rankings)))
    draw_sweep(rankings, target / "report.png")
    page = sweep_page(results, rankings, folders) | {"scaling": scaling and scaling_section(scaling)}
    write_page(target / "report.html", "sweep", page)
    if scaling:
        write_json(target / "scaling.json", scaling.as_record())
        if not isinstance(scaling.ladder, str):
            draw_scaling(scaling.ladder, scaling.predictions, target / "scaling.png")
    lines = [*scaling.lines()] if scaling else []
    return Report(target / "report.html", lines, report_findings(rankings, scaling, folders, target))


def study_report(jobs: list[Job], folders: list[Path], target: Path) -> Report:
    """Write the report of a study of samples."""
    write_text(target / "report.csv", _as_csv(_study_rows(jobs)))
    draw_study(jobs, target / "report.png")
    write_page(target / "report.html", "study", study_page(jobs, folders))
    summary = {"settings": len(jobs), "failed": sum(bool(job.error) for job in jobs)}
    tables = {"settings": [table_row(job) for job in jobs]}
    findings = Findings("study", "study", summary, tables, {"report": target / "report.png"})
    return Report(target / "report.html", [], findings)


def _sweep_rows(results: list[Result], rankings: list[Ranking]) -> Iterable[list[Any]]:
    keys = swept_keys(settings_of(results))
    names = [*dict.fromkeys(name for result in results for name in result.figures if name not in keys)]
    text_of = {result: each.of.title for each in rankings for result in each.results}
    text_head = ["text"] if len(rankings) > 1 else []
    may = {
        result: answer
        for each in rankings
        for group, answer in zip(each.groups, each.possibly_best, strict=True)
        for result in group
    }
    may_head = ["possibly_best"] if any(answer is not None for answer in may.values()) else []
    yield ["job", *keys, "state", *text_head, *names, *may_head, "error", "folder"]
    for result in results:
        figures = [result.figures.get(name) for name in names]
        setting = [result.job.setting.get(key) for key in keys]
        folder = as_typed(result.job.folder)
        text = [text_of[result]] if text_head else []
        answer = [None if may[result] is None else str(may[result]).lower()] if may_head else []
        yield [result.job.name, *setting, result.state, *text, *figures, *answer, result.error, folder]


def _study_rows(jobs: list[Job]) -> Iterable[list[Any]]:
    heads = ["job", *swept_keys([job.setting for job in jobs]), *METRICS]
    yield heads
    for job in jobs:
        row = table_row(job)
        yield [row.get(name) for name in heads]


def _as_csv(rows: Iterable[list[Any]]) -> str:
    """Rows as CSV; missing values are empty."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return writable(text.getvalue())
