"""Sweeps as a user runs them: killed and resumed, side by side, as submitit's jobs."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import TINY, Begin, Script, numbers
from scripts import HANGS, ScriptProcess

from llm.sweeps.jobs import read_jobs

pytestmark = pytest.mark.usefixtures("no_pictures")

SWEEP = ("-m", *TINY, "data=text", "training.max_steps=40", "checkpoint.every_steps=2")


def wait_for_checkpoint(process: ScriptProcess, job: Path) -> None:
    while process.is_alive() and not (job / "checkpoints" / "last").exists():
        time.sleep(0.02)


def kill_process_of(job: Path) -> None:
    """Kill the process that trains in a folder, found by the lock that it holds."""
    inode = (job / ".run.lock").stat().st_ino
    [line] = [line for line in Path("/proc/locks").read_text().splitlines() if f":{inode} " in line]
    os.kill(int(line.split()[4]), signal.SIGKILL)


def test_a_sweep_that_was_killed_resumes_as_if_it_had_not_been(
    begin: Begin, script: Script, tmp_path: Path, text: str
) -> None:
    values = (text, "optimizer.lr=4e-4,-1,5e-4", "tracking=disabled")
    whole = script("pretrain", *SWEEP, *values, "hydra.sweep.dir=whole")
    assert whole.returncode == 1
    killed = begin(*SWEEP, *values, "hydra.sweep.dir=sweep")
    wait_for_checkpoint(killed, tmp_path / "sweep" / "2")
    killed.send_signal(signal.SIGKILL, group=True)
    killed.output()
    assert [job.state for job in read_jobs([tmp_path / "sweep"])] == ["finished", "failed", "killed"]
    refused = script("pretrain", "-m", "sweep.resume=sweep", "training.max_steps=50")
    assert refused.stderr == (
        "error: sweep.resume continues a sweep as it was begun: remove training.max_steps=50\n"
    )
    resumed = script("pretrain", "-m", "sweep.resume=sweep")
    assert resumed.returncode == 1
    assert resumed.stderr.startswith("error: job 1 (lr=-1): optimizer.lr=-1.0: must be above 0 (peak")
    assert len(resumed.stderr.splitlines()) == 1
    assert "job 0" not in resumed.stdout[: resumed.stdout.index("job  set")]  # it was finished
    summary = json.loads((tmp_path / "sweep" / "2" / "summary.json").read_text("utf-8"))
    assert summary["resumed"][0]["steps"] > 0
    for job in "02":
        assert numbers(tmp_path / "sweep" / job) == numbers(tmp_path / "whole" / job) != []
    for result, folder in ((whole, "whole"), (resumed, "sweep")):
        table = result.stdout[result.stdout.index("job  set") :].splitlines()
        assert [line.split()[:3] for line in table[1:4]] == [
            ["0", "lr=4e-4", "finished"],
            ["1", "lr=-1", "failed"],
            ["2", "lr=5e-4", "finished"],
        ]
        assert table[-1] == f"resume      python experiments/pretrain.py -m sweep.resume={folder}"
    config = json.loads(
        (tmp_path / "sweep" / "2" / "checkpoints" / "last" / "config.json").read_text("utf-8")
    )
    assert (config["tracking"]["name"], config["tracking"]["group"]) == ("lr=5e-4", "sweep")


def test_an_extended_sweep_keeps_its_jobs_and_is_killed_and_resumed_like_any(
    begin: Begin, script: Script, tmp_path: Path, text: str
) -> None:
    steps = ("data=text", text, "training.max_steps=20", "checkpoint.every_steps=2")
    assert script("pretrain", "-m", *TINY, *steps, "hydra.sweep.dir=sweep").returncode == 0
    before = (tmp_path / "sweep" / "0" / "summary.json").read_bytes()
    killed = begin("sweep.extend=sweep", "seed=7,123")  # the second by default
    wait_for_checkpoint(killed, tmp_path / "sweep" / "1")
    killed.send_signal(signal.SIGKILL, group=True)
    assert killed.output()[0].startswith("jobs: 1 new, 1 from before; asked for and there already: 1\n")
    resumed = script("pretrain", "sweep.resume=sweep")
    assert resumed.returncode == 0, resumed.stderr
    assert (tmp_path / "sweep" / "0" / "summary.json").read_bytes() == before
    assert [(job.title, job.state) for job in read_jobs([tmp_path / "sweep"])] == [
        ("seed=123", "finished"),
        ("seed=7", "finished"),
    ]
    assert [line["step"] for line in numbers(tmp_path / "sweep" / "1") if "lr" in line] == [*range(20)]
    summary = json.loads((tmp_path / "sweep" / "1" / "summary.json").read_text("utf-8"))
    assert (summary["seed"], len(summary["resumed"])) == (7, 1)
    again = script("pretrain", "sweep.resume=sweep", "seed=9")
    assert again.stderr == "error: sweep.resume continues a sweep as it was begun: remove seed=9\n"


def test_jobs_side_by_side_share_the_cores_and_one_that_is_killed_does_not_stop_the_others(
    begin: Begin, environment: dict[str, str], tmp_path: Path, text: str
) -> None:
    del environment["OMP_NUM_THREADS"]  # the tests' own
    side_by_side = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    process = begin(*SWEEP, *side_by_side, text, "seed=range(3)", "hydra.sweep.dir=sweep")
    for job in "01":
        wait_for_checkpoint(process, tmp_path / "sweep" / job)
    kill_process_of(tmp_path / "sweep" / "1")
    output, errors = process.output()
    assert (process.exitcode, errors) == (0, ""), output  # joblib breaks: both are resumed
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    for each in read_jobs([tmp_path / "sweep"]):
        assert each.state == "finished"
        assert len([line for line in numbers(each.folder) if "train/loss" in line]) == 40
        assert f", {threads} thread" in each.summary["device"]


def test_jobs_side_by_side_save_and_end_when_their_sweep_is_killed(
    begin: Begin, tmp_path: Path, text: str
) -> None:
    side_by_side = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    endless = ("training.max_steps=100000", "seed=range(3)")
    process = begin(*SWEEP, *side_by_side, *endless, text, "hydra.sweep.dir=sweep")
    for job in "01":
        wait_for_checkpoint(process, tmp_path / "sweep" / job)
    process.kill()
    deadline = time.monotonic() + HANGS
    while processes_in(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [job.state for job in read_jobs([tmp_path / "sweep"])] == ["interrupted", "interrupted", "waiting"]
    assert processes_in(tmp_path) == []


def processes_in(folder: Path) -> list[str]:
    """The processes that work in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            if (process / "cwd").readlink() == folder:
                found.append(process.name)
    return found


def trained_by(job: Path) -> int:
    """How many processes shared a run."""
    [count] = re.findall(r"; (\d+) processes$", (job / "pretrain.log").read_text("utf-8"), re.MULTILINE)
    return int(count)


def test_tasks_of_submitit_are_one_run_and_end_with_its_first_process(
    begin: Begin, tmp_path: Path, text: str
) -> None:
    two = "hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2"
    process = begin(*SWEEP, *two, text, "seed=1,2", "hydra.sweep.dir=sweep")
    wait_for_checkpoint(process, tmp_path / "sweep" / "0")
    kill_process_of(tmp_path / "sweep" / "0")
    _, errors = process.output()
    assert process.exitcode == 1
    assert errors == "error: job 0 (seed=1): its process was killed; it may have run out of memory\n"
    assert [job.state for job in read_jobs([tmp_path / "sweep"])] == ["failed", "finished"]
    assert trained_by(tmp_path / "sweep" / "1") == 2
    training = [line["step"] for line in numbers(tmp_path / "sweep" / "1") if "train/loss" in line]
    assert training == [*range(40)]
    assert processes_in(tmp_path) == []


def slurm_answers() -> bool:
    return bool(shutil.which("sinfo")) and subprocess.run(["sinfo"], capture_output=True).returncode == 0


@pytest.mark.skipif(not slurm_answers(), reason="there is no Slurm here")
def test_an_array_of_slurm_trains_each_run_in_two_tasks(script: Script, tmp_path: Path, text: str) -> None:
    tasks = "hydra.launcher.gpus_per_node=null", "hydra.launcher.tasks_per_node=2"
    cores = "hydra.launcher.cpus_per_task=1"
    slurm = "hydra/launcher=submitit_slurm", *tasks, cores
    swept = script("pretrain", *SWEEP, *slurm, text, "seed=1,2", "hydra.sweep.dir=sweep")
    assert (swept.returncode, swept.stderr) == (0, "")
    assert [trained_by(tmp_path / "sweep" / job) for job in "01"] == [2, 2]


@pytest.mark.parametrize(
    ("number", "to_all", "side_by_side"),
    [
        (signal.SIGINT, True, False),
        (signal.SIGTERM, False, False),
        (signal.SIGINT, True, True),
        (signal.SIGTERM, False, True),
        (signal.SIGHUP, True, False),  # its terminal was closed
    ],
)
def test_a_sweep_that_is_asked_to_stop_saves_its_jobs(
    begin: Begin, tmp_path: Path, text: str, number: signal.Signals, to_all: bool, side_by_side: bool
) -> None:
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"] if side_by_side else []
    process = begin(
        *SWEEP, *launcher, text, "training.max_steps=100000", "seed=1,2,3", "hydra.sweep.dir=sweep"
    )
    running = 2 if launcher else 1
    for each in range(running):
        wait_for_checkpoint(process, tmp_path / "sweep" / str(each))
    process.send_signal(number, group=to_all)
    output, errors = process.output()
    assert process.exitcode == 128 + number, output
    assert errors == ""
    jobs = read_jobs([tmp_path / "sweep"])
    assert [job.state for job in jobs] == ["interrupted"] * running + ["waiting"] * (3 - running)
    for job in jobs[:running]:
        saved = (job.folder / "checkpoints" / "last").readlink().name
        assert saved == f"step-{job.summary['steps']:08d}"
    assert output.endswith("resume      python experiments/pretrain.py -m sweep.resume=sweep\n")
