"""Whether a device computes correctly, and how fast, in under a minute: a table to read or to send on."""

import logging
import math
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from llm.commands.benchmark_generation import text_generator
from llm.commands.benchmark_training import flops_per_token, updater
from llm.commands.device_checks import CHECKS, Check
from llm.config import BenchmarkConfig, ModelConfig, OptimizerConfig, PretrainConfig
from llm.config_rules import validate
from llm.device import device_name, device_of, gpu_memory_bytes, measure_matmul_flops, memory_bytes
from llm.errors import UserError, first_line
from llm.files import write_json
from llm.generation.inference import for_inference
from llm.model.gpt import GPTModel
from llm.outcome import Outcome
from llm.progress import Progress, format_count
from llm.runtime import Runtime, precisions_of, set_product_precision, start_runtime
from llm.tables import fitted, format_table
from llm.training.acceleration import LARGE_FLOPS
from llm.training.circumstances import Circumstances
from llm.training.memory import largest_that_fits
from llm.training.optimizers import build_optimizers

log = logging.getLogger(__name__)

WIDTH = 80
GPT124M = ModelConfig(50257, 1024, 768, n_heads=12, n_layers=12)  # GPT-2's, without dropout
GPT124M_ROWS, DECODED_ROWS, NEW_TOKENS = 32, (1, 32), 100
COPIED_BYTES = {"cuda": 1 << 30, "mps": 1 << 28, "cpu": 1 << 27}  # far more than a cache holds


def benchmark_device(config: BenchmarkConfig, run_dir: Path) -> Outcome:
    """Run all checks in each precision of the device, then time it; print both and write
    `run_dir/benchmark.json`. 124M parameters are timed on GPUs only, if they fit, as they take minutes on a
    CPU.

    Raises:
        UserError: a check failed; everything has been printed and written by then.
    """
    validate(config)
    runtime = start_runtime(config.runtime)
    torch.manual_seed(config.seed)  # for dropout
    about = _about(runtime)
    log.info("\n".join(fitted(f"{name:<11}{text}", WIDTH) for name, text in about.items()) + "\n")
    rows = list(_checked(runtime))
    cells = [["check", "deviation", "limit", ""]]
    for row in rows:
        numbers = [_number(row[name]) for name in ("deviation", "limit")]
        cells.append([row["check"], *numbers, "ok" if row["ok"] else "FAILED"])
    log.info("%s", format_table(cells, {0, 3}))
    failed = [row for row in rows if not row["ok"]]
    for row in failed:
        log.info("%s", fitted(f"{row['check']}: {row['failure']}", WIDTH))
    speeds = list(_speeds(config, runtime))
    log.info("\n%s\n", format_table([["speed", "", ""], *speeds], {0, 2}, wrapped=2, width=WIDTH))
    write_json(
        run_dir / "benchmark.json",
        {"config": asdict(config), "about": about, "rows": rows, "speeds": speeds},
    )
    if failed:
        raise UserError(
            f"{len(failed)} of {len(rows)} checks failed on {device_name(runtime.device)}: "
            f"{'; '.join(row['check'] for row in failed)}"
        )
    log.info("all %d checks are ok", len(rows))
    return Outcome({"rows": rows}, {"figures": run_dir / "benchmark.json"})


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}" if value else "0"


def _about(runtime: Runtime) -> dict[str, str]:
    """The device and the software, as somebody else has to know them."""
    where = Circumstances()
    device = [device_name(runtime.device)]
    software = [f"torch {torch.__version__}", f"python {where.versions['python']}"]
    if runtime.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(runtime.device)
        device += [f"{format_count(gpu_memory_bytes(runtime.device))}B", f"capability {major}.{minor}"]
        software += [f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"]
        software += [f"driver {driver}" for driver in _driver()]
    if where.git_commit:
        software.append(f"commit {where.git_commit[:7]}{'' if where.git_clean else ', changed'}")
    told = {
        "device": ", ".join(device),
        "machine": f"{where.machine}, {format_count(memory_bytes())}B",
        "software": ", ".join(software),
    }
    if runtime.device.type != "mps":  # which torch does not ask which one it takes
        told["attention"] = ", ".join(
            f"{_attention_kernel(replace(runtime, precision=precision))} in {precision}"
            for precision in ("fp32", "bf16")
        )
    return told


def _driver() -> list[str]:
    """The version of NVIDIA's driver, if nvidia-smi is installed."""
    if not shutil.which("nvidia-smi"):
        return []
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.split()[:1]


def _attention_kernel(runtime: Runtime) -> str:
    """The kernel that torch chooses for causal attention with GPT-2's heads."""
    heads = torch.zeros(1, 12, 128, 64, device=runtime.device, dtype=runtime.dtype)
    chosen = SDPBackend(torch._fused_sdp_choice(heads, heads, heads, is_causal=True))
    return chosen.name.lower().removesuffix("_attention").replace("_", " ")


def _checked(runtime: Runtime) -> Iterator[dict[str, Any]]:
    """The outcome of each check that applies to the device, in each of its precisions."""
    progress = Progress("checking")
    for number, check in enumerate(CHECKS):
        for precision in precisions_of(runtime.device):
            if precision in check.limits:
                progress.update(number / len(CHECKS), check.name)
                set_product_precision(precision)
                if row := _outcome(check, replace(runtime, precision=precision)):
                    yield row
    progress.clear()


def _outcome(check: Check, runtime: Runtime) -> dict[str, Any] | None:
    """A check's outcome; None if it does not apply to the device."""
    found: float | None = math.inf
    limit, error = check.limits[runtime.precision], ""
    try:
        found = check.deviation(runtime)
    except Exception as raised:  # of any kind: what a strange device cannot do is what is asked for
        error = f"{type(raised).__name__}: {first_line(raised)}"
    if found is None:
        return None
    return {
        "check": f"{check.name}, {runtime.precision}",
        "deviation": found if math.isfinite(found) else None,
        "limit": limit,
        "ok": found <= limit,
        "failure": "" if found <= limit else error or f"not by rounding ({check.why})",
    }


def _speeds(config: BenchmarkConfig, runtime: Runtime) -> Iterator[list[str]]:
    """Rows of the table: what is timed, its speed, and remarks. 124M parameters take minutes on a CPU, and
    are timed on GPUs only."""
    flops = {}
    for precision in precisions_of(runtime.device):
        set_product_precision(precision)
        flops[precision] = measure_matmul_flops(replace(runtime, precision=precision))
        yield [f"large products, {precision}", f"{format_count(flops[precision])}FLOP/s", ""]
    set_product_precision(runtime.precision)
    yield ["memory", f"{_copied_per_second(runtime) / 1e9:,.0f} GB/s", "read and written by a copy"]
    models = {"default": (config.model, config.batch_size)}
    if runtime.device.type != "cpu":
        planned, counts = PretrainConfig(model=GPT124M), [GPT124M_ROWS, 16, 8, 4, 2]
        fitting = largest_that_fits(counts, planned, runtime.precision, device_of(runtime))
        models["124M"] = GPT124M, fitting
    for name, (model, rows) in models.items():
        in_words = partial(_update_in_words, model, rows, flops.get(runtime.precision))
        for optimizer in ("adamw", "muon"):
            seconds = partial(_update_seconds, config, model, rows, optimizer, runtime)
            yield [f"{name}, {optimizer}", *_told(seconds, in_words)]
    for name, (model, _) in models.items():
        for rows in DECODED_ROWS:
            seconds = partial(_decode_seconds, config, model, rows, runtime)
            title = f"{name}, {rows} text{'s' if rows > 1 else ''} at once"
            yield [title, *_told(seconds, partial(_text_in_words, rows))]


def _told(seconds: Callable[[], float], in_words: Callable[[float], list[str]]) -> list[str]:
    """A time in words, or why there is none."""
    try:
        return in_words(seconds())
    except Exception as raised:  # as in `_outcome`
        return ["–", f"{type(raised).__name__}: {first_line(raised)}"]


def _copied_per_second(runtime: Runtime) -> float:
    """Bytes per second that a copy within the device's memory reads and writes."""
    source = torch.ones(COPIED_BYTES[runtime.device.type] // 4, device=runtime.device)
    target = torch.empty_like(source)
    return (
        2 * source.nbytes / _median_seconds(lambda: target.copy_(source)[0].item(), 5)
    )  # waits for the device


def _update_seconds(
    config: BenchmarkConfig, model: ModelConfig, rows: int, optimizer: str, runtime: Runtime
) -> float:
    made = GPTModel(model).to(runtime.device)
    optimizers = build_optimizers(made, OptimizerConfig(optimizer, lr=1e-3), runtime)
    sizes = replace(config, model=model, batch_size=rows)
    # As a run of more than a moment does.
    small = rows * model.context_length * flops_per_token(model) < LARGE_FLOPS
    captures = optimizers.can_queue and small
    update = updater(sizes, runtime, made, optimizers, GPTModel.__call__, captures)
    return _median_seconds(update, config.steps)


def _update_in_words(model: ModelConfig, rows: int, flops: float | None, seconds: float) -> list[str]:
    tokens = rows * model.context_length / seconds
    told = f"{format_count(tokens)} tokens/s ({rows} × {model.context_length})"
    if flops:
        told += f", {tokens * flops_per_token(model) / flops:.0%} MFU"
    return [f"{1000 * seconds:,.2f} ms", told]


def _decode_seconds(config: BenchmarkConfig, model: ModelConfig, rows: int, runtime: Runtime) -> float:
    """Seconds of a step."""
    new = min(NEW_TOKENS, model.context_length // 2)
    ready = for_inference(GPTModel(model).to(runtime.device).eval(), runtime)
    generate = text_generator(config, ready, new)
    return _median_seconds(lambda: generate(rows), 3) / new


def _text_in_words(rows: int, seconds: float) -> list[str]:
    return [f"{rows / seconds:,.0f} tokens/s", f"{1000 * seconds:.2f} ms a step"]


def _median_seconds(work: Callable[[], Any], times: int) -> float:
    """Of some work that waits for the device, done once before to warm up."""
    seconds = []
    for _ in range(times + 1):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])
