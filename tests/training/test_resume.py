"""Going on with a run, repeating it, and what may change on the way; through `pretrain` in this process."""

import fcntl
import json
import math
import os
import re
import resource
import shutil
import sys
from contextlib import suppress
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import numbers
from drill import TEXT, outcome
from scripts import FORKED, HANGS
from settings import changed, settings

from llm.checkpoints.checkpoint import STEP_FILES, newest_whole, read_state
from llm.commands.pretrain import pretrain
from llm.config import PretrainConfig, ScheduleConfig, TokenizerConfig
from llm.device import device_errors_in_one_line
from llm.errors import UserError
from llm.files import read_json_lines
from llm.generation.inference import NOT_FINITE
from llm.run_folder import GOING_BACK, step_folders
from llm.training.loop import watch
from llm.training.plots import plot_losses
from llm.training.start import Start, rewind
from llm.training.summary import Counters

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"model__emb_dim": 32}, "model.emb_dim=32 (it is 16) cannot change within a run"),
        (
            {"tokenizer__name": "gpt2", "model__vocab_size": 50257},
            "model.vocab_size=50257 (it is 257), token",
        ),
        ({"data__batch_size": 4, "seed": 7}, "data.batch_size=4 (it is 2), seed=7 (it is 123) cannot change"),
        ({"optimizer__name": "adamw"}, "optimizer.name=adamw (it is muon) cannot change"),
        ({"training__accumulate": 2}, "training.accumulate=2 (it is 1) cannot change"),
    ],
)
def test_what_cannot_change_is_refused_by_name(tmp_path: Path, values: dict[str, Any], line: str) -> None:
    config = settings(tmp_path, max_steps=2)
    pretrain(config, tmp_path / "run")
    summary = (tmp_path / "run" / "summary.json").read_text()
    before = outcome(tmp_path / "run")
    again = changed(config, resume=str(tmp_path / "run"), training__max_steps=4, **values)
    with pytest.raises(UserError) as error:
        pretrain(again, given={"training.max_steps", *(key.replace("__", ".") for key in values)})
    assert line in str(error.value)
    assert "init_from=" in str(error.value)
    assert (tmp_path / "run" / "summary.json").read_text() == summary
    assert outcome(tmp_path / "run") == before


def test_another_text_is_refused_wherever_it_lies(tmp_path: Path) -> None:
    config = settings(tmp_path, max_steps=2)
    pretrain(config, tmp_path / "run")
    again = changed(config, resume=str(tmp_path / "run"), training__max_steps=4)
    (tmp_path / "moved.txt").write_text(TEXT, encoding="utf-8")
    pretrain(changed(again, data__path=str(tmp_path / "moved.txt")))
    (tmp_path / "moved.txt").write_text(TEXT.replace("beer", "wine"), encoding="utf-8")
    with pytest.raises(UserError, match=r"the text or its tokens are not those that .* was trained on"):
        pretrain(changed(again, data__path=str(tmp_path / "moved.txt"), training__max_steps=6))


def test_what_may_change_is_shown_and_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    config = settings(tmp_path)
    pretrain(config, tmp_path / "run")
    again = changed(config, resume=str(tmp_path / "run"), training__max_steps=14, optimizer__lr=0.03125)
    summary = pretrain(again)
    assert "changed    optimizer.lr=0.03125 (it was 0.015)" in caplog.text
    change = {"training.max_steps": [12, 14], "optimizer.lr": [0.015, 0.03125]}
    assert [(each["steps"], each["changed"]) for each in summary.resumed] == [(12, change)]
    with pytest.raises(UserError, match=r"training\.max_steps=14 is spent; to continue, raise it"):
        pretrain(again)


def test_a_run_killed_after_its_last_update_is_concluded(tmp_path: Path) -> None:
    config = settings(tmp_path)
    pretrain(config, tmp_path / "whole")
    pretrain(config, tmp_path / "run")
    summary_file = tmp_path / "run" / "summary.json"
    finished = json.loads(summary_file.read_text())
    summary_file.write_text(json.dumps({**finished, "status": "running", "val_loss": None}))
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0, "tra')  # and this too was cut off
    summary = pretrain(changed(config, resume=str(tmp_path / "run")))
    assert (summary.status, summary.val_loss) == ("finished", finished["val_loss"])
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_an_earlier_checkpoint_can_be_gone_back_to(tmp_path: Path) -> None:
    config = settings(tmp_path)
    pretrain(config, tmp_path / "whole")
    pretrain(config, tmp_path / "run")
    newest, earlier = step_folders(tmp_path / "run")
    assert (newest.name, earlier.name) == ("step-00000012", "step-00000010")
    pretrain(changed(config, resume=str(earlier)))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    (earlier / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"cannot be resumed: config\.json does not match its checksum"):
        pretrain(changed(config, resume=str(earlier)))


class Kill(BaseException):
    pass


def kill_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the process end before its n-th change of a folder's names."""
    count = 0

    def counted(change: Any) -> Any:
        def change_or_end(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                raise Kill
            return change(*arguments, **named)

        return change_or_end

    for name in ("replace", "unlink", "symlink_to"):
        monkeypatch.setattr(Path, name, counted(getattr(Path, name)))


def test_who_goes_back_is_back_wherever_it_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = changed(settings(tmp_path), checkpoint__keep=4, checkpoint__every_steps=2)
    pretrain(config, tmp_path / "run")
    folders = step_folders(tmp_path / "run")
    states = {folder.name: read_state(folder)["counters"]["best_step"] for folder in folders}
    assert [*states] == [f"step-{steps:08d}" for steps in (12, 10, 8, 6)]
    assert states["step-00000008"] != states["step-00000012"]  # another best one
    ends = []
    for number in count(1):
        run = tmp_path / f"killed-{number}"
        shutil.copytree(tmp_path / "run", run, symlinks=True)
        chosen = run / "checkpoints" / "step-00000008"
        with monkeypatch.context() as patch, suppress(Kill):
            kill_at(patch, number)
            rewind(Start(config, run, "", chosen))
            break  # there are no more changes to be killed at
        newest = newest_whole(run, STEP_FILES)  # where `resume=latest` continues
        ends.append(newest.name)
        has_begun = json.loads((run / "summary.json").read_text())["status"] == "running"
        assert newest.name == "step-00000012" if not has_begun else newest.name in states
        rewind(Start(config, run, "", newest))
        best = run / "checkpoints" / f"best-{states[newest.name] + 1:08d}"
        assert (run / "checkpoints" / "best").resolve() == best
        assert (run / "checkpoints" / "last").resolve() == newest
        assert (run / "metrics.jsonl").read_bytes() == (newest / "metrics.jsonl").read_bytes()
        assert not (run / "checkpoints" / GOING_BACK).exists()
    assert set(ends) == {"step-00000012", "step-00000008"}
    assert ends == sorted(ends, reverse=True)  # from one moment on, it is back
    assert len(ends) > 12
    before = {folder.name for folder in (run / "checkpoints").glob("abandoned-*")}
    assert {"abandoned-step-00000012", "abandoned-step-00000010"} <= before
    assert not (run / "loss.png").exists()


def test_a_run_that_went_back_and_was_killed_does_not_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    config = settings(tmp_path)
    pretrain(config, tmp_path / "whole")
    pretrain(config, tmp_path / "run")
    earlier = step_folders(tmp_path / "run")[1]

    def end(*arguments: Any) -> None:
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert (summary["status"], summary["val_loss"]) == ("running", None)
        raise Kill

    back = changed(config, resume=str(earlier), optimizer__lr=0.02)
    with monkeypatch.context() as patch:
        patch.setattr("llm.training.lifecycle.train", end)
        with pytest.raises(Kill):
            pretrain(back)
    aside = tmp_path / "run" / "checkpoints" / "abandoned-step-00000012"
    assert f"to return to it: python experiments/pretrain.py resume={aside}" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr("llm.training.lifecycle.train", end)
        with pytest.raises(Kill):
            pretrain(changed(config, resume=str(aside)))  # it was the better one after all
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")
    assert step_folders(tmp_path / "run")[0].name == "step-00000012"
    with monkeypatch.context() as patch:
        patch.setattr("llm.training.lifecycle.train", end)
        with pytest.raises(Kill):
            pretrain(back)
    summary = pretrain(changed(back, resume=str(tmp_path / "run")))
    assert (summary.status, summary.steps) == ("finished", 12)
    assert [each["steps"] for each in summary.resumed] == [10]
    assert numbers(tmp_path / "run")[-1] != numbers(tmp_path / "whole")[-1]
    assert not aside.exists()  # the run has passed it


def test_two_processes_never_share_a_run(tmp_path: Path) -> None:
    config = settings(tmp_path, max_steps=2)
    pretrain(config, tmp_path / "run")
    with (tmp_path / "run" / ".run.lock").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as a process that trains there
        with pytest.raises(UserError, match="is being written by another process"):
            pretrain(changed(config, resume=str(tmp_path / "run"), training__max_steps=4))
    with pytest.raises(UserError, match="already holds a run: continue it with resume="):
        pretrain(config, tmp_path / "run")


def test_a_run_limited_by_the_clock_comes_out_the_same_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    config = changed(settings(tmp_path, max_steps=None, max_minutes=0.01), seed=5)
    first = pretrain(config, tmp_path / "run")
    assert first.steps >= 1
    again = pretrain(
        changed(PretrainConfig(), rerun=str(tmp_path / "run"), tracking__mode="disabled"), tmp_path / "again"
    )
    assert (again.steps, again.seconds, again.seed) == (first.steps, first.seconds, 5)
    assert outcome(tmp_path / "again") == outcome(tmp_path / "run")
    assert "the same numbers as" in caplog.text


def test_a_rerun_takes_changes_once_it_has_finished(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And is a run like others from there on, also where it is killed before its next checkpoint."""
    caplog.set_level("INFO")
    pretrain(settings(tmp_path), tmp_path / "run")
    whole = settings(tmp_path, max_steps=16)
    pretrain(changed(whole, resume=str(tmp_path / "run")))
    rerun = changed(PretrainConfig(), rerun=str(tmp_path / "run"), tracking__mode="disabled")
    with pytest.raises(UserError, match=r"other numbers.*changed after 12 updates: training\.max_steps=16"):
        pretrain(rerun, tmp_path / "again")
    assert (
        "rerun      the original was changed after 12 updates: training.max_steps=16 (it was 12); "
        in caplog.text
    )

    longer = changed(PretrainConfig(), resume=str(tmp_path / "again"), training__max_steps=18)
    summary_file = tmp_path / "again" / "summary.json"
    finished = json.loads(summary_file.read_text())
    summary_file.write_text(json.dumps({**finished, "status": "interrupted"}))
    with pytest.raises(
        UserError, match=r"is a rerun, .*: remove training\.max_steps=18 until it has finished"
    ):
        pretrain(longer, given={"training.max_steps"})
    summary_file.write_text(json.dumps(finished))
    summary = pretrain(longer, given={"training.max_steps"})
    assert (summary.status, summary.steps) == ("finished", 18)
    assert (tmp_path / "again" / "checkpoints" / "last" / "config.json").read_text().count(
        '"rerun": null'
    ) == 1


def test_a_rerun_that_comes_out_otherwise_says_where_and_what_differs(tmp_path: Path) -> None:
    pretrain(settings(tmp_path), tmp_path / "run")
    lines = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    step = next(number for number, line in enumerate(lines) if line["step"] == 7)
    lines[step]["grad_norm"] += 1e-9
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    summary["versions"]["torch"] = "1.0"
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(UserError) as error:
        pretrain(
            changed(PretrainConfig(), rerun=str(tmp_path / "run"), tracking__mode="disabled"),
            tmp_path / "again",
        )
    assert "gave other numbers, first at step 7: grad_norm " in str(error.value)
    assert f"torch {version('torch')} (originally 1.0)" in str(error.value)


def test_updates_that_are_not_finite_are_skipped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = torch.nn.Module.__call__
    losses = []

    def some_are_nan(module: torch.nn.Module, *arguments: Any) -> Any:
        result = forward(module, *arguments)
        if type(module).__name__ == "GPTModel" and module.training and len(arguments) == 2:
            losses.append(result)
            return result * math.nan if len(losses) in (4, 5) else result
        return result

    config = settings(tmp_path, max_skipped=2)
    monkeypatch.setattr(torch.nn.Module, "__call__", some_are_nan)
    summary = pretrain(config, tmp_path / "run")
    assert (summary.status, summary.steps, summary.skipped) == ("finished", 12, 2)
    steps = [line for line in read_json_lines(tmp_path / "run" / "metrics.jsonl") if "train/loss" in line]
    assert [line["train/loss"] is None for line in steps] == [number in (3, 4) for number in range(12)]
    assert [line.get("skipped") for line in steps[2:6]] == [None, 1, 2, None]
    assert plot_losses(tmp_path / "run").exists()
    losses.clear()
    with pytest.raises(UserError, match=r"step 4: loss nan with gradient norm nan is not finite"):
        pretrain(changed(config, training__max_skipped=1), tmp_path / "stopped")


def test_the_last_good_checkpoint_is_from_before_the_weights_went_astray(tmp_path: Path) -> None:
    config = settings(tmp_path, max_steps=5, grad_clip=None)
    config = changed(config, optimizer__name="adamw", optimizer__lr=0.001, schedule__name="constant")
    config.schedule.warmup = 0
    config.checkpoint.every_steps = 1
    pretrain(config, tmp_path / "run")
    # update 5 ruins the weights, so that no later loss is finite; those of update 6 are saved all the same
    astray = changed(config, resume=str(tmp_path / "run"), optimizer__lr=1e30, training__max_steps=12)
    for skipped, step in ((0, 6), (2, 8)):
        with pytest.raises(UserError) as error:
            pretrain(changed(astray, training__max_skipped=skipped))
        assert f"step {step}: loss nan" in str(error.value)
        assert f"the last good checkpoint is {tmp_path}/run/checkpoints/step-00000005;" in str(error.value)
    good = tmp_path / "run" / "checkpoints" / "step-00000005"
    summary = pretrain(changed(config, resume=str(good), training__max_steps=8))
    assert (summary.status, summary.steps, summary.skipped) == ("finished", 8, 0)
    losses = [line for line in read_json_lines(tmp_path / "run" / "metrics.jsonl") if "train/loss" in line]
    assert [line["step"] for line in losses] == list(range(8))
    assert all(line["train/loss"] < 6 for line in losses)


@pytest.mark.parametrize(
    ("last", "why"),
    [
        (3, "step 2: the loss after this update is not finite"),  # in the evaluation after the last update
        (4, NOT_FINITE),  # in a sample, while there are updates to come
    ],
)
def test_weights_that_have_gone_astray_are_not_saved(tmp_path: Path, last: int, why: str) -> None:
    """The loss of the update that ruins them is finite: it is that of the weights before."""
    config = settings(tmp_path, max_steps=2, eval_freq=None, grad_clip=None)
    config = changed(config, optimizer__name="adamw", optimizer__lr=1e-3, schedule__name="constant")
    config.schedule.warmup = 0
    config.checkpoint.every_steps = 1
    pretrain(config, tmp_path / "run")
    config = changed(config, resume=str(tmp_path / "run"), optimizer__lr=1e30, training__max_steps=last)
    config.samples.every_minutes = 1e-9
    good = tmp_path / "run" / "checkpoints" / "step-00000002"
    with pytest.raises(UserError, match=re.escape(f"{why}; the last good checkpoint is {good};")):
        pretrain(config)
    assert not (good.parent / "step-00000003").exists()


def test_gradient_norm_spikes_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    class Stub:
        config = PretrainConfig()
        counters = Counters()

    run: Any = Stub()
    for step in range(40):
        run.counters.steps = step
        watch(run, True, 2.0, 5.0 if step in (10, 30) else 1.0 + 0.1 * (step % 3))
    assert run.counters.grad_norm_spikes == 1  # at step 10 the norm's mean says little yet
    assert "step 30: gradient norm 5, " in caplog.text


def test_out_of_memory_is_one_line_with_the_sizes(tmp_path: Path) -> None:
    """In a process with little room to address; CPUs have no other way to run out."""
    (tmp_path / "text.txt").write_text(TEXT * 40, encoding="utf-8")
    process = FORKED.Process(target=_train_in_little_room, args=(tmp_path,))
    process.start()
    process.join(HANGS)
    [line] = (tmp_path / "stderr.txt").read_text("utf-8").splitlines()
    assert line.startswith("out of memory (")
    assert "1000 windows of 128 tokens; lower data.batch_size=1000" in line
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["error"] == line


def _train_in_little_room(folder: Path) -> None:
    os.chdir(folder)
    with Path("stderr.txt").open("wb") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    config = PretrainConfig(tokenizer=TokenizerConfig("bytes"))
    config.data.path, config.data.cache_dir, config.data.batch_size = "text.txt", "cache", 1000
    config.model.vocab_size, config.tracking.mode, config.runtime.device = 257, "disabled", "cpu"
    room = int(Path("/proc/self/statm").read_text().split()[0]) * 4096 + 600_000_000
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    try:
        pretrain(config, folder / "run")
    except UserError as error:
        print(error, file=sys.stderr)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total …"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB). Tried to allocate 20.00 MiB on …"),
    ],
)
def test_out_of_memory_of_accelerators_is_known(error: RuntimeError) -> None:
    line = r"out of memory \(20\.00 MiB more requested\): the sizes"
    with pytest.raises(UserError, match=line), device_errors_in_one_line(lambda: "the sizes"):
        raise error
    with pytest.raises(RuntimeError, match="another bug"), device_errors_in_one_line(lambda: "the sizes"):
        raise RuntimeError("another bug")


def test_a_compiled_run_has_the_losses_of_a_plain_one_and_resumes_exactly(tmp_path: Path) -> None:
    plain = settings(tmp_path)
    plain.model.drop_rate = 0.0  # whose random draws are the compiler's own
    plain.schedule = ScheduleConfig("constant", warmup=0)  # the same rates in a shorter run
    plain.training.eval_freq = 3  # after the last update of the shorter run too
    compiled = changed(plain, runtime__compile=True)
    pretrain(plain, tmp_path / "plain")
    pretrain(compiled, tmp_path / "whole")
    pretrain(changed(compiled, training__max_steps=7), tmp_path / "run")
    pretrain(changed(compiled, resume=str(tmp_path / "run")))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    assert numbers(tmp_path / "whole") != numbers(tmp_path / "plain")  # it was compiled
    for line, expected in zip(numbers(tmp_path / "whole"), numbers(tmp_path / "plain"), strict=True):
        assert line == pytest.approx(expected, rel=2e-4)


def test_evaluation_and_samples_do_not_move_training(tmp_path: Path) -> None:
    config = changed(settings(tmp_path, max_steps=30), data__train_ratio=0.05)  # of 11 updates an epoch
    pretrain(changed(config, training__eval_freq=1, samples__every_epoch=True), tmp_path / "watched")
    pretrain(changed(config, training__eval_freq=None), tmp_path / "unwatched")
    watched = [line for line in numbers(tmp_path / "watched") if "train/loss" in line]
    *unwatched, last = numbers(tmp_path / "unwatched")
    assert watched == unwatched
    assert (last["step"], "val/loss" in last) == (29, True)
    assert len(read_json_lines(tmp_path / "watched" / "samples.jsonl")) == 3
