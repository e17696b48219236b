"""The work of `experiments/evaluate.py`: evaluating a checkpoint on a split, on files, or on a text token by
token."""

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import torch
from torch import Tensor

from llm.config import EvaluateConfig, SamplingConfig
from llm.config_rules import validate
from llm.data.corpus import Corpus
from llm.data.pieces import encode_pieces
from llm.data.text_files import find_files
from llm.data.tokenizer import bytes_of, bytes_of_tokens, identity_of
from llm.data.windows import Batch, cut_windows, ordered_batches, whole_batches
from llm.device import device_errors_in_one_line
from llm.errors import NotFinite, UserError
from llm.files import parse_json, read_content, write_json
from llm.generation.inference import NOT_FINITE, load_for_inference, splits_of
from llm.generation.sampling import FILTERS, next_distribution, penalise_repetition
from llm.model.gpt import GPTModel
from llm.outcome import Outcome
from llm.progress import Progress, format_count, format_figure, format_windows
from llm.records import read_record
from llm.run_folder import write_summary
from llm.runtime import start_runtime
from llm.training import plots
from llm.training.evaluation import METRICS, evaluate

log = logging.getLogger(__name__)

EVALUATION = "evaluation.json"
NEXT_TOKEN = "next_token.png"
SHOWN_TOKENS = 20  # likeliest next tokens in the picture


def run_evaluation(config: EvaluateConfig, run_dir: Path, in_sweep: bool = False) -> Outcome:
    """Evaluate, print the figures and write them to `run_dir/evaluation.json`.

    A split is cut into the same windows as in training's own evaluation, which reproduces a run's figures. In
    a file or a text, every token but the first is predicted from those before it in its window of
    `context_length` tokens. For a text there is also a table of its tokens, and a picture of likely next
    tokens.

    Args:
        in_sweep: also write a summary, for the sweep's table.

    Raises:
        UserError: a value is out of range, the text is not available or too short, or the checkpoint cannot
            be loaded.
        NotFinite: the loss is not.
    """
    validate(config)
    runtime = start_runtime(config.runtime)
    loaded = load_for_inference(config.checkpoint, runtime, config.model.n_heads, config.tokenizer.name)
    model, tokenizer, trained = loaded.model, loaded.tokenizer, loaded.trained
    log.info("checkpoint %s · %s · %s\n", loaded.name, runtime.device, runtime.precision)
    context = model.config.context_length
    lengths = bytes_of_tokens(tokenizer, model.config.vocab_size)
    if config.text is None and config.path is None:
        if trained is None:
            raise UserError(f"the training data of {loaded.name} is unknown: give a text with path= or text=")
        splits = cut_windows(trained, tokenizer, splits_of(loaded))
        windows = splits[config.split == "validation"]
        what, batches = f"{config.split} split", ordered_batches(windows, config.batch_size)
        # A run's own validation may have been on some of them.
        extent = f" ({format_windows(len(windows), len(windows))})"
        count = len(windows) * context
    else:
        what, extent = "text" if config.path is None else config.path, ""
        token_ids = _token_ids(config, tokenizer, lengths)
        batches, count = whole_batches(token_ids, context, config.batch_size), len(token_ids) - 1
    with device_errors_in_one_line(lambda: f"lower batch_size={config.batch_size}"):
        metrics = evaluate(model, _with_progress(batches, count), lengths, runtime)
    if not math.isfinite(metrics["loss"]):
        raise NotFinite(NOT_FINITE)
    figures: dict[str, Any] = {
        "checkpoint": loaded.name,
        "step": loaded.step,
        "precision": runtime.precision,
        "what": what,
        "tokens": count,
        **metrics,
    }
    if config.text is not None:
        table = token_table(model, token_ids, tokenizer)
        following = distribution_stages(model, token_ids, config.sampling)
        _print_table(table)
        picture = plots.plot_next_token(
            run_dir / NEXT_TOKEN, *_likeliest(following, tokenizer), text=config.text
        )
        figures |= {"token_table": table, "sampling": asdict(config.sampling)}
    write_json(run_dir / EVALUATION, figures)
    if in_sweep:
        write_summary(run_dir, {"status": "finished", "tokenizer": identity_of(tokenizer), **figures})
    log.info("%s%s: %s predicted tokens", what, extent, f"{count:,}")
    _print_metrics(metrics)
    if config.text is not None:
        log.info("next-token probabilities, before and after each sampling step: %s", picture)
    log.info("saved to %s", run_dir / EVALUATION)
    return outcome_of(run_dir)


def _print_metrics(metrics: Mapping[str, Any]) -> None:
    width = max(len(metric.title) for metric in METRICS.values())
    for name, metric in METRICS.items():
        unit = " nats per token" if name == "loss" else ""
        log.info("%s  %s%s", metric.title.ljust(width), format_figure(metrics.get(name), metric.form), unit)


def outcome_of(run_dir: Path) -> Outcome:
    """The outcome of the evaluation in a folder; sweeps compare the loss in nats per token."""
    read = parse_json(read_content(run_dir / EVALUATION))
    figures = read if isinstance(read, dict) else {}
    files = {"evaluation": run_dir / EVALUATION, "picture": run_dir / NEXT_TOKEN}
    loss = read_record(run_dir / EVALUATION).get("loss")
    return Outcome(figures, {name: file for name, file in files.items() if file.exists()}, result=loss)


def show_again(_: EvaluateConfig, run_dir: Path) -> None:
    """Print the results of the evaluation in a folder."""
    _print_metrics(read_record(run_dir / EVALUATION))
    log.info("saved to %s", run_dir / EVALUATION)


def _token_ids(config: EvaluateConfig, tokenizer: tiktoken.Encoding, lengths: Tensor) -> np.ndarray:
    """The tokens of the text, or of the files with the end-of-text token between them: (tokens,), int64.

    Args:
        lengths: UTF-8 length of each token that the model knows, (vocab_size,).
    """
    pieces = [config.text or ""] if config.path is None else Corpus(find_files(config.path, "path")).pieces()
    token_ids = np.concatenate([ids for _, ids in encode_pieces(pieces, tokenizer)]).astype(np.int64)
    key = "text" if config.path is None else f"path={config.path}"
    if len(token_ids) < 2:
        raise UserError(f"{key} is too short: give at least 2 tokens, as the first is never predicted")
    if (largest := int(token_ids.max())) >= len(lengths):
        raise UserError(f"{key} contains token id {largest}, but the model knows {len(lengths)} tokens")
    if not lengths[token_ids[1:]].any():
        raise UserError(f"{key} holds no text to predict: after its first token there are ends of text alone")
    return token_ids


def _with_progress(batches: Iterator[Batch], count: int) -> Iterator[Batch]:
    progress, done = Progress("evaluating"), 0
    for batch in batches:
        progress.update(done / count, f"{format_count(done)} of {format_count(count)} tokens")
        yield batch
        done += batch[1].numel()
    progress.clear()


@torch.no_grad()
def token_table(model: GPTModel, token_ids: np.ndarray, tokenizer: tiktoken.Encoding) -> list[dict[str, Any]]:
    """For each token but the first: its probability under the model, its rank in the vocabulary (1 is the
    likeliest), and the token that the model thought likeliest in its place."""
    table = []
    for inputs, targets in whole_batches(token_ids, model.config.context_length, 1):
        logits = model(inputs.to(model.tok_emb.weight.device))[0].float()
        wanted = logits.gather(-1, targets[0, :, None].to(logits.device))
        probabilities = (wanted.squeeze(-1) - logits.logsumexp(dim=-1)).exp()
        ranks = (logits > wanted).sum(dim=-1) + 1
        for token_id, probability, rank, best in zip(
            targets[0].tolist(),
            probabilities.tolist(),
            ranks.tolist(),
            logits.argmax(dim=-1).tolist(),
            strict=True,
        ):
            table.append(
                {
                    "token_id": token_id,
                    "text": _text(token_id, tokenizer),
                    "probability": probability,
                    "rank": rank,
                    "likeliest": _text(best, tokenizer),
                }
            )
    return table


@torch.no_grad()
def distribution_stages(
    model: GPTModel, token_ids: np.ndarray, sampling: SamplingConfig
) -> dict[str, torch.Tensor]:
    """The distribution of the token after `token_ids`, (vocab_size,), at each stage of sampling: the model's
    own, then after each step of `sampling` that changes anything."""
    seen_ids = torch.from_numpy(token_ids)
    idx = seen_ids[None, -model.config.context_length :].to(model.tok_emb.weight.device)
    logits = model.logits(model.features(idx)[:, -1]).float().cpu()
    plain = SamplingConfig(temperature=1.0, top_k=None)
    stages = {"model": next_distribution(logits, plain)}
    if sampling.repetition_penalty != 1:
        seen = torch.zeros_like(logits, dtype=torch.bool)
        seen[0, seen_ids] = True
        logits = penalise_repetition(logits, seen, sampling.repetition_penalty)
        stages[f"repetition penalty {sampling.repetition_penalty:g}"] = next_distribution(logits, plain)
    so_far = plain
    for name in ("temperature", *FILTERS):
        value = getattr(sampling, name)
        if value is not None and value != getattr(plain, name):
            so_far = replace(so_far, **{name: value})
            stages[f"then {name.replace('_', '-')} {value:g}"] = next_distribution(logits, so_far)
    return {name: distribution[0] for name, distribution in stages.items()}


def _likeliest(
    stages: dict[str, torch.Tensor], tokenizer: tiktoken.Encoding
) -> tuple[list[str], dict[str, list[float]]]:
    """The likeliest tokens under the model, and their probabilities at each stage."""
    token_ids = stages["model"].topk(min(SHOWN_TOKENS, len(stages["model"]))).indices
    texts = [_text(token_id, tokenizer) for token_id in token_ids.tolist()]
    return texts, {name: distribution[token_ids].tolist() for name, distribution in stages.items()}


def _text(token_id: int, tokenizer: tiktoken.Encoding) -> str:
    return bytes_of(token_id, tokenizer).decode(errors="replace")


def _print_table(table: list[dict[str, Any]]) -> None:
    log.info("%-20s %12s %7s   %s", "token", "probability", "rank", "likeliest")
    for row in table:
        log.info(
            "%-20r %12.5f %7d   %s", row["text"], row["probability"], row["rank"], repr(row["likeliest"])
        )
    log.info("")
