"""Models with today's parts, through the real scripts."""

import json
from pathlib import Path

import pytest
from conftest import TINY, Script, numbers

pytestmark = pytest.mark.usefixtures("no_pictures")

COMMON = [each for each in TINY if not each.startswith("model")]


def model_of(run: Path) -> dict[str, object]:
    return json.loads((run / "checkpoints" / "last" / "config.json").read_text())["model"]


def test_a_modern_model_keeps_its_parts(script: Script, text: str, tmp_path: Path) -> None:
    whole = script(
        "pretrain",
        *COMMON,
        text,
        "model=modern_tiny",
        "model.value_embeddings=true",
        "model.logit_softcap=15",
        "model.n_kv_heads=1",
        "training.max_steps=10",
        "checkpoint.every_steps=5",
        "hydra.run.dir=run",
    )
    assert whole.returncode == 0, whole.stderr
    assert (
        "2 layers, width 64, 2 heads, 1 of keys and values, context 64, rotary, rmsnorm, QK-norm, "
        "value embeddings, smeared embeddings, parallel blocks, logits capped at 15, no biases"
    ) in whole.stdout
    assert model_of(tmp_path / "run")["norm"] == "rmsnorm"
    recorded = numbers(tmp_path / "run")
    resumed = script("pretrain", "resume=run/checkpoints/step-00000005")
    assert resumed.returncode == 0, resumed.stderr
    assert numbers(tmp_path / "run") == recorded

    for override, refused in (
        ("model.norm=layernorm", "model.norm=layernorm (it is rmsnorm)"),
        ("model/part=swiglu", "model.activation=swiglu (it is gelu)"),
        ("model.logit_softcap=null", "model.logit_softcap=None (it is 15.0)"),
    ):
        result = script("pretrain", "resume=run", override, "training.max_steps=20")
        assert result.returncode == 1
        assert result.stderr.startswith(f"error: resume=run: {refused} cannot change within a run")
        assert len(result.stderr.splitlines()) == 1


def test_given_weights_bring_their_parts(script: Script, text: str, tmp_path: Path) -> None:
    run = [*COMMON, text, "training.max_steps=2"]
    first = script("pretrain", *run, "model=modern_tiny", "hydra.run.dir=modern")
    assert first.returncode == 0, first.stderr
    # No position is learnt, so that a longer context than theirs may follow.
    longer = [*run, "init_from=modern", "model.context_length=128"]
    second = script("pretrain", *longer, "model.drop_rate=0.1", "hydra.run.dir=tuned")
    assert second.returncode == 0, second.stderr
    expected = {**model_of(tmp_path / "modern"), "context_length": 128, "drop_rate": 0.1}
    assert model_of(tmp_path / "tuned") == expected
    for asked, refused in (
        ("model=tiny", "model.norm=layernorm: the weights of"),
        ("model.position=learned", "model.position=learned: the weights of"),
        ("model/part=qk_norm", None),  # as theirs
        ("model/part=swiglu", "model.activation=swiglu: the weights of"),
        ("model=modern_tiny", None),
    ):
        result = script("pretrain", *run, "init_from=modern", asked, "training.max_steps=1")
        if refused is None:
            assert result.returncode == 0, result.stderr
        else:
            assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
            assert result.stderr.startswith(f"error: {refused}")


def test_a_sweep_of_parts_is_reported_and_resumed(script: Script, text: str, tmp_path: Path) -> None:
    run = [*COMMON, text, "model=tiny", "training.max_steps=2"]
    swept = script("pretrain", "-m", *run, "model/part=base,swiglu", "hydra.sweep.dir=sweep")
    assert swept.returncode == 0, swept.stderr
    assert "model/part=swiglu" in swept.stdout
    assert model_of(tmp_path / "sweep" / "1")["activation"] == "swiglu"
    assert "model/part" in (tmp_path / "sweep" / "report.csv").read_text().splitlines()[0]
    summary = tmp_path / "sweep" / "1" / "summary.json"
    summary.write_text(summary.read_text().replace('"finished"', '"interrupted"'))
    resumed = script("pretrain", "-m", "sweep.resume=sweep")
    assert resumed.returncode == 0, resumed.stderr
