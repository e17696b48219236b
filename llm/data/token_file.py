"""Texts tokenised into memory-mapped files, which are cached."""

import logging
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import tiktoken

from llm.config import DataConfig
from llm.data.accelerated import Checked, DifferentIds, accelerated
from llm.data.cache import Record, made_once, read_array, write_array
from llm.data.corpus import Split, find_splits
from llm.data.pieces import encode_pieces
from llm.data.shards import shard_files
from llm.data.tokenizer import bytes_of_tokens, fingerprint_of_ids
from llm.data.tokens import TokenFile
from llm.files import cache_folder
from llm.progress import Progress, format_count

log = logging.getLogger(__name__)

LONG_CHARACTERS = 1 << 24  # of a text for which importing gigatoken pays


def token_files(
    config: DataConfig, tokenizer: tiktoken.Encoding, splits: tuple[Split, Split] | None = None
) -> tuple[TokenFile, TokenFile]:
    """The tokens of the training and the validation text, from the cache or from shards.

    Args:
        splits: the texts, if they have been found already.

    Raises:
        UserError: the text does not exist, is not UTF-8, is empty, or changes while it is read; or see
            `shard_files`.
    """
    if config.source == "shards":
        return shard_files(config, tokenizer)
    training, validation = splits or find_splits(config)
    cache = cache_folder(config.cache_dir)
    return (
        token_file(training, tokenizer, cache, "training"),
        token_file(validation, tokenizer, cache, "validation"),
    )


def token_file(split: Split, tokenizer: tiktoken.Encoding, cache: Path, what: str) -> TokenFile:
    """The tokens of a split, from the cache; tokenised at the first call for this text and tokenizer."""
    identity = fingerprint_of_ids(tokenizer, split.sha256)
    path = cache / "tokens" / f"{identity}.npy"
    token_ids, record = made_once(
        path,
        read=partial(read_array, path, identity),
        make=lambda: write_array(path, identity, partial(_write, split, tokenizer, what)),
        doing=f"tokenising the {what} text",
    )
    return TokenFile(token_ids, identity, record["bytes"], path)


def _write(split: Split, tokenizer: tiktoken.Encoding, what: str, file: IO[bytes]) -> Record:
    """Write a split's tokens; returns their number, and how many bytes of text they stand for."""
    if split.end - split.start >= LONG_CHARACTERS and (fast := accelerated(tokenizer)):
        try:
            return _write_with(Checked(tokenizer, fast), split, tokenizer, what, file)
        except DifferentIds:
            log.warning("gigatoken gave other ids than tiktoken: beginning again with tiktoken alone")
            file.seek(0)
            file.truncate()
    return _write_with(None, split, tokenizer, what, file)


def _write_with(
    whole: Checked | None, split: Split, tokenizer: tiktoken.Encoding, what: str, file: IO[bytes]
) -> Record:
    progress, characters = Progress(f"tokenising the {what} text"), max(1, split.end - split.start)
    dtype = np.min_scalar_type(tokenizer.n_vocab - 1)
    lengths = bytes_of_tokens(tokenizer, tokenizer.n_vocab).numpy()
    count = byte_count = 0
    _write_header(file, dtype, count)
    for done, token_ids in encode_pieces(split.pieces(), tokenizer, whole):
        file.write(token_ids.astype(dtype).data)
        count += len(token_ids)
        byte_count += int(lengths[token_ids].sum())
        progress.update(done / characters, f"{format_count(count)} tokens")
    file.seek(0)
    # Now the count is known. The header keeps its length, as numpy leaves room for the count to grow.
    _write_header(file, dtype, count)
    progress.clear()
    return {"tokens": count, "bytes": byte_count}


def _write_header(file: IO[bytes], dtype: np.dtype, count: int) -> None:
    description = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(
        file, {"descr": description, "fortran_order": False, "shape": (count,)}
    )
