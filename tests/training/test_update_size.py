"""What is chosen for a GPU if nobody has said: the rule, its estimate of memory, and that it is recorded."""

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml
from conftest import TINY, Script, numbers
from parts import CPU, EVERY_PART
from torch import Tensor

from llm.config import DataConfig, ModelConfig, PretrainConfig, RuntimeConfig, TrainingConfig, modern_small
from llm.model import attention, cpu, parts
from llm.model.gpt import GPTModel
from llm.training.update_size import DEVICE_KEYS, activation_bytes, chosen_for_device, chosen_for_gpu

pytestmark = pytest.mark.usefixtures("no_pictures")

GIB = 2**30
GPT124M = PretrainConfig(
    model=ModelConfig(50257, 256, 768, 12, 12, tie_weights=False),
    data=DataConfig(batch_size=4),
    training=TrainingConfig(eval_freq=10),
)
SHAKESPEARE = 1_610_000  # tokens


def chosen(config: PretrainConfig, gib: int = 80, tokens: int = SHAKESPEARE) -> dict[str, int]:
    return chosen_for_gpu(config, DEVICE_KEYS, gib * GIB, 2, tokens)


def test_the_update_depends_on_the_model_and_only_its_division_on_the_memory() -> None:
    """124M: 18 × 162M bytes of weights and state, and 12 × 2 × 32 × 768 × 256 = 151 MB a window."""
    assert chosen(GPT124M) == {"data.batch_size": 128, "training.eval_freq": 100}
    in_two = {"data.batch_size": 64, "training.accumulate": 2, "training.eval_freq": 100}
    assert chosen(GPT124M, gib=24) == in_two  # (25.8 - 2.9) / 2 = 11.4 GB
    assert chosen(GPT124M, gib=8)["data.batch_size"] * chosen(GPT124M, gib=8)["training.accumulate"] == 128
    assert chosen(GPT124M, gib=1)["data.batch_size"] == 1  # and an error that says what to do
    longer = replace(GPT124M, model=replace(GPT124M.model, context_length=1024))
    assert chosen(longer) == {"data.batch_size": 32, "training.eval_freq": 100}
    assert chosen(PretrainConfig(model=modern_small())) == {"training.eval_freq": 250}


def test_a_short_text_is_not_used_up_by_an_update() -> None:
    assert chosen(GPT124M, tokens=512 * 32 + 10)["training.eval_freq"] == 100
    assert "data.batch_size" not in chosen(GPT124M, tokens=512 * 32 + 10)  # two windows: as on a CPU, four
    assert chosen(GPT124M, tokens=2048 * 32)["data.batch_size"] == 8


def test_several_processes_share_the_same_update() -> None:
    for processes, batch in ((2, 128), (4, 128), (3, 126)):
        config = replace(GPT124M, runtime=RuntimeConfig(processes=processes))
        assert chosen(config)["data.batch_size"] == batch
    split = chosen(replace(GPT124M, runtime=RuntimeConfig(processes=4)), gib=8)
    assert split["data.batch_size"] % 4 == 0
    assert split["data.batch_size"] * split["training.accumulate"] == 128


def test_what_is_given_stays() -> None:
    for given in ({"data.batch_size"}, {"training.accumulate"}):
        found = chosen_for_gpu(GPT124M, {*DEVICE_KEYS} - given, 80 * GIB, 2, SHAKESPEARE)
        assert found == {"training.eval_freq": 100}
    assert chosen_for_gpu(GPT124M, {"data.batch_size"}, 80 * GIB, 2, SHAKESPEARE) == {}
    never = replace(GPT124M, training=TrainingConfig(eval_freq=None))
    assert "training.eval_freq" not in chosen(never)


@pytest.mark.parametrize(("steps", "frequency"), [(100, 10), (1000, 25), (10_000, 100)])
def test_a_short_run_is_evaluated_as_on_a_cpu(steps: int, frequency: int) -> None:
    config = replace(GPT124M, training=TrainingConfig(max_steps=steps, eval_freq=10))
    assert chosen(config).get("training.eval_freq", 10) == frequency


BASE = ModelConfig(300, 64, 256, 4, 2)


@pytest.mark.parametrize(
    ("config", "at_most"),  # times too much, in bf16
    [
        (BASE, 1.7),
        (replace(BASE, hidden_dim=2048), 1.5),
        (replace(BASE, activation="swiglu"), 1.6),
        (replace(modern_small(), vocab_size=300, emb_dim=256), 1.1),
        (replace(BASE, **EVERY_PART), 1.1),
    ],
)
def test_the_estimate_of_memory_is_enough(config: ModelConfig, at_most: float) -> None:
    for number_bytes, most in ((2, at_most), (4, 1.4 * at_most)):
        estimate = activation_bytes(config, number_bytes) / config.n_layers
        of_layers = [
            saved_bytes(replace(config, n_layers=layers), 4, number_bytes)
            - saved_bytes(replace(config, n_layers=layers), 2, number_bytes)  # without copies of weights
            for layers in (2, 4)
        ]
        saved = (of_layers[1] - of_layers[0]) / 2 / (2 * config.context_length)
        assert 1 <= estimate / saved <= most, (number_bytes, estimate / saved)


def saved_bytes(config: ModelConfig, rows: int, number_bytes: int) -> int:
    """What torch keeps for the backward pass, by its own account; without what is done otherwise on a CPU."""
    model, found = GPTModel(config), {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    idx = torch.zeros(rows, config.context_length, dtype=torch.long)
    elsewhere = [(cpu, "trains_on_cpu"), (cpu, "trains_in_bf16_on_cpu"), (parts, "trains_on_cpu")]
    elsewhere += [(attention, "trains_on_cpu"), (attention, "trains_in_bf16_on_cpu")]
    patches = [patch.object(module, name, lambda x: False) for module, name in elsewhere]
    for each in patches:
        each.start()
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=number_bytes == 2),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        model.features(idx)
    for each in patches:
        each.stop()
    return sum(found.values())


def test_what_is_chosen_is_recorded_and_resumed(
    script: Script, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [each for each in TINY if not each.startswith(("data.batch_size", "training.eval_freq"))]
    arguments += ["data=text", text, "model.context_length=16", "runtime.precision=fp32"]
    asked = []

    def for_this_gpu(config: PretrainConfig, undecided: frozenset[str], *_: object) -> dict[str, int]:
        asked.append(undecided)
        new = {"data.batch_size": 4, "training.accumulate": 2, "training.eval_freq": 3}
        return {key: value for key, value in new.items() if key in undecided}

    monkeypatch.setattr("llm.training.run.chosen_for_device", for_this_gpu)
    result = script("pretrain", *arguments, "training.max_steps=4", "hydra.run.dir=run")
    assert result.returncode == 0, result.stderr
    assert "4 windows of 16 tokens × 2 micro-batches: 128 tokens" in result.stdout
    line = (
        "           for this GPU, as nobody gave them: data.batch_size=4 training.accumulate=2 training.eval_"
    )
    assert line in result.stdout
    composed = yaml.safe_load((tmp_path / "run" / ".hydra" / "config.yaml").read_text())
    assert (composed["data"]["batch_size"], composed["training"]["accumulate"]) == (4, 2)
    config = json.loads((tmp_path / "run" / "checkpoints" / "last" / "config.json").read_text())
    assert (config["data"]["batch_size"], config["training"]["eval_freq"]) == (4, 3)
    assert [line["step"] for line in numbers(tmp_path / "run") if "val/loss" in line] == [0, 3]

    again = script("pretrain", "rerun=run", "tracking=disabled", "hydra.run.dir=again")
    assert "the same numbers" in again.stdout, again.stderr
    resumed = script("pretrain", "resume=run", "training.max_steps=6")
    assert resumed.returncode == 0, resumed.stderr
    assert asked == [frozenset(DEVICE_KEYS), frozenset(), frozenset()]
    script("pretrain", *arguments, "training.max_steps=1", "data.batch_size=2", "hydra.run.dir=given")
    assert asked[-1] == {"training.accumulate", "training.eval_freq"}


def test_a_cpu_keeps_its_own() -> None:
    assert chosen_for_device(GPT124M, DEVICE_KEYS, CPU, SHAKESPEARE) == {}
