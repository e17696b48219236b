"""Reports and verdicts in W&B: their figures, tables and pictures, and the project that they are logged
to."""

import logging
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from llm.config import TrackingConfig
from llm.config_rules import validate
from llm.errors import UserError
from llm.files import as_typed, remove
from llm.overrides import title_of
from llm.records import figure_in, read_config_text, read_config_texts
from llm.sweeps.jobs import RECORD, Job
from llm.sweeps.race import read_race
from llm.sweeps.ranking import Ranking, figures_of, is_numeric, settings_of, swept_keys, values_of
from llm.sweeps.scaling_report import Scaling
from llm.sweeps.verdict import Difference, Figures
from llm.tracking import Tracker

log = logging.getLogger(__name__)

Rows = list[dict[str, Any]]

ASCII = str.maketrans({"α": "alpha", "β": "beta", "γ": "gamma"})  # W&B filters and sorts by such names alone


@dataclass(frozen=True)
class Findings:
    """The content of a W&B run about other runs. Figures, tables and pictures all have different names."""

    job_type: str  # report, study or verdict
    name: str
    summary: dict[str, Any]
    tables: dict[str, Rows] = field(default_factory=dict)
    pictures: dict[str, Path] = field(default_factory=dict)


def log_findings(findings: Findings, folder: Path, jobs: list[Job], tracking: TrackingConfig) -> Path | None:
    """Log findings about `jobs` to W&B, as a run whose files are in `folder`. Findings that were logged from
    there before are overwritten, under the same id.

    If W&B fails, that is a warning, as the findings are in `folder` anyway.

    Returns:
        The folder for `wandb sync`; None if there is nothing to sync.
    """
    if tracking.mode == "disabled":
        return None
    if tracking.name is None and not os.environ.get("WANDB_NAME"):
        tracking = replace(tracking, name=findings.name)
    begin = f"{findings.job_type}-"
    found = [(each, re.search(f"{begin}([0-9a-f]{{8}})$", each.name)) for each in folder.glob("wandb/*run-*")]
    earlier = {each: known[1] for each, known in found if known}
    identity = next(iter(earlier.values()), None) or secrets.token_hex(4)
    about = {"runs": [str(as_typed(job.folder)) for job in jobs]}
    try:
        tracker = Tracker(folder, tracking, about, findings.job_type, begin + identity)
    except UserError as error:
        log.warning("%s", error)
        return None
    written = tracker.wandb_folder
    for title, rows in findings.tables.items():
        tracker.log_table(title, rows)
    for title, picture in findings.pictures.items():
        tracker.log_picture(title, picture)
    tracker.finish({key: value for key, value in findings.summary.items() if value is not None})
    for each in earlier:  # the new one has all of it
        if written and each.name != written.name:
            remove(each)
    return tracker.wandb_folder


# Where


def tracking_of(jobs: list[Job]) -> TrackingConfig:
    """How runs were tracked: the mode, from their W&B folders; project, user and tags, as recorded by the
    first; and their group, if it is the same for all."""
    names = [folder.name for job in jobs for folder in job.folder.glob("wandb/*run-*")]
    if not names:
        return TrackingConfig("disabled")
    mode = "online" if any(name.startswith("run-") for name in names) else "offline"
    firsts: dict[Path, Job] = {}
    for job in jobs:
        firsts.setdefault(job.folder.parent if _is_of_sweep(job) else job.folder, job)
    recorded = [_recorded(job) for job in firsts.values()]
    group = recorded[0].group if len({each.group for each in recorded}) == 1 else None
    return replace(recorded[0], mode=mode, name=None, group=group)


def tracking_for(given: TrackingConfig, jobs: list[Job]) -> TrackingConfig:
    """Where to log the findings of a report or a comparison: beside the runs, unless keys say otherwise.

    Without a given mode, `WANDB_MODE` counts, else offline: that somebody else's runs were tracked online is
    no reason to send anything. Findings about runs that were not tracked, or about a single run, which W&B
    has already, are logged only if a mode is given.
    """
    theirs = tracking_of(jobs)
    unasked = given.mode is None and (theirs.mode == "disabled" or len(jobs) == 1)
    return TrackingConfig(
        "disabled" if unasked else given.mode,
        given.project or theirs.project,
        given.entity or theirs.entity,
        given.group or theirs.group,
        given.name,
        given.tags or theirs.tags,
    )


def _is_of_sweep(job: Job) -> bool:
    return (job.folder.parent / RECORD).exists()


def _recorded(job: Job) -> TrackingConfig:
    from llm.checkpoints.checkpoint import recorded_config  # imports torch, which studies need not

    if config := recorded_config(job.folder):
        found = config.tracking
    else:
        names = ("project", "entity", "group")
        texts: dict[str, Any] = {name: read_config_text(job.folder, f"tracking.{name}") for name in names}
        found = TrackingConfig(**texts, tags=read_config_texts(job.folder, "tracking.tags"))
    if found.group is None and _is_of_sweep(job) and not os.environ.get("WANDB_RUN_GROUP"):
        found = replace(found, group=str(as_typed(job.folder.parent)))
    validate(found, "tracking.")
    return found


# What


def report_findings(
    rankings: list[Ranking], scaling: Scaling | None, folders: list[Path], target: Path
) -> Findings:
    """The findings of a report in `target` about the runs in `folders`."""
    results = [result for ranking in rankings for result in ranking.results]
    summary: dict[str, Any] = {
        "jobs": len(results),
        "finished": sum(result.state == "finished" for result in results),
        "failed": sum(result.state == "failed" for result in results),
        "settings": sum(len(ranking.groups) for ranking in rankings),
    }
    for ranking in rankings:
        prefix = f"{ranking.of.title.partition(' (')[0]}/" if len(rankings) > 1 else ""
        summary |= {f"{prefix}{key}": value for key, value in _best(ranking)}
    if len(folders) == 1:
        summary |= {f"race/{key}": value for key, value in read_race(folders[0]).items()}
    tables = {"ranking": _ranked(rankings)}
    if scaling:
        summary |= {f"scaling/{key}": value for key, value in _law(scaling)}
        tables |= _ladder_tables(scaling)
    pictures = {name: target / f"{name}.png" for name in ("report", *["scaling"] * bool(scaling))}
    return Findings("report", "report", summary, tables, pictures)


def _best(ranking: Ranking) -> Iterator[tuple[str, Any]]:
    """The best setting, those that may be the best, and the noise of seeds: its standard deviation and the
    band."""
    titles, means = [_title(ranking, place) for place in range(len(ranking.groups))], []
    for group in ranking.groups:
        if figures := figures_of(group):
            means.append(mean(figures.values()))
    yield "measure", ranking.of.measure.name
    if not means:
        return
    yield "best/setting", titles[0]
    yield "best/mean", means[0]
    yield "best/seeds", len(figures_of(ranking.groups[0]))
    if True in ranking.possibly_best:
        may = [title for title, may in zip(titles, ranking.possibly_best, strict=True) if may]
        yield "best/possibly", may
        yield "best/decided", len(may) == 1 and None not in ranking.possibly_best
    if ranking.noise is not None:
        yield "noise/sd", ranking.noise
        yield "noise/low", means[0] - ranking.noise
        yield "noise/high", means[0] + ranking.noise


def _title(ranking: Ranking, place: int) -> str:
    return title_of(ranking.groups[place][0].setting) or "the one setting"


def _ranked(rankings: list[Ranking]) -> Rows:
    """A row for each setting, best first."""
    settings = settings_of([result for ranking in rankings for result in ranking.results])
    keys = [key for key in swept_keys(settings) if key != "seed"]
    as_value: dict[str, Any] = {
        key: figure_in if is_numeric(values_of(settings, key)) else str for key in keys
    }
    rows = []
    for ranking in rankings:
        for place, (group, may) in enumerate(zip(ranking.groups, ranking.possibly_best, strict=True)):
            setting, values = group[0].setting, [*figures_of(group).values()]
            rows.append(
                {
                    "text": ranking.of.title or None,
                    "place": place + 1 if values else None,
                    "setting": _title(ranking, place),
                    "mean": mean(values) if values else None,
                    "sd": stdev(values) if len(values) > 1 else None,
                    "seeds": len(values),
                    "possibly_best": may,
                    "measure": ranking.of.measure.name,
                    **{key: as_value[key](setting[key]) if key in setting else None for key in keys},
                }
            )
    return rows


def _law(scaling: Scaling) -> Iterator[tuple[str, Any]]:
    """The constants of a ladder's law with their intervals, and the larger run that it was tested on."""
    if isinstance(scaling.ladder, str):
        yield "why_not", scaling.ladder
        return
    fit = scaling.ladder.fit
    yield "law", fit.form.formula
    yield "source", fit.form.source
    yield "measure", scaling.ladder.measure.name
    for name in ("residual", "held_out", "noise"):
        yield name, getattr(fit, name)
    for name, interval in fit.constants.items():
        yield from _with_interval(name.translate(ASCII), interval)
    tried = [each for each in scaling.predictions if each.outcome is not None] or scaling.predictions
    for each in tried[-1:]:
        yield "times", each.times
        yield from _with_interval("predicted", each.loss)
        yield "measured", each.outcome
        yield "off", each.off
        yield "off_in_intervals", each.off_in_intervals


def _with_interval(name: str, interval: tuple[float, float, float]) -> Iterator[tuple[str, float]]:
    for end, value in zip(("", "_low", "_high"), interval, strict=True):
        yield f"{name}{end}", value


def _ladder_tables(scaling: Scaling) -> dict[str, Rows]:
    """The rungs with their predictions by the law, the best sizes by it, and larger runs."""
    if isinstance(scaling.ladder, str):
        return {}
    rungs = []
    for rung in sorted(scaling.ladder.fit.rungs, key=lambda each: each.compute):
        row = asdict(rung)
        losses = row.pop("losses")
        said = float(scaling.ladder.fit.losses(**row)[0])
        sd = stdev(losses) if len(losses) > 1 else None
        rungs.append(
            {**row, "mean": rung.loss, "sd": sd, "seeds": len(losses), "law": said, "off": rung.loss - said}
        )
    record = scaling.as_record()
    optima = [
        {
            **{name: each[name] for name in ("times", "compute")},
            **dict(_with_interval("parameters", each["parameters"])),
            **dict(_with_interval("tokens", each["tokens"])),
        }
        for each in record["optimum"]
    ]
    predictions = [
        {
            **{name: each[name] for name in ("times", "parameters", "tokens", "compute", "epochs")},
            **dict(_with_interval("predicted", each["loss"])),
            "measured": each["outcome"],
            **{name: each[name] for name in ("off", "off_in_intervals")},
        }
        for each in record["predictions"]
    ]
    return {"ladder": rungs, "optima": optima, "predictions": predictions}


def verdict_findings(
    said: str,
    titles: tuple[str, str],
    figures: tuple[Figures, Figures],
    found: Difference,
    measure: str,
    picture: Path,
) -> Findings:
    """The findings of a verdict on two settings: a sentence, and the figures behind it."""
    numbers = asdict(found)
    summary = {
        "sentence": said,
        **dict(zip("ab", titles, strict=True)),
        "measure": measure,
        "decided": found.decided,
        "difference": numbers.pop("mean"),
        **numbers,
        "seeds_needed": None if found.decided else found.seeds_needed,
    }
    a, b = figures
    rows: Rows = [
        {
            "seed": seed,
            "a": a.get(seed),
            "b": b.get(seed),
            "difference": b[seed] - a[seed] if seed in a and seed in b else None,
        }
        for seed in sorted(a.keys() | b.keys())
    ]
    summary = {f"verdict/{key}": value for key, value in summary.items()}
    return Findings("verdict", " or ".join(titles), summary, {"seeds": rows}, {"verdict": picture})
