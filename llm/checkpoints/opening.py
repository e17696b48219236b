"""Weights by name: ours, Hugging Face's, the hub's or the book's. Each is read and verified once."""

import re
from pathlib import Path

from llm.checkpoints.book import read_book
from llm.checkpoints.checkpoint import CHECKSUMS, find_checkpoint, read_weights
from llm.checkpoints.hub import download
from llm.checkpoints.huggingface import WHAT_TO_GIVE, read_huggingface
from llm.checkpoints.weights import Weights
from llm.errors import UserError
from llm.run_folder import CHECKPOINTS


def open_weights(name: str) -> Weights:
    """Weights by name: a run or checkpoint folder of ours, `latest`, a folder in Hugging Face's GPT-2 layout,
    a .pth file of the book's, or a name on Hugging Face's hub, such as gpt2-medium or user/name@revision.

    Raises:
        UserError: there are none of that name, they are damaged, or they are not those of a GPT-2.
    """
    try:
        return _open(name)
    except UserError as error:  # names in a file can hold line breaks and a terminal's control codes
        line = "".join(letter if letter.isprintable() else "\ufffd" for letter in str(error))
        raise UserError(line) from error


def _open(name: str) -> Weights:
    path = Path(name)
    if is_ours(name):
        return read_weights(find_checkpoint(name))
    if path.is_dir():
        return read_huggingface(path, name)
    if path.is_file():
        return read_book(path)
    if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?(@[\w.-]+)?", name):
        return read_huggingface(*download(name))
    raise UserError(f"{name}: no such file or folder; {WHAT_TO_GIVE}")


def is_ours(name: str) -> bool:
    """Whether a name means a run or a checkpoint of this program."""
    path = Path(name)
    return name == "latest" or (path / CHECKPOINTS).exists() or (path / CHECKSUMS).exists()
