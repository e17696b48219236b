"""The outcome of a script, which a person reads as text and a program as one JSON object."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Outcome:
    """What came of a script's work."""

    figures: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)  # files and folders, by what they are
    next: dict[str, str] = field(default_factory=dict)  # commands that may be wanted next, by their purpose
    result: float | None = None  # the figure by which a sweep compares its jobs
    failed: bool = False  # for a sweep: whether a job that ran has no result
