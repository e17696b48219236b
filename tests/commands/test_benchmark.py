"""benchmark.py as a user runs it. No time is asserted."""

import json
from pathlib import Path

import pytest
from conftest import Script

from llm.config import ModelConfig
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
    wide = script("benchmark", *TINY, "model.hidden_dim=2560", "batch_size=2", "steps=1")
    assert wide.returncode == 0, wide.stderr
    rows = json.loads((tmp_path / "run" / "benchmark.json").read_text())["rows"]
    work = {row["variant"]: row["mfu"] / row["tokens_per_second"] for row in rows}  # a token's
    plain = training_flops_per_token(GPTModel(ModelConfig(300, 64, 64, 2, 2)))
    more = 6 * 2 * 2 * 64 * (2560 - 256)
    assert work["fp32, chunked loss"] / work["fp32, GPT-2's parts"] == pytest.approx((plain + more) / plain)


def test_generation_variants_in_one_run(script: Script, tmp_path: Path) -> None:
    sizes = ("generation.new_tokens=5", "generation.batch_sizes=[1,2]", "generation.rounds=1")
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
    modern = script("benchmark", *TINY, "model=modern_tiny", "measure=generation", *sizes)
    assert modern.returncode == 0, modern.stderr
    assert "fp32, here" in modern.stdout
    assert "fp32, GPT-2's parts" in modern.stdout
    assert "transformers 5" not in modern.stdout  # its GPT-2 is another model
    too_long = script("benchmark", *TINY, "measure=generation", "generation.new_tokens=500")
    assert too_long.returncode == 1
    assert too_long.stderr.startswith(
        "error: generation.prompt_tokens=4 and generation.new_tokens=500 do not"
    )
