"""Which text files a path means: a file, those in a folder, or the matches of a glob."""

import glob
import logging
import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from llm.errors import UserError
from llm.files import expanded

log = logging.getLogger(__name__)

TEXT_SUFFIXES = {".txt", ".md"}  # of the files taken from a folder, in any case


def find_files(path: str, key: str, suffixes: Collection[str] = TEXT_SUFFIXES) -> list[Path]:
    """The files that a path means, sorted: the file itself, the texts in a folder, or the matches of a glob.
    What is skipped is logged.

    In a folder these are all files `*.txt` and `*.md`, also in upper case and in subfolders, but nothing
    hidden, and no folders that are links. A glob works as in a shell.

    Raises:
        UserError: there are none; the message names `key`, the config key that gave the path.
    """
    try:
        place = expanded(path)
        if place.is_dir():
            files, skipped = _in_folder(place, suffixes)
            lacking = f"no {_listed(suffixes)} file in that folder"
        elif place.is_file():
            files, skipped = [place], Counter()
        elif place.exists():
            raise UserError(f"{key}={path} is a pipe, a socket or a device: give a file")
        else:
            files, skipped = _of_glob(str(place))
            lacking = "no file matches" if glob.has_magic(str(place)) else "no such file or folder"
    except (OSError, ValueError, RuntimeError) as error:  # no permission, a zero byte, no home folder
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{key}={path} cannot be read: {reason}") from error
    if skipped:
        counts = ", ".join(f"{what} ({count})" for what, count in sorted(skipped.items()))
        log.info("%s=%s: skipped %s", key, path, counts)
    if not files:
        raise UserError(f"{key}={path}: {lacking}")
    return sorted(files)


def _listed(suffixes: Collection[str]) -> str:
    """The suffixes in words: `*.txt or *.md`."""
    *some, last = (f"*{suffix}" for suffix in sorted(suffixes, reverse=True))
    return f"{', '.join(some)} or {last}"


def _in_folder(folder: Path, suffixes: Collection[str]) -> tuple[list[Path], Counter[str]]:
    """The texts in a folder, and how many other things there are, by kind."""
    files, skipped = [], Counter[str]()

    def refuse(error: OSError) -> None:
        raise error  # `os.walk` would ignore it

    for parent, subfolders, names in os.walk(folder, onerror=refuse):
        for name in [*subfolders]:
            if name.startswith("."):
                skipped["hidden"] += 1
                subfolders.remove(name)
            elif Path(parent, name).is_symlink():  # which `os.walk` does not follow: it may lead back
                skipped["links to folders"] += 1
        for file in (Path(parent, name) for name in names):
            if file.name.startswith("."):
                skipped["hidden"] += 1
            elif not file.name.lower().endswith(tuple(suffixes)):
                skipped["other kinds of file"] += 1
            elif not file.is_file():
                skipped["pipes, sockets, devices or dead links"] += 1
            else:
                files.append(file)
    return files, skipped


def _of_glob(pattern: str) -> tuple[list[Path], Counter[str]]:
    """The files that match a glob, and how many other things match, by kind; folders do not count."""
    parts = Path(pattern).parts
    if "**" in parts:  # which follows links, and would never end in a loop
        for root in glob.glob(str(Path(*parts[: parts.index("**")]))):  # noqa: PTH207
            _refuse_loops(root, frozenset())
    matches = {Path(name) for name in glob.glob(pattern, recursive=True)}  # noqa: PTH207
    files = [match for match in matches if match.is_file()]
    others = sum(not match.is_dir() for match in matches) - len(files)
    return files, Counter({"pipes, sockets, devices or dead links": others}) if others else Counter()


def _refuse_loops(folder: str, above: frozenset[str]) -> None:
    """Look for links that lead back.

    Raises:
        UserError: a link in a folder leads to the folder or to one above it.
    """
    place = os.path.realpath(folder)
    if place in above:
        raise UserError(f"{folder} is a link back to {place}: remove it, or give a glob without **")
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir() and not entry.name.startswith("."):
                _refuse_loops(entry.path, above | {place})
