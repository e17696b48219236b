"""The work of `experiments/prepare.py`: tokenising a run's text in advance, so that no GPU has to wait."""

import logging
import time
from dataclasses import replace

from llm.config import PrepareConfig, PretrainConfig
from llm.config_rules import validate
from llm.data.bpe import find_tokenizer
from llm.data.corpus import find_splits
from llm.data.sharding import prepare_shards
from llm.data.shards import SPLITS
from llm.data.token_file import token_files
from llm.data.tokenizer import LEARNT
from llm.data.windows import TrainingBatches, cut_windows
from llm.files import expanded
from llm.outcome import Outcome
from llm.progress import format_count, format_seconds
from llm.runtime import start_runtime

log = logging.getLogger(__name__)


def prepare(config: PrepareConfig) -> Outcome:
    """Tokenise a run's text into the cache, where the run will find it, or into a folder of shards; and log
    its size.

    Raises:
        UserError: a value is out of range, or the run could not use the text; see `cut_windows`.
    """
    validate(config)
    begin = time.perf_counter()
    start_runtime(replace(config.runtime, device="cpu", precision="auto", processes=1))  # sets the threads
    outcome = _prepare_shards(config) if config.shards.path is not None else _prepare_cache(config)
    log.info("took        %s", format_seconds(time.perf_counter() - begin))
    return outcome


def _prepare_shards(config: PrepareConfig) -> Outcome:
    index = prepare_shards(config)
    counts = ("tokens", "documents")
    figures = {
        f"{split}_{count}": sum(shard[count] for shard in index[split])
        for split in SPLITS
        for count in counts
    }
    return Outcome(
        {"vocab_size": index["tokenizer"]["vocab_size"], **figures},
        {"shards": expanded(config.shards.path or "")},
    )


def _prepare_cache(config: PretrainConfig) -> Outcome:
    splits, size = None, None
    if config.data.source != "shards":
        splits = find_splits(config.data)
        files = splits[0].corpus.files
        size = sum(file.stat().st_size for file in files)
        log.info(
            "text        %sB in %d file%s (%s)",
            format_count(size),
            len(files),
            "s"[: len(files) > 1],
            config.data.path or config.data.source,
        )
    tokenizer, _ = find_tokenizer(config.tokenizer, config.data, splits)
    if config.tokenizer.name == LEARNT:
        log.info("tokenizer   %s tokens, learnt from the training split", f"{tokenizer.n_vocab:,}")
    token_file_pair = token_files(config.data, tokenizer, splits)
    windows_pair = cut_windows(config, tokenizer, token_file_pair)
    for name, tokens, windows in zip(("training", "validation"), token_file_pair, windows_pair, strict=True):
        log.info(
            "%-11s %s tokens%s, %s windows of %d: %s",
            name,
            format_count(len(tokens.ids)),
            "" if tokens.bytes is None else f" of {tokens.bytes / len(tokens.ids):.2f} bytes",
            format_count(len(windows)),
            config.model.context_length,
            tokens.path,
        )
    updates = len(TrainingBatches(windows_pair[0], config.data, config.seed)) / config.training.accumulate
    log.info("an epoch    %s updates", f"{updates:,.2f}".removesuffix(".00"))
    names = ("training", "validation")
    figures = {
        f"{name}_tokens": len(tokens.ids) for name, tokens in zip(names, token_file_pair, strict=True)
    } | {f"{name}_windows": len(windows) for name, windows in zip(names, windows_pair, strict=True)}
    return Outcome(
        {"bytes": size, "vocab_size": tokenizer.n_vocab, **figures, "updates_per_epoch": updates},
        {name: tokens.path for name, tokens in zip(names, token_file_pair, strict=True)},
    )
