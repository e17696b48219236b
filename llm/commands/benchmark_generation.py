"""Speed of generation. Variants take turns in one process, next to the book's loop and transformers."""

import importlib.util
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from llm.commands.benchmark_training import (
    GPT2_PARTS,
    times_transformers,
    transformers_gpt2,
    with_gpt2_parts,
)
from llm.config import BenchmarkConfig, ModelConfig
from llm.config_rules import validate
from llm.data.tokenizer import load_tokenizer
from llm.device import device_name
from llm.errors import UserError
from llm.files import write_json
from llm.generation.inference import for_inference
from llm.generation.sampling import draw_from, next_token
from llm.generation.texts import generate_texts
from llm.model.gpt import GPTModel, matrix_parameters
from llm.outcome import Outcome
from llm.progress import Progress
from llm.runtime import computes_in_bf16, start_runtime

log = logging.getLogger(__name__)

MOST_NEW_TOKENS = 200  # a row, where nobody says how many
PRECISION_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}  # per weight


def benchmark_generation(config: BenchmarkConfig, run_dir: Path) -> Outcome:
    """Measure the new tokens per second of each variant at each batch size; print a table and write
    `run_dir/benchmark.json`.

    Our variants do what `generate.py` does, in each precision that the device supports, and with
    `runtime.compile` also compiled. On CUDA, where a step is captured as a graph, "no graph" launches the
    same kernels one by one. The book's loop, which has no cache and recomputes the whole text for each token,
    takes minutes, so it is timed only once, for one row. For a model of GPT-2's parts, transformers'
    `generate` with its GPT-2 of the same size is timed too, if transformers is installed; for any other
    model, ours with GPT-2's parts.

    `bound` is, for one row, the speed as a share of what memory allows, as each token has to read all
    weights. Memory bandwidth is measured in each round, because other machines on a shared host take part of
    it.

    Raises:
        UserError: a value is out of range, or prompt and new tokens do not fit into the context.
    """
    validate(config)
    sizes, context = config.generation, config.model.context_length
    new = sizes.new_tokens or max(1, min(MOST_NEW_TOKENS, context - sizes.prompt_tokens))
    if sizes.prompt_tokens + new > context:
        raise UserError(
            f"generation.prompt_tokens={sizes.prompt_tokens} and generation.new_tokens={new} "
            f"do not fit into model.context_length={context}: make them smaller"
        )
    runtime = start_runtime(config.runtime)
    precisions = ["fp32", *(["bf16"] if computes_in_bf16(runtime.device) else [])]
    model, plain = _random_model(config.model, config.seed).to(runtime.device), with_gpt2_parts(config.model)
    gpt2 = model if config.model == plain else _random_model(plain, config.seed).to(runtime.device)
    variants: dict[str, Callable[[int], None]] = {}
    for precision in [*precisions, *(["int8"] if runtime.device.type == "cpu" else [])]:
        for compiled in [False] + [True] * runtime.compile:
            ready = for_inference(model, replace(runtime, precision=precision, compile=compiled))
            variants[f"{precision}, here{', compiled' * compiled}"] = text_generator(config, ready, new)
        if runtime.device.type == "cuda":
            eager = for_inference(model, replace(runtime, precision=precision, compile=False, graph="off"))
            variants[f"{precision}, here, no graph"] = text_generator(config, eager, new)
        if gpt2 is not model:
            ready = for_inference(gpt2, replace(runtime, precision=precision))
            variants[f"{precision}, {GPT2_PARTS}"] = text_generator(config, ready, new)
    if times_transformers(config.model):
        for precision in precisions:
            variants[f"{precision}, transformers {version('transformers')}"] = _transformers(
                config, replace(runtime, precision=precision).dtype, runtime.device, new
            )
    seconds: dict[tuple[int, str], list[float]] = {}
    reading = []  # bytes a second
    buffer = torch.ones(1 << 27, device=runtime.device)  # 512 MiB, far more than any cache holds
    progress = Progress("benchmark")
    # One batch size after the other, as a model keeps the graph of one.
    rounds = [(number, batch) for batch in sizes.batch_sizes for number in range(sizes.rounds + 1)]
    for done, (number, batch) in enumerate(rounds):
        for name, generate in variants.items():
            begin = time.perf_counter()
            generate(batch)
            if number > 0:  # the first is a warm-up
                seconds.setdefault((batch, name), []).append(time.perf_counter() - begin)
        begin = time.perf_counter()
        buffer.sum().item()
        reading.append(buffer.nbytes / (time.perf_counter() - begin))
        progress.update((done + 1) / len(rounds), f"round {number} of {sizes.rounds}, {batch} rows")
    begin = time.perf_counter()
    _book_loop(config, model, new)
    seconds[1, "fp32, the book's loop"] = [time.perf_counter() - begin]
    progress.clear()
    return _report(config, run_dir, model, new, seconds, statistics.median(reading))


def _random_model(config: ModelConfig, seed: int) -> GPTModel:
    torch.manual_seed(seed)
    return GPTModel(replace(config, drop_rate=0.0)).eval()


def _report(
    config: BenchmarkConfig,
    run_dir: Path,
    model: GPTModel,
    new: int,
    seconds: dict[tuple[int, str], list[float]],
    bandwidth: float,
) -> Outcome:
    sizes = config.generation
    tokens_per_second = {
        (batch, name): batch * new / statistics.median(values) for (batch, name), values in seconds.items()
    }
    book = tokens_per_second[1, "fp32, the book's loop"]
    log.info(
        "%s, reading memory at %.1f GB/s · prompt of %d tokens, %d new ones · medians of %d\n",
        device_name(model.tok_emb.weight.device),
        bandwidth / 1e9,
        sizes.prompt_tokens,
        new,
        sizes.rounds,
    )
    log.info(
        "%4s %-28s %10s %9s %8s %16s %7s",
        "rows",
        "variant",
        "tokens/s",
        "ms/step",
        "book",
        "transformers",
        "bound",
    )
    rows: list[dict[str, Any]] = []
    for (batch, name), speed in sorted(tokens_per_second.items(), key=lambda item: item[0][0]):
        precision, _, by = name.partition(", ")
        ours = by.startswith("here")
        theirs = tokens_per_second.get((batch, f"{precision}, transformers {_version()}"))
        step_bytes = matrix_parameters(model) * PRECISION_BYTES[precision]
        row = {
            "rows": batch,
            "variant": name,
            "tokens_per_second": speed,
            "over_book": speed / book,
            "over_transformers": speed / theirs if theirs and ours else None,
            "share_of_bound": speed * step_bytes / bandwidth if batch == 1 and ours else None,
        }
        rows.append(row)
        log.info(
            "%4d %-28s %10.1f %9.1f %7.1fx %16s %7s",
            batch,
            name,
            speed,
            1000 * batch / speed,
            row["over_book"],
            "" if row["over_transformers"] is None else f"{row['over_transformers']:.2f}x",
            "" if row["share_of_bound"] is None else f"{row['share_of_bound']:.0%}",
        )
    write_json(run_dir / "benchmark.json", {"config": asdict(config), "bandwidth": bandwidth, "rows": rows})
    return Outcome({"rows": rows}, {"figures": run_dir / "benchmark.json"})


def _version() -> str:
    return version("transformers") if importlib.util.find_spec("transformers") else ""


def text_generator(config: BenchmarkConfig, model: GPTModel, new: int) -> Callable[[int], None]:
    tokenizer = load_tokenizer("bytes")  # a letter is one token, with an id that any vocabulary has
    prompt = "a" * config.generation.prompt_tokens

    def generate(batch: int) -> None:
        for _ in generate_texts(
            model,
            tokenizer,
            [prompt],
            config.sampling,
            new,
            batch,
            config.seed,
            batch,
            eos=False,
            show=lambda piece: None,
        ):
            pass

    return generate


@torch.no_grad()
def _book_loop(config: BenchmarkConfig, model: GPTModel, new: int) -> None:
    """Chapter 5.3.3 of the book, one row."""
    device = model.tok_emb.weight.device
    idx = torch.full((1, config.generation.prompt_tokens), ord("a"), device=device)
    for _ in range(new):
        logits = model(idx)[:, -1]
        idx = torch.cat([idx, next_token(logits, config.sampling, draw_from())[:, None]], dim=1)


def _transformers(
    config: BenchmarkConfig, dtype: torch.dtype, device: torch.device, new: int
) -> Callable[[int], None]:
    model = transformers_gpt2(config.model).to(device, dtype).eval()
    sampling = {
        name: value
        for name, value in asdict(config.sampling).items()
        if name != "repetition_penalty" and value is not None
    }

    def generate(batch: int) -> None:
        idx = torch.full((batch, config.generation.prompt_tokens), ord("a"), device=device)
        model.generate(  # type: ignore[operator]
            idx,
            attention_mask=torch.ones_like(idx),
            do_sample=True,
            min_new_tokens=new,
            max_new_tokens=new,
            pad_token_id=0,
            **sampling,
        )

    return generate
