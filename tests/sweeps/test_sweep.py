"""Sweeps: what a folder says of its jobs, and the sweepers with a launcher that trains nothing."""

import io
import json
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from arguments import rewritten
from conftest import Script
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.types import HydraContext
from hydra_errors import one_line
from hydra_plugins.race_sweeper import RaceSweeper
from hydra_plugins.sweepers import GridSweeper, OptunaSweeper, RecordedSweeper
from omegaconf import DictConfig
from rich.console import Console
from scripts import FORKED, ROOT
from sweeping.launchers import BASIC, SUBMITIT, Traits, configure_launchers, traits_of

from llm.config import GenerateConfig, PretrainConfig
from llm.config_values import own_defaults
from llm.errors import UserError
from llm.files import held, write_json
from llm.overrides import compact, title_of
from llm.run_folder import LOCK
from llm.sweeps.commands import command_again
from llm.sweeps.comparing import BITS_PER_BYTE, LOSS
from llm.sweeps.jobs import (
    Job,
    find_sweep,
    read_jobs,
    read_record,
    settings_of,
    write_record,
)
from llm.sweeps.race import read_race
from llm.sweeps.report import Report
from llm.sweeps.tracked import Findings
from llm.sweeps.watch import SweepProgress, live_table, sweep_table, watching

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_what_varies_is_what_a_job_is_called() -> None:
    jobs = [
        ["model=tiny", "optimizer.lr=0.0004", "+seed=1", "tracking=offline", "resume=x"],
        ["model=tiny", "optimizer.lr=0.0004", "+seed=2", "tracking=disabled"],
        ["model=tiny", "optimizer.lr=0.02", "+seed=1"],
    ]
    assert [title_of(setting) for setting in settings_of(jobs)] == [
        "lr=4e-4 seed=1",
        "lr=4e-4 seed=2",
        "lr=0.02 seed=1",
    ]


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("0.0004", "4e-4"),
        ("-0.00015", "-1.5e-4"),
        ("0.01", "0.01"),
        ("0.000123456789", "1.23456789e-4"),
        ("1000000", "1000000"),
        ("null", "null"),
        ("0.5", "0.5"),
        ("0.005", "0.005"),
    ],
)
def test_numbers_in_few_characters(value: str, written: str) -> None:
    assert compact(value) == written
    if value != "null":
        assert float(compact(value)) == float(value)


def write_job(folder: Path, overrides: list[str], **summary: Any) -> Path:
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides), encoding="utf-8")
    (folder / ".hydra" / "config.yaml").write_text("optimizer: {lr: 0.01}\nseed: 7\n", encoding="utf-8")
    if summary:
        write_json(folder / "summary.json", summary)
    return folder


def test_a_job_that_does_not_set_a_key_has_its_default(tmp_path: Path) -> None:
    one = write_job(tmp_path / "one", ["optimizer.lr=0.02"], status="finished")
    other = write_job(tmp_path / "other", ["seed=1"], status="finished")
    assert [job.setting for job in read_jobs([one, other])] == [
        {"optimizer.lr": "0.02", "seed": "7"},
        {"seed": "1", "optimizer.lr": "0.01"},
    ]
    with pytest.raises(UserError, match="holds neither a sweep nor a run"):
        read_jobs([tmp_path / "nowhere"])


def test_the_state_of_a_job_is_read_from_its_folder(tmp_path: Path) -> None:
    overrides = [[f"seed={number}"] for number in range(7)]
    write_record(tmp_path, "pretrain", ["seed=range(7)"], ["seed"], overrides)
    write_job(tmp_path / "0", overrides[0], status="finished", val_loss=2.0)
    write_job(tmp_path / "1", overrides[1], status="failed", error="no")
    write_job(tmp_path / "2", overrides[2], status="interrupted", stopped_early="median rule at step 5")
    write_job(tmp_path / "3", overrides[3], status="running")
    write_job(tmp_path / "4", overrides[4])
    write_job(tmp_path / "5", overrides[5], status="running")
    with held(tmp_path / "5" / LOCK) as ours:
        assert ours
        states = [job.state for job in read_jobs([tmp_path])]
    assert states == ["finished", "failed", "stopped", "killed", "killed", "running", "waiting"]
    with held(tmp_path / ".sweep.lock"):  # by whose process the jobs run, though they hold nothing yet
        states = [job.state for job in read_jobs([tmp_path])]
    assert states == ["finished", "failed", "stopped", "running", "running", "running", "waiting"]
    table = sweep_table(read_jobs([tmp_path])).splitlines()
    assert table[1].split() == ["0", "seed=0", "finished", "★", "2.000"]
    assert table[2].split() == ["1", "seed=1", "failed", "–"]
    assert table[8:10] == ["job 1: no", "job 2: stopped early: median rule at step 5"]


def test_a_job_of_a_named_sweep_can_be_run_alone(script: Script, tmp_path: Path) -> None:
    job = Job(tmp_path, "0", ["experiment=sweep_lr", "seed=1", "optimizer.lr=0.1"])
    command = command_again("pretrain", PretrainConfig, job, "data=text", "data.path=nothing")
    assert command
    arguments = shlex.split(command)[2:]
    result = script("pretrain", *arguments, "hydra.run.dir=run")
    assert result.stderr.startswith("error: data.path=nothing: no such file")
    assert [path.name for path in tmp_path.iterdir()] == []  # a run that is refused leaves nothing


def test_progress_counts_what_is_done_of_the_budget(tmp_path: Path) -> None:
    write_record(tmp_path, "pretrain", [], ["seed"], [["seed=0"], ["seed=1"], ["seed=2"], ["seed=3"]])
    write_job(tmp_path / "0", ["seed=0"], status="finished", val_loss=2.5)
    job = write_job(tmp_path / "1", ["seed=1"], status="running")
    (job / ".hydra" / "config.yaml").write_text("training: {max_steps: 10, max_minutes: null}\n", "utf-8")
    lines = [{"step": step, "epoch": 0.1, "seconds": 1.0, "train/loss": 3.0} for step in range(5)]
    text = "\n" + "".join(json.dumps(line) + "\n" for line in lines)
    (job / "metrics.jsonl").write_text(text + '{"step": 9, "tra', encoding="utf-8")
    progress = SweepProgress(tmp_path, since=0.0, total=4)
    assert progress.share() == (1 + 5 / 10) / 4
    assert progress.heading() == "1 of 4 jobs done · 1 running · 2 waiting"
    write_json(job / "summary.json", {"status": "failed", "error": "no"})
    assert progress.poll() == ["1"]
    assert progress.heading().startswith("1 of 4 jobs done · 2 waiting · 1 failed")
    assert progress.best_so_far() == "best: job 0, val loss 2.500"


def rows_of_live_table(folder: Path, jobs: int, ended: int, running: int) -> list[str]:
    """The first column of what a terminal of 20 lines shows of a sweep."""
    overrides = [[f"seed={number}"] for number in range(jobs)]
    write_record(folder, "pretrain", [], ["seed"], overrides)
    for number in range(ended + running):
        about = {"status": "finished", "val_loss": 3.0 - number} if number < ended else {}
        write_job(folder / str(number), overrides[number], **about)
    screen = Console(width=90, file=io.StringIO())
    screen.print(live_table(SweepProgress(folder, since=1.0, total=jobs)))
    lines = screen.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) <= 20
    head = lines.index(next(filter(HEAD.match, lines)))
    return [line.split()[0] for line in lines[head + 1 : -1]]  # without the note below


HEAD = re.compile("job +set ")


def test_the_live_table_has_as_many_jobs_as_the_screen_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "get_terminal_size", lambda *_, **__: os.terminal_size((90, 20)))
    assert rows_of_live_table(tmp_path / "few", 6, 3, 2) == ["0", "1", "2", "3", "4", "5"]
    many = rows_of_live_table(tmp_path / "many", 100, 50, 2)
    assert many[-3:] == ["50", "51", "52"]  # those that run, and the next one
    assert many[:-3] == [str(number) for number in range(50 - len(many) + 3, 50)]  # the last that ended
    assert len(many) == 13


def test_a_name_can_neither_control_the_terminal_nor_style_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    name = "[bold red]x[/] [link=http://a.b]y[/link] \x1b[2J\x1b]52;c;eA==\x07\r\u202e\x9b1m"
    escaped = r"[bold red]x[/] [link=http://a.b]y[/link] \x1b[2J\x1b]52;c;eA==\x07\r\u202e\x9b1m"
    overrides = [[f"data.path={name}"], ["data.path=b"]]
    write_record(tmp_path, "pretrain", [], ["data.path"], overrides)
    write_job(tmp_path / "0", overrides[0], status="failed", error=name)
    screen = Console(width=300, file=io.StringIO(), force_terminal=True, color_system=None)
    progress = SweepProgress(tmp_path, since=1.0, total=2)
    screen.print(live_table(progress))
    table = sweep_table(read_jobs([tmp_path]))
    progress.states = dict.fromkeys(progress.states, "waiting")
    with watching(progress):
        pass
    printed = capsys.readouterr()
    for text in (screen.file.getvalue(), table, printed.err):  # type: ignore[attr-defined]
        assert escaped in text
        assert not re.search("[\x07\x1b\x9b\u202e\r]", text)


# Sweepers, with a launcher that trains nothing


class FakeLauncher:
    """Writes what a job that trained would have left. `act` gives the summary, or raises."""

    def __init__(self, act: Callable[[dict[str, str]], dict[str, Any]]) -> None:
        self.act = act
        self.launched: list[list[int]] = []

    def told(self, *, config: DictConfig, **given: Any) -> "FakeLauncher":
        self.options = config.hydra.launcher
        return self

    def setup(self, *, config: DictConfig, **given: Any) -> None:
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        jobs = [dict(each.split("=", 1) for each in overrides) for overrides in job_overrides]
        folders = [Path(job["hydra.sweep.dir"].strip("'")) / job["hydra.sweep.subdir"] for job in jobs]
        self.launched.append([int(folder.name) for folder in folders])
        for folder, overrides in zip(folders, job_overrides, strict=True):
            (folder / ".hydra").mkdir(parents=True, exist_ok=True)
            write_json(folder / ".hydra" / "overrides.yaml", [o for o in overrides if "hydra" not in o])
        for folder, job in zip(folders, jobs, strict=True):
            write_json(folder / "summary.json", self.act(job))
        return [JobReturn() for _ in jobs]


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeLauncher]:
    """Sweep with overrides by a sweeper whose launcher is fake; returns the launcher."""
    ConfigStore.instance().store(name="pretrain_schema", node=own_defaults(PretrainConfig))
    configure_launchers()
    none = Report(Path("none"), [], Findings("report", "report", {}))  # see test_sweep_report.py
    monkeypatch.setattr("llm.commands.conclude.sweep_report", lambda *_: none)

    def run(
        sweeper: RecordedSweeper,
        act: Callable[[dict[str, str]], dict[str, Any]],
        *arguments: str,
        folder: str = "sweep",
        launcher: str = "basic",
    ) -> FakeLauncher:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            overrides = [f"hydra.sweep.dir={tmp_path / folder}", "hydra.mode=MULTIRUN"]
            overrides += f"hydra/launcher={launcher}".split()
            overrides += [each for each in arguments if each.startswith("runtime.")]
            config = compose("pretrain", overrides=overrides, return_hydra_config=True)
            HydraConfig.instance().set_config(config)
            loader = GlobalHydra.instance().config_loader()
            context = HydraContext(config_loader=loader, callbacks=None)  # type: ignore[arg-type]
            fake = FakeLauncher(act)
            monkeypatch.setattr(Plugins, "instantiate_launcher", lambda _, **given: fake.told(**given))
            sweeper.setup(hydra_context=context, task_function=lambda config: None, config=config)
            sweeper.sweep(list(arguments))
        return fake

    return run


Sweep = Callable[..., FakeLauncher]
Act = Callable[[dict[str, str]], dict[str, Any]]  # a job's overrides to its summary


def finished(job: dict[str, str]) -> dict[str, Any]:
    return {"status": "finished", "val_loss": float(job["seed"])}


def test_a_grid_is_every_combination_recorded_before_it_begins(sweep: Sweep, tmp_path: Path) -> None:
    def act(job: dict[str, str]) -> dict[str, Any]:
        assert len(read_record(tmp_path / "sweep")["jobs"]) == 4
        return finished(job)

    sweep(GridSweeper({"seed": "range(2)"}), act, "optimizer.lr=choice(0.1,0.2)")
    jobs = read_jobs([tmp_path / "sweep"])
    assert [job.overrides for job in jobs] == [
        [f"seed={seed}", f"optimizer.lr={lr}"] for seed in (0, 1) for lr in (0.1, 0.2)
    ]
    assert [job.state for job in jobs] == ["finished"] * 4
    with pytest.raises(UserError, match="holds a sweep already"):
        sweep(GridSweeper(), finished, "seed=1,2")


def test_only_what_has_no_result_is_run_again_under_its_number(sweep: Sweep, tmp_path: Path) -> None:
    def act(job: dict[str, str]) -> dict[str, Any]:
        if job["seed"] == "2":
            raise KeyboardInterrupt
        if job["seed"] == "1":
            return {"status": "failed", "error": "no"}
        return finished(job)

    with pytest.raises(SystemExit, match="130"):
        sweep(GridSweeper(max_batch_size=1), act, "seed=range(5)")
    jobs = read_jobs([tmp_path / "sweep"])
    assert [job.state for job in jobs] == ["finished", "failed", "killed", "waiting", "waiting"]
    before = (tmp_path / "sweep" / "0" / "summary.json").stat().st_mtime_ns
    again = sweep(GridSweeper(resume=True), finished, "seed=range(5)", "tracking=disabled")
    assert again.launched == [[1, 2, 3, 4]]
    assert (tmp_path / "sweep" / "0" / "summary.json").stat().st_mtime_ns == before
    overrides = json.loads((tmp_path / "sweep" / "4" / ".hydra" / "overrides.yaml").read_text("utf-8"))
    assert overrides == ["seed=4", "tracking=disabled"]


def test_a_job_that_kills_its_launcher_fails_alone(
    sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def act(job: dict[str, str]) -> dict[str, Any]:
        if job["seed"] == "1":
            raise RuntimeError("the pool is broken")  # as joblib's is when a worker is killed
        return finished(job)

    with pytest.raises(SystemExit, match="1"):
        sweep(GridSweeper(), act, "seed=range(4)")
    assert [(job.state, job.error) for job in read_jobs([tmp_path / "sweep"])] == [
        ("finished", None),
        ("failed", "RuntimeError: the pool is broken"),
        ("finished", None),
        ("finished", None),
    ]
    assert "error: job 1 (seed=1): RuntimeError: the pool is broken" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("visible", "launched", "runtime", "gpus", "at_once"),
    [
        ("3,5", "n_jobs=-1", "runtime.processes=1", ["3", "5", "3"], 2),
        ("3,5", "n_jobs=3", "runtime.processes=1", ["3", "5", "3"], 3),
        ("3", "n_jobs=-1", "runtime.processes=1", [None] * 3, 1),
        ("3,5", "n_jobs=-1", "runtime.processes=2", [None] * 3, 1),  # each has both
        ("3,5", "n_jobs=3", "runtime.device=cpu", [None] * 3, 3),
        ("3,5", "jobs_per_device=2", "runtime.processes=1", ["3", "5", "3"], 3),
        ("3", "jobs_per_device=2", "runtime.processes=1", ["3", "3", "3"], 2),
    ],
)
def test_side_by_side_each_job_has_a_gpu(
    sweep: Sweep,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    visible: str,
    launched: str,
    runtime: str,
    gpus: list[str | None],
    at_once: int,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    given = []

    def act(job: dict[str, str]) -> dict[str, Any]:
        given.append(job.get("+hydra.job.env_set.CUDA_VISIBLE_DEVICES"))
        return finished(job)

    done = sweep(GridSweeper(), act, "seed=range(3)", runtime, launcher=f"joblib hydra.launcher.{launched}")
    assert given == [gpu and f"'{gpu}'" for gpu in gpus]
    assert done.options.n_jobs == at_once
    assert "jobs_per_device" not in done.options  # joblib would refuse it


@pytest.mark.parametrize(
    ("visible", "launched", "line"),
    [
        ("", "jobs_per_device=2", "there is none to use; set hydra.launcher.n_jobs"),
        ("3,5", "jobs_per_device=0", "must be at least 1"),
        ("3,5", "jobs_per_device=2 hydra.launcher.n_jobs=3", "n_jobs=3 says too how many jobs run"),
        ("3,5", "jobs_per_device=2 runtime.processes=2", "set runtime.processes=1"),
    ],
)
def test_jobs_that_cannot_share_a_gpu(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, launched: str, line: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UserError, match=line):
        sweep(GridSweeper(), finished, "seed=1,2", launcher=f"joblib hydra.launcher.{launched}")
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("launched", "given", "tasks", "processes"),
    [
        ("submitit_slurm hydra.launcher.nodes=2 hydra.launcher.gpus_per_node=8", "", 8, "16"),
        ("submitit_slurm hydra.launcher.nodes=2", "runtime.processes=2", 1, "2"),
        ("submitit_local hydra.launcher.tasks_per_node=3", "", 3, "3"),
        ("submitit_slurm hydra.launcher.gpus_per_node=null", "runtime.processes=4", 1, "4"),  # spawned
        ("submitit_slurm", "", 1, None),
    ],
)
def test_a_job_has_a_task_a_gpu_each_a_process_of_the_run(
    sweep: Sweep, launched: str, given: str, tasks: int, processes: str | None
) -> None:
    jobs = []

    def act(job: dict[str, str]) -> dict[str, Any]:
        jobs.append(job.get("runtime.processes"))
        return finished(job)

    done = sweep(GridSweeper(), act, "seed=1,2", *given.split(), launcher=launched)
    assert (done.options.tasks_per_node, jobs) == (tasks, [processes] * 2)


@pytest.mark.parametrize(
    ("launched", "line"),
    [
        ("slurm nodes=0", "hydra.launcher.nodes=0: must be at least 1"),
        ("local nodes=2", "hydra.launcher.nodes=2: this launcher has one machine; use hydra/launcher=submit"),
        ("slurm tasks_per_node=2", "hydra.launcher.gpus_per_node=1: remove it, or set gpus_per_node=null"),
        ("slurm gpus_per_node=2 gpus_per_task=1", "hydra.launcher.gpus_per_task: a process finds its GPU"),
        ("slurm nodes=2 gpus_per_node=4 runtime.processes=4", "runtime.processes=4: 2 × 4 tasks of a job"),
    ],
)
def test_jobs_that_cannot_be_divided_into_tasks(
    sweep: Sweep, tmp_path: Path, launched: str, line: str
) -> None:
    name, *keys = launched.split()
    keys = [key if key.startswith("runtime.") else f"hydra.launcher.{key}" for key in keys]
    with pytest.raises(UserError, match=line):
        sweep(GridSweeper(), finished, "seed=1,2", launcher=" ".join([f"submitit_{name}", *keys]))
    assert not (tmp_path / "sweep").exists()


def test_the_jobs_that_are_left_are_spread_over_the_gpus(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    sweep(GridSweeper(), finished, "seed=range(6)", launcher="joblib")
    for number in (1, 3, 5):
        (tmp_path / "sweep" / str(number) / "summary.json").unlink()
    given = []

    def act(job: dict[str, str]) -> dict[str, Any]:
        given.append(job["+hydra.job.env_set.CUDA_VISIBLE_DEVICES"])
        return finished(job)

    sweep(GridSweeper(resume=True), act, "seed=range(6)", launcher="joblib")
    assert given == ["'0'", "'1'", "'0'"]


def test_a_value_that_does_not_fit_fails_its_jobs_alone(sweep: Sweep, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="1"):
        sweep(GridSweeper(), finished, "seed=1,2", "optimizer.lr=0.1,abc", "model=tiny")
    jobs = read_jobs([tmp_path / "sweep"])
    assert [job.state for job in jobs] == ["finished", "failed", "finished", "failed"]
    assert "optimizer.lr=abc: must be a number" in (jobs[1].error or "")
    with pytest.raises(HydraException, match="lrr"):  # no job fits: nothing is begun
        sweep(GridSweeper(), finished, "optimizer.lrr=1,2", folder="nothing")
    assert not (tmp_path / "nothing").exists()


def test_jobs_run_seed_by_seed_under_their_numbers(sweep: Sweep, tmp_path: Path) -> None:
    arguments = ("optimizer.lr=0.1,0.2", "seed=1,2")
    assert sweep(GridSweeper(), finished, *arguments).launched == [[0, 2, 1, 3]]
    in_turn = sweep(GridSweeper(order="given", max_batch_size=3), finished, *arguments, folder="given")
    assert in_turn.launched == [[0, 1, 2], [3]]
    more = sweep(GridSweeper(resume=True, extend=True), finished, *arguments[:1], "seed=3,2")
    assert more.launched == [[4, 5]]
    assert [job.title for job in read_jobs([tmp_path / "sweep"])][3:] == [
        "lr=0.2 seed=2",
        "lr=0.1 seed=3",
        "lr=0.2 seed=3",
    ]
    with pytest.raises(UserError, match=r"sweep\.order=random: must be one of"):
        sweep(GridSweeper(order="random"), finished, *arguments, folder="no")
    with pytest.raises(HydraException, match="abc"):  # none of the new jobs fits: nothing is added
        sweep(GridSweeper(resume=True, extend=True), finished, "optimizer.lr=abc,abd")
    assert len(read_record(tmp_path / "sweep")["jobs"]) == 6


def hold(lock: Path, ready: Any, end: Any) -> None:
    with held(lock):
        ready.set()
        end.wait()


def test_a_sweep_has_its_folder_for_itself(sweep: Sweep, tmp_path: Path) -> None:
    ready, end = FORKED.Event(), FORKED.Event()
    sweep(GridSweeper(), finished, "seed=1")
    other = FORKED.Process(target=hold, args=(tmp_path / "sweep" / ".sweep.lock", ready, end))
    other.start()
    ready.wait()
    with pytest.raises(UserError, match="is being run by another process"):
        sweep(GridSweeper(resume=True), finished, "seed=1")
    end.set()
    other.join()
    sweep(GridSweeper(resume=True), finished, "seed=1")


def bowl(job: dict[str, str]) -> dict[str, Any]:
    """A loss with its minimum at lr 0.01 and 3 layers; it diverges at high rates."""
    lr, layers = float(job["optimizer.lr"]), int(job["model.n_layers"])
    if lr > 0.5:
        return {"status": "failed", "error": "not finite"}
    loss = math.log10(lr / 0.01) ** 2 + (layers - 3) ** 2 / 10 + (job["model.init"] == "torch")
    if loss > 3:
        return {"status": "interrupted", "stopped_early": "hopeless", "best_val_loss": loss, "steps": 3}
    return {"status": "finished", "val_loss": loss}


def cut_off(act: Act, at: int) -> Act:
    """What jobs do, until that one is interrupted."""
    calls = count(1)

    def until_then(job: dict[str, str]) -> dict[str, Any]:
        if next(calls) == at:
            raise KeyboardInterrupt
        return act(job)

    return until_then


SEARCHED = (
    "optimizer.lr=tag(log,interval(1e-5,1))",
    "model.n_layers=range(1,7)",
    "model.init=choice(gpt2,torch)",
)


def test_a_search_finds_the_minimum_and_resumes_as_if_it_had_not_been_cut_off(
    sweep: Sweep, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match="1"):  # some diverged
        sweep(OptunaSweeper(n_trials=30), bowl, *SEARCHED, "model=tiny")
    jobs = read_jobs([tmp_path / "sweep"])
    assert {job.state for job in jobs} == {"finished", "stopped", "failed"}
    assert list(jobs[0].setting) == ["optimizer.lr", "model.n_layers", "model.init"]
    assert min(job.summary.get("val_loss", 9) for job in jobs) < 0.1
    late = [bowl(dict(each.split("=") for each in job.overrides)).get("val_loss", 9) for job in jobs[15:]]
    early = [bowl(dict(each.split("=") for each in job.overrides)).get("val_loss", 9) for job in jobs[:10]]
    assert sorted(late)[7] < sorted(early)[5]  # it learns
    with pytest.raises(SystemExit, match="130"):
        sweep(OptunaSweeper(n_trials=30), cut_off(bowl, 18), *SEARCHED, "model=tiny", folder="cut")
    with pytest.raises(SystemExit, match="1"):
        sweep(OptunaSweeper(n_trials=30, resume=True), bowl, *SEARCHED, "model=tiny", folder="cut")
    assert read_record(tmp_path / "cut")["jobs"] == read_record(tmp_path / "sweep")["jobs"]


def test_a_search_tries_several_at_once_within_its_bounds(sweep: Sweep, tmp_path: Path) -> None:
    arguments = ("optimizer.lr=interval(0.0012345678,0.0012345679)", "model.n_layers=range(2,9,3)")
    done = sweep(
        OptunaSweeper(n_trials=5, n_jobs=2),
        lambda job: {"status": "finished", "val_loss": float(job["model.n_layers"])},
        *arguments,
    )
    assert done.launched == [[0, 1], [2, 3], [4]]
    for job in read_jobs([tmp_path / "sweep"]):
        given = dict(each.split("=") for each in job.overrides)
        assert 0.0012345678 <= float(given["optimizer.lr"]) <= 0.0012345679
        assert int(given["model.n_layers"]) in (2, 5, 8)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [(["seed=1"], "has nothing to search"), (["seed=range(3)", "optimizer.lr=abc"], "lr=abc")],
)
def test_a_search_that_makes_no_sense(sweep: Sweep, tmp_path: Path, arguments: list[str], line: str) -> None:
    with pytest.raises((UserError, HydraException), match=line):
        sweep(OptunaSweeper(), finished, *arguments)
    assert not (tmp_path / "sweep").exists()


def test_a_missing_plugin_is_named_with_how_to_install_it() -> None:
    error = HydraException(
        "In 'pretrain': Could not find 'hydra/launcher/submitit_slurm'\n\nAvailable: basic"
    )
    assert one_line(error) == (
        "hydra/launcher=submitit needs a plugin: pip install -c constraints.txt -e '.[submitit]'"
    )


def test_optuna_is_asked_for_where_it_is_missing(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sweeping.search", raising=False)
    monkeypatch.setitem(sys.modules, "optuna.distributions", None)
    with pytest.raises(UserError) as raised:
        sweep(OptunaSweeper(), finished, "seed=1,2")
    expected = "hydra/sweeper=optuna needs Optuna: pip install -c constraints.txt -e '.[optuna]'"
    assert one_line(raised.value) == expected


def test_a_search_over_tokenizers_compares_bits_per_byte_and_over_texts_is_refused(
    sweep: Sweep, tmp_path: Path
) -> None:
    suggested = []

    def act(job: dict[str, str]) -> dict[str, Any]:
        bits, loss = (3.0, 2.0) if job["tokenizer"] == "bytes" else (2.0, 4.0)
        about = {"tokenizer": f"{job['tokenizer']}-1", "validation_text": job.get("seed", "text")}
        suggested.append(job["tokenizer"])
        return {"status": "finished", "val_loss": loss, "val_bits_per_byte": bits, **about}

    sweeper = OptunaSweeper(n_trials=24, n_startup_trials=8)
    sweep(sweeper, act, "tokenizer=choice(bytes,gpt2)")
    assert suggested[12:].count("gpt2") > 8  # the one with fewer bits
    jobs = read_jobs([tmp_path / "sweep"])
    trials = [sweeper.search._as_trial(job, BITS_PER_BYTE) for job in jobs]
    assert {trial.value for trial in trials} == {2.0, 3.0}
    cut_off = Job(
        tmp_path, "0", jobs[0].overrides, {}, {"status": "interrupted", "best_val_loss": 0.1, "steps": 3}
    )
    assert sweeper.search._as_trial(cut_off, LOSS).state.name == "FAIL"
    for key in ("data.train_ratio=interval(0.5,0.9)", "data=choice(shakespeare,the_verdict)"):
        with pytest.raises(UserError, match="would change: give one value"):
            sweep(OptunaSweeper(), act, key, folder="refused")
    with pytest.raises(UserError, match="text A and text B, which do not compare"):
        sweep(
            OptunaSweeper(n_trials=9),
            act,
            "tokenizer=choice(bytes,gpt2)",
            "seed=choice(1,2,3)",
            folder="texts",
        )


def test_a_sweep_is_resumed_as_it_was_begun(tmp_path: Path) -> None:
    begun = ["hydra/launcher=joblib", "optimizer.lr=1,2", "tracking=offline"]
    write_record(tmp_path, "pretrain", begun, ["optimizer.lr"], [["optimizer.lr=1"], ["optimizer.lr=2"]])
    resume = f"sweep.resume={tmp_path}"
    arguments = ["-m", resume, "hydra/launcher=basic", "tracking=disabled"]
    assert rewritten(arguments, "pretrain", PretrainConfig) == [
        "--multirun",
        "hydra/launcher=basic",
        "optimizer.lr=1,2",
        "tracking=disabled",
        f"hydra.sweep.dir='{tmp_path}'",
        "hydra.sweeper.resume=true",
    ]
    with pytest.raises(UserError, match=r"remove seed=1$"):
        rewritten([resume, "seed=1"], "pretrain", PretrainConfig)
    with pytest.raises(UserError, match=r"was begun by experiments/pretrain\.py"):
        rewritten([resume], "generate", GenerateConfig)
    with pytest.raises(UserError, match="is not a sweep's folder"):
        rewritten([f"sweep.resume={tmp_path / 'nothing'}"], "pretrain", PretrainConfig)


def test_the_latest_sweep_is_the_one_begun_last(tmp_path: Path) -> None:
    for number, name in enumerate(("pretrain/sweeps/2026-01-01/b", "generate/sweeps/2026-01-01/a")):
        write_record(tmp_path / name, "pretrain", [], [], [])
        os.utime(tmp_path / name / "sweep.json", (number, number))
    assert find_sweep("latest", root=tmp_path).name == "a"
    with pytest.raises(UserError, match="there is no sweep begun under"):
        find_sweep("latest", root=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("launcher", "traits"),
    [
        ("basic", BASIC),
        ("joblib", Traits(side_by_side=True, death="TerminatedWorkerError")),
        ("submitit_local", SUBMITIT),
        ("submitit_slurm", SUBMITIT),
    ],
)
def test_a_launcher_is_known_by_its_class(launcher: str, traits: Traits) -> None:
    ConfigStore.instance().store(name="pretrain_schema", node=own_defaults(PretrainConfig))
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("pretrain", [f"hydra/launcher={launcher}"], return_hydra_config=True)
    assert traits_of(config.hydra.launcher) == traits
    config.hydra.launcher._target_ = "somebody.elses.JoblibLauncher"
    assert traits_of(config.hydra.launcher) == BASIC


def test_the_table_shows_every_figure_of_the_validation_split(tmp_path: Path) -> None:
    summaries = [
        {"status": "finished", "val_loss": 2.0, "val_perplexity": 7.4, "val_accuracy": 0.25, "seconds": 3.0},
        {"status": "finished", "val_loss": 3.0, "val_perplexity": 20.1, "seconds": 4.0},
    ]
    jobs = [Job(tmp_path, str(i), [], {"seed": str(i)}, summary) for i, summary in enumerate(summaries)]
    assert [line.split() for line in sweep_table(jobs).splitlines()] == [
        ["job", "set", "state", "val", "loss", "val", "accuracy", "train", "time"],
        ["0", "seed=0", "finished", "★", "2.000", "0.250", "3s"],
        ["1", "seed=1", "finished", "3.000", "–", "4s"],
    ]


def noisy(job: dict[str, str]) -> dict[str, Any]:
    """A loss that depends on the rate and a little on the seed; high rates diverge."""
    lr, seed = float(job["optimizer.lr"]), int(job["seed"])
    if lr > 0.5:
        return {"status": "failed", "error": "not finite"}
    noise = math.sin(seed) + 0.1 * math.sin(100 * lr + 7 * seed)
    return {"status": "finished", "seed": seed, "val_loss": lr + noise}


RACED = ("optimizer.lr=0.1,0.3,0.9,0.1001", "seed=5")


def test_a_race_adds_seeds_to_what_is_left_and_resumes_as_if_it_had_not_been_cut_off(
    sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="1"):  # one diverged
        sweep(RaceSweeper(max_seeds=7, n_jobs=2), noisy, *RACED)
    said = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(
        r"race +not decided after 7 seeds, in 2\d jobs: lr=0.1, lr=0.1001 cannot be told apart; ruled out: "
        r"lr=0.3 after [456], lr=0.9 after 1",
        said,
    ), said
    outcome = read_race(tmp_path / "sweep")
    assert (f"race        {outcome['verdict']}", outcome["decided"], outcome["best"]) == (said, False, None)
    jobs = read_jobs([tmp_path / "sweep"])
    assert [job.setting["seed"] for job in jobs[:12]] == [*4 * "5", *4 * "6", *4 * "7"]
    assert [job.title for job in jobs[-2:]] == ["lr=0.1 seed=11", "lr=0.1001 seed=11"]
    with pytest.raises(SystemExit, match="130"):
        sweep(RaceSweeper(max_seeds=7), cut_off(noisy, 17), *RACED, folder="cut")
    with pytest.raises(SystemExit, match="1"):
        sweep(RaceSweeper(max_seeds=7, resume=True), noisy, *RACED, folder="cut")
    assert read_record(tmp_path / "cut")["jobs"] == read_record(tmp_path / "sweep")["jobs"]
    assert capsys.readouterr().out.splitlines()[-1] == said


def test_zipped_settings_are_raced_and_the_record_decides_them(sweep: Sweep, tmp_path: Path) -> None:
    zipped = ("optimizer.lr=0.1,0.3", "model.n_layers=1,2", "seed=5")
    sweep(RaceSweeper(max_seeds=3, zip=[["optimizer.lr", "model.n_layers"]]), noisy, *zipped)
    sweep(RaceSweeper(max_seeds=4, resume=True), noisy, *zipped)  # whose arguments do not say what is zipped
    raced = {
        (job.setting["optimizer.lr"], job.setting["model.n_layers"])
        for job in read_jobs([tmp_path / "sweep"])
    }
    assert raced == {("0.1", "1"), ("0.3", "2")}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["optimizer.lr=0.1"], "needs two settings or more"),
        (["optimizer.lr=0.1,0.2", "seed=1,2"], "give one value of seed"),
        (["data.path=a,b"], "give one value of data.path"),
        (["optimizer.lr=0.1,abc"], "lr=abc"),
    ],
)
def test_a_race_that_makes_no_sense(sweep: Sweep, tmp_path: Path, arguments: list[str], line: str) -> None:
    with pytest.raises((UserError, HydraException), match=line):
        sweep(RaceSweeper(), finished, *arguments)
    assert not (tmp_path / "sweep").exists()
