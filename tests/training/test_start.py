"""What given weights decide, what was asked for by name, and that weights are opened once."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from settings import changed, settings

from llm import PretrainConfig, pretrain
from llm.checkpoints import checkpoint
from llm.commands.generate import run_generation
from llm.config import GenerateConfig, ModelConfig, TokenizerConfig, TrackingConfig
from llm.errors import UserError
from llm.training.start import with_weights

pytestmark = pytest.mark.usefixtures("no_pictures")

THEIRS = ModelConfig(257, 16, 32, 2, 2, qkv_bias=True, tie_weights=True)


def as_run(given: set[str], tokenizer: str = "gpt2", **model: Any) -> PretrainConfig:
    config = PretrainConfig(model=ModelConfig(**model), tokenizer=TokenizerConfig(tokenizer))
    return with_weights(config, THEIRS, TokenizerConfig("bytes"), "here", given)


@pytest.mark.parametrize(
    ("given", "values", "line"),
    [
        # the default is 4: what was typed is known as typed, not guessed from differing from the default
        ({"model.n_layers"}, {"n_layers": 4}, "model.n_layers=4: the weights of here have 2"),
        ({"model"}, {}, "model.emb_dim=128: the weights of here have 32"),  # model=small
        ({"model.qkv_bias"}, {"qkv_bias": False}, "model.qkv_bias=False: the weights of here have True"),
        ({"model.tie_weights"}, {"tie_weights": False}, "model.tie_weights=False: the weights of here have"),
        ({"model.vocab_size"}, {"vocab_size": 50257}, "model.vocab_size=50257: the weights of here have 257"),
        ({"model.norm"}, {"norm": "rmsnorm"}, "model.norm=rmsnorm: the weights of here have layernorm"),
        (
            {"model.context_length"},
            {"context_length": 17},
            "model.context_length=17: the weights of here",
        ),
        ({"tokenizer"}, {}, "tokenizer.name=gpt2: the weights of here have bytes"),
        (
            {"tokenizer.name"},
            {"tokenizer": "p50k_base"},
            "tokenizer.name=p50k_base: the weights of here",
        ),
    ],
)
def test_what_was_given_must_be_what_the_weights_have(
    given: set[str], values: dict[str, Any], line: str
) -> None:
    with pytest.raises(UserError) as error:
        as_run(given, **values)
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_the_weights_decide_what_was_not_given() -> None:
    config = as_run(set(), drop_rate=0.2)
    assert config.model == dataclasses.replace(THEIRS, drop_rate=0.2)
    assert config.tokenizer.name == "bytes"
    assert as_run({"model.context_length"}, context_length=8).model.context_length == 8
    # A preset names sizes; whether its other switches are as in the weights is not what it is chosen for.
    preset: dict[str, Any] = {
        "emb_dim": 32,
        "n_heads": 2,
        "n_layers": 2,
        "context_length": 8,
        "tie_weights": False,
    }
    assert as_run({"model"}, **preset).model == dataclasses.replace(THEIRS, context_length=8)


def test_weights_are_hashed_and_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(tmp_path, max_steps=5)
    pretrain(config, tmp_path / "run")
    counts: Counter[str] = Counter()

    def counted(name: str) -> Any:
        real = getattr(checkpoint, name)

        def read(path: Path) -> Any:
            counts[f"{name} {path.name}"] += 1
            return real(path)

        return read

    for name in ("sha256", "load_file"):
        monkeypatch.setattr(checkpoint, name, counted(name))

    def counts_of(work: Any) -> dict[str, int]:
        counts.clear()
        work()
        return {name: count for name, count in counts.items() if "model.safetensors" in name}

    once = {"sha256 model.safetensors": 1, "load_file model.safetensors": 1}
    generate = GenerateConfig(str(tmp_path / "run"), max_new_tokens=2, tracking=TrackingConfig("disabled"))
    assert counts_of(lambda: run_generation(generate, tmp_path)) == once
    assert counts_of(lambda: run_generation(generate, tmp_path)) == {}  # the next job of a sweep
    # Checkpoints are written, and read back, by a process of its own.
    config.checkpoint.every_steps, config.training.eval_freq = None, None
    tuned = changed(config, init_from=str(tmp_path / "run"), training__max_steps=1)
    assert counts_of(lambda: pretrain(tuned, tmp_path / "tuned")) == once
    resumed = changed(config, resume=str(tmp_path / "run"), training__max_steps=6)
    assert counts_of(lambda: pretrain(resumed)) == once
