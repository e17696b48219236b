"""Files that are whole or not there: written beside their place, flushed to disk, then renamed."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm.config import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, for a file or a folder; on success it takes `path`'s place.

    Raises:
        UserError: the disk is full, or the place cannot be written; nothing half written stays.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        is_folder = temporary.is_dir() and not temporary.is_symlink()
        if not temporary.is_symlink():
            for file in [*temporary.rglob("*"), temporary] if is_folder else [temporary]:
                _flush(file)
        if is_folder and path.exists():  # a folder cannot be renamed over a full one
            shutil.rmtree(path)
        temporary.replace(path)
        _flush(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary.is_dir() and not temporary.is_symlink():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def append_json_line(path: Path, value: dict[str, Any]) -> None:
    """Add one JSON object as a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=False) + "\n")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a JSON-lines file; a last line cut off by a crash is passed over."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def as_typed(path: Path) -> Path:
    """A path as a user would type it here: relative, if it lies below the working folder."""
    path = path.absolute()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def cache_folder(configured: str | None) -> Path:
    """Where token files and downloads lie: as configured, or the user's cache folder (XDG)."""
    if configured:
        return Path(configured).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "gpt-experiment-runner"
