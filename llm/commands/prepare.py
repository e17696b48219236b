"""What `experiments/prepare.py` does: tokenise a run's data in advance, so that no GPU has to wait for it."""

import logging
import time
from dataclasses import replace

from llm.config import PretrainConfig, validate
from llm.data.corpus import find_corpus
from llm.data.tokenizer import load_tokenizer
from llm.data.windows import TrainingBatches, load_windows, path_of
from llm.progress import format_count, format_seconds
from llm.runtime import start_runtime

log = logging.getLogger(__name__)


def prepare(config: PretrainConfig) -> None:
    """Tokenise the texts of a run into the cache, where the run will find them, and log their sizes.

    Raises:
        UserError: a value is out of range, or the run could not use the text; see `load_windows`.
    """
    validate(config)
    begin = time.perf_counter()
    start_runtime(replace(config.runtime, device="cpu", precision="auto", processes=1))  # sets the threads
    files = find_corpus(config.data).files
    size = sum(file.stat().st_size for file in files)
    source = config.data.path or config.data.source
    log.info(
        "text        %sB in %d file%s (%s)", format_count(size), len(files), "s"[: len(files) > 1], source
    )
    training, validation = load_windows(config, load_tokenizer(config.tokenizer.name))
    for name, windows in (("training", training), ("validation", validation)):
        log.info(
            "%-11s %s tokens, %s windows of %d: %s",
            name,
            format_count(len(windows.tokens)),
            format_count(len(windows)),
            config.model.context_length,
            path_of(windows),
        )
    updates = len(TrainingBatches(training, config.data, config.seed)) // config.training.accumulate
    log.info("an epoch    %s updates", f"{updates:,}")
    log.info("took        %s", format_seconds(time.perf_counter() - begin))
