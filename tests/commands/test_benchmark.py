"""benchmark.py as a user runs it. No time is asserted."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Script
from parts import CPU

from llm.commands import benchmark_device, device_checks
from llm.commands.device_checks import CHECKS, Check
from llm.config import ModelConfig, OptimizerConfig
from llm.model.gpt import GPTModel, training_flops_per_token

TINY = ("model=tiny", "model.vocab_size=300", "hydra.run.dir=run")


def test_training_variants_in_one_run(script: Script, tmp_path: Path) -> None:
    result = script("benchmark", *TINY, "batch_size=2", "steps=2")
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "run" / "benchmark.json").read_text())["rows"]
    assert [row["variant"] for row in rows][:2] == ["fp32, plain loss", "fp32, chunked loss"]
    assert rows[0]["speed"] == 1.0
    assert not result.stderr
    of_transformers = [row["variant"] for row in rows if "transformers" in row["variant"]]
    assert of_transformers[0].startswith("fp32, transformers ")
    wide = script("benchmark", *TINY, "model.hidden_dim=2560", "model.smear=true", "batch_size=2", "steps=1")
    assert wide.returncode == 0, wide.stderr
    rows = json.loads((tmp_path / "run" / "benchmark.json").read_text())["rows"]
    work = {row["variant"]: row["mfu"] / row["tokens_per_second"] for row in rows}  # a token's
    plain = training_flops_per_token(GPTModel(ModelConfig(300, 64, 64, 2, 2)))
    more = 6 * 2 * 2 * 64 * (2560 - 256)
    assert work["fp32, chunked loss"] / work["fp32, GPT-2's parts"] == pytest.approx((plain + more) / plain)


def test_generation_variants_in_one_run(script: Script, tmp_path: Path) -> None:
    sizes = ("generation.batch_sizes=[1,2]", "generation.rounds=1")
    result = script("benchmark", *TINY, "measure=generation", *sizes)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "run" / "benchmark.json").read_text())["rows"]
    by_name = {(row["rows"], row["variant"]): row for row in rows}
    book, ours = by_name[1, "fp32, the book's loop"], by_name[1, "fp32, here"]
    assert ours["over_book"] == ours["tokens_per_second"] / book["tokens_per_second"]
    assert ours["share_of_bound"] > 0
    [theirs] = [row for (_, name), row in by_name.items() if name.startswith("fp32, tr") and row["rows"] == 2]
    both = by_name[2, "fp32, here"]
    assert both["over_transformers"] == both["tokens_per_second"] / theirs["tokens_per_second"]
    assert not result.stderr
    assert "prompt of 4 tokens, 60 new ones" in result.stdout  # what the context has room for
    fewer = (*sizes, "generation.new_tokens=5")
    modern = script("benchmark", *TINY, "model=modern_tiny", "measure=generation", *fewer)
    assert modern.returncode == 0, modern.stderr
    assert "fp32, here" in modern.stdout
    assert "fp32, GPT-2's parts" in modern.stdout
    assert "transformers 5" not in modern.stdout  # its GPT-2 is another model
    too_long = script("benchmark", *TINY, "measure=generation", "generation.new_tokens=500")
    assert too_long.returncode == 1
    assert too_long.stderr.startswith(
        "error: generation.prompt_tokens=4 and generation.new_tokens=500 do not"
    )


def refused(*_: object) -> float:
    raise NotImplementedError("no such operator\nhere")


def test_a_device_that_computes_wrong_is_told(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def limited(name: str, found: object) -> Check:
        return Check(name, found, {"fp32": 1e-5}, "for a reason")  # type: ignore[arg-type]

    right = limited("products", device_checks.products)
    wrong = limited("sums", lambda runtime: 0.25)
    undefined = limited("roots", lambda runtime: float("nan"))
    absent = limited("of another device", lambda runtime: None)
    sizes = ("measure=device", "batch_size=1", "steps=1", "runtime.precision=fp32")
    monkeypatch.setattr(benchmark_device, "COPIED_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(benchmark_device, "CHECKS", [right, wrong, undefined, absent, limited("x", refused)])
    result = script("benchmark", *TINY, *sizes)
    assert result.returncode == 1
    [error] = result.stderr.splitlines()
    assert error.startswith("error: 3 of 4 checks failed on ")
    assert error.endswith(": sums, fp32; roots, fp32; x, fp32")
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "sums, fp32 2.5e-01 1.0e-05 FAILED" in lines
    assert "sums, fp32: not by rounding (for a reason)" in lines
    assert "x, fp32: NotImplementedError: no such operator" in lines
    assert not any("another device" in line for line in lines)
    assert max(len(line) for line in result.stdout.splitlines() if not line.startswith("error: ")) <= 80
    content = json.loads((tmp_path / "run" / "benchmark.json").read_text())
    assert [row["ok"] for row in content["rows"]] == [True, False, False, False]
    assert content["rows"][2]["deviation"] is None  # which JSON has no other word for
    monkeypatch.setattr(benchmark_device, "CHECKS", [right])
    result = script("benchmark", *TINY, *sizes)
    assert (result.returncode, result.stderr) == (0, "")
    assert "default, adamw" in result.stdout
    assert result.stdout.splitlines()[-1] == "all 1 checks are ok"


SLOW = ("updates", "repeated")
QUICK = [check for check in CHECKS if not any(word in check.name for word in SLOW)]


@pytest.mark.parametrize("check", QUICK, ids=lambda check: check.name)
def test_a_cpu_passes_the_checks_and_coarser_numbers_do_not(check: Check) -> None:
    if (found := check.deviation(CPU)) is None:
        pytest.skip("a CPU has no such kernel")
    assert found <= check.limits["fp32"]
    if {"tf32", "bf16"} <= check.limits.keys():  # a matter of rounding
        coarser = check.deviation(replace(CPU, precision="bf16"))
        assert coarser is not None
        assert check.limits["fp32"] < coarser <= check.limits["bf16"]


def test_a_training_whose_rate_is_wrong_by_a_hundredth_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    [limit] = [check.limits["fp32"] for check in CHECKS if check.name.endswith("updates, AdamW")]
    monkeypatch.setattr(device_checks, "UPDATES", 4)
    monkeypatch.setattr(device_checks, "_reference_losses", device_checks._reference_losses.__wrapped__)
    assert device_checks.training("adamw", CPU) <= limit
    wanted = device_checks._reference_losses("adamw")
    monkeypatch.setattr(device_checks, "_reference_losses", lambda optimizer: wanted)
    monkeypatch.setattr(device_checks, "OptimizerConfig", lambda name, lr: OptimizerConfig(name, 1.01 * lr))
    assert device_checks.training("adamw", CPU) > limit


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_activations_keep_their_size_in_wider_models(script: Script, tmp_path: Path, optimizer: str) -> None:
    sizes = ("model=modern_tiny", "model.vocab_size=64", "model.context_length=16", "runtime.precision=fp32")
    few = ("optimizer.lr=0.01", "widths=[32,64,256]", "model.emb_dim=64", "steps=4", "batch_size=4")
    command = ("benchmark", "measure=coordinates", f"optimizer={optimizer}", *sizes, *few)
    result = script(*command, "hydra.run.dir=run")
    assert result.returncode == 0, result.stderr
    with_rule, without = json.loads((tmp_path / "run" / "coordinates.json").read_text())[
        "activations"
    ].values()
    assert [*with_rule] == ["32", "64", "256"]
    for place in with_rule["64"]:
        assert max(each[place] for each in with_rule.values()) < 2 * min(
            each[place] for each in with_rule.values()
        ), place
    assert with_rule["64"] == without["64"]  # the base width
    assert without["256"]["residual"] > 3 * without["32"]["residual"]
    assert (tmp_path / "run" / "coordinates.png").stat().st_size > 10_000
    refused = script(*command, "widths=[33]")
    assert refused.returncode == 1
    assert "width 33 cannot be divided into heads of 32 as model.emb_dim=64 is" in refused.stderr
