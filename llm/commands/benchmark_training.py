"""Speed of a training update. Variants take turns in one process, so that a noisy machine is fair to all."""

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
import torch.nn.functional as F
from torch import Tensor, nn

from llm.checkpoints.gpt2_layout import GPT2
from llm.config import BenchmarkConfig, ModelConfig, validate
from llm.device import device_name, measure_matmul_flops
from llm.files import write_json
from llm.model.gpt import GPTModel, training_flops_per_token
from llm.progress import Progress
from llm.runtime import (
    Runtime,
    precisions_of,
    set_product_precision,
    start_runtime,
    use_deterministic_kernels,
)
from llm.training.optimizers import Optimizers, build_optimizers

log = logging.getLogger(__name__)

GPT2_PARTS, DETERMINISTIC = "GPT-2's parts", "deterministic"  # names of variants


def benchmark_training(config: BenchmarkConfig, run_dir: Path) -> list[dict]:
    """Measure the median speed of a whole update (forward, backward, optimizer) of each variant; print a
    table and write `run_dir/benchmark.json`.

    The first variant is the book's: fp32, all logits at once. The others vary precision and loss, and with
    `runtime.compile` one compiles the blocks, with `runtime.deterministic` one takes only kernels that repeat
    their numbers, as all of a CPU's do. Beside a model of GPT-2's parts, transformers' GPT-2 of this
    size is timed too, with AdamW, if transformers is installed; beside another model, ours.
    """
    validate(config)
    runtime = start_runtime(replace(config.runtime, deterministic=False))
    precisions = precisions_of(runtime.device)
    exact = config.runtime.deterministic and runtime.device.type == "cuda"
    variants: dict[str, Callable[[], None]] = {}
    flops: dict[str, int] = {}  # per token
    for precision in precisions:
        each = replace(runtime, precision=precision)
        ours = [("plain loss", _plain_loss), ("chunked loss", GPTModel.__call__)]
        ours += [("compiled", GPTModel.__call__)] * runtime.compile
        ours += [(DETERMINISTIC, GPTModel.__call__)] * exact
        ours += [(GPT2_PARTS, GPTModel.__call__)] * (config.model != with_gpt2_parts(config.model))
        for name, loss in ours:
            torch.manual_seed(config.seed)
            model = GPTModel(with_gpt2_parts(config.model) if name == GPT2_PARTS else config.model)
            if name == "compiled":
                for block in model.trf_blocks:
                    block.compile()
            flops[f"{precision}, {name}"] = training_flops_per_token(model)
            optimizers = build_optimizers(model, config.optimizer, each)
            update = updater(config, each, model, optimizers, loss)
            variants[f"{precision}, {name}"] = deterministically(update) if name == DETERMINISTIC else update
        if times_transformers(config.model):
            theirs = transformers_gpt2(config.model)
            adamw = build_optimizers(theirs, replace(config.optimizer, name="adamw"), each)
            name = f"{precision}, transformers {version('transformers')}"
            flops[name] = training_flops_per_token(model)  # it is the same model
            variants[name] = updater(config, each, theirs, adamw, _transformers_loss)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    progress = Progress("benchmark")
    for step in range(config.steps + 1):
        for name, update in variants.items():
            begin = time.perf_counter()
            update()
            if step > 0:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - begin)
        progress.update(step / config.steps, f"round {step} of {config.steps}")
    progress.clear()
    tokens = config.batch_size * config.model.context_length
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rates = {}
    for precision in precisions:
        set_product_precision(precision)
        rates[precision] = measure_matmul_flops(replace(runtime, precision=precision))
    baseline = next(iter(medians.values()))
    log.info(
        "%s · %d × %d tokens per update · medians of %d updates\n",
        device_name(runtime.device),
        config.batch_size,
        config.model.context_length,
        config.steps,
    )
    log.info("%-30s %12s %10s %8s %8s", "variant", "ms/update", "tokens/s", "MFU", "speed")
    rows: list[dict[str, Any]] = []
    for name, median in medians.items():
        mfu = tokens * flops[name] / median / rates[name[:4]]
        row = {
            "variant": name,
            "milliseconds": 1000 * median,
            "tokens_per_second": tokens / median,
            "mfu": mfu,
            "speed": baseline / median,
        }
        rows.append(row)
        figures = 1000 * median, tokens / median, 100 * mfu, baseline / median
        log.info("%-30s %12.1f %10.0f %7.0f%% %7.2fx", name, *figures)
    write_json(run_dir / "benchmark.json", {"config": asdict(config), "rows": rows})
    return rows


def _plain_loss(model: GPTModel, inputs: Tensor, targets: Tensor) -> Tensor:
    """The book's loss: all logits at once."""
    return F.cross_entropy(model(inputs).float().flatten(0, 1), targets.flatten())


def with_gpt2_parts(config: ModelConfig) -> ModelConfig:
    """GPT-2 in the size of a model."""
    return ModelConfig(**{name: getattr(config, name) for name in GPT2.keys})


def times_transformers(config: ModelConfig) -> bool:
    """Whether transformers is installed, and its GPT-2 is this model."""
    return config == with_gpt2_parts(config) and importlib.util.find_spec("transformers") is not None


def transformers_gpt2(config: ModelConfig) -> nn.Module:
    """The GPT-2 of transformers in the same size, in training mode."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.context_length,
        n_embd=config.emb_dim,
        n_layer=config.n_layers,
        n_head=config.n_heads,
        resid_pdrop=config.drop_rate,
        embd_pdrop=config.drop_rate,
        attn_pdrop=config.drop_rate,
        tie_word_embeddings=config.tie_weights,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(sizes).train()
    model.loss_type = "ForCausalLM"  # else it warns that it has to guess
    return model


def _transformers_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    # It shifts the labels itself, so these targets are one token off; the cost is the same.
    return model(input_ids=inputs, labels=targets, use_cache=False).loss


def updater(
    config: BenchmarkConfig,
    runtime: Runtime,
    model: nn.Module,
    optimizers: Optimizers,
    loss: Callable[..., Tensor],
) -> Callable[[], None]:
    """A function that does one update on random tokens and waits for the device."""
    model.to(runtime.device)
    shape = (config.batch_size, config.model.context_length + 1)
    tokens = torch.randint(config.model.vocab_size, shape, device=runtime.device)

    def update() -> None:
        set_product_precision(runtime.precision)  # other variants have theirs
        with runtime.autocast():
            loss(model, tokens[:, :-1], tokens[:, 1:]).backward()
        optimizers.step()
        optimizers.zero_grad()
        next(model.parameters())[0, 0].item()  # GPU kernels are only queued: reading a value waits for them

    return update


def deterministically(update: Callable[[], None]) -> Callable[[], None]:
    """The same update, by kernels that give the same numbers each time."""

    def update_so() -> None:
        use_deterministic_kernels(True)
        update()
        use_deterministic_kernels(False)

    return update_so
