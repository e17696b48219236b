"""What the page of a sampling study shows, as plain values; templates/study.html draws it."""

import math
from dataclasses import asdict
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any

from llm.files import as_typed, read_json_lines
from llm.overrides import as_command
from llm.sweeps.jobs import Job, compact, short_key
from llm.sweeps.ranking import grid_of, values_of
from llm.sweeps.study import METRICS, axes_of, metric_cells, subject_of, written


def study_page(jobs: list[Job], folders: list[Path]) -> dict[str, Any]:
    shown = [_job(job) for job in jobs]
    return {
        "subject": subject_of(jobs),
        "folders": ", ".join(str(as_typed(folder)) for folder in folders),
        "about": _about(jobs, sum(len(job["samples"]) for job in shown)),
        "metrics": [
            {"title": title, "meaning": meaning, "cells": metric_cells(jobs, metric)}
            for metric, (title, _, meaning) in METRICS.items()
        ],
        "grids": _grids(jobs),
        "jobs": shown,
    }


def _about(jobs: list[Job], samples: int) -> str:
    finished = [job.summary for job in jobs if job.state == "finished"]
    parts = [
        f"{datetime.now():%Y-%m-%d %H:%M}",
        f"{len(jobs)} setting{'s' * (len(jobs) > 1)}",
        f"{samples} samples",
        f"{sum(summary['new_tokens'] for summary in finished):,} tokens",
    ]
    if finished:
        parts += [finished[0]["precision"], f"seed {finished[0]['seed']}"]
    return " · ".join(parts)


def _grids(jobs: list[Job]) -> list[dict[str, Any]]:
    """The heatmap over the first two swept keys, once for each setting of the others."""
    settings = [job.setting for job in jobs]
    down, along, others = axes_of(jobs)
    slices = product(*(values_of(settings, key) for key in others))
    fixed = [dict(zip(others, values, strict=True)) for values in slices]
    return [
        {
            "caption": ", ".join(f"{short_key(key)} {value}" for key, value in each.items()),
            **asdict(grid_of(settings, down, along, each)),
        }
        for each in fixed
    ]


def _job(job: Job) -> dict[str, Any]:
    copy = None
    if job.summary.get("longest_copy_text"):
        copy = (
            f"Longest copy, {written(job, 'longest_copy')} tokens, from training token "
            f"{job.summary['longest_copy_token']:,} on: {job.summary['longest_copy_text']}"
        )
    lines = read_json_lines(job.folder / "samples.jsonl")
    return {
        "name": job.name,
        "title": job.title,
        "setting": {key: compact(value) for key, value in job.setting.items()},
        "error": job.error,
        "copy": copy,
        "samples": [
            {"prompt": line["prompt"], "text": line["text"][len(line["prompt"]) :], "note": _note(line)}
            for line in lines
        ],
        "again": as_command("generate", *job.overrides_alone, "study=true"),
    }


def _note(line: dict[str, Any]) -> str:
    """The figures of a sample, in a line."""
    tokens = len(line["token_ids"])
    parts = [f"sample {line['sample']}"]
    if tokens:
        parts.append(f"perplexity {math.exp(-line['log_probability'] / tokens):.1f}")
    parts.append(f"{tokens} tokens, ended by {line['stop_reason']}")
    if line.get("copied") is not None:
        parts.append(f"{line['copied']:.0%} copied, at most {line['longest_copy']} tokens in a row")
    return " · ".join(parts)
