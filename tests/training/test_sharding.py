"""Activations that are computed again, and weights that several processes share out among themselves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Script, numbers
from torch import Tensor

from llm.checkpoints.staging import Rows
from llm.config import ModelConfig, OptimizerConfig, RuntimeConfig
from llm.model.gpt import GPTModel
from llm.processes import processes
from llm.runtime import Runtime
from llm.training.optimizers import State, build_optimizers
from llm.training.sharding import clip_gradients, copies_of, is_sharded, load_weights, own, parts_of, shard
from llm.training.state import copy_weights

CPU = torch.device("cpu")
SMALL = ModelConfig(
    vocab_size=64,
    context_length=16,
    emb_dim=32,
    n_heads=4,
    n_layers=3,
    drop_rate=0.1,
    norm="rmsnorm",
    position="rotary",
    qk_norm=True,
    value_embeddings=True,
    residual_scalars=True,
)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_computed_again_give_the_same_gradients(precision: str) -> None:
    """To the bit, and with the same dropout; and what is kept for the backward pass is less."""

    def update(again: bool) -> tuple[float, list[Tensor], Tensor, int]:
        torch.manual_seed(1)
        model = GPTModel(SMALL)
        model.checkpoint_activations(again)
        kept = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        batch = torch.randint(64, (8, 16))
        with Runtime(CPU, precision).autocast():
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = model(batch, batch)
            loss.backward()
        gradients = [each.grad for each in model.parameters() if each.grad is not None]
        return loss.item(), gradients, torch.get_rng_state(), sum(kept.values())

    plain, again = update(False), update(True)
    assert again[0] == plain[0]
    assert all(map(torch.equal, again[1], plain[1]))
    assert torch.equal(again[2], plain[2])
    assert again[3] < plain[3] / 2


# Of three processes the last keeps fewer rows of a matrix than the others, or none.
THREE = RuntimeConfig(device="cpu", precision="fp32", processes=3)
CLIP = 0.5


def updated(runtime: Runtime, name: str) -> dict[str, Any]:
    """What an update and a half make of a model: weights, the optimizer's state, norms and scores, whole in
    the first process. Between the updates all of it is taken over by another model."""
    torch.manual_seed(2)
    model = GPTModel(SMALL)
    batch = torch.randint(64, (6, 16), generator=torch.Generator().manual_seed(3))
    rows = batch[runtime.rank :: runtime.processes]
    config = OptimizerConfig(name, lr=0.01)
    norms = []
    weights, state = copy_weights(model), State()
    for _ in range(2):
        torch.manual_seed(4)
        model = GPTModel(SMALL).eval()  # without dropout
        if runtime.processes > 1:
            shard(model, runtime)
            kept = sum(own(parameter).numel() for parameter in model.parameters() if is_sharded(parameter))
            assert kept < sum(tensor.numel() for tensor in copy_weights(GPTModel(SMALL)).values()) / 2
        optimizers = build_optimizers(model, config, runtime)
        for part in optimizers.parts:
            if hasattr(part, "dtype"):  # Muon's, where a rounding in bf16 goes a long way
                part.dtype = torch.float32
        load_weights(model, weights)
        optimizers.load_state(model, state, "here")
        model(rows, rows).backward()
        if runtime.processes > 1:
            norms.append(clip_gradients(model, CLIP, runtime).item())
        else:
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizers.step()
        optimizers.zero_grad()
        weights = joined(model.state_dict(), runtime)
        state = {name: joined(kept, runtime) for name, kept in optimizers.state(model).items()}
    return {"weights": weights, "state": state, "norms": norms}


def joined(tensors: Mapping[str, Any], runtime: Runtime) -> dict[str, Any]:
    """What checkpoints hold in parts, put together by hand."""
    parts = runtime.gather(copies_of(parts_of(tensors, runtime.is_main)))
    whole: dict[str, Any] = {}
    for name, tensor in parts[0].items():
        whole[name] = tensor
        if isinstance(tensor, Rows):
            rows = [part[name] for part in parts if name in part]
            assert [each.first for each in rows] == [
                sum(len(e.own) for e in rows[:n]) for n in range(len(rows))
            ]
            whole[name] = torch.cat([each.own for each in rows])
            assert whole[name].shape == tensor.shape
    return whole


def both_updated(runtime: Runtime) -> list[dict[str, Any]]:
    return [updated(runtime, name) for name in ("adamw", "muon")]


def test_three_processes_update_shards_as_one_updates_the_whole() -> None:
    with processes(THREE, both_updated) as runtime:
        sharded = both_updated(runtime)
    for found, expected in zip(sharded, both_updated(Runtime(CPU, "fp32")), strict=True):
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        assert found["norms"][0] > CLIP
        torch.testing.assert_close(found["weights"], expected["weights"], atol=2e-5, rtol=1e-4)
        assert found["state"].keys() == expected["state"].keys()
        for name, kept in expected["state"].items():
            torch.testing.assert_close(found["state"][name], kept, atol=2e-5, rtol=1e-3)


def test_a_sharded_run_is_as_one_process_and_resumes_in_one(
    script: Script, tmp_path: Path, text: str
) -> None:
    common = (
        *TINY,
        "data=text",
        text,
        "model.drop_rate=0",
        "runtime.precision=fp32",
        "optimizer=adamw",
        "runtime.checkpoint_activations=true",
        "checkpoint.every_steps=3",
        "training.max_steps=6",
    )
    sharded = "runtime.processes=2", "runtime.sharding=fsdp", "training.accumulate=2", "data.batch_size=2"
    for name, settings in ("one", ["data.batch_size=4"]), ("two", sharded):
        result = script("pretrain", *common, *settings, f"hydra.run.dir={name}")
        assert result.returncode == 0, result.stderr
    one, two = (
        [line["train/loss"] for line in numbers(tmp_path / name) if "train/loss" in line]
        for name in ("one", "two")
    )
    assert two == pytest.approx(one, abs=2e-6)
    straight = numbers(tmp_path / "two")
    refused = script("pretrain", "resume=two/checkpoints/step-00000003", "runtime.processes=1")
    assert refused.stderr.startswith("error: runtime.sharding=fsdp shares a model among the processes")
    whole = "runtime.processes=1", "runtime.sharding=none"
    resumed = script("pretrain", "resume=two/checkpoints/step-00000003", *whole)
    assert resumed.returncode == 0, resumed.stderr
    for line, before in zip(numbers(tmp_path / "two"), straight, strict=True):
        assert line == pytest.approx(before, abs=1e-5)
