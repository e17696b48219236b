"""Text to token ids, on all cores, in a memory-mapped file that is made once."""

import logging
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from math import inf
from pathlib import Path
from typing import IO

import numpy as np
import tiktoken
import torch

from llm.config import DataConfig
from llm.data.corpus import Split, find_splits
from llm.data.tokenizer import END_OF_TEXT, fingerprint
from llm.files import cache_folder, held, is_held, replacing
from llm.progress import Progress, format_count

log = logging.getLogger(__name__)

PIECE_CHARACTERS = 1_000_000  # encoded at a time by a thread

# Places that no encoding's pattern joins text across, so that the pieces encode to the ids of the whole:
# between a letter and a single space before a letter, and after a single newline; o200k has tokens of a
# newline and slashes.
_SAFE_BREAK = re.compile(r"(?<=[a-z])(?= [a-z])|(?<=[^\s]\n)(?=[^\s/])")


def token_files(config: DataConfig, tokenizer: tiktoken.Encoding) -> tuple[np.ndarray, np.ndarray]:
    """The token ids of the training and of the validation text, see `token_file`.

    Raises:
        UserError: the text cannot be had, is not UTF-8, or is empty.
    """
    training, validation = find_splits(config)
    cache = cache_folder(config.cache_dir)
    return (
        token_file(training, tokenizer, cache, "training"),
        token_file(validation, tokenizer, cache, "validation"),
    )


def token_file(split: Split, tokenizer: tiktoken.Encoding, cache: Path, what: str) -> np.ndarray:
    """Token ids of a split, memory-mapped from the cache: (tokens,), the smallest integer type that fits.

    Made at the first call for this text and this tokenizer; other processes wait for it meanwhile.
    """
    name = f"{tokenizer.name}-{fingerprint(tokenizer)[:16]}-{split.sha256[:32]}.npy"
    path, lock = cache / "tokens" / name, cache / "tokens.lock"
    if not path.exists():
        if is_held(lock):
            log.info("waiting for another process, which tokenises a text")
        with held(lock, seconds=inf):
            if not path.exists():
                _write_token_file(path, split, tokenizer, what)
    return np.load(path, mmap_mode="r")


def _write_token_file(path: Path, split: Split, tokenizer: tiktoken.Encoding, what: str) -> None:
    progress, characters = Progress(f"tokenising the {what} text"), split.end - split.start
    dtype = np.min_scalar_type(tokenizer.n_vocab - 1)
    count = 0
    with replacing(path) as temporary, temporary.open("wb") as file:
        _write_header(file, dtype, count)
        for done, token_ids in encode_pieces(split.pieces(), tokenizer):
            file.write(token_ids.astype(dtype).data)
            count += len(token_ids)
            progress.update(done / characters, f"{format_count(count)} tokens")
        file.seek(0)
        _write_header(file, dtype, count)  # now known, and as long: numpy leaves room for the count to grow
    progress.clear()


def _write_header(file: IO[bytes], dtype: np.dtype, count: int) -> None:
    description = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(
        file, {"descr": description, "fortran_order": False, "shape": (count,)}
    )


def encode_pieces(pieces: Iterable[str], tokenizer: tiktoken.Encoding) -> Iterator[tuple[int, np.ndarray]]:
    """What `llm.data.tokenizer.encode` makes of the whole text: how many characters are done, and the next
    token ids (tokens,), uint32. As many threads encode as torch has; tiktoken lets go of Python's lock."""
    encode = partial(tokenizer.encode_to_numpy, allowed_special={END_OF_TEXT}, disallowed_special=())
    safe_pieces, threads, done = _cut_at_safe_breaks(pieces), torch.get_num_threads(), 0
    with ThreadPoolExecutor(threads) as pool:
        while batch := list(islice(safe_pieces, threads)):
            for text, token_ids in zip(batch, pool.map(encode, batch), strict=True):
                done += len(text)
                yield done, token_ids


def _cut_at_safe_breaks(pieces: Iterable[str]) -> Iterator[str]:
    """The same text in pieces of about PIECE_CHARACTERS, or more where it has no such place."""
    waiting: list[str] = []
    size = 0
    for piece in pieces:
        waiting.append(piece)
        size += len(piece)
        if size >= PIECE_CHARACTERS and (end := _last_safe_break(text := "".join(waiting))):
            yield text[:end]
            waiting, size = [text[end:]], len(text) - end
    yield "".join(waiting)


def _last_safe_break(text: str) -> int:
    """Where the last one is; 0 if there is none."""
    for start in (max(0, len(text) - 10_000), 0):
        if breaks := list(_SAFE_BREAK.finditer(text, start)):
            return breaks[-1].start()
    return 0
