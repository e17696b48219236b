"""Runs in W&B: what arrives there online and by `wandb sync`, outages, W&B's sweeps, a saved workspace."""

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import wandb
from click.testing import CliRunner
from conftest import TINY, Script, numbers
from omegaconf import OmegaConf
from scripts import BRIEF, ROOT, run_python
from wandb.cli.cli import cli
from wandb_server import KEY, ArrivedRun, WandbServer

from llm import wandb_client
from llm.checkpoints.checkpoint import run_id
from llm.commands.compare import compare
from llm.commands.pretrain import pretrain
from llm.commands.report import write_report
from llm.commands.workspace import CURVES, save_workspace
from llm.config import (
    CompareConfig,
    ModelConfig,
    PretrainConfig,
    ReportConfig,
    TrackingConfig,
    WorkspaceConfig,
)
from llm.errors import UserError
from llm.files import as_typed, read_json_lines, remove, write_json, write_text
from llm.sweeps.jobs import read_jobs, write_record
from llm.sweeps.tracked import tracking_for, tracking_of
from llm.tracking import Tracker
from llm.training import lifecycle, loop
from llm.training.run import Launched, Run
from llm.wandb_client import sync_command

TINY_ONLINE = [each for each in (*TINY, "data=text", "training.max_steps=1") if each != "tracking=disabled"]
TIMED = {"seconds", "tokens_per_second", "total_seconds", "mfu", "peak_memory_bytes", "run_dir"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WandbServer]:
    for name in [*os.environ]:
        if name.startswith("WANDB_") or name.lower() == "http_proxy":
            monkeypatch.delenv(name)
    server = WandbServer()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    for folder in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(folder, str(tmp_path / "wandb-home"))
    monkeypatch.chdir(tmp_path)  # where the client keeps a log of each of its commands
    wandb.teardown()  # what an earlier test has set in this process
    monkeypatch.setattr(wandb_client, "failed_to_start", False)
    yield server
    wandb.teardown()
    server.stop()


@pytest.fixture
def config(tmp_path: Path) -> PretrainConfig:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} bottles of beer on the wall\n" for number in range(60)))
    config = PretrainConfig()
    config.model = ModelConfig(vocab_size=257, context_length=16, emb_dim=16, n_heads=2, n_layers=1)
    config.tokenizer.name = "bytes"
    config.data.source, config.data.path, config.data.cache_dir = "text", str(text), str(tmp_path / "cache")
    config.data.batch_size, config.samples.max_new_tokens, config.runtime.threads = 2, 3, 1
    config.training.max_minutes, config.training.max_steps, config.training.eval_freq = None, 4, 2
    config.tracking.mode, config.tracking.group, config.tracking.name = "online", "a group", "a name"
    return config


# Seconds to wait for a server that will not answer; one that answers with an error is given longer.
WAITS = {"gone": 0.2, "slow": 0.2}


def break_down(server: WandbServer, outage: str) -> None:
    match outage:
        case "gone":
            server.stop()
        case "slow":
            server.delay = 3
        case status:
            server.status = int(status)


def sync(folder: Path) -> None:
    """What `sync_command` says, in this process, with the server of the environment."""
    wandb.teardown()
    result = CliRunner().invoke(cli, shlex.split(sync_command(folder))[1:])
    assert result.exit_code == 0, result.output


def values(line: dict[str, Any]) -> dict[str, Any]:
    """What was logged, without what W&B adds and what a clock decides."""
    return {key: value for key, value in line.items() if not key.startswith("_") and key not in TIMED}


def metrics(run: ArrivedRun) -> list[dict[str, Any]]:
    """The history as in metrics.jsonl: without the table and the picture at its end."""
    return [values(line) for line in run.history if "step" in line]


def test_online_and_by_sync_the_same_arrives(
    server: WandbServer, config: PretrainConfig, tmp_path: Path
) -> None:
    pretrain(config, tmp_path / "online")
    config.tracking.mode = "offline"
    pretrain(config, tmp_path / "offline")
    [folder] = (tmp_path / "offline" / "wandb").glob("offline-run-*")
    sync(folder)
    [folder] = (tmp_path / "online" / "wandb").glob("run-*")
    sync(folder)  # once more, as after an outage that let a part of it through
    online, offline = server.runs[run_id(tmp_path / "online")], server.runs[run_id(tmp_path / "offline")]
    written = [values(line) for line in read_json_lines(tmp_path / "online" / "metrics.jsonl")]
    assert len(written) == 7  # with the evaluation at the last update
    for run in (online, offline):
        assert metrics(run) == [pytest.approx(line) for line in written]
        assert run.exit_code == 0
        assert [run.fields[name] for name in ("groupName", "displayName", "jobType")] == [
            "a group",
            "a name",
            "pretrain",
        ]
        assert run.config["seed"]["value"] == 123
        assert run.config["model"]["value"]["emb_dim"] == 16
        # the axis of every curve, by its place among the metrics that are defined
        defined = run.config["_wandb"]["value"]["m"]
        [every] = [metric for metric in defined if metric.get("2") == "*"]
        assert defined[every["5"] - 1]["1"] == "tokens_seen"
        assert run.summary["val_loss"] > 0
        assert {name.split("/")[1] for name in run.uploads if name.startswith("media/")} == {
            "images",
            "table",
        }
    one, other = (
        {key: value for key, value in run.config.items() if key not in ("_wandb", "tracking")}
        for run in (online, offline)
    )
    assert one == other
    assert set(one) | {"tracking"} == set(asdict(config))
    left_out = TIMED | {"samples", "loss"}  # files, whose names hold a hash
    one, other = (
        {key: value for key, value in values(run.summary).items() if key not in left_out}
        for run in (online, offline)
    )
    assert one == other


def test_a_failed_run_says_so(server: WandbServer, config: PretrainConfig, tmp_path: Path) -> None:
    config.optimizer.name, config.optimizer.lr, config.schedule.name = "adamw", 1e30, "constant"
    config.training.grad_clip = None
    with pytest.raises(UserError, match="not finite"):
        pretrain(config, tmp_path / "run")
    run = server.runs[run_id(tmp_path / "run")]
    assert run.exit_code == 1
    assert run.summary["status"] == "failed"


@pytest.mark.parametrize("outage", ["gone", "slow", "500", "403"])
def test_an_outage_costs_nothing_but_a_sync(
    server: WandbServer,
    config: PretrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    outage: str,
) -> None:
    for name in ("ANSWER", "DELIVER"):
        monkeypatch.setattr(wandb_client, name, WAITS.get(outage, 1.0))
    begin = lifecycle.train

    def train(*arguments: Any) -> None:
        break_down(server, outage)
        begin(*arguments)

    monkeypatch.setattr(lifecycle, "train", train)
    summary = pretrain(config, tmp_path / "run")
    assert summary.status == "finished"
    [folder] = (tmp_path / "run" / "wandb").glob("run-*")
    [line] = [
        record.getMessage() for record in caplog.records if "W&B did not receive" in record.getMessage()
    ]
    assert line.endswith(f"wandb sync --include-online {as_typed(folder)}")
    assert server.runs[run_id(tmp_path / "run")].exit_code is None
    healthy = server
    if outage == "gone":
        healthy = WandbServer()
        monkeypatch.setenv("WANDB_BASE_URL", healthy.url)
    server.status, server.delay = 200, 0
    sync(folder)
    run = healthy.runs[run_id(tmp_path / "run")]
    written = [values(line) for line in read_json_lines(tmp_path / "run" / "metrics.jsonl")]
    assert metrics(run) == [pytest.approx(line) for line in written]
    assert run.exit_code == 0
    assert run.summary["val_loss"] == pytest.approx(summary.val_loss)
    assert any(name.startswith("media/table/samples") for name in run.uploads)
    if outage == "gone":
        healthy.stop()


@pytest.mark.parametrize(
    ("outage", "reason"), [("gone", "refused"), ("slow", "deadline"), ("500", "500"), ("401", "401")]
)
def test_a_run_that_cannot_begin_online_begins_offline(
    server: WandbServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    outage: str,
    reason: str,
) -> None:
    for name in ("ANSWER", "BEGIN"):
        monkeypatch.setattr(wandb_client, name, WAITS.get(outage, 1.0))
    break_down(server, outage)
    tracker = Tracker(tmp_path, TrackingConfig(mode="online"), {}, "pretrain", "0123abcd")
    [line] = [record.getMessage() for record in caplog.records if "recorded offline" in record.getMessage()]
    assert reason in line
    tracker.log(0, {"train/loss": 1.0})
    tracker.finish({})
    assert tracker.wandb_folder == next(Path("wandb").glob("*run-*-*"))
    assert tracker.wandb_folder.name.startswith("offline-run-")
    (tmp_path / "next").mkdir()
    Tracker(tmp_path / "next", TrackingConfig(mode="online"), {}, "pretrain", "0123abce").finish({})
    assert "W&B still does not answer" in caplog.text  # the next job of a sweep does not wait as long again


class Crash(BaseException):
    """As if the process ended here."""


def crash_at_update(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the next run end before this update, with no checkpoint of what it did last."""
    launch = loop.launch

    def launch_or_crash(run: Run, done: float) -> Launched:
        if run.counters.steps + 1 == number:
            monkeypatch.setattr(loop, "launch", launch)
            raise Crash
        return launch(run, done)

    monkeypatch.setattr(loop, "launch", launch_or_crash)


@pytest.mark.parametrize("modes", ["online online", "offline offline", "disabled online", "online offline"])
def test_a_resumed_run_has_the_history_of_its_metrics(
    server: WandbServer,
    config: PretrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    modes: str,
) -> None:
    before, after = modes.split()
    run_dir = tmp_path / "a run's folder"
    config.training.max_steps, config.training.eval_freq, config.checkpoint.every_steps = 8, 3, 2
    config.tracking.mode = before
    crash_at_update(monkeypatch, 6)
    with pytest.raises(Crash):
        pretrain(config, run_dir)
    assert (run_dir / "checkpoints" / "last").readlink().name == "step-00000004"
    config.tracking.mode, config.optimizer.lr, config.resume = after, 0.5, str(run_dir)
    monkeypatch.setenv("WANDB_RESUME", "allow")  # which would append
    summary = pretrain(config)
    if after == "offline":
        assert summary.wandb_folder
        assert list((run_dir / "wandb").glob("*run-*-*")) == [Path.cwd() / summary.wandb_folder]
        sync(Path(summary.wandb_folder))
    written = [values(line) for line in read_json_lines(run_dir / "metrics.jsonl")]
    assert [line["step"] for line in written] == [0, 0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 7]
    assert metrics(server.runs[run_id(run_dir)]) == [pytest.approx(line) for line in written]
    assert server.runs[run_id(run_dir)].summary["status"] == "finished"


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_run_outlives_the_process_of_wandb(
    server: WandbServer,
    config: PretrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mode: str,
) -> None:
    config.tracking.mode = mode
    launch = loop.launch

    def launch_without_wandb(run: Run, done: float) -> Launched:
        if run.counters.steps == 2:
            for children in Path("/proc/self/task").glob("*/children"):
                for child in children.read_text().split():
                    if "wandb-core" in Path(f"/proc/{child}/cmdline").read_text():
                        os.kill(int(child), signal.SIGKILL)
            time.sleep(0.2)
        return launch(run, done)

    monkeypatch.setattr(loop, "launch", launch_without_wandb)
    summary = pretrain(config, tmp_path / "run")
    assert summary.status == "finished"
    [line] = [record.getMessage() for record in caplog.records if record.name == "llm.tracking"]
    assert line.startswith("W&B stopped recording (")
    if mode == "offline":
        assert summary.wandb_folder
        sync(Path(summary.wandb_folder))
    run = server.runs[run_id(tmp_path / "run")]
    written = [values(line) for line in read_json_lines(tmp_path / "run" / "metrics.jsonl")]
    assert len(written) == 7  # with the evaluation at the last update
    assert metrics(run) == [pytest.approx(line) for line in written]
    assert {name.split("/")[1] for name in run.uploads if name.startswith("media/")} == {"images", "table"}
    assert (run.exit_code, run.summary["status"]) == (0, "finished")


def test_what_is_not_configured_is_as_wandbs_variables_say(
    server: WandbServer, config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {"MODE": "online", "PROJECT": "theirs", "NAME": "its name", "RUN_GROUP": "its group"}
    variables |= {"TAGS": "one,two", "NOTES": "a note", "JOB_TYPE": "a job", "ENTITY": "us"}
    for name, value in variables.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    config.tracking = TrackingConfig()
    pretrain(config, tmp_path / "run")
    names = ("project", "displayName", "groupName", "tags", "notes", "jobType")
    run = server.runs.pop(run_id(tmp_path / "run"))
    wanted = ["theirs", "its name", "its group", ["one", "two"], "a note", "a job"]
    assert [run.fields[name] for name in names] == wanted
    config.tracking = TrackingConfig("online", "ours", None, "our group", "our name", ["three"])
    monkeypatch.setenv("WANDB_MODE", "disabled")
    pretrain(config, tmp_path / "given")
    run = server.runs.pop(run_id(tmp_path / "given"))
    assert [run.fields[name] for name in names[:4]] == ["ours", "our name", "our group", ["three"]]
    config.tracking = TrackingConfig()
    pretrain(config, tmp_path / "disabled")
    assert not (tmp_path / "disabled" / "wandb").exists()
    monkeypatch.setenv("WANDB_MODE", "shared")
    with pytest.raises(UserError, match="WANDB_MODE=shared: must be one of offline, online, disabled"):
        pretrain(config, tmp_path / "shared")
    monkeypatch.delenv("WANDB_MODE")
    config.training.max_steps = 1
    assert "offline-run-" in str(pretrain(config, tmp_path / "offline").wandb_folder)
    assert not server.runs


def test_the_jobs_of_a_sweep_are_runs_of_their_own(
    server: WandbServer, config: PretrainConfig, script: Script, environment: dict[str, str], tmp_path: Path
) -> None:
    environment |= {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
    environment |= {"WANDB_MODE": "online", "WANDB_RUN_ID": "ab12cd34", "WANDB_RUN_GROUP": "their group"}
    result = script(
        "pretrain", "-m", *TINY_ONLINE, f"data.path={config.data.path}", "seed=1,2", "hydra.sweep.dir=sweep"
    )
    assert result.returncode == 0, result.stderr
    runs = [server.runs[run_id(tmp_path / "sweep" / number)].fields for number in "01"]
    assert [run["displayName"] for run in runs] == ["seed=1", "seed=2"]
    [report] = (run for run in server.runs.values() if run.fields["jobType"] == "report")
    assert {run["groupName"] for run in [*runs, report.fields]} == {"their group"}
    assert report.summary["noise/sd"] > 0
    assert len(server.runs) == 3
    assert "ab12cd34" not in server.runs


def tracked_sweep(sweep: Path, bits: dict[str, list[float]], kept: str = "offline-run") -> str:
    """A sweep over learning rates and seeds whose jobs were tracked in a project of theirs."""
    jobs: list[list[str]] = []
    for lr, figures in bits.items():
        for seed, figure in enumerate(figures, 1):
            job = sweep / str(len(jobs))
            (job / "wandb" / f"{kept}-20260101_000000-ab12cd3{seed}").mkdir(parents=True)
            jobs.append([f"optimizer.lr={lr}", f"seed={seed}"])
            write_text(job / ".hydra" / "config.yaml", "tracking: {project: theirs, tags: [one]}")
            write_json(job / ".hydra" / "overrides.yaml", jobs[-1])
            known = {"status": "finished", "seed": seed, "tokens_seen": 64, "val_loss": figure / 2}
            write_json(job / "summary.json", {**known, "val_bits_per_byte": figure})
    write_record(sweep, "pretrain", [], ["optimizer.lr", "seed"], jobs)
    return str(sweep)


BITS = {"0.1": [1.921, 1.972, 1.95], "0.2": [1.90, 1.95, 1.93]}


def test_a_verdict_and_a_report_arrive_beside_their_runs(server: WandbServer, tmp_path: Path) -> None:
    sweep = tracked_sweep(tmp_path / "sweep", BITS)
    (tmp_path / "out").mkdir()
    compare(CompareConfig(sweep, tracking=TrackingConfig("online", name="mine")), tmp_path / "out")
    [verdict] = server.runs.values()
    names = ("project", "groupName", "jobType", "displayName", "tags")
    wanted = ["theirs", "sweep", "verdict", "mine", ["one"]]
    assert [verdict.fields[name] for name in names] == wanted
    # The differences are -0.021, -0.022 and -0.020: see test_compare.py.
    figures = {"difference": -0.021, "low": -0.0235, "high": -0.0185, "p": 0.00075, "seeds": 3}
    for name, value in figures.items():
        assert verdict.summary[f"verdict/{name}"] == pytest.approx(value, abs=5e-5)
    assert verdict.summary["verdict/decided"]
    assert verdict.summary["verdict/sentence"].startswith("b (lr=0.2) is better than a (lr=0.1) by 0.0210")
    assert verdict.summary["seeds"]["nrows"] == 3
    assert verdict.summary["verdict"]["_type"] == "image-file"
    assert {name.split("/")[1] for name in verdict.uploads if "media" in name} == {"images", "table"}
    for _ in range(2):  # the second time over the first
        write_report(ReportConfig(sweep), tmp_path)
    [folder] = (tmp_path / "sweep" / "wandb").glob("*run-*")  # offline, as nothing was asked for
    [table] = folder.glob("files/media/table/ranking*")
    rows = json.loads(table.read_text("utf-8"))
    ranked = [dict(zip(rows["columns"], row, strict=True)) for row in rows["data"]]
    assert [(row["setting"], row["optimizer.lr"], row["seeds"]) for row in ranked] == [
        ("lr=0.2", 0.2, 3),
        ("lr=0.1", 0.1, 3),
    ]
    assert [row["possibly_best"] for row in ranked] == [True, False]
    assert [row["sd"] for row in ranked] == pytest.approx([stdev(BITS[lr]) / 2 for lr in ("0.2", "0.1")])
    assert len(server.runs) == 1
    sync(folder)
    [report] = (run for run in server.runs.values() if run is not verdict)
    assert [report.fields[name] for name in names] == ["theirs", "sweep", "report", "report", ["one"]]
    noise, best = stdev(BITS["0.2"]) / 2, mean(BITS["0.2"]) / 2
    assert [report.summary[f"noise/{name}"] for name in ("sd", "low", "high")] == pytest.approx(
        [noise, best - noise, best + noise]
    )
    assert (report.summary["best/setting"], report.summary["best/possibly"]) == ("lr=0.2", ["lr=0.2"])
    assert report.summary["report"]["_type"] == "image-file"


def test_what_was_not_tracked_is_logged_only_if_asked_for(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sweep = tracked_sweep(tmp_path / "sweep", BITS)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr("llm.sweeps.report.draw_sweep", lambda *_: None)
    jobs = read_jobs([tmp_path / "sweep"])
    assert tracking_for(TrackingConfig(), jobs[:1]).mode == "disabled"  # one run, which W&B has
    for job in jobs:
        remove(job.folder / "wandb")
    write_report(ReportConfig(sweep), tmp_path)
    assert not [*tmp_path.glob("sweep/**/wandb")]
    assert not server.runs
    # W&B that fails is no reason for a report to.
    monkeypatch.delenv("WANDB_API_KEY")
    asked = TrackingConfig("online")
    assert write_report(ReportConfig(sweep, tracking=asked), tmp_path).files["report"].exists()
    assert "tracking=online: Weights & Biases did not start" in caplog.text


def test_sweeps_end_in_the_mode_of_their_jobs(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "other")]
    tracked_sweep(folders[0], BITS, "run")
    tracked_sweep(folders[1], BITS)
    online, both = tracking_of(read_jobs(folders[:1])), tracking_of(read_jobs(folders))
    assert online == TrackingConfig("online", "theirs", None, str(folders[0]), None, ["one"])
    assert both == replace(online, group=None)
    # Where a folder alone says that they were online, nothing is sent.
    assert tracking_for(TrackingConfig(), read_jobs(folders)).mode is None


def damage_record(file: Path, damage: str) -> None:
    content = file.read_bytes()
    match damage:
        case "deleted":
            file.unlink()
        case "replaced":
            file.unlink()
            file.write_bytes(b"x" * len(content))
        case "cut":
            os.truncate(file, 10)
        case "appended to":
            file.write_bytes(content + b"x\n")
        case "changed":  # and no longer or shorter than it was
            file.write_bytes(content[:-5] + b"xxxx\n")


@pytest.mark.parametrize("damage", ["deleted", "replaced", "cut", "appended to", "changed"])
@pytest.mark.parametrize("copied", [0, 2, 4])
def test_records_that_something_else_changes_are_restored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str, copied: int
) -> None:
    tracker = Tracker(tmp_path, TrackingConfig(mode="disabled"), {}, "pretrain")
    for step in range(4):
        tracker.log(step, {"train/loss": 1 / (step + 1)})
        if step + 1 == copied:
            for name, size in tracker.record_sizes().items():
                copy = tmp_path / "checkpoints" / f"step-{copied:08d}" / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes((tmp_path / name).read_bytes() if size else b"")
    if copied == 2:
        tracker.record_sizes()  # from here on, it relies on the copy
    damage_record(tmp_path / "metrics.jsonl", damage)
    if damage != "changed":
        tracker.log(4, {"train/loss": 0.2})
    size = tracker.record_sizes()["metrics.jsonl"]
    lines = read_json_lines(tmp_path / "metrics.jsonl")
    assert [line["train/loss"] for line in lines] == [1.0, 0.5, 1 / 3, 0.25, 0.2][: len(lines)]
    assert len(lines) == (4 if damage == "changed" else 5)
    assert (tmp_path / "metrics.jsonl").stat().st_size == size
    assert "metrics.jsonl was changed by something else (" in caplog.text


@pytest.mark.usefixtures("no_pictures")
def test_no_checkpoint_is_short_of_lines(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config.tracking.mode, config.checkpoint.every_steps = "disabled", 2
    pretrain(config, tmp_path / "whole")
    file = tmp_path / "run" / "metrics.jsonl"
    launch = loop.launch

    def launch_and_delete(run: Run, done: float) -> Launched:
        if run.counters.steps == 3:
            file.unlink()
        return launch(run, done)

    monkeypatch.setattr(loop, "launch", launch_and_delete)
    pretrain(config, tmp_path / "run")
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")
    assert (tmp_path / "run" / "checkpoints" / "last" / "metrics.jsonl").read_bytes() == file.read_bytes()
    [line] = [record.getMessage() for record in caplog.records if record.name == "llm.line_file"]
    assert line.startswith(f"{file} was changed by something else (none are there of the ")


def test_an_agent_of_a_wandb_sweep_runs_pretrain(
    server: WandbServer, tmp_path: Path, config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_ENTITY", "us")  # `wandb sweep` sets both itself, and leaves them
    monkeypatch.setenv("WANDB_PROJECT", "gpt-experiment-runner")
    file = ROOT / "experiments" / "wandb_sweep.yaml"
    result = CliRunner().invoke(cli, ["sweep", str(file)])
    assert result.exit_code == 0, result.output
    sweep: Any = OmegaConf.create(server.sweep)
    assert set(sweep["parameters"]) == {"optimizer.lr", "seed", "training.max_minutes"}
    given = {"optimizer.lr": 0.00123, "seed": 7, "training.max_minutes": 0.001, "model": "tiny"}
    given |= {"tokenizer": "bytes", "data": "text", "data.path": config.data.path, "hydra.run.dir": "run"}
    given |= {"data.cache_dir": config.data.cache_dir, "runtime.threads": 1, "samples.max_new_tokens": 3}
    given |= {"training.grad_clip": None, "schedule": {"warmup": 0.25, "name": "cosine"}}  # these are nested
    server.commands = [
        {
            "type": "run",
            "run_id": "ab12xyz9",
            "program": str(ROOT / sweep["program"]),
            "args": {name: {"value": value} for name, value in given.items()},
        }
    ]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        **BRIEF,
    }
    often = "from wandb import wandb_agent; wandb_agent.Agent.POLL_INTERVAL = 0.1"  # not each 5 seconds
    code = f"{often}; from wandb.cli.cli import cli; cli()"
    arguments = ("agent", "--count", "1", "us/gpt-experiment-runner/sweep1")
    agent = run_python(tmp_path, environment, "-c", code, *arguments)
    assert agent.returncode == 0, agent.stderr
    assert run_id(tmp_path / "run") == "ab12xyz9"
    run = server.runs["ab12xyz9"]
    assert (run.fields["sweep"], run.exit_code) == ("sweep1", 0), agent.stderr
    assert run.summary[sweep["metric"]["name"]] > 0
    assert run.config["optimizer"]["value"]["lr"] == 0.00123
    overrides = OmegaConf.load(tmp_path / "run" / ".hydra" / "overrides.yaml")
    assert {"tracking=online", "optimizer.lr=0.00123", "seed=7"} <= set(overrides)
    assert run.config["training"]["value"]["grad_clip"] is None
    assert [run.config["schedule"]["value"][key] for key in ("name", "warmup")] == ["cosine", 0.25]


def test_a_workspace_is_saved(server: WandbServer) -> None:
    url = save_workspace(WorkspaceConfig(tracking=TrackingConfig(project="a-project")))
    assert url.startswith(f"{server.url}/us/a-project?nw=")
    [view] = server.views
    assert (view["projectName"], view["displayName"]) == ("a-project", "GPT experiments")
    spec = json.loads(view["spec"])
    panels = [
        panel for section in spec["section"]["panelBankConfig"]["sections"] for panel in section["panels"]
    ]
    lines = [panel["config"] for panel in panels if panel["viewType"] == "Run History Line Plot"]
    assert [(line["xAxis"], line["metrics"]) for line in lines] == [
        ("tokens_seen", [name]) for name in CURVES
    ]
    text = json.dumps(panels)
    for part in (
        "Parallel Coordinates Plot",
        "Parameter Importance",
        "optimizer",
        "val_bits_per_byte",
        "samples",
        "verdict/difference",
        "race/verdict",
        "ranking",
        "predictions",
        "Media Browser",
    ):
        assert part in text


def test_a_workspace_needs_its_package_and_a_server(
    server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.status = 401
    with pytest.raises(UserError, match=r"could not save workspace .* in gpt-experiment-runner .*401"):
        save_workspace(WorkspaceConfig())
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(UserError, match=r"pip install -c constraints.txt -e '.\[workspace\]'"):
        save_workspace(WorkspaceConfig())
