"""Runs on file systems that are read-only for a while, or have no links, no locks or no home folder."""

import errno
import fcntl
import io
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Script, numbers
from drill import outcome
from settings import changed, settings

from llm.checkpoints.training_state import TrainingState
from llm.checkpoints.writing import NOT_SAVED, CheckpointWriter, Snapshot
from llm.commands.pretrain import pretrain
from llm.errors import UserError
from llm.files import append_json_lines, cache_folder, expanded, replacing, write_json, write_text
from llm.training.recorder import Recorder

pytestmark = pytest.mark.usefixtures("no_pictures")


def refuse(
    monkeypatch: pytest.MonkeyPatch, place: Any, name: str, number: int, when: Callable[..., bool]
) -> None:
    """Let a call of the operating system fail with an error number."""
    original = getattr(place, name)

    def call(*arguments: Any, **keywords: Any) -> Any:
        if when(*arguments):
            raise OSError(number, os.strerror(number), str(arguments[0]))
        return original(*arguments, **keywords)

    monkeypatch.setattr(place, name, call)


def let_the_disk_fail(disk: pytest.MonkeyPatch, folder: Path, number: int) -> None:
    """Let nothing be written below a folder, as if its disk were read-only, full or away."""

    def writes(path: Any, mode: str = "w", *_: Any) -> bool:
        inside = not isinstance(path, int) and Path(path).is_relative_to(folder)
        return inside and mode.strip("rb") != ""

    refuse(disk, io, "open", number, writes)
    refuse(disk, os, "open", number, lambda path, flags, *_: flags & os.O_CREAT and writes(path))
    # A stale handle of a network file system cannot even be looked at.
    looks = ("stat", "lstat", "listdir", "scandir") if number == errno.ESTALE else ()
    for name in ("mkdir", "unlink", "replace", "symlink", "rmdir", *looks):
        refuse(disk, os, name, number, lambda path, *_: writes(path))


@pytest.fixture
def disk() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.mark.parametrize("number", [errno.EROFS, errno.ESTALE])
def test_a_disk_that_fails_for_a_while_costs_nothing(
    tmp_path: Path,
    disk: pytest.MonkeyPatch,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    config = changed(settings(tmp_path), checkpoint__every_steps=2)
    pretrain(config, tmp_path / "whole")
    original = Recorder.updated

    def updated(self: Recorder, metrics: dict[str, float]) -> None:
        if self.run.counters.step == 5:
            self.writer.wait()
            let_the_disk_fail(disk, tmp_path / "run", number)
        if self.run.counters.step == 9:
            self.writer.wait()
            disk.undo()
        original(self, metrics)

    monkeypatch.setattr(Recorder, "updated", updated)
    pretrain(config, tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    said = os.strerror(number)
    assert f"{tmp_path}/run/metrics.jsonl: {said}; its lines stay in memory" in caplog.text
    assert f"checkpoint not saved: cannot write {tmp_path}/run" in caplog.text


def test_a_disk_that_fails_inside_a_checkpoint_is_tried_again(
    tmp_path: Path, disk: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    state = TrainingState("0123abcd", {}, {}, [], [], {}, {}, None)
    snapshot = Snapshot(3, settings(tmp_path), {}, state, record_sizes={})
    writer = CheckpointWriter(tmp_path / "run", keep=1)
    (tmp_path / "run").mkdir()
    let_the_disk_fail(disk, tmp_path / "run", errno.EROFS)
    writer.best = 1, {"weight": torch.ones(2)}
    writer.write(snapshot)
    error = writer.wait()
    assert isinstance(error, UserError)
    assert "step-00000003: Read-only file system" in str(error)
    assert NOT_SAVED % error in caplog.text


def test_a_disk_that_fails_to_the_end_is_one_error(
    tmp_path: Path, disk: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = settings(tmp_path), tmp_path / "run"
    # A sample is the last thing before the summary.
    monkeypatch.setattr(Recorder, "sample", lambda self: let_the_disk_fail(disk, run, errno.EROFS))
    with pytest.raises(UserError, match=r"cannot write .*/run/summary.json: Read-only file system"):
        pretrain(config, run)
    disk.undo()
    monkeypatch.undo()
    assert pretrain(changed(config, resume=str(run))).status == "finished"


def test_without_links_last_and_best_are_found_all_the_same(
    script: Script, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, os, "symlink", errno.EPERM, lambda *_: True)  # as vfat says
    arguments = [*TINY, "data=text", text, "training.max_steps=6", "checkpoint.every_steps=2"]
    result = script("pretrain", *arguments, "hydra.run.dir=outputs/run")
    assert (result.returncode, result.stderr) == (0, "")
    checkpoints = tmp_path / "outputs" / "run" / "checkpoints"
    assert (checkpoints / "last").read_text() == "step-00000006"
    texts = {}
    for name in ("latest", "outputs/run/checkpoints/last", "outputs/run/checkpoints/step-00000006"):
        result = script("generate", f"checkpoint={name}", "prompt=7 bot", "max_new_tokens=5")
        assert result.returncode == 0, result.stderr
        texts[name] = [line for line in result.stdout.splitlines() if line.startswith("7 bot")]
    assert all(each == texts["latest"] != [] for each in texts.values())
    result = script("evaluate", "checkpoint=outputs/run/checkpoints/best", "text=7 bottles")
    assert result.returncode == 0, result.stderr
    result = script("pretrain", "resume=outputs/run/checkpoints/last", "training.max_steps=8")
    assert (result.returncode, result.stderr) == (0, "")
    assert (checkpoints / "last").read_text() == "step-00000008"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_a_run_says_so_in_a_line(
    script: Script, text: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    refuse(monkeypatch, fcntl, "flock", number, lambda *_: True)
    result = script("pretrain", *TINY, "data=text", text, "training.max_steps=2", "hydra.run.dir=run")
    assert result.returncode == 0, result.stderr
    assert (result.stdout + result.stderr).count("run has no file locks: nothing keeps two processes") == 1
    assert "Traceback" not in result.stderr


def test_a_folder_that_cannot_be_flushed_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse_folders(number: int) -> None:
        monkeypatch.undo()
        refuse(monkeypatch, os, "fsync", number, lambda file: os.path.isdir(f"/proc/self/fd/{file}"))  # noqa: PTH112

    for number in (errno.EINVAL, errno.EACCES, errno.EBADF):
        refuse_folders(number)
        write_text(tmp_path / "file", str(number))
        assert (tmp_path / "file").read_text() == str(number)
        with replacing(tmp_path / "folder") as temporary:
            temporary.mkdir()
    refuse_folders(errno.EIO)
    with pytest.raises(UserError, match="Input/output error"):
        write_text(tmp_path / "file", "lost")


def test_without_a_home_folder_the_cache_is_where_the_run_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # for users without an entry, and no HOME
    for _ in range(2):
        assert cache_folder(None) == tmp_path / "outputs" / "cache"
    assert caplog.text.count("no cache folder for this user (there is no home folder)") == 1
    assert expanded("~/text") == Path("~/text")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")  # where nobody can write
    assert cache_folder(None) == tmp_path / "outputs" / "cache"
    assert cache_folder("/proc/none") == Path("/proc/none")  # as asked for: to fail later, with a line


@pytest.mark.parametrize("umask", [0o077, 0o002])
def test_files_are_as_readable_as_the_user_lets_new_files_be(tmp_path: Path, umask: int) -> None:
    config = settings(tmp_path, max_steps=2)
    config.tracking.mode = "offline"
    before = os.umask(umask)
    try:
        (tmp_path / "shared").mkdir()
        (tmp_path / "shared").chmod(0o2777 & ~umask)  # what is new in it has its group
        pretrain(config, tmp_path / "shared" / "run")
    finally:
        os.umask(before)
    ours = [path for path in (tmp_path / "shared" / "run").rglob("*") if "wandb" not in path.parts]
    assert len(ours) > 10
    for path in ours:
        if not path.is_symlink():
            expected = 0o2777 if path.is_dir() else 0o666
            assert path.stat().st_mode & 0o7777 == expected & ~umask, path
    assert numbers(tmp_path / "shared" / "run")


def test_without_a_home_that_can_be_written_a_run_is_tracked_all_the_same(
    script: Script, environment: dict[str, str], text: str
) -> None:
    environment["HOME"] = "/proc/none"
    arguments = [*TINY, "tracking=offline", "data=text", text, "training.max_steps=2"]
    result = script("pretrain", *arguments, "hydra.run.dir=run")
    assert (result.returncode, result.stderr) == (0, "")


def test_what_json_does_not_know_is_null(tmp_path: Path) -> None:
    value = {"perplexity": math.inf, "losses": [1.5, math.nan], "steps": 3, "name": "inf"}
    expected = {"perplexity": None, "losses": [1.5, None], "steps": 3, "name": "inf"}
    write_json(tmp_path / "one.json", value)
    append_json_lines(tmp_path / "lines.jsonl", [value])
    for name in ("one.json", "lines.jsonl"):
        assert json.loads((tmp_path / name).read_text("utf-8")) == expected
        assert "nf" not in (tmp_path / name).read_text("utf-8").replace('"inf"', "")
