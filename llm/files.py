"""Atomic file writes: a file is written under a temporary name, flushed to disk and renamed, so that it
appears whole or not at all. Also JSON lines, file locks and the cache folder."""

import errno
import fcntl
import functools
import hashlib
import json
import logging
import math
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from llm.errors import UserError
from llm.progress import format_count

log = logging.getLogger(__name__)

# Errors by which a file system says that it does not support an operation.
UNSUPPORTED = (errno.EPERM, errno.EACCES, errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

LOCK_SECONDS = 1.0  # how long to try for a lock, as `is_held` also takes it for a moment


@contextmanager
def replacing(path: Path, size: int = 0) -> Iterator[Path]:
    """Yield a temporary name beside `path`, for a file or a folder; on success it takes `path`'s place.

    Args:
        size: bytes that will be written, if many: with less free space, nothing is written at all.

    Raises:
        UserError: the disk is full or read-only, or `path` cannot be written; nothing is left half written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if size > _room(path.parent):
            raise OSError("no space left on the disk")
        yield temporary
        is_folder = temporary.is_dir() and not temporary.is_symlink()
        if not temporary.is_symlink():
            for file in [*temporary.rglob("*"), temporary] if is_folder else [temporary]:
                flush(file)
        if is_folder and path.exists():  # a folder cannot be renamed over one that is not empty
            shutil.rmtree(path)
        temporary.replace(path)
        flush(path.parent)  # the rename itself is on disk only once the folder is
    except OSError as error:
        reason = f"{error.strerror or error}{_room_wanted(path, size)}"
        raise UserError(f"cannot write {path}: {reason}") from error
    finally:
        with suppress(OSError):  # a read-only disk refuses even if there is nothing to remove
            remove(temporary)


def _room(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _room_wanted(path: Path, size: int) -> str:
    if size:
        with suppress(OSError):
            return f" (it takes {format_count(size)}B, and {format_count(_room(path.parent))}B are free)"
    return ""


def flush(path: Path) -> None:
    """Make sure that a file's content, or a folder's entries, are on disk; some file systems cannot do so for
    folders."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED or not path.is_dir():
            raise


def remove(path: Path) -> None:
    """Delete a file, a link, or a folder and its contents, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()


def modified(path: Path) -> float:
    """When a file was last written, in seconds since 1970; 0 if it does not exist or cannot be read."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that `replacing` left in a folder when its process was killed."""
    for leftover in folder.glob(".*.tmp"):
        remove(leftover)


def sha256(path: Path) -> str:
    """A file's SHA-256 in hexadecimal."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def refuse_stand_in(file: Path) -> None:
    """Check that a file is not something else that was downloaded in its place.

    Raises:
        UserError: it is a git-LFS pointer, a web page, a pipe or a device.
        OSError: it cannot be read.
    """
    if file.exists() and not file.is_file() and not file.is_dir():
        raise UserError(f"{file} is a pipe or a device, not a file")
    with file.open("rb") as content:
        begin = content.read(100)
    if begin.startswith(b"version https://git-lfs.github.com/spec/"):
        raise UserError(
            f"{file} is a git-LFS pointer, not the file itself: run `git lfs pull` in its repository"
        )
    if begin.lstrip().startswith(b"<"):
        raise UserError(f"{file} is a web page, not the file itself: download it again")


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, as_json(value))


def as_json(value: Any) -> str:
    """A value as indented JSON. NaN and infinity, which JSON does not have, become null."""
    return json.dumps(_without_infinities(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _without_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinities(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_json_lines(values: list[dict[str, Any]]) -> bytes:
    lines = (json.dumps(_without_infinities(value), ensure_ascii=False, allow_nan=False) for value in values)
    return "".join(f"{line}\n" for line in lines).encode()


def append_json_lines(path: Path, values: list[dict[str, Any]]) -> None:
    """Append JSON objects as lines, see `append`."""
    append(path, as_json_lines(values))


def append(path: Path, content: bytes) -> None:
    """Append to a file, all of the content or none.

    Raises:
        UserError: it cannot be written; the file is unchanged.
    """
    with writing(path), path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            file.truncate(end)
            raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of writing a file into one line.

    Raises:
        UserError: the disk is full, read-only or gone, or `path` cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file. Damaged lines are skipped, such as a last one that a crash cut
    off."""
    lines = map(parse_json, read_content(path).split(b"\n")[:-1])
    return [line for line in lines if isinstance(line, dict)]


def parse_json(content: bytes) -> Any:
    """A value from untrusted JSON; None if it cannot be parsed. NaN and infinity, which JSON does not have,
    become None too."""
    try:
        return json.loads(content.decode(), parse_constant=lambda name: None)
    except (ValueError, RecursionError):
        return None


def read_content(path: Path, most: float = math.inf) -> bytes:
    """The bytes of a file; empty if it does not exist, is no regular file, cannot be read, or is larger than
    `most`."""
    try:
        return path.read_bytes() if path.is_file() and path.stat().st_size <= most else b""
    except OSError:
        return b""


@contextmanager
def held(lock: Path, seconds: float = LOCK_SECONDS) -> Iterator[bool]:
    """Lock a file for this process; yields whether that succeeded within `seconds`. The operating system
    releases the lock when the process ends, however it ends. If the file system has no locks, a warning is
    logged, and that counts as success.

    Raises:
        UserError: the file cannot be written.
    """
    deadline = time.monotonic() + seconds
    while True:
        with writing(lock):
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = lock.open("a")
        with file:
            locked = _lock(file, fcntl.LOCK_EX)
            # A lock on a file that has been deleted since keeps nobody off.
            if (ours := locked and _lies_at(file, lock)) or (not locked and time.monotonic() >= deadline):
                yield ours
                return
        if not locked:
            time.sleep(0.05)


def is_held(lock: Path) -> bool:
    """Whether a process holds the lock on a file."""
    if not lock.is_file():  # opening a pipe would wait for its other end
        return False
    try:
        with lock.open() as file:
            return not _lock(file, fcntl.LOCK_SH)
    except OSError:
        return False


def _lies_at(file: IO[str], path: Path) -> bool:
    """Whether an open file still has this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: IO[str], kind: int) -> bool:
    """Whether the lock was taken, or there is none to take."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        if kind == fcntl.LOCK_EX:
            folder = as_typed(Path(file.name).parent)
            log.warning("%s has no file locks: nothing keeps two processes from writing there", folder)
    return True


def as_typed(path: Path) -> Path:
    """A path as a user would type it: relative, if it is below the working directory."""
    path = path.absolute()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def expanded(path: str) -> Path:
    """A path with `~` expanded; unchanged if there is no such home folder, as in a shell."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def cache_folder(configured: str | None) -> Path:
    """The folder for token files and downloads: as configured; else the user's cache folder (XDG), or one in
    the working directory if that cannot be written."""
    if configured:
        return expanded(configured)
    return _users_cache(os.environ.get("XDG_CACHE_HOME") or "~/.cache")


def ensure_home() -> None:
    """Set the cache folder as home folder if there is none, for libraries that need one."""
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = str(cache_folder(None))


@functools.cache  # so that the warning is logged once
def _users_cache(home: str) -> Path:
    try:
        folder = Path(home).expanduser() / "gpt-experiment-runner"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
        reason = f"{folder} is not writable"
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}"
    except RuntimeError:
        reason = "there is no home folder"
    instead = Path("outputs", "cache").absolute()
    log.warning(
        "no cache folder for this user (%s): token files go to %s; data.cache_dir=FOLDER chooses another",
        reason,
        as_typed(instead),
    )
    return instead
