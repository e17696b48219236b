"""The content of a sampling study's page, as plain values; templates/study.html shows it."""

import math
from dataclasses import asdict
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any

from llm.files import as_typed
from llm.overrides import compact, short_key
from llm.progress import format_figure
from llm.records import LARGEST, Record, read_samples
from llm.sweeps.commands import generate_again
from llm.sweeps.jobs import Job
from llm.sweeps.ranking import grid_of, swept_keys, values_of
from llm.sweeps.study import METRICS, axes_of, metric_cells, notes_on, subject_of, written


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
        "names": {key: short_key(key) for key in swept_keys([job.setting for job in jobs])},
        "notes": notes_on(jobs),
        "jobs": shown,
    }


def _about(jobs: list[Job], samples: int) -> str:
    finished = [job.summary for job in jobs if job.state == "finished"]
    parts = [
        f"{datetime.now():%Y-%m-%d %H:%M}",
        f"{len(jobs)} setting{'s' * (len(jobs) > 1)}",
        f"{samples} samples",
        f"{sum(summary.get('new_tokens') or 0 for summary in finished):,} tokens",
    ]
    if finished:
        seed = finished[0].get("seed")
        parts += [finished[0].get("precision") or "", "" if seed is None else f"seed {seed}"]
    return " · ".join(filter(None, parts))


def _grids(jobs: list[Job]) -> list[dict[str, Any]]:
    """Heatmaps over two swept keys, one for each setting of the others."""
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
            f"{format_figure(job.summary.get('longest_copy_token'), '{:,}')} on: "
            f"{job.summary['longest_copy_text']}"
        )
    return {
        "name": job.name,
        "title": job.title,
        "setting": {key: compact(value) for key, value in job.setting.items()},
        "error": job.error,
        "copy": copy,
        "samples": [
            {
                "prompt": line["prompt"],
                "text": line["text"].removeprefix(line["prompt"]),
                "note": _note(line),
            }
            for line in read_samples(job.folder / "samples.jsonl")
        ],
        **asdict(generate_again(job)),
    }


def _note(line: Record) -> str:
    """The figures of a sample, in a line."""
    tokens, log_probability = len(line.get("token_ids") or []), line.get("log_probability")
    parts = [f"sample {format_figure(line.get('sample'), '{}')}"]
    if tokens and log_probability is not None and -log_probability / tokens < math.log(LARGEST):
        parts.append(f"perplexity {math.exp(-log_probability / tokens):.1f}")
    parts.append(f"{tokens} tokens, ended by {line.get('stop_reason') or '–'}")
    if line.get("copied") is not None:
        longest = format_figure(line.get("longest_copy"), "{:.0f}")
        parts.append(f"{line['copied']:.0%} copied, at most {longest} tokens in a row")
    return " · ".join(parts)
