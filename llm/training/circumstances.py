"""What affects a run's numbers besides its config: the machine, the package versions, the commit."""

import os
import platform
import subprocess
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("torch", "numpy", "tiktoken", "safetensors", "wandb")


def package_versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def machine() -> str:
    """The operating system, the processor architecture and the number of cores."""
    return f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} cores"


def git_commit() -> str | None:
    """The commit of this code, or None outside a git checkout."""
    return _git("rev-parse", "HEAD")


def git_is_clean() -> bool | None:
    """Whether all tracked files are as committed, or None outside a git checkout."""
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return None if changed is None else not changed


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@dataclass(frozen=True)
class Circumstances:
    """Where, and with which code and packages, a run was trained."""

    machine: str = field(default_factory=machine)
    versions: dict[str, str] = field(default_factory=package_versions)
    git_commit: str | None = field(default_factory=git_commit)
    git_clean: bool | None = field(default_factory=git_is_clean)
