"""A sampling study: the measures of its settings, and how they are shown."""

from typing import Any

from llm.overrides import short_key
from llm.records import figure as as_figure
from llm.sweeps.jobs import Job
from llm.sweeps.ranking import HeatCell, shades_by_size, swept_keys, values_of

# The measures that llm/generation/study.py takes of a setting's samples, by name: title, format, and meaning.
METRICS = {
    "perplexity": ("Perplexity", "{:.1f}", "of the samples under the model itself, at temperature 1"),
    "log_probability": ("Log-probability", "{:.2f}", "mean under the model, nats per token"),
    "entropy": ("Entropy", "{:.2f}", "mean of the distributions drawn from, nats per token"),
    "distinct_1": ("Distinct-1", "{:.3f}", "share of different tokens among all"),
    "distinct_2": ("Distinct-2", "{:.3f}", "share of different pairs of tokens"),
    "distinct_3": ("Distinct-3", "{:.3f}", "share of different triples of tokens"),
    "repetition": ("Repetition", "{:.1%}", "share of 4-grams that occur earlier in their own sample"),
    "length": ("Length", "{:.1f}", "mean new tokens of a sample"),
    "copied": ("Copied", "{:.1%}", "share of new tokens in runs of 8 or more from the training text"),
    "longest_copy": ("Longest copy", "{:.0f}", "tokens of the longest run from the training text"),
}
# Those of the printed table and the picture, which has room for six.
MAIN_METRICS = ("perplexity", "entropy", "distinct_2", "repetition", "copied", "longest_copy")


def is_study(jobs: list[Job]) -> bool:
    """Whether jobs have measured samples, rather than trained."""
    return any("sampling" in job.summary and "val_loss" not in job.summary for job in jobs)


def figure(job: Job, metric: str) -> float | None:
    """A measure of a job; None if it could not be taken, or the job did not get that far."""
    return as_figure(job.summary.get(metric))


def written(job: Job, metric: str) -> str:
    value = figure(job, metric)
    return "–" if value is None else METRICS[metric][1].format(value)


def table_row(job: Job) -> dict[str, Any]:
    """A job's setting and all its measures."""
    return {"job": job.name, **job.setting, **{metric: figure(job, metric) for metric in METRICS}}


def metric_cells(jobs: list[Job], metric: str) -> list[HeatCell]:
    """A cell for each job in the heatmap of a metric: the higher among jobs with the same tokenizer, the
    darker."""
    shades: dict[str, float | None] = {}
    for tokenizer in {_tokenizer(job) for job in jobs}:
        alike = [job for job in jobs if _tokenizer(job) == tokenizer]
        values = shades_by_size([figure(job, metric) for job in alike])
        shades |= {job.name: shade for job, shade in zip(alike, values, strict=True)}
    return [(shades[job.name], written(job, metric)) for job in jobs]


def notes_on(jobs: list[Job]) -> list[str]:
    """Notes on measures that are not comparable between the settings."""
    notes = []
    if len({job.summary.get("checkpoint") for job in jobs} - {None}) > 1:
        notes.append(
            "Perplexity, log-probability and entropy are under the model that drew the samples: they do not "
            "say which checkpoint predicts a text better, as experiments/evaluate.py does."
        )
    if len({_tokenizer(job) for job in jobs} - {None}) > 1:
        notes.append(
            "The checkpoints have different tokenizers, and all figures count tokens: compare only settings "
            "of one tokenizer. Cells are shaded among those."
        )
    return notes


def _tokenizer(job: Job) -> str | None:
    return job.summary.get("tokenizer")


def axes_of(jobs: list[Job]) -> tuple[str | None, str | None, list[str]]:
    """The swept keys: the one down the side of heatmaps, the one along the top, and the others."""
    settings = [job.setting for job in jobs]
    keys = swept_keys(settings)
    if len(keys) < 2:
        return None, keys[0] if keys else None, []
    longest = sorted(keys, key=lambda key: -len(values_of(settings, key)))[:2]
    down, along = sorted(longest, key=lambda key: (short_key(key) != "temperature", keys.index(key)))
    return down, along, [key for key in keys if key not in longest]


def subject_of(jobs: list[Job]) -> str:
    """The checkpoint and its step, or how many checkpoints there are; empty if no job has loaded one."""
    loaded = {job.summary["checkpoint"]: job.summary for job in jobs if job.summary.get("checkpoint")}
    if len(loaded) > 1:
        return f"{len(loaded)} checkpoints"
    return "".join(f"{checkpoint}, step {each.get('step', '?')}" for checkpoint, each in loaded.items())
