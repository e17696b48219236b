"""runs.py, and what `latest`, `best` and a mistyped run mean: on the recorded runs of tests/fixtures."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY, Script
from scripts import ROOT, run_python, script_path

from llm.checkpoints.checkpoint import find_checkpoint
from llm.checkpoints.writing import write_start
from llm.commands.runs import list_runs
from llm.config import PretrainConfig, RunsConfig
from llm.errors import UserError
from llm.files import held, read_json_lines, write_json
from llm.run_folder import LOCK, RUN_ID, read_summary
from llm.runs import find_run
from llm.sweeps.jobs import write_record
from llm.training.summary import Summary

pytestmark = pytest.mark.usefixtures("no_pictures")

FIXTURES = ROOT / "tests" / "fixtures"
OLD, NEW = "outputs/pretrain/2026-01-01/10-00-00", "outputs/pretrain/sweeps/2026-01-01/09-00-00/1"
BITS = {OLD: "7.186", NEW: "6.981"}  # as the summaries say


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run, and a job of a sweep that was begun after it; the sweep's other job failed before it began."""
    monkeypatch.chdir(tmp_path)
    for number, (run, fixture) in enumerate(((OLD, "run_v1"), (NEW, "run_v2"))):
        shutil.copytree(FIXTURES / fixture, run, symlinks=True)
        os.utime(Path(run, RUN_ID), (number + 1, number + 1))
    jobs = [["optimizer.lr=-1", "seed=7"], ["optimizer.lr=3e-4", "seed=7"]]
    write_record(Path(NEW).parent, "pretrain", [], ["optimizer.lr"], jobs)
    write_json(Path(NEW).parent / "0" / "summary.json", {"status": "failed", "error": "lr must be above 0"})
    return tmp_path / "outputs"


def row(output: str, run: str) -> str:
    [line] = [line for line in output.splitlines() if f" {run} " in line]
    return line


def test_runs_are_listed(script: Script, outputs: Path) -> None:
    (outputs / "generate" / "samples").mkdir(parents=True)
    write_json(outputs / "generate" / "samples" / "summary.json", {"status": "finished"})  # a study is no run
    result = script("runs")
    assert (result.returncode, result.stderr) == (0, "")
    heading, failed, new, old = result.stdout.splitlines()
    assert heading.split() == ["state", "updates", "bits/byte", "trained", "run", "asked", "for"]
    assert failed.split()[:5] == ["failed", "–", "–", "–", f"{Path(NEW).parent}/0"]
    assert failed.endswith("lr=-1: lr must be above 0")
    assert new.split() == ["finished", "8", BITS[NEW], "0s", NEW, "lr=3e-4"]
    assert old.split()[:6] == ["finished", "8", BITS[OLD], "0s", OLD, "max_minutes=null"]
    _, one, more = script("runs", "limit=1").stdout.splitlines()
    assert (one.split(), more) == (failed.split(), "… and 2 more: limit=null lists all")
    assert script("runs", "state=finished", f"path={NEW}").stdout.split()[-6:] == new.split()
    assert not (outputs / "runs").exists()
    assert script("runs", "path=nowhere").stderr == "error: path=nowhere: there is no such folder\n"


def test_a_run_whose_process_is_gone_does_not_run(script: Script, outputs: Path) -> None:
    write_json(Path(OLD, "summary.json"), {"status": "running", "steps": 0})
    with held(Path(OLD, LOCK)):
        assert row(script("runs").stdout, OLD).split()[:3] == ["running", "8", "~7.235"]
    killed = script("runs").stdout
    assert row(killed, OLD).split()[:3] == ["killed", "8", "~7.235"]
    assert killed.splitlines()[-1].startswith("~ over a few batches")
    write_json(Path(OLD, "summary.json"), {"status": "interrupted", "steps": 6, "seconds": 61})
    assert row(script("runs", "state=interrupted").stdout, OLD).split()[:4] == [
        *("interrupted", "6", "~7.235", "1m01s")
    ]


def test_broken_folders_are_listed(script: Script, outputs: Path) -> None:
    Path(OLD, "summary.json").write_text("{", "utf-8")
    Path(OLD, ".hydra", "overrides.yaml").write_text("}{", "utf-8")
    Path(OLD, "metrics.jsonl").write_bytes(b"\x00\n{}\n[1]\n")
    Path(NEW, "metrics.jsonl").unlink()
    Path(NEW, "metrics.jsonl").mkdir()
    (Path(NEW).parent / "sweep.json").write_text("[]", "utf-8")
    result = script("runs")
    assert (result.returncode, result.stderr) == (0, "")
    assert row(result.stdout, OLD).split() == ["damaged", "–", "–", "–", OLD, "default"]
    assert row(result.stdout, NEW).split()[2] == BITS[NEW]


def test_a_terminal_gets_no_line_longer_than_it_is_wide(
    outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    list_runs(RunsConfig())
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1] == f"{Path(NEW).parent}/"  # once for both of its jobs
    assert [line.split()[4] for line in (lines[2], lines[3], lines[5])] == ["0", "1", "10-00-00"], lines


def test_no_runs_are_no_error_and_need_no_torch(environment: dict[str, str], tmp_path: Path) -> None:
    result = run_python(tmp_path, environment, "-X", "importtime", script_path("runs"))
    assert (result.returncode, result.stdout) == (0, "there is no run under outputs/\n")
    assert " llm.commands.runs" in result.stderr
    assert not {" torch\n", " numpy\n"} & {f" {line.split()[-1]}\n" for line in result.stderr.splitlines()}
    assert list(tmp_path.iterdir()) == []


def test_output_that_nobody_reads_is_no_error(environment: dict[str, str], tmp_path: Path) -> None:
    command = f"'{sys.executable}' '{script_path('runs')}' | true; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, "")


# Which run or checkpoint a name means


def test_latest_is_the_run_begun_last_and_best_its_best_checkpoint(script: Script, outputs: Path) -> None:
    assert str(find_run("latest")) == NEW
    assert find_checkpoint("latest") == Path(NEW, "checkpoints", "step-00000008").absolute()
    best = Path(NEW, "checkpoints", "best-00000007")
    assert find_checkpoint("best") == find_checkpoint(f"{NEW}/checkpoints/best") == best.absolute()
    few = ("max_new_tokens=2", "prompt=9")
    for checkpoint, step in (("latest", 7), ("best", 6)):
        result = script("generate", *few, f"checkpoint={checkpoint}", f"hydra.run.dir={checkpoint}")
        assert result.returncode == 0, result.stderr
        [line] = read_json_lines(Path(checkpoint, "samples.jsonl"))
        assert line["step"] == step
    short = ("training.max_steps=1", "training.max_minutes=null", "data=text", "data.path=text.txt")
    Path("text.txt").write_text("9 bottles of beer\n" * 60, "utf-8")
    tuned = script("pretrain", "init_from=best", *short, "tracking=disabled", "samples.max_new_tokens=2")
    assert tuned.returncode == 0, tuned.stderr
    run = find_run("latest")
    assert str(run) != NEW
    assert f'"init_from": "{best}"' in (run / "summary.json").read_text("utf-8")  # which `best` now is not
    assert script("runs").stdout.splitlines()[1].split()[4] != NEW
    refused = script("pretrain", "resume=best").stderr
    assert f"the best checkpoint holds weights alone; continue from the newest with resume={run}" in refused


def test_a_run_without_a_checkpoint_is_the_latest_too(script: Script, outputs: Path) -> None:
    """Rather than that another one is silently taken for it."""
    begun = outputs / "begun"
    write_start(begun, 0, PretrainConfig())
    (begun / RUN_ID).write_text("abcdef01", "utf-8")
    assert find_run("latest", with_checkpoint=False) == Path("outputs", "begun")
    for name in ("generate", "export"):
        result = script(name)
        assert result.returncode == 1
        assert result.stderr.startswith(
            f"error: latest: outputs/begun has no checkpoint yet; the newest runs: {NEW} (finished, "
        )
    assert "checkpoints/best: there is no such checkpoint; the run has none yet" in (
        script("generate", "checkpoint=best").stderr
    )


@pytest.mark.parametrize(
    ("name", "argument", "line"),
    [
        ("pretrain", "resume=typo", "typo is not a run folder; the newest runs: "),
        ("pretrain", "rerun=typo", "typo is not a run folder; the newest runs: "),
        ("pretrain", "init_from=outputs/typo", "outputs/typo is not a run folder; the newest runs: "),
        (
            "generate",
            "checkpoint=outputs/pretrain",
            "outputs/pretrain is not a run folder; the newest",
        ),
        ("generate", "checkpoint=typo", "typo is no file or folder here, and Hugging Face"),
        ("evaluate", f"checkpoint={NEW}/checkpoints/bets", f"{NEW}/checkpoints/bets: there is no such check"),
        ("export", "checkpoint=", "an empty name is no run"),
        ("report", "sweep=typo", "typo holds neither a sweep nor a run; the newest sweeps: "),
        (
            "pretrain",
            "sweep.resume=typo",
            "typo is not a sweep's folder: it has no sweep.json; the newest ",
        ),
    ],
)
def test_a_mistyped_run_is_answered_with_those_there_are(
    script: Script, outputs: Path, name: str, argument: str, line: str
) -> None:
    result = script(name, argument)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {line}")
    assert result.stderr.count("\n") == 1
    answers = {"bets": "the run has best-00000004, best-00000007, step-00000005", "export": "give its folder"}
    told = next((answers[key] for key in answers if key in f"{name} {argument}"), str(Path(NEW).parent))
    assert told in result.stderr


def test_a_name_without_a_run_is_refused(tmp_path: Path) -> None:
    for name in ("latest", "best"):
        with pytest.raises(UserError, match=f"{name}: there is no run under"):
            find_run(name, tmp_path)


def test_a_run_that_is_not_heard_of_is_told(script: Script, outputs: Path) -> None:
    summary = read_summary(Path(OLD))
    for ago, said in ((30, ""), (7500, ": not heard of for 2h05m")):
        beating = {"status": "running", "heartbeat": time.time() - ago}
        write_json(Path(OLD) / "summary.json", {**summary, **beating})
        with held(Path(OLD) / LOCK):
            told = row(script("runs").stdout, OLD)
        assert told.startswith("running")
        assert told.partition("max_minutes=null")[2].partition(":")[2] == said[1:]


def test_a_run_is_running_until_its_final_figures_are_there(
    script: Script, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a heartbeat during the validation at the end: whoever read `finished` there, as a sweep does,
    would look no further, and a run killed there could not be resumed."""
    told: list[tuple[str, float | None]] = []
    write = Summary.write

    def watched(summary: Summary, run_dir: Path) -> None:
        write(summary, run_dir)
        told.append((read_summary(run_dir)["status"], read_summary(run_dir)["val_loss"]))

    monkeypatch.setattr(Summary, "write", watched)
    monkeypatch.setattr("llm.training.recorder.HEARTBEAT_SECONDS", 0.0)
    monkeypatch.setattr("llm.training.recorder.LARGEST_SHARE", 1e9)
    result = script("pretrain", *TINY, "data=text", text, "training.max_steps=2", "hydra.run.dir=run")
    assert result.returncode == 0, result.stderr
    assert {status for status, loss in told if loss is None} == {"running"}
    assert told[-1][0] == "finished"


def test_a_run_says_that_it_lives(
    script: Script, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second between two heartbeats, on a clock by which an update takes 0.4 seconds."""
    told: list[tuple[int, float | None]] = []
    write, clock = Summary.write, itertools.count(0, 0.2)  # a heartbeat looks twice where it writes

    def watched(summary: Summary, run_dir: Path) -> None:
        write(summary, run_dir)
        if summary.heartbeat and summary.status == "running":
            told.append((read_summary(run_dir)["steps"], read_summary(run_dir)["heartbeat"]))

    monkeypatch.setattr(Summary, "write", watched)
    monkeypatch.setattr("llm.training.recorder.HEARTBEAT_SECONDS", 1.0)
    monkeypatch.setattr("llm.training.recorder.LARGEST_SHARE", 1.0)
    monkeypatch.setattr("llm.training.recorder.time.monotonic", lambda: next(clock))
    begin = time.time()
    result = script("pretrain", *TINY, "data=text", text, "training.max_steps=20", "hydra.run.dir=run")
    assert result.returncode == 0, result.stderr
    steps, times = zip(*told, strict=True)
    assert steps[0] == 1
    assert 3 <= len(steps) < 12
    assert begin < times[0] <= times[-1] < time.time()
    assert sorted(set(steps)) == list(steps)
