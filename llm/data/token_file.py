"""Text to token ids, in a memory-mapped file that is made once."""

import hashlib
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import IO

import numpy as np
import tiktoken
import torch

from llm.config import DataConfig
from llm.data.corpus import Split, find_splits
from llm.data.pieces import encode_pieces
from llm.data.tokenizer import bytes_of_tokens, fingerprint
from llm.errors import UserError
from llm.files import cache_folder, held, is_held, replacing, write_json
from llm.progress import Progress, format_count

log = logging.getLogger(__name__)

BLOCK_BYTES = 1 << 24  # hashed at a time by a thread


@dataclass(frozen=True)
class TokenFile:
    """The token ids of a text, memory-mapped from the cache."""

    ids: np.ndarray  # (tokens,), the smallest integer type that fits
    fingerprint: str  # of the text and of the tokenizer, which together decide the ids
    bytes: int  # UTF-8 length of the text that the tokens stand for, without ends of text
    path: Path


def token_files(config: DataConfig, tokenizer: tiktoken.Encoding) -> tuple[TokenFile, TokenFile]:
    """The tokens of the training and of the validation text, see `token_file`.

    Raises:
        UserError: the text does not exist, is not UTF-8, or is empty.
    """
    training, validation = find_splits(config)
    cache = cache_folder(config.cache_dir)
    return (
        token_file(training, tokenizer, cache, "training"),
        token_file(validation, tokenizer, cache, "validation"),
    )


def token_file(split: Split, tokenizer: tiktoken.Encoding, cache: Path, what: str) -> TokenFile:
    """The tokens of a split, from the cache; made at the first call for this text and this tokenizer, while
    other processes wait for it. A file whose content is not what was written is made again."""
    identity = f"{tokenizer.name}-{fingerprint(tokenizer)[:16]}-{split.sha256[:32]}"
    path, lock = cache / "tokens" / f"{identity}.npy", cache / "tokens.lock"
    if found := _read(path, identity):
        return found
    if is_held(lock):
        log.info("waiting for another process, which tokenises a text")
    with held(lock, seconds=inf):
        if not (found := _read(path, identity)):
            if path.with_suffix(".json").exists():
                log.warning("%s is damaged: tokenising the text again", path)
            _write(path, identity, split, tokenizer, what)
            found = _read(path, identity)
    if not found:
        raise UserError(f"{path} was not read back as it was written: the disk or the memory is faulty")
    return found


def _read(path: Path, identity: str) -> TokenFile | None:
    """The token file at a path, if it is whole and of this identity."""
    try:
        record = json.loads(path.with_suffix(".json").read_text("utf-8"))
        if record["fingerprint"] == identity and record["sha256"] == _block_hashes(path):
            return TokenFile(np.load(path, mmap_mode="r"), identity, record["bytes"], path)
    except (OSError, ValueError, LookupError, TypeError):
        pass
    return None


def _block_hashes(path: Path) -> list[str]:
    """SHA-256 of each block of a file. Threads hash them side by side, so that checking a gigabyte takes less
    than a second."""

    def block_hash(start: int) -> str:
        with path.open("rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(BLOCK_BYTES)).hexdigest()

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(block_hash, range(0, path.stat().st_size, BLOCK_BYTES)))


def _write(path: Path, identity: str, split: Split, tokenizer: tiktoken.Encoding, what: str) -> None:
    """Write a token file, and beside it the record that `_read` checks it by."""
    progress, characters = Progress(f"tokenising the {what} text"), split.end - split.start
    dtype = np.min_scalar_type(tokenizer.n_vocab - 1)
    lengths = bytes_of_tokens(tokenizer, tokenizer.n_vocab).numpy()
    count = byte_count = 0
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            _write_header(file, dtype, count)
            for done, token_ids in encode_pieces(split.pieces(), tokenizer):
                file.write(token_ids.astype(dtype).data)
                count += len(token_ids)
                byte_count += int(lengths[token_ids].sum())
                progress.update(done / characters, f"{format_count(count)} tokens")
            file.seek(0)
            # The count is known now. The header keeps its length: numpy leaves room for the count to grow.
            _write_header(file, dtype, count)
        hashes = _block_hashes(temporary)
    record = {"fingerprint": identity, "tokens": count, "bytes": byte_count, "sha256": hashes}
    write_json(path.with_suffix(".json"), record)
    progress.clear()


def _write_header(file: IO[bytes], dtype: np.dtype, count: int) -> None:
    description = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(
        file, {"descr": description, "fortran_order": False, "shape": (count,)}
    )
