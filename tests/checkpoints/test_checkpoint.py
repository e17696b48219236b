"""Checkpoints: what is loaded is what was saved; damage is found, hostility refused, nothing half exists."""

import errno
import fcntl
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
import torch
from drill import DAMAGES, damage_file
from parts import CPU
from safetensors.torch import save_file

from llm.checkpoints import file_writer, writing
from llm.checkpoints.checkpoint import (
    BEST_FILES,
    CHECKSUMS,
    FORMAT_VERSION,
    STEP_FILES,
    TrainingState,
    find_checkpoint,
    newest_whole,
    read_state,
    read_training_state,
)
from llm.checkpoints.opening import open_weights
from llm.checkpoints.staging import Place, Staging
from llm.checkpoints.weights import build_model
from llm.checkpoints.writing import CheckpointWriter, Snapshot
from llm.config import ModelConfig, OptimizerConfig, PretrainConfig
from llm.errors import UserError
from llm.files import sha256
from llm.model.gpt import GPTModel
from llm.training.optimizers import OPTIMIZERS, build_optimizers
from llm.training.state import copy_weights

CONFIG = PretrainConfig(model=ModelConfig(vocab_size=31, context_length=8, emb_dim=16, n_heads=2, n_layers=1))


def model_after(steps: int) -> GPTModel:
    torch.manual_seed(steps)
    return GPTModel(CONFIG.model)


def snapshot(run_dir: Path, steps: int, best_step: int | None = None) -> Snapshot:
    metrics = run_dir / "metrics.jsonl"
    run_dir.mkdir(exist_ok=True)
    metrics.write_text("".join(f'{{"step": {step}}}\n' for step in range(steps)))
    weights = copy_weights(model_after(steps))
    sizes = {"metrics.jsonl": metrics.stat().st_size, "samples.jsonl": 0}
    state = TrainingState(
        run_id="0123abcd",
        counters={"best_step": best_step},
        batches={"epoch": 0, "position": steps},
        data=["training", "validation"],
        resumed=[],
        optimizer={"tok_emb.weight": {"exp_avg": torch.full((31, 16), float(steps)), "calls": steps}},
        generators={0: {"cpu": torch.get_rng_state()}},
        epoch_generator=None,
    )
    return Snapshot(steps, CONFIG, weights, state, sizes)


def save(run_dir: Path, *steps: int) -> CheckpointWriter:
    writer = CheckpointWriter(run_dir, keep=2)
    for each in steps:
        writer.write(snapshot(run_dir, each))
        assert writer.wait() is None
    return writer


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_the_last_and_the_best_are_kept_and_load_the_same(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep=2)
    for steps, best_step in ((1, 0), (2, 0), (3, 2), (4, 2), (5, 4)):
        if best_step == steps - 1:
            writer.best = steps, copy_weights(model_after(steps))
        writer.write(snapshot(tmp_path, steps, best_step))
        assert writer.wait() is None
        if steps == 4:
            assert names(tmp_path) == ["best", "best-00000003", "last", "step-00000003", "step-00000004"]
    # the best of step 4 is still needed: who resumes there has it as the best so far
    assert names(tmp_path) == [
        "best",
        "best-00000003",
        "best-00000005",
        "last",
        "step-00000004",
        "step-00000005",
    ]
    for name, steps in (("last", 5), ("best", 5), ("step-00000004", 4), ("best-00000003", 3)):
        weights = open_weights(str(tmp_path / "checkpoints" / name))
        loaded = build_model(weights)
        assert weights.trained == CONFIG
        expected = model_after(steps).state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
    folder = tmp_path / "checkpoints" / "step-00000004"
    saved = read_training_state(folder)
    kept = saved.optimizer["tok_emb.weight"]
    assert torch.equal(torch.as_tensor(kept["exp_avg"]), torch.full((31, 16), 4.0))
    assert (kept["calls"], saved.batches) == (4, {"epoch": 0, "position": 4})
    assert json.loads((folder / "config.json").read_text())["format_version"] == 2  # not in parts
    assert (folder / "metrics.jsonl").read_text().count("\n") == 4


def test_a_best_that_is_found_while_a_checkpoint_waits_to_be_written_is_kept(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep=2)
    writer.best = 1, copy_weights(model_after(1))
    turn = threading.Event()
    writer._pool.submit(turn.wait)  # as on a busy machine, the thread is late
    writer.write(snapshot(tmp_path, 1, best_step=0))
    writer.best = 2, copy_weights(model_after(2))  # training continues meanwhile
    turn.set()
    assert writer.wait() is None
    assert names(tmp_path) == ["best", "best-00000001", "last", "step-00000001"]
    writer.write(snapshot(tmp_path, 3, best_step=1))
    assert writer.wait() is None
    assert (tmp_path / "checkpoints" / "best").readlink().name == "best-00000002"
    assert find_checkpoint(str(tmp_path / "checkpoints" / "best")).name == "best-00000002"


def test_checksums_are_those_of_sha256sum(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = find_checkpoint(str(tmp_path))
    assert subprocess.run(["sha256sum", "-c", CHECKSUMS], cwd=folder, capture_output=True).returncode == 0
    assert (folder / "model.safetensors").stat().st_mode & 0o444 == 0o444  # a group reads it too
    listed = {line.split()[1] for line in (folder / CHECKSUMS).read_text().splitlines()}
    assert listed == {file.name for file in folder.iterdir()} - {CHECKSUMS}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", [*STEP_FILES, CHECKSUMS])
def test_a_damaged_checkpoint_is_skipped(
    tmp_path: Path, name: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "run", 1, 2)
    save(tmp_path / "other", 3)
    newest = tmp_path / "run" / "checkpoints" / "step-00000002"
    other = tmp_path / "other" / "checkpoints" / "step-00000003" / name
    before = (newest / name).read_bytes()
    damage_file(newest / name, kind, other, random.Random(f"{name} {kind}"))
    if kind != "missing" and (newest / name).read_bytes() == before:
        pytest.skip("the same in both runs")
    assert newest_whole(tmp_path / "run", STEP_FILES).name == "step-00000001"
    assert "step-00000002 is skipped: " in caplog.text


def test_a_whole_checkpoint_of_another_run_is_skipped(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    assert newest_whole(tmp_path, STEP_FILES, "0123abcd").name == "step-00000002"
    with pytest.raises(UserError, match=r"no checkpoint of .* in step-00000001 it belongs to another"):
        newest_whole(tmp_path, STEP_FILES, "ffffffff")


def test_a_full_disk_leaves_the_old_checkpoints_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = save(tmp_path, 1)
    writer.best = 2, copy_weights(model_after(2))

    write = Staging.write

    def full_disk(staging: Staging, files: dict[Path, Place]) -> dict[Path, str]:
        write(staging, dict(list(files.items())[:1]))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "write", full_disk)
        writer.write(snapshot(tmp_path, 2, best_step=1))
        error = writer.wait()
    assert "No space left on device (it takes " in str(error)
    assert "checkpoint not saved" in caplog.text
    assert not writer.has_saved(2)
    assert names(tmp_path) == ["last", "step-00000001"]
    assert find_checkpoint(str(tmp_path)).name == "step-00000001"
    writer.write(snapshot(tmp_path, 3, best_step=1))
    assert writer.wait() is None
    assert names(tmp_path) == ["best", "best-00000002", "last", "step-00000001", "step-00000003"]


def test_too_little_room_is_seen_before_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = save(tmp_path, 1)
    monkeypatch.setattr("llm.files._room", lambda folder: 1000)
    monkeypatch.setattr(Staging, "stage", None)  # not to be called
    writer.write(snapshot(tmp_path, 2))
    # 3888 weights and 496 averages of 4 bytes, 5056 bytes of a random state, and two lines of 12
    assert str(writer.wait()).endswith("(it takes 22.6kB, and 1kB are free)")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    writer = CheckpointWriter(tmp_path, keep=2)
    writer.write(snapshot(tmp_path, 1))
    assert "step-00000001: File exists" in str(writer.wait())


def test_a_crash_of_the_writer_is_not_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*arguments: object) -> None:
        raise ZeroDivisionError

    writer = save(tmp_path, 1)
    monkeypatch.setattr(writing, "prune", crash)
    writer.write(snapshot(tmp_path, 2))
    with pytest.raises(ZeroDivisionError):
        writer.wait()


def test_what_is_not_read_back_as_written_is_an_error(tmp_path: Path) -> None:
    class BadMemory:
        reads = 0

        def __getitem__(self, place: slice) -> bytes:
            self.reads += 1
            return b"other" if self.reads > 1 else b"first"

    with pytest.raises(OSError, match="weights was not read back as it was written"):
        file_writer.write(BadMemory(), tmp_path / "weights", 0, 5)  # type: ignore[arg-type]


def test_the_content_that_is_staged_is_that_of_the_safetensors_library(tmp_path: Path) -> None:
    tensors = {
        "b.weight": torch.randn(300, 70),
        "a": torch.randn(()),
        "é": torch.randn(3, 4, 5).bfloat16(),
        "random state": torch.arange(5000).to(torch.uint8),
        "position": torch.arange(3),
        "none": torch.zeros(0, 4),
    }
    staging, name = Staging(), tmp_path / "one.safetensors"
    places = staging.stage({tmp_path / "other": {"x": torch.ones(3)}, name: tensors})
    checksum = staging.write(places)[name]
    save_file(tensors, tmp_path / "expected")
    assert name.read_bytes() == (tmp_path / "expected").read_bytes()
    assert checksum == sha256(tmp_path / "expected")


def test_a_writing_process_that_dies_fails_one_checkpoint(tmp_path: Path) -> None:
    writer = save(tmp_path, 1)
    process = writer._staging._writer
    assert process
    process.send_signal(signal.SIGSTOP)  # so that it is killed in the middle
    os.waitpid(process.pid, os.WUNTRACED)  # until it has stopped
    writer.write(snapshot(tmp_path, 2))
    assert process.stdin
    while not int.from_bytes(fcntl.ioctl(process.stdin, termios.FIONREAD, bytes(4)), sys.byteorder):
        time.sleep(0.01)  # until it is asked to write
    process.kill()
    assert "the process that writes checkpoints was killed by SIGKILL" in str(writer.wait())
    assert names(tmp_path) == ["last", "step-00000001"]
    writer.write(snapshot(tmp_path, 3))
    assert writer.wait() is None
    assert names(tmp_path) == ["last", "step-00000001", "step-00000003"]


class _Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("bomb-went-off",)


def seal(folder: Path) -> None:
    """Give a changed checkpoint the right checksums, as who wants to deceive would."""
    sums = subprocess.run(["sha256sum", *STEP_FILES], cwd=folder, capture_output=True, text=True).stdout
    (folder / CHECKSUMS).write_text(sums)


def test_a_pickle_bomb_does_not_go_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path, 1)
    folder = find_checkpoint(str(tmp_path))
    for name in ("training_state.safetensors", "model.safetensors"):
        torch.save({"steps": _Bomb()}, folder / name)
        seal(folder)
        with pytest.raises(UserError, match="damaged or of another format"):
            read_training_state(folder) if "state" in name else open_weights(str(folder))
        (folder / name).write_bytes(pickle.dumps(_Bomb(), protocol=2))
        seal(folder)
        with pytest.raises(UserError, match="damaged or of another format"):
            read_training_state(folder) if "state" in name else open_weights(str(folder))
    assert not (tmp_path / "bomb-went-off").exists()


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("n_layers", 10**4, "holds another model: n_layers=1, not 10000"),
        ("emb_dim", 10**6, "holds another model: emb_dim=16, not 1000000"),
        ("vocab_size", 32, "holds another model: vocab_size=31, not 32"),
        ("context_length", 9, "pos_emb.weight has shape (8, 16), and the config's model wants (9, 16)"),
        ("n_heads", 3, "config.json is damaged or of another version: model.emb_dim=16 cannot be divided"),
        ("tie_weights", False, "out_head.weight has shape nothing, and the config's model wants (31, 16)"),
        ("surprise", 1, "surprise"),
        ("emb_dim", "wide", "config.json is damaged or of another format"),
    ],
)
def test_a_config_that_lies_is_refused_before_memory_is_taken(
    tmp_path: Path, key: str, value: object, line: str
) -> None:
    save(tmp_path, 1)
    folder = find_checkpoint(str(tmp_path))
    config = json.loads((folder / "config.json").read_text())
    config["model"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    seal(folder)
    with pytest.raises(UserError) as error:
        build_model(open_weights(str(folder)))
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_checksums_name_no_file_outside(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = find_checkpoint(str(tmp_path))
    (folder / CHECKSUMS).write_text(f"{'0' * 64}  ../../../etc/passwd\n")
    with pytest.raises(UserError, match=r"SHA256SUMS does not list model\.safetensors"):
        open_weights(str(folder))
    assert newest_whole_or_error(tmp_path) == "SHA256SUMS does not list model.safetensors"


def newest_whole_or_error(run_dir: Path) -> str:
    with pytest.raises(UserError) as error:
        newest_whole(run_dir, BEST_FILES)
    return str(error.value).partition("in step-00000001 ")[2]


def test_state_that_is_no_object_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = find_checkpoint(str(tmp_path))
    (folder / "training_state.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="damaged or of another format"):
        read_state(folder)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_survives_by_name(name: str) -> None:
    model = model_after(1)
    optimizers = build_optimizers(model, OptimizerConfig(name=name), CPU)
    model(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])).backward()
    optimizers.step()
    state = optimizers.state(model)
    assert state.keys() == dict(model.named_parameters()).keys()
    again = build_optimizers(model, OptimizerConfig(name=name), CPU)
    again.load_state(model, state, "here")
    for ours, theirs in zip(optimizers.parts, again.parts, strict=True):
        assert ours.state_dict()["param_groups"] == theirs.state_dict()["param_groups"]
        for number, averages in ours.state_dict()["state"].items():
            for key, tensor in averages.items():
                assert torch.equal(tensor, theirs.state_dict()["state"][number][key])
    state["another.weight"] = state["tok_emb.weight"]
    with pytest.raises(UserError, match=r"here holds optimizer state for another\.weight"):
        again.load_state(model, state, "here")


def test_a_checkpoint_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = find_checkpoint(str(tmp_path))
    config = json.loads((folder / "config.json").read_text())
    for version in (FORMAT_VERSION + 1, "two"):
        (folder / "config.json").write_text(json.dumps({**config, "format_version": version}))
        seal(folder)
        with pytest.raises(UserError, match=f"format version {version}, and this program reads up to"):
            open_weights(str(folder))
