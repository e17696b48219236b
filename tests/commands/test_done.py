"""Runs that are not made twice, and what a program is told."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Script, numbers

from llm.commands import done
from llm.config import PretrainConfig

pytestmark = pytest.mark.usefixtures("no_pictures")

QUICK = (
    *("model=tiny", "model.context_length=16", "data=text", "tokenizer=bytes"),
    *("training.max_steps=2", "training.max_epochs=null", "training.max_minutes=null"),
    *("tracking=disabled", "runtime.device=cpu", "samples.max_new_tokens=2"),
)


@pytest.fixture
def train(script: Script, text: str) -> Any:
    """Train briefly; returns what a program is told."""

    def run(*arguments: str) -> dict[str, Any]:
        result = script("pretrain", *QUICK, text, "output=json", *arguments)
        answer = json.loads(result.stdout)
        assert (answer["status"] == "finished") == (result.returncode == 0), result.stderr
        assert isinstance(answer, dict)
        return answer

    return run


def runs_in(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("outputs/pretrain/*/*/metrics.jsonl"))


def test_a_run_that_is_done_is_not_made_again(
    train: Any, script: Script, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train()
    assert not first["reused"]
    assert Path(tmp_path, first["files"]["metrics"]).exists()
    again = train("tracking.group=other")
    assert again["reused"]
    assert again["folder"] == first["folder"]
    assert again["figures"] == first["figures"]
    said = script("pretrain", *QUICK, text)
    assert "done already" in said.stderr
    assert f"{first['figures']['val_loss']:.3f}" in said.stdout
    assert len(runs_in(tmp_path)) == 1

    copied = train("if_done=again")
    assert not copied["reused"]
    assert numbers(tmp_path / copied["folder"]) == numbers(tmp_path / first["folder"])
    assert not train("seed=124")["reused"]
    assert not train("hydra.run.dir=mine")["reused"]
    assert train("hydra.run.dir=mine")["reused"]

    monkeypatch.setattr(done, "_code", lambda: "other code")
    assert not train()["reused"]
    monkeypatch.undo()
    path = Path(text.partition("=")[2])
    path.write_text(path.read_text("utf-8").replace("beer", "wine"), "utf-8")
    assert not train()["reused"]


def test_a_run_that_is_shown_again_leaves_no_folder(train: Any, tmp_path: Path) -> None:
    first = train()
    before = sorted(tmp_path.glob("outputs/*/*/*"))
    assert train()["folder"] == first["folder"]
    assert sorted(tmp_path.glob("outputs/*/*/*")) == before


def test_a_job_that_was_stopped_early_is_not_done(train: Any, script: Script, tmp_path: Path) -> None:
    rule = ("early_stopping.rule=median", "early_stopping.min_jobs=1", "training.eval_freq=1", "seed=1")
    sweep = ("-m", "optimizer.lr=1e-2,1e-12", "training.max_steps=6", *rule)
    states = [job["state"] for job in train(*sweep)["figures"]["jobs"]]
    assert states == ["finished", "stopped"]
    jobs = train(*sweep)["figures"]["jobs"]
    assert ["taken_from" in job["figures"] for job in jobs] == [True, False]


def test_a_run_counts_as_what_it_became(train: Any, script: Script, tmp_path: Path) -> None:
    first = train()
    resumed = script("pretrain", f"resume={first['folder']}", "training.max_steps=3")
    assert resumed.returncode == 0, resumed.stderr
    assert not train()["reused"], "it has three updates now"
    same = train()
    assert same["reused"]
    script("pretrain", f"resume={same['folder']}")  # which changes nothing
    assert train()["folder"] == same["folder"]


def test_a_sweep_takes_what_is_done(train: Any, script: Script, tmp_path: Path) -> None:
    first = train()
    swept = train("-m", "seed=123,124")
    jobs = swept["figures"]["jobs"]
    assert [job["state"] for job in jobs] == ["finished", "finished"]
    assert jobs[0]["figures"]["taken_from"] == first["folder"]
    assert "taken_from" not in jobs[1]["figures"]
    assert numbers(tmp_path / jobs[0]["folder"]) == numbers(tmp_path / first["folder"])
    assert {"report"} <= set(swept["files"])
    sampled = json.loads(script("generate", f"checkpoint={jobs[0]['folder']}", "output=json").stdout)
    assert sampled["figures"]["samples"][0]["text"].startswith("Every effort moves you")
    # The job goes on by itself, and what it was taken from stays as it is.
    script("pretrain", f"resume={jobs[0]['folder']}", "training.max_steps=3")
    assert len(numbers(tmp_path / first["folder"])) < len(numbers(tmp_path / jobs[0]["folder"]))
    assert train()["reused"]


def test_samples_and_evaluations_that_are_done_are_shown_again(train: Any, script: Script) -> None:
    train()
    for name, arguments in (
        ("generate", ("max_new_tokens=5", "num_samples=2", "quiet=true")),
        ("evaluate", ("split=training",)),
    ):
        first, again = (script(name, *arguments) for _ in range(2))
        assert "done already" in again.stderr
        assert "done already" not in first.stderr
        if name == "generate":
            assert again.stdout == first.stdout
        else:
            assert first.stdout.endswith(again.stdout.partition("loss")[2])
        assert json.loads(script(name, *arguments, "output=json").stdout)["reused"]
    train("if_done=again", "seed=5")
    assert "done already" not in script("evaluate", "split=training").stderr, "latest is another run now"


def test_the_same_bytes_are_another_text_as_lines_of_json(train: Any, script: Script, tmp_path: Path) -> None:
    train()
    for name in ("text.txt", "text.jsonl"):
        (tmp_path / name).write_text('{"text": "10 bottles of beer"}\n', encoding="utf-8")
    tokens = [
        json.loads(script("evaluate", f"path={name}", "output=json").stdout)["figures"]["tokens"]
        for name in ("text.txt", "text.jsonl")
    ]
    assert tokens == [len('{"text": "10 bottles of beer"}\n') - 1, len("10 bottles of beer") - 1]


def test_a_program_is_told_of_errors_too(train: Any, script: Script) -> None:
    for arguments in (["optimizer.lrr=1"], ["data.path=nowhere"], ["seed=-1"]):
        answer = train(*arguments)
        assert answer["status"] == "failed"
        assert answer["error"], answer
    wrong = script("runs", "output=yaml")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: output=yaml: must be one of text, json")


def test_every_script_answers_programs(train: Any, script: Script, text: str) -> None:
    train("-m", "optimizer.lr=1e-3,2e-3", "seed=1,2")
    for name, *arguments in (
        ("prepare", *QUICK, text),
        ("export", "checkpoint=latest", "format=book"),
        ("runs",),
        ("report",),
        ("compare",),
        ("evaluate",),
    ):
        answer = json.loads(script(name, *arguments, "output=json").stdout)
        if name == "report":
            assert answer["figures"]["best/seeds"] == 2
        if name == "runs":
            assert {run["updates"] for run in answer["figures"]["runs"]} == {2}
        assert (answer["script"], answer["status"], answer["error"]) == (name, "finished", None), answer
        assert answer["figures"] or answer["files"]


def test_what_decides_a_run_is_all_of_its_config(text: str, tmp_path: Path) -> None:
    config = PretrainConfig()
    config.data.path, config.data.source = text.partition("=")[2], "text"
    made_with = done.fingerprint(config)
    for key in ("seed", "training.max_steps", "model.emb_dim", "optimizer.lr", "checkpoint.keep"):
        changed = PretrainConfig()
        changed.data.path, changed.data.source = config.data.path, "text"
        *place, name = key.split(".")
        owner = getattr(changed, place[0]) if place else changed
        setattr(owner, name, 2 * (getattr(owner, name) or 64))
        assert done.fingerprint(changed) != made_with, key
    config.tracking.mode, config.if_done = "disabled", "again"
    config.data.cache_dir = str(tmp_path / "cache")
    assert done.fingerprint(config) == made_with


def test_what_nobody_gave_may_be_left_to_the_device(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU 16 windows a batch are what was asked for if they are given, and a CPU's number if not."""
    config = PretrainConfig()
    config.data.path, config.data.source = text.partition("=")[2], "text"
    for kind in ("cpu", "cuda"):
        monkeypatch.setattr(done, "device_kind", lambda _, kind=kind: kind)
        left_open, given = (done.fingerprint(config, keys) for keys in (["seed"], ["data.batch_size"]))
        assert (left_open == given) == (kind == "cpu")
