"""Which jobs' final losses are comparable, and by what measure.

A loss in nats per token depends on the tokenizer, so jobs with different tokenizers are compared by bits per
byte. Losses on different texts are not compared at all.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from string import ascii_uppercase

from llm.sweeps.jobs import Job, title_of

# The keys and groups that decide which text is evaluated on.
TEXT_KEYS = ("data", "data.source", "data.path", "data.train_ratio", "training.final_eval")


@dataclass(frozen=True)
class Measure:
    """A figure by which jobs are ranked; lower is better."""

    name: str  # in a summary
    line: str  # in the lines of metrics
    title: str  # in sentences
    column: str  # in tables
    unit: str


LOSS = Measure("val_loss", "val/loss", "validation loss", "val loss", "nats per token")
BITS_PER_BYTE = Measure(
    "val_bits_per_byte", "val/bits_per_byte", "validation bits per byte", "bits/byte", "bits per byte"
)


@dataclass(frozen=True)
class Comparison:
    """Comparable jobs: their final figures are on the same text."""

    title: str  # what sets their text apart; empty if all jobs have the same
    measure: Measure
    jobs: list[Job]

    @property
    def best(self) -> Job | None:
        """The finished job with the lowest figure."""
        measured = [job for job in self.jobs if job.final(self.measure.name) is not None]
        return min(measured, key=lambda job: job.summary[self.measure.name], default=None)


def comparisons(jobs: Iterable[Job]) -> list[Comparison]:
    """Jobs grouped by the text that they were evaluated on, in the order of each group's first job. A part of
    the validation split (see `training.final_eval`) is a text of its own, and a different one under each
    tokenizer. Jobs without a final figure are grouped by what is known about them."""
    jobs = list(jobs)
    measured = [job for job in jobs if job.final(LOSS.name) is not None]
    known: dict[Hashable, Hashable] = {}  # the text by what is known of it
    for job in (*measured, *jobs):
        if job.evaluated_on or job.final(LOSS.name) is not None:
            for what in _known_of(job):
                known.setdefault(what, _text(job))
    by_text: dict[Hashable, list[Job]] = {}
    for job in jobs:
        text = _text(job)
        if job.final(LOSS.name) is None:
            text = next((known[what] for what in _known_of(job) if what in known), None)
            text = text or next(iter(known.values()), None)
        by_text.setdefault(text, []).append(job)
    return [
        Comparison(_title(number, same) if len(by_text) > 1 else "", _measure(same), same)
        for number, same in enumerate(by_text.values())
    ]


def _text(job: Job) -> Hashable:
    if job.evaluated_on is None:
        return None
    tokenizer, text = job.evaluated_on
    return (text, tokenizer, job.part) if job.part else text


def _known_of(job: Job) -> list[Hashable]:
    """What is known about the text that a job is evaluated on, the surest first."""
    settings = ("settings", _text_settings(job))
    return [job.evaluated_on, job.evaluated_on[1], settings] if job.evaluated_on else [settings]


def _measure(jobs: list[Job]) -> Measure:
    tokenizers = {job.evaluated_on[0] for job in jobs if job.evaluated_on}
    return BITS_PER_BYTE if len(tokenizers) > 1 else LOSS


def _text_settings(job: Job) -> str:
    return title_of({key: value for key, value in job.setting.items() if key in TEXT_KEYS})


def _title(number: int, jobs: list[Job]) -> str:
    """As `text A (train_ratio=0.8, 184 of 1,475 windows)`."""
    letter = ascii_uppercase[number % 26] * (number // 26 + 1)
    settings = {_text_settings(job) for job in jobs}
    parts = {job.part for job in jobs if job.final(LOSS.name) is not None}
    about = [each.pop() for each in (settings, parts) if len(each) == 1]
    told = ", ".join(filter(None, about))
    return f"text {letter}" + (f" ({told})" if told else "")
