"""Speed of a training update. Variants take turns in one process, so that a noisy machine is fair to all."""

import gc
import importlib.util
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.checkpoints.gpt2_layout import GPT2
from llm.config import BenchmarkConfig, ModelConfig
from llm.config_rules import validate
from llm.cuda_graph import captured
from llm.device import device_name, measure_matmul_flops
from llm.files import write_json
from llm.model.gpt import GPTModel, training_flops_per_token, without_weights
from llm.outcome import Outcome
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

GPT2_PARTS, DETERMINISTIC, GRAPH = "GPT-2's parts", "deterministic", "one graph"  # names of variants
CHECKPOINTED = "activations again"
HEADER = "variant", "ms/update", "tokens/s", "MFU", "speed"


def benchmark_training(config: BenchmarkConfig, run_dir: Path) -> Outcome:
    """Measure the median speed of a whole update (forward, backward, optimizer) of each variant; print a
    table and write `run_dir/benchmark.json`.

    The first variant is the book's: fp32, all logits at once. The others vary precision and loss. On CUDA, or
    with `runtime.compile=true`, one has compiled blocks. On CUDA, some are captured as one graph; with
    `runtime.deterministic` one uses deterministic kernels only; and memory is shown too. With
    `runtime.checkpoint_activations`, one recomputes activations. For a model of GPT-2's parts, transformers'
    GPT-2 of the same size is timed too, with AdamW, if transformers is installed; for any other model, ours
    with GPT-2's parts.
    """
    validate(config)
    runtime = start_runtime(replace(config.runtime, deterministic=False))
    on_cuda = runtime.device.type == "cuda"
    precisions = precisions_of(runtime.device)
    compiles = config.runtime.compile is True or (config.runtime.compile == "auto" and on_cuda)
    captures = config.runtime.graph != "off" and on_cuda
    exact = config.runtime.deterministic and on_cuda
    variants: dict[str, Callable[[], Callable[[], None]]] = {}  # each makes what does an update
    for precision in precisions:
        each = replace(runtime, precision=precision)
        ours = [("plain loss", _plain_loss), ("chunked loss", GPTModel.__call__)]
        ours += [("compiled", GPTModel.__call__)] * compiles
        ours += [(GRAPH, GPTModel.__call__)] * captures
        ours += [(f"compiled, {GRAPH}", GPTModel.__call__)] * (compiles and captures)
        ours += [(DETERMINISTIC, GPTModel.__call__)] * exact
        ours += [(CHECKPOINTED, GPTModel.__call__)] * config.runtime.checkpoint_activations
        ours += [(GPT2_PARTS, GPTModel.__call__)] * (config.model != with_gpt2_parts(config.model))
        for name, loss in ours:
            variants[f"{precision}, {name}"] = partial(_ours, config, each, name, loss)
        if times_transformers(config.model):
            name = f"{precision}, transformers {version('transformers')}"
            variants[name] = partial(_transformers, config, each)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    memory: dict[str, int] = {}
    progress = Progress("benchmark")
    # On a CPU they take turns, as it has other work too. A GPU might not hold all of them at once.
    for together in [[name] for name in variants] if on_cuda else [list(variants)]:
        if on_cuda:
            if compiles:
                torch.compiler.reset()  # else variants would share its limit on how often it compiles anew
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        updates = {name: variants[name]() for name in together}
        for step in range(config.steps + 1):
            for name, update in updates.items():
                begin = time.perf_counter()
                update()
                if step > 0:  # the first is a warm-up
                    seconds[name].append(time.perf_counter() - begin)
            progress.update(step / config.steps, f"{together[0]}, round {step} of {config.steps}")
        if on_cuda:
            memory[together[0]] = torch.cuda.max_memory_allocated()
        del updates, update
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
    log.info("%-30s %12s %10s %8s %8s%s", *HEADER, f" {'memory':>8}" * on_cuda)
    rows: list[dict[str, Any]] = []
    for name, median in medians.items():
        model = with_gpt2_parts(config.model) if GPT2_PARTS in name else config.model
        mfu = tokens * flops_per_token(model) / median / rates[name[:4]]
        row = {
            "variant": name,
            "milliseconds": 1000 * median,
            "tokens_per_second": tokens / median,
            "mfu": mfu,
            "speed": baseline / median,
            **({"memory_bytes": memory[name]} if on_cuda else {}),
        }
        rows.append(row)
        figures = 1000 * median, tokens / median, 100 * mfu, baseline / median
        taken = f" {memory[name] / 2**30:7.1f}G" if on_cuda else ""
        log.info("%-30s %12.2f %10.0f %7.0f%% %7.2fx%s", name, *figures, taken)
    write_json(run_dir / "benchmark.json", {"config": asdict(config), "rows": rows})
    return Outcome({"rows": rows}, {"figures": run_dir / "benchmark.json"})


def _plain_loss(model: GPTModel, inputs: Tensor, targets: Tensor) -> Tensor:
    """The book's loss: all logits at once."""
    return F.cross_entropy(model(inputs).float().flatten(0, 1), targets.flatten())


def with_gpt2_parts(config: ModelConfig) -> ModelConfig:
    """A model of the same size with GPT-2's parts."""
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


def flops_per_token(config: ModelConfig) -> int:
    """Floating-point operations of training per token, see `training_flops_per_token`."""
    return training_flops_per_token(without_weights(config))


def _ours(
    config: BenchmarkConfig, runtime: Runtime, name: str, loss: Callable[..., Tensor]
) -> Callable[[], None]:
    torch.manual_seed(config.seed)
    model = GPTModel(with_gpt2_parts(config.model) if name == GPT2_PARTS else config.model)
    model.checkpoint_activations(name == CHECKPOINTED)
    if "compiled" in name:
        for block in model.trf_blocks:
            block.compile()
    optimizers = build_optimizers(model, config.optimizer, runtime)
    update = updater(config, runtime, model, optimizers, loss, GRAPH in name)
    return deterministically(update) if name == DETERMINISTIC else update


def _transformers(config: BenchmarkConfig, runtime: Runtime) -> Callable[[], None]:
    model = transformers_gpt2(config.model)
    optimizers = build_optimizers(model, replace(config.optimizer, name="adamw"), runtime)
    return updater(config, runtime, model, optimizers, _transformers_loss)


def updater(
    config: BenchmarkConfig,
    runtime: Runtime,
    model: nn.Module,
    optimizers: Optimizers,
    loss: Callable[..., Tensor],
    captures: bool = False,
) -> Callable[[], None]:
    """A function that makes one update on random tokens and waits for the device. On CUDA it also clips the
    gradient and skips steps that are not finite, as training does."""
    model.to(runtime.device)
    shape = (config.batch_size, config.model.context_length + 1)
    tokens = torch.randint(config.model.vocab_size, shape, device=runtime.device)
    optimizers.set_lr(config.optimizer.lr)

    def update() -> Tensor:
        set_product_precision(runtime.precision)  # other variants have theirs
        with runtime.autocast():
            nats = loss(model, tokens[:, :-1], tokens[:, 1:])
            nats.backward()
        if optimizers.can_queue:
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers.step_unless(~(nats.detach() + norm).isfinite())
        else:
            optimizers.step()
        optimizers.zero_grad()
        return nats.detach()

    work = captured(update, "an update") if captures else update

    def wait_for_update() -> None:
        work()
        # GPU kernels are only queued: reading a value waits for them.
        next(model.parameters()).view(-1)[0].item()

    return wait_for_update


def deterministically(update: Callable[[], None]) -> Callable[[], None]:
    """The same update, with deterministic kernels."""

    def update_so() -> None:
        use_deterministic_kernels(True)
        update()
        use_deterministic_kernels(False)

    return update_so
