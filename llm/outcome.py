"""What a script did, for whoever began it: a person reads it as text, a program as one JSON object."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Outcome:
    """What came of a script's work."""

    figures: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)  # and folders, by what they are
    next: dict[str, str] = field(default_factory=dict)  # commands that one may want to type now, by their use
    result: float | None = None  # what a sweep compares its jobs by
    failed: bool = False  # of a sweep: whether a job that ran has no result
