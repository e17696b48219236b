"""A text of any size and format tokenised into a folder of shards: finds the text and the tokenizer, and logs
the result."""

import hashlib
import logging
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import tiktoken

from llm.config import PrepareConfig
from llm.data import bpe
from llm.data.cache import Record
from llm.data.corpus import Corpus, Split, find_corpus
from llm.data.dataset import Dataset
from llm.data.documents import SUFFIXES, TABLES, divided, divided_rows, kind_of, read_documents
from llm.data.shard_worker import Job, is_held_out
from llm.data.shard_writer import write_shards
from llm.data.shards import SPLITS
from llm.data.text_files import find_files
from llm.data.tokenizer import LEARNT, end_of_text_id, load_tokenizer
from llm.errors import UserError
from llm.files import cache_folder, expanded
from llm.progress import format_count

log = logging.getLogger(__name__)


def prepare_shards(config: PrepareConfig) -> Record:
    """Tokenise the text of `config.data` into the folder `config.shards.path`, log what it holds, and return
    its index.

    Raises:
        UserError: see `write_shards`; or the text is empty, or the tokenizer has no token that ends a text.
    """
    shards, data = config.shards, config.data
    folder, size = expanded(shards.path or ""), shards.megabytes * 10**6
    dataset = None
    if data.source == "shards":
        raise UserError("data=shards is prepared already: give the text, as data=text data.path=FILE")
    if data.source == "huggingface":
        local = expanded(data.path or "")
        dataset = Dataset(
            str(local) if local.exists() else data.path or "", shards.dataset_config, shards.dataset_split
        )
        units = [*divided_rows(dataset, size)]
        what = f"{sum(unit[0].end - unit[0].start for unit in units):,} rows"
    else:
        files = _files(config)
        units = [*divided(files, size)]
        what = f"{len(files):,} file{'s'[: len(files) > 1]}"
    total = sum(part.bytes for unit in units for part in unit)
    log.info("text        %sB in %s (%s)", format_count(total), what, data.path or data.source)
    job = Job(folder, config.tokenizer.name, shards.column, shards.validation, size, dataset, units)
    tokenizer = _tokenizer(config, job)
    if end_of_text_id(tokenizer) is None:
        raise UserError(
            f"tokenizer.name={config.tokenizer.name} has no token that ends a text: choose another"
        )
    index = write_shards(job, tokenizer, config.tokenizer, shards.workers or os.cpu_count() or 1)
    counts = {split: sum(shard["tokens"] for shard in index[split]) for split in SPLITS}
    if not counts["training"]:
        raise UserError(f"the text of data.path={data.path} is empty: give a text to train on")
    for split in SPLITS:
        log.info(
            "%-11s %s tokens in %s documents and %d shards",
            split,
            format_count(counts[split]),
            format_count(sum(shard["documents"] for shard in index[split])),
            len(index[split]),
        )
    if not counts["validation"]:
        log.warning("no document is held out, so that runs cannot validate: give a larger shards.validation")
    log.info("train on it with data=shards data.path=%s", shards.path)
    return index


def _files(config: PrepareConfig) -> list[Path]:
    """The files of the text. In a folder with tables such as Parquet, only these: text files describe
    them."""
    if config.data.path is None:
        return find_corpus(config.data).files
    files = find_files(config.data.path, "data.path", SUFFIXES)
    tables = [file for file in files if kind_of(file).startswith(TABLES)]
    if expanded(config.data.path).is_dir() and tables:
        if len(tables) < len(files):
            log.info(
                "data.path=%s: skipped texts beside tables (%d)", config.data.path, len(files) - len(tables)
            )
        return tables
    return files


def _tokenizer(config: PrepareConfig, job: Job) -> tiktoken.Encoding:
    """The tokenizer, by its name, or learnt from the training documents at the beginning of each unit."""
    asked = config.tokenizer
    if asked.name != LEARNT or asked.vocab_size is None:
        return load_tokenizer(asked.name)
    cache = cache_folder(config.data.cache_dir)
    with TemporaryDirectory() as folder:
        sample = Path(folder, "sample.txt")
        digest, length = hashlib.sha256(), 0
        with sample.open("wb") as file:
            for text in _sampled(job):
                file.write(text.encode())
                digest.update(text.encode())
                length += len(text)
        split = Split(Corpus([sample]), 0, length, digest.hexdigest())
        tokenizer = bpe.learnt_tokenizer(split, asked.vocab_size, cache)
    log.info("tokenizer   %s tokens, learnt from the training documents", f"{tokenizer.n_vocab:,}")
    return tokenizer


def _sampled(job: Job) -> Iterator[str]:
    """Training documents to learn a tokenizer from, equally many characters of each unit, with ends of
    text."""
    of_each = bpe.SAMPLED_CHARACTERS // len(job.units)
    for unit in job.units:
        left = of_each
        for text in chain.from_iterable(read_documents(part, job.column, job.dataset) for part in unit):
            if not is_held_out(text.encode(), job.validation):
                left -= len(text)
                yield text + bpe.END_OF_TEXT
            if left <= 0:
                break
