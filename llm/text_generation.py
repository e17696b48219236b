"""Prompts to texts under a checkpoint: what `experiments/generate.py` does."""

import logging
import re
import time
from dataclasses import asdict
from pathlib import Path

from llm.checkpoint import find_checkpoint, load_checkpoint
from llm.config import GenerateConfig, UserError, validate
from llm.files import append_json_line
from llm.generation import generate, sample_generator
from llm.runtime import start_runtime
from llm.tokenizer import load_tokenizer, text_to_token_ids, token_ids_to_text

log = logging.getLogger(__name__)


def sample_texts(config: GenerateConfig, run_dir: Path) -> list[str]:
    """Generate `num_samples` texts, print them, and leave them in `run_dir/samples.jsonl`.

    Model and tokenizer are those of the checkpoint. Sample i draws from a random stream of its own.

    Raises:
        UserError: a value is out of range, the prompt is empty, or the checkpoint cannot be loaded.
    """
    validate(config)
    folder = find_checkpoint(config.checkpoint)
    runtime = start_runtime(config.runtime)
    model, trained = load_checkpoint(folder, runtime.device)
    tokenizer = load_tokenizer(trained.tokenizer.name)
    prompt = text_to_token_ids(config.prompt, tokenizer).to(runtime.device)
    if prompt.numel() == 0:
        raise UserError(
            "prompt is empty: give some text to go on from, or prompt='<|endoftext|>' for a fresh start"
        )
    if (largest := int(prompt.max())) >= trained.model.vocab_size:
        raise UserError(
            f"prompt holds token id {largest}, and the model knows {trained.model.vocab_size} tokens"
        )
    log.info("checkpoint %s · %s · %s\n", folder, runtime.device, runtime.precision)
    texts = []
    begin = time.perf_counter()
    new_tokens = 0
    for index in range(config.num_samples):
        with runtime.autocast():
            token_ids = generate(
                model,
                prompt,
                config.max_new_tokens,
                context_size=trained.model.context_length,
                **asdict(config.sampling),
                generator=sample_generator(config.seed, index, runtime.device),
            )
        new_tokens += token_ids.shape[1] - prompt.shape[1]
        texts.append(token_ids_to_text(token_ids, tokenizer))
        log.info("%s%s\n", f"sample {index + 1}:\n" if config.num_samples > 1 else "", texts[-1])
        line = {
            "step": _step_of(folder),
            "prompt": config.prompt,
            "text": texts[-1],
            "sampling": asdict(config.sampling),
            "seed": config.seed,
            "sample": index,
        }
        append_json_line(run_dir / "samples.jsonl", line)
    seconds = time.perf_counter() - begin
    log.info(
        "%d tokens at %.1f tokens/s; kept in %s", new_tokens, new_tokens / seconds, run_dir / "samples.jsonl"
    )
    return texts


def _step_of(folder: Path) -> int | None:
    """The step, counted from 0, after which one of our checkpoint folders was saved."""
    number = re.fullmatch(r"(?:step|best)-(\d+)", folder.name)
    return int(number[1]) - 1 if number else None
