"""What is chosen for a GPU if nobody has said: the rule, its estimate of memory, and that it is recorded."""

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TINY, Script, numbers
from parts import EVERY_PART
from torch.profiler import ProfilerActivity, profile

from llm.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    RuntimeConfig,
    TrainingConfig,
    modern_small,
)
from llm.device import Device
from llm.errors import UserError
from llm.model.gpt import GPTModel, parameters_of
from llm.runtime import Runtime
from llm.training.memory import KEPT, PROCESS, USED_SHARE, Memory, _counted, memory_of
from llm.training.optimizers import build_optimizers
from llm.training.update_size import DEVICE_KEYS, chosen_for_device, refuse_uneven

pytestmark = pytest.mark.usefixtures("no_pictures")

GIB = 2**30
CPU_DEVICE = Device("cpu", 80 * GIB)
GPT124M = PretrainConfig(
    model=ModelConfig(50257, 256, 768, 12, 12, tie_weights=False),
    data=DataConfig(batch_size=4),
    training=TrainingConfig(eval_freq=10),
)
SHAKESPEARE = 1_610_000  # tokens


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 124M: 16 × 162M bytes of weights and state, and 12 × 2 × 20 × 768 × 256 = 94 MB a window."""

    def memory_of(config: PretrainConfig, rows: int, *_: object) -> Memory:
        model = config.model
        window = model.n_layers * 2 * 20 * model.emb_dim * model.context_length
        return Memory(0, 0, 0, 0, 0, 0, 16 * parameters_of(model) + rows * window, 0, 0)

    monkeypatch.setattr("llm.training.memory.memory_of", memory_of)


def chosen(
    config: PretrainConfig,
    gib: float = 80,
    tokens: int = SHAKESPEARE,
    undecided: Collection[str] = DEVICE_KEYS,
    kind: str = "cuda",
) -> dict[str, int]:
    return chosen_for_device(config, undecided, Device(kind, gib * GIB), "bf16", tokens)


@pytest.mark.usefixtures("by_hand")
def test_the_update_depends_on_the_model_and_only_its_division_on_the_memory() -> None:
    assert chosen(GPT124M) == {"data.batch_size": 128, "training.eval_freq": 100}
    in_two = {"data.batch_size": 64, "training.accumulate": 2, "training.eval_freq": 100}
    assert chosen(GPT124M, gib=16) == in_two  # 3 / 4 of 17.2 GB, less 2.6, are 10.3 GB
    assert chosen(GPT124M, gib=1)["data.batch_size"] == 1  # and an error that says what to do
    longer = replace(GPT124M, model=replace(GPT124M.model, context_length=1024))
    assert chosen(longer) == {"data.batch_size": 32, "training.eval_freq": 100}
    assert chosen(PretrainConfig(model=modern_small())) == {"training.eval_freq": 1000}


@pytest.mark.usefixtures("by_hand")
def test_a_short_text_is_not_used_up_by_an_update() -> None:
    assert chosen(GPT124M, tokens=512 * 32 + 10)["training.eval_freq"] == 100
    assert "data.batch_size" not in chosen(GPT124M, tokens=512 * 32 + 10)  # two windows: as on a CPU, four
    assert chosen(GPT124M, tokens=2048 * 32)["data.batch_size"] == 8


@pytest.mark.usefixtures("by_hand")
def test_several_processes_share_the_same_update() -> None:
    for processes, batch in ((2, 128), (4, 128), (3, 126)):
        config = replace(GPT124M, runtime=RuntimeConfig(processes=processes))
        assert chosen(config)["data.batch_size"] == batch
    split = chosen(replace(GPT124M, runtime=RuntimeConfig(processes=4)), gib=6)
    assert split["data.batch_size"] % 4 == 0
    assert split["data.batch_size"] * split["training.accumulate"] == 128


@pytest.mark.usefixtures("by_hand")
def test_what_is_given_stays() -> None:
    for given in ({"data.batch_size"}, {"training.accumulate"}):
        found = chosen(GPT124M, undecided={*DEVICE_KEYS} - given)
        assert found == {"training.eval_freq": 100}
    assert chosen(GPT124M, undecided={"data.batch_size"}) == {}
    never = replace(GPT124M, training=TrainingConfig(eval_freq=None))
    assert "training.eval_freq" not in chosen(never)


@pytest.mark.usefixtures("by_hand")
@pytest.mark.parametrize(("steps", "frequency"), [(100, 10), (1000, 25), (10_000, 100)])
def test_a_short_run_is_evaluated_as_on_a_cpu(steps: int, frequency: int) -> None:
    limits = [TrainingConfig(max_steps=steps, eval_freq=10)]
    limits += [TrainingConfig(max_epochs=steps * 128 * 256 / SHAKESPEARE, eval_freq=10)]
    for training in limits:
        assert chosen(replace(GPT124M, training=training)).get("training.eval_freq", 10) == frequency


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
    line = "           for this device, as nobody gave them: data.batch_size=4 training.accumulate=2 tra"
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
    assert chosen(GPT124M, kind="cpu") == {}


SMALL = PretrainConfig(
    model=ModelConfig(300, 64, 64, 4, 2, tie_weights=True), optimizer=OptimizerConfig("adamw")
)
AUTO_SMALL = replace(SMALL, data=DataConfig(batch_size="auto"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("parts", "precision", "optimizer"),
    [
        ({}, "fp32", "adamw"),
        ({}, "bf16", "muon"),
        (EVERY_PART, "fp32", "muon"),
        (EVERY_PART, "bf16", "adamw"),
        ({"drop_rate": 0.1}, "bf16", "adamw"),
    ],
)
def test_memory_is_what_torchs_allocator_gives(parts: Any, precision: str, optimizer: str) -> None:
    """Two updates on real tensors, by the allocator's own account of what is held at once."""
    config = replace(SMALL, model=replace(SMALL.model, **parts), optimizer=OptimizerConfig(optimizer))
    runtime, context = Runtime(torch.device("cpu"), precision), config.model.context_length
    held = most = 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        model = GPTModel(config.model)
        optimizers = build_optimizers(model, config.optimizer, runtime)
        for _ in range(2):
            tokens = torch.zeros(4, context, dtype=torch.int64)
            with runtime.autocast():
                model(tokens, tokens).backward()
            optimizers.step()
            optimizers.zero_grad()
    events = profiled.profiler.kineto_results.events()
    for event in sorted(events, key=lambda each: each.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    counted = memory_of(replace(config, training=TrainingConfig(grad_clip=None)), 4, precision, CPU_DEVICE)
    assert counted.update == pytest.approx(most, rel=0.08)  # kernels have memory of their own
    weights = 4 * sum(each.numel() for each in model.parameters())
    assert (counted.weights, counted.gradients) == (pytest.approx(weights, rel=0.01), weights)
    assert optimizer == "muon" or counted.optimizer == pytest.approx(2 * weights, rel=0.01)


def test_memory_of_a_deep_model_is_told_from_fewer_blocks() -> None:
    deep = replace(SMALL, model=replace(SMALL.model, n_layers=11))
    told, counted = memory_of(deep, 8, "fp32", CPU_DEVICE), _counted(deep, 8, "fp32", CPU_DEVICE)
    for part in ("weights", "gradients", "optimizer", "activations", "update", "evaluation"):
        assert getattr(told, part) == pytest.approx(getattr(counted, part), rel=0.01)


def test_to_evaluate_takes_no_more_than_to_train_even_where_logits_are_most_of_it() -> None:
    """GPT-2's vocabulary: the logits of a chunk of 1,024 tokens are 103 MB in bf16, and as much as twice
    206 MB in fp32 with their softmax."""
    model = replace(SMALL.model, vocab_size=50257, context_length=128)
    counted = memory_of(replace(SMALL, model=model), 16, "bf16", CPU_DEVICE)
    assert counted.evaluation < counted.update


def test_a_shard_is_a_share_of_the_states_and_what_is_gathered() -> None:
    config = replace(SMALL, optimizer=OptimizerConfig("adamw"), training=TrainingConfig(accumulate=2))
    whole = memory_of(config, 4, "fp32", CPU_DEVICE)
    shared = replace(config, runtime=RuntimeConfig(processes=4, sharding="fsdp"))
    shard = memory_of(shared, 4, "fp32", CPU_DEVICE)
    # Two blocks, all there are, and all that is around them: each process gathers the whole model.
    assert shard.weights == pytest.approx(1.25 * whole.weights, rel=0.01)
    assert (4 * shard.gradients, 4 * shard.optimizer) == pytest.approx((whole.gradients, whole.optimizer))
    assert shard.activations == whole.activations
    assert shard.copies == pytest.approx(whole.copies / 4 + whole.weights)  # those of all for a sample
    states = shard.weights + shard.gradients + shard.optimizer
    assert states + shard.activations < shard.update < whole.update


def test_auto_divides_an_update_as_large_as_suits_the_model_by_the_memory() -> None:
    """√(0.13M / 124M) of 32,768 tokens are 1,060: 16 windows of 64."""
    undecided = {"training.accumulate"}
    whole = chosen(AUTO_SMALL, undecided=undecided, kind="cpu")
    assert whole == {"data.batch_size": 16}
    accumulating = replace(AUTO_SMALL, training=TrainingConfig(accumulate=2))
    of_5 = memory_of(accumulating, 5, "bf16", CPU_DEVICE)
    tight = (PROCESS + KEPT * of_5.peak + of_5.copies) / USED_SHARE / GIB
    parts = chosen(AUTO_SMALL, gib=tight, undecided=undecided, kind="cpu")
    assert parts == {"data.batch_size": 4, "training.accumulate": 4}  # the largest divisor of 16 up to 5
    assert chosen(AUTO_SMALL, undecided=set(), kind="cpu") == {"data.batch_size": 16}
    told = replace(AUTO_SMALL, training=TrainingConfig(update_tokens=64 * 6, accumulate=2))
    assert chosen(told, undecided=undecided, kind="cpu") == {"data.batch_size": 6, "training.accumulate": 1}
    assert chosen(told, undecided=set(), kind="cpu") == {"data.batch_size": 3}
    shared = replace(told, runtime=RuntimeConfig(processes=3))
    assert chosen(shared, undecided=set(), kind="cpu") == {"data.batch_size": 3}
    odd = replace(AUTO_SMALL, training=TrainingConfig(update_tokens=100))
    with pytest.raises(UserError, match="make it a multiple of 64, the product of"):
        chosen(odd, undecided=undecided, kind="cpu")


def test_only_sizes_that_stay_have_to_go_together() -> None:
    """The presets' sizes are a CPU's: 8 processes cannot share 4 windows, and on GPUs there are 128."""
    shared = replace(GPT124M, runtime=RuntimeConfig(processes=8))
    refuse_uneven(shared, DEVICE_KEYS, "cuda")
    refuse_uneven(replace(shared, data=AUTO_SMALL.data), (), "cpu")
    for undecided, kind in ((DEVICE_KEYS, "cpu"), (["training.accumulate"], "cuda")):
        with pytest.raises(UserError, match="batch_size=4 cannot be divided evenly among"):
            refuse_uneven(shared, undecided, kind)


def test_auto_makes_the_same_update_and_is_recorded_resumed_and_repeated(
    script: Script, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [each for each in TINY if not each.startswith(("data.batch_size", "model.drop_rate"))]
    arguments += ["data=text", text, "model.context_length=16", "runtime.precision=fp32"]
    auto = ["data.batch_size=auto", "training.update_tokens=128"]
    monkeypatch.setattr("llm.training.update_size.largest_that_fits", lambda *_: 2)
    steps = "training.max_steps=4"
    result = script("pretrain", *arguments, *auto, steps, "hydra.run.dir=run")
    assert result.returncode == 0, result.stderr
    assert "for this device, as nobody gave them: data.batch_size=2 training.accumulate=4" in result.stdout
    script("pretrain", *arguments, "data.batch_size=8", steps, "hydra.run.dir=whole")
    losses = [
        [line["train/loss"] for line in numbers(tmp_path / run) if "train/loss" in line]
        for run in ("run", "whole")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    monkeypatch.setattr("llm.training.update_size.largest_that_fits", lambda *_: 8)  # another machine
    again = script("pretrain", "rerun=run", "tracking=disabled", "hydra.run.dir=again")
    assert "the same numbers" in again.stdout, again.stderr
    resumed = script("pretrain", "resume=run", "data.batch_size=auto", "training.max_steps=6")
    assert resumed.returncode == 0, resumed.stderr
    assert "2 windows of 16 tokens × 4 micro-batches" in resumed.stdout
    for given, said in (
        ("data.batch_size=all", "data.batch_size=all: must be a whole number or auto"),
        ("data.batch_size=0", "data.batch_size=0: must be at least 1"),
        (
            "training.update_tokens=100",
            "is 256; set data.batch_size=auto, or remove it",
        ),
        (
            "runtime.processes=3",
            "among runtime.processes=3: make it a multiple of 3",
        ),
    ):
        refused = script("pretrain", *arguments, steps, given, "hydra.run.dir=no")
        assert refused.returncode == 1
        assert said in refused.stderr
