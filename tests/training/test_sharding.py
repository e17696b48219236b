"""Activations that are computed again, and weights that several processes share out among themselves."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Script, numbers
from drill import DAMAGES, damage_file
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

from llm.checkpoints.checkpoint import (
    BEST_FILES,
    CHECKSUMS,
    STEP_FILES,
    WEIGHTS,
    damage,
    newest_whole,
    read_config,
    read_tensors,
    read_training_state,
)
from llm.checkpoints.training_state import TrainingState
from llm.checkpoints.writing import CheckpointWriter, Snapshot
from llm.config import ModelConfig, OptimizerConfig, PretrainConfig, RuntimeConfig
from llm.errors import UserError
from llm.model.gpt import GPTModel
from llm.processes import processes
from llm.runtime import Runtime
from llm.training.optimizers import Optimizers, build_optimizers
from llm.training.sharding import clip_gradients, is_sharded, load_weights, own, parts_of, shard
from llm.training.state import copy_weights, restore_shard

RUN_V3 = Path(__file__).parents[1] / "fixtures" / "run_v3"  # of two processes
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
    smear=True,
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


def updated(runtime: Runtime, name: str, folder: Path) -> dict[str, Any]:
    """What two updates make of a model: weights, the optimizer's state, and norms. After each of them all is
    saved, and another model begins with it."""
    batch = torch.randint(64, (6, 16), generator=torch.Generator().manual_seed(3))
    rows = batch[runtime.rank :: runtime.processes]
    run_dir, norms = folder / f"{name}-{runtime.processes}", []
    for steps in (1, 2):
        torch.manual_seed(2)
        model = GPTModel(SMALL).eval()  # without dropout
        if runtime.processes > 1:
            shard(model, runtime)
            kept = sum(own(parameter).numel() for parameter in model.parameters() if is_sharded(parameter))
            assert kept < sum(tensor.numel() for tensor in copy_weights(GPTModel(SMALL)).values()) / 2
        optimizers = build_optimizers(model, OptimizerConfig(name, lr=0.01), runtime)
        for part in optimizers.parts:
            if hasattr(part, "dtype"):  # Muon's, where a rounding in bf16 goes a long way
                part.dtype = torch.float32
        if steps > 1:
            restore(model, optimizers, runtime, run_dir)
        model(rows, rows).backward()
        if runtime.processes > 1:
            norms.append(clip_gradients(model, CLIP, runtime).item())
        else:
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizers.step()
        optimizers.zero_grad()
        save(model, optimizers, runtime, run_dir, steps)
    checkpoint = newest_whole(run_dir, BEST_FILES)
    weights, state = read_tensors(checkpoint, WEIGHTS), read_training_state(checkpoint)
    assert state.generators.keys() == set(range(runtime.processes))
    return {"weights": weights, "state": state.optimizer, "norms": norms}


def save(model: GPTModel, optimizers: Optimizers, runtime: Runtime, run_dir: Path, steps: int) -> None:
    writer = CheckpointWriter(run_dir, 1, runtime if runtime.processes > 1 else None)
    kept = {name: parts_of(state, runtime.is_main) for name, state in optimizers.state(model).items()}
    generators = {runtime.rank: {"cpu": torch.get_rng_state()}}
    state = TrainingState("0123abcd", {}, {}, [], [], kept, generators, None)
    weights = parts_of(model.state_dict(), runtime.is_main)
    writer.write(Snapshot(steps, PretrainConfig(model=SMALL), weights, state, {}))
    assert writer.wait() is None
    writer.close()
    runtime.gather(None)  # the others were done before the main one


def restore(model: GPTModel, optimizers: Optimizers, runtime: Runtime, run_dir: Path) -> None:
    checkpoint = newest_whole(run_dir, BEST_FILES)
    if runtime.processes > 1:
        state = restore_shard(model, runtime.rank, checkpoint)
        assert state.generators.keys() == {runtime.rank}
    else:
        load_weights(model, read_tensors(checkpoint, WEIGHTS))
        state = read_training_state(checkpoint)
    optimizers.load_state(model, state.optimizer, "here")


def both_updated(folder: Path, runtime: Runtime) -> list[dict[str, Any]]:
    return [updated(runtime, name, folder) for name in ("adamw", "muon")]


def test_three_processes_update_shards_as_one_updates_the_whole(tmp_path: Path) -> None:
    with processes(THREE, both_updated, tmp_path) as runtime:
        sharded = both_updated(tmp_path, runtime)
    whole = both_updated(tmp_path, Runtime(CPU, "fp32"))
    for found, expected in zip(sharded, whole, strict=True):
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
    assert len(list((tmp_path / "two/checkpoints/last/model").iterdir())) == 2
    straight = numbers(tmp_path / "two")
    refused = script("pretrain", "resume=two/checkpoints/step-00000003", "runtime.processes=1")
    assert refused.stderr.startswith("error: runtime.sharding=fsdp shares a model among the processes")
    whole = "runtime.processes=1", "runtime.sharding=none"
    resumed = script("pretrain", "resume=two/checkpoints/step-00000003", *whole)
    assert resumed.returncode == 0, resumed.stderr
    for line, before in zip(numbers(tmp_path / "two"), straight, strict=True):
        assert line == pytest.approx(before, rel=1e-5)


def test_torch_itself_puts_the_parts_of_a_checkpoint_together(tmp_path: Path) -> None:
    """By what makes one file of those of its `HuggingFaceStorageWriter`."""
    parts = RUN_V3 / "checkpoints" / "last" / "model"
    names = {name for file in parts.iterdir() for name in load_file(file)}
    consolidate_safetensors_files(str(parts), str(tmp_path), dict.fromkeys(names, 1))
    ours = read_tensors(parts.parent, WEIGHTS)
    theirs = load_file(tmp_path / "model-00001-of-00001.safetensors")
    assert ours.keys() == theirs.keys() == GPTModel(read_config(parts.parent).model).state_dict().keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor)


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("place", ["model", "training_state"])
def test_a_damaged_part_is_found(tmp_path: Path, place: str, kind: str) -> None:
    run = shutil.copytree(RUN_V3, tmp_path / "run", symlinks=True)
    part = run / "checkpoints" / "step-00000008" / place / "shard-00002-model-00001-of-00001.safetensors"
    other = part.with_name("shard-00001-model-00001-of-00001.safetensors")
    damage_file(part, kind, other, random.Random(f"{place} {kind}"))
    assert newest_whole(run, STEP_FILES).name == "step-00000005"


def test_a_part_that_is_not_listed_or_not_there_is_missed(tmp_path: Path) -> None:
    """The checksums are no proof of themselves."""
    checkpoint = shutil.copytree(RUN_V3 / "checkpoints" / "step-00000008", tmp_path / "step-00000008")
    sums = checkpoint / CHECKSUMS
    kept = [line for line in sums.read_text().splitlines() if "model/shard-00001" not in line]
    sums.write_text("\n".join(kept) + "\n")
    part = "model/shard-00001-model-00001-of-00001.safetensors"
    assert damage(checkpoint) == f"{CHECKSUMS} does not list {part}"
    (checkpoint / part).unlink()
    with pytest.raises(UserError, match=r"model is damaged or of another format: a part of .* is missing"):
        read_tensors(checkpoint, WEIGHTS)
