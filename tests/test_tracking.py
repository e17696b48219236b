"""Runs in W&B: what arrives there online and by `wandb sync`, outages, W&B's sweeps, a saved workspace."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import wandb
from click.testing import CliRunner
from omegaconf import OmegaConf
from scripts import ROOT, run_python
from wandb.cli.cli import cli
from wandb_server import KEY, ArrivedRun, WandbServer

from llm import tracking
from llm.checkpoints.checkpoint import run_id
from llm.commands.pretrain import pretrain
from llm.commands.workspace import CURVES, save_workspace
from llm.config import ModelConfig, PretrainConfig, TrackingConfig, WorkspaceConfig
from llm.errors import UserError
from llm.files import as_typed, read_json_lines
from llm.tracking import Tracker, sync_command
from llm.training import lifecycle

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
    monkeypatch.setattr(Tracker, "failed_to_start", False)
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
    result = CliRunner().invoke(cli, sync_command(folder).split()[1:])
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
    online, offline = server.runs[run_id(tmp_path / "online")], server.runs[run_id(tmp_path / "offline")]
    written = [values(line) for line in read_json_lines(tmp_path / "online" / "metrics.jsonl")]
    assert len(written) == 6
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
    monkeypatch.setattr(tracking, "ANSWER", 1)
    monkeypatch.setattr(tracking, "DELIVER", 1)
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
    monkeypatch.setattr(tracking, "BEGIN", 1)
    monkeypatch.setattr(tracking, "ANSWER", 1)
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
        "PYTHONPATH": str(ROOT),
    }
    agent = run_python(
        tmp_path, environment, "-m", "wandb", "agent", "--count", "1", "us/gpt-experiment-runner/sweep1"
    )
    assert agent.returncode == 0, agent.stderr
    assert run_id(tmp_path / "run") == "ab12xyz9"
    run = server.runs["ab12xyz9"]
    assert (run.fields["sweep"], run.exit_code) == ("sweep1", 0), agent.stderr
    assert run.summary[sweep["metric"]["name"]] > 0
    assert run.config["optimizer"]["value"]["lr"] == 0.00123
    overrides = OmegaConf.load(tmp_path / "run" / ".hydra" / "overrides.yaml")
    assert {"tracking=online", "optimizer.lr=0.00123", "seed=7"} <= set(overrides)


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
    for part in ("Parallel Coordinates Plot", "Parameter Importance", "optimizer", "val_loss", "samples"):
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
