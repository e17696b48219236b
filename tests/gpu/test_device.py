"""A GPU is found, computes right, is filled by default, and repeats its numbers when asked to."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, Script, numbers

from llm.commands import benchmark_device
from llm.commands.device_checks import CHECKS, Check, products
from llm.config import ModelConfig, OptimizerConfig, PretrainConfig, RuntimeConfig
from llm.device import device_of
from llm.model.gpt import GPTModel
from llm.runtime import computes_in_tf32, precisions_of, set_product_precision, start_runtime
from llm.training.memory import memory_of
from llm.training.optimizers import build_optimizers

pytestmark = pytest.mark.usefixtures("no_pictures")

CASES = [
    pytest.param(check, precision, id=f"{check.name}, {precision}")
    for check in CHECKS
    for precision in check.limits
]
KINDS = [
    pytest.param("cuda", marks=pytest.mark.gpu),
    pytest.param("mps", marks=pytest.mark.gpu(kind="mps")),
]


@pytest.mark.parametrize("kind", KINDS)
def test_auto_finds_the_gpu(kind: str) -> None:
    runtime = start_runtime(RuntimeConfig())
    assert runtime.device.type == kind
    assert runtime.precision == ("bf16" if "bf16" in precisions_of(runtime.device) else "fp32")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("check", "precision"), CASES)
def test_it_computes_right(check: Check, precision: str, kind: str) -> None:
    runtime = start_runtime(RuntimeConfig(device=kind))
    if precision not in precisions_of(runtime.device):
        pytest.skip(f"no {precision}")
    set_product_precision(precision)
    if (found := check.deviation(replace(runtime, precision=precision))) is None:
        pytest.skip("the device has no such thing")
    assert found <= check.limits[precision]


@pytest.mark.parametrize("kind", KINDS)
def test_the_self_check_in_a_table(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(benchmark_device, "CHECKS", CHECKS[:1])  # each has been a test above
    result = script("benchmark", "measure=device", "steps=3", f"runtime.device={kind}", "hydra.run.dir=run")
    assert result.returncode == 0, result.stdout + result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80
    speeds = {
        name: figure
        for name, figure, _ in json.loads((tmp_path / "run" / "benchmark.json").read_text())["speeds"]
    }
    assert "–" not in speeds.values(), result.stdout
    assert "124M, 32 texts at once" in speeds
    print(result.stdout)  # what pytest -s shows


@pytest.mark.gpu
def test_tf32_only_where_it_is_asked_for() -> None:
    strict = CHECKS[0].limits["fp32"]
    if computes_in_tf32(torch.device("cuda")):
        rounded = products(start_runtime(RuntimeConfig(device="cuda", precision="tf32")))
        assert strict < rounded <= CHECKS[0].limits["tf32"]
    assert products(start_runtime(RuntimeConfig(device="cuda", precision="fp32"))) <= strict


@pytest.mark.gpu
def test_out_of_memory_is_one_line(process: Script, tmp_path: Path) -> None:
    """200 blocks keep more than 1 MB a token, of four times as many tokens as the GPU has MB."""
    windows = torch.cuda.get_device_properties(0).total_memory // (1 << 20) // 16
    (tmp_path / "text.txt").write_text("bottles of beer\n" * (windows // 8), encoding="utf-8")
    sizes = ("model.n_layers=200", "model.emb_dim=256", "data.stride=1", f"data.batch_size={windows}")
    run = ("tokenizer=bytes", "data=text", "data.path=text.txt", "training.max_steps=2", "tracking=disabled")
    result = process("pretrain", "model=tiny", *sizes, *run, "runtime.device=cuda", "hydra.run.dir=run")
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert line.startswith("error: out of memory (")
    assert f"{windows} windows of 64 tokens; lower data.batch_size={windows}" in line


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32"])
def test_a_deterministic_run_is_repeated_and_resumed_bit_for_bit(
    script: Script, text: str, tmp_path: Path, precision: str
) -> None:
    if precision not in precisions_of(torch.device("cuda")):
        pytest.skip(f"no {precision}")
    exact = ("runtime.device=cuda", "runtime.deterministic=true", f"runtime.precision={precision}")
    run = (*TINY, "data=text", text, "model.context_length=32", *exact)
    whole = script("pretrain", *run, "training.max_steps=30", "schedule=constant", "hydra.run.dir=whole")
    assert whole.returncode == 0, whole.stderr
    assert "; deterministic kernels\n" in whole.stdout
    again = script("pretrain", "rerun=whole", "tracking=disabled", "hydra.run.dir=again")
    assert "the same numbers as whole, bit for bit" in again.stdout, again.stderr
    for steps, given in ((13, [*run, "schedule=constant", "hydra.run.dir=parts"]), (30, ["resume=parts"])):
        part = script("pretrain", *given, f"training.max_steps={steps}")
        assert part.returncode == 0, part.stderr
    ended = {line["step"] for line in numbers(tmp_path / "whole") if "val/loss" in line}
    parts = [line for line in numbers(tmp_path / "parts") if "val/loss" not in line or line["step"] in ended]
    assert parts == numbers(tmp_path / "whole")


@pytest.mark.gpu
def test_a_run_fills_the_gpu_unless_told_otherwise(script: Script, tmp_path: Path) -> None:
    """20 M parameters: 32,768 × √(20/124) = 13,000 tokens, which is 64 windows and some."""
    model = ("model=small", "model.emb_dim=512", "model.n_layers=6", "model.n_heads=8", "tokenizer=bytes")
    ends = ("training.max_steps=3", "training.max_minutes=null", "training.eval_iter=1", "tracking=disabled")
    result = script(
        "pretrain", *model, *ends, "samples.max_new_tokens=5", "runtime.device=cuda", "hydra.run.dir=run"
    )
    assert result.returncode == 0, result.stderr
    assert "for this device, as nobody gave them: data.batch_size=64" in result.stdout
    config = json.loads((tmp_path / "run" / "checkpoints" / "last" / "config.json").read_text())
    assert (config["data"]["batch_size"], config["training"]["accumulate"]) == (64, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_memory_is_what_was_counted(precision: str) -> None:
    runtime = start_runtime(RuntimeConfig(device="cuda", precision=precision))
    config = PretrainConfig(model=ModelConfig(1000, 256, 512, 8, 6), optimizer=OptimizerConfig("adamw"))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = GPTModel(config.model).to(runtime.device)
    optimizers = build_optimizers(model, config.optimizer, runtime)
    optimizers.set_lr(1e-3)
    idx = torch.zeros(32, 256, dtype=torch.long, device="cuda")
    for _ in range(2):
        with runtime.autocast():
            model(idx, idx).backward()
        optimizers.step_unless(torch.zeros((), device="cuda"))
        optimizers.zero_grad()
    used = torch.cuda.max_memory_allocated() - before
    counted = memory_of(config, 32, precision, device_of(runtime)).update
    assert used == pytest.approx(counted, rel=0.1)


@pytest.mark.gpu(count=2)
def test_two_gpus_train_as_one(process: Script, text: str, tmp_path: Path) -> None:
    run = (*TINY, "data=text", text, "model.drop_rate=0", "training.max_steps=10", "optimizer=adamw")
    for number in (1, 2):
        result = process(
            "pretrain",
            *run,
            "runtime.precision=fp32",
            f"runtime.processes={number}",
            f"hydra.run.dir=on-{number}",
        )
        assert result.returncode == 0, result.stderr
    one, two = (
        [line["train/loss"] for line in numbers(tmp_path / f"on-{number}") if "lr" in line]
        for number in (1, 2)
    )
    assert two == pytest.approx(one, rel=1e-3)


@pytest.mark.gpu(kind="mps")
def test_apples_gpu_trains_resumes_and_samples(script: Script, text: str, tmp_path: Path) -> None:
    run = (*TINY, "data=text", text, "runtime.device=mps", "hydra.run.dir=run")
    for arguments in ((*run, "training.max_steps=6"), ("resume=run", "training.max_steps=9")):
        result = script("pretrain", *arguments)
        assert result.returncode == 0, result.stderr
    assert len([line for line in numbers(tmp_path / "run") if "lr" in line]) == 9
    result = script("generate", "checkpoint=run", "max_new_tokens=8", "runtime.device=mps", "quiet=true")
    assert result.returncode == 0, result.stderr
