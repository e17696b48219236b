"""One folder, one run: who gets a folder, and what of a folder's records counts."""

import json
import shutil
import time
from pathlib import Path

import pytest
from conftest import TINY, Begin, Script, numbers
from settings import changed, settings

from llm.checkpoints.checkpoint import recorded_config
from llm.commands.pretrain import pretrain
from llm.errors import UserError
from llm.files import held, read_json_lines, write_json
from llm.run_folder import LOCK, claimed
from llm.runs import find_run
from llm.sweeps.jobs import find_sweep

pytestmark = pytest.mark.usefixtures("no_pictures")

FOUR = (*TINY, "data=text", "training.max_steps=4", "checkpoint.every_steps=2")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Who gets a folder


@pytest.mark.parametrize(
    "names",
    [
        ["hydra.run.dir=run"],
        ["hydra.run.dir=${data.source}-${model.n_layers}"],
        ["--config-dir", "conf", "experiment=mine"],
    ],
)
def test_a_run_that_is_refused_leaves_every_byte_as_it_was(
    script: Script, text: str, tmp_path: Path, names: list[str]
) -> None:
    mine = tmp_path / "conf" / "experiment" / "mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("# @package _global_\nhydra: {run: {dir: 'run-${data.source}'}}\n", "utf-8")
    assert script("pretrain", *FOUR, text, "seed=1", *names).returncode == 0
    before = content(tmp_path)
    result = script("pretrain", *FOUR, text, "seed=2", *names)
    assert result.returncode == 1
    assert "already holds a run: continue it with resume=" in result.stderr
    assert content(tmp_path) == before


def test_of_two_begun_at_once_one_trains(begin: Begin, text: str, tmp_path: Path) -> None:
    """Named alike, by the same folder; of those that the clock names, both do."""
    both = [begin(*FOUR, text, f"seed={seed}", "hydra.run.dir=run") for seed in (1, 2)]
    outputs = ["".join(process.output()) for process in both]
    assert sorted(process.exitcode or 0 for process in both) == [0, 1]
    [won] = [seed for seed, process in enumerate(both, 1) if process.exitcode == 0]
    assert "error: run is being written by another process" in outputs[2 - won] or (
        "error: run already holds a run" in outputs[2 - won]
    )
    assert json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))["seed"] == won
    assert f"seed={won}" in (tmp_path / "run" / ".hydra" / "overrides.yaml").read_text("utf-8")


def test_a_folder_named_by_the_clock_may_be_one_beside(script: Script, text: str, tmp_path: Path) -> None:
    names = "hydra.run.dir=out/${now:%Y}"
    for seed in (1, 2):
        assert script("pretrain", *FOUR, text, f"seed={seed}", names).returncode == 0
    one, other = sorted((tmp_path / "out").iterdir())
    assert other.name == f"{one.name}-2"
    seeds = [json.loads((run / "summary.json").read_text("utf-8"))["seed"] for run in (one, other)]
    assert seeds == [1, 2]
    assert (other / "pretrain.log").exists()


def test_a_run_that_is_refused_leaves_no_folder(script: Script, tmp_path: Path) -> None:
    for arguments in (["data=text", "data.path=missing"], ["optimizer.lr=-1"], ["init_from=missing"]):
        assert script("pretrain", *TINY, *arguments).returncode == 1
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="no such file"):
        pretrain(changed(settings(tmp_path), data__path="missing"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_lock_whose_file_was_deleted_is_taken_again(tmp_path: Path) -> None:
    with claimed(tmp_path / "run", beside=True):
        (tmp_path / "run" / LOCK).unlink()
        with claimed(tmp_path / "run", beside=True) as folder:  # by whoever came after
            assert folder == tmp_path / "run"
            with held(tmp_path / "run" / LOCK, seconds=0) as ours:
                assert not ours


def test_nothing_is_written_through_a_link(script: Script, text: str, tmp_path: Path) -> None:
    assert script("pretrain", *FOUR, text, "hydra.run.dir=run").returncode == 0
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for name in ("metrics.jsonl", ".hydra", "checkpoints", "pretrain.log", ".run.lock"):
        (run / name).rename(elsewhere)
        (run / name).symlink_to(elsewhere)
        before = content(elsewhere) if elsewhere.is_dir() else elsewhere.read_bytes()
        result = script("pretrain", "resume=run", "training.max_steps=6")
        assert result.stderr.startswith(f"error: run/{name} is a link: ")
        assert (content(elsewhere) if elsewhere.is_dir() else elsewhere.read_bytes()) == before
        (run / name).unlink()
        elsewhere.rename(run / name)
    unnamed = run / "checkpoints" / ".best.0123abcd.tmp"  # of a run that was killed as it made the link
    unnamed.symlink_to((run / "checkpoints" / "best").readlink())
    assert script("pretrain", "resume=run", "training.max_steps=6").returncode == 0
    assert not unnamed.is_symlink()


def test_latest_is_found_behind_links(script: Script, text: str, tmp_path: Path) -> None:
    script("pretrain", *FOUR, text, "seed=1", "hydra.run.dir=disk/1")
    script("pretrain", *FOUR, text, "-m", "seed=2", "hydra.sweep.dir=disk/sweep")
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "linked").symlink_to("../disk")
    (tmp_path / "disk" / "back").symlink_to("..")
    (tmp_path / "outputs" / "never-began" / "checkpoints").mkdir(parents=True)
    assert find_run("latest", tmp_path / "outputs").name == "0"
    assert find_sweep("latest", "pretrain", tmp_path / "outputs").name == "sweep"
    with pytest.raises(UserError, match=r"there is no sweep begun by experiments/generate\.py under"):
        find_sweep("latest", "generate", tmp_path / "outputs")
    shutil.rmtree(tmp_path / "disk" / "sweep")
    result = script("pretrain", "resume=latest", "training.max_steps=6")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "disk" / "1" / "checkpoints" / "step-00000006").exists()
    assert "its config is not composed" in script("pretrain", "resume=latest", "--cfg", "job").stderr


# What counts of its records


def test_a_run_is_resumed_from_its_checkpoint_whatever_hydra_recorded(
    script: Script, text: str, tmp_path: Path
) -> None:
    """The overrides that a stranger left, or a killed process cut off, are not read."""
    script("pretrain", *FOUR, text, "seed=5", "hydra.run.dir=run")
    whole = shutil.copytree(tmp_path / "run", tmp_path / "whole", symlinks=True)
    evil = ["seed=6", f"+hydra.job.env_set.GIT_TRACE={tmp_path / 'traced'}", "hydra.job.name=${oc.env:HOME}"]
    for record in (json.dumps(evil), "", "}{"):
        (tmp_path / "run" / ".hydra" / "overrides.yaml").write_text(record, "utf-8")
        result = script("pretrain", "resume=run", "training.max_steps=6")
        assert result.returncode == 0, result.stderr
        config = recorded_config(tmp_path / "run")
        assert config
        assert (config.seed, config.training.max_steps) == (5, 6)
        assert (tmp_path / "run" / ".hydra" / "overrides.yaml").read_text("utf-8") == record
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(whole, tmp_path / "run", symlinks=True)
    assert not (tmp_path / "traced").exists()


def test_what_was_typed_as_a_reference_is_resumed_and_reported(
    script: Script, text: str, tmp_path: Path
) -> None:
    arguments = ["data.stride=${model.context_length}", "model.context_length=32", r"tracking.name='a \${b}'"]
    assert script("pretrain", *FOUR, text, *arguments, "hydra.run.dir=run").returncode == 0
    result = script("pretrain", "resume=run", "training.max_steps=6")
    assert result.returncode == 0, result.stderr
    config = recorded_config(tmp_path / "run")
    assert config
    assert (config.data.stride, config.tracking.name) == (32, "a ${b}")
    assert script("report", "sweep=run").returncode == 0
    result = script("pretrain", "resume=run", "training.max_steps=${training.eval_freq}")
    assert "with resume, give a value" in result.stderr


def test_a_run_without_a_checkpoint_begins_again_with_its_config(tmp_path: Path) -> None:
    config = changed(settings(tmp_path, max_steps=4), seed=9)
    pretrain(config, tmp_path / "whole")
    pretrain(config, tmp_path / "run")
    lines = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    start = tmp_path / "run" / "checkpoints" / "start-00000000"
    assert not start.exists()  # the next checkpoint says it all
    for folder in start.parent.iterdir():
        folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)
    with pytest.raises(UserError, match="is not a run folder"):
        pretrain(resumed := changed(type(config)(), resume=str(tmp_path / "run")))
    from llm.checkpoints.writing import write_start

    write_start(tmp_path / "run", 0, config)
    pretrain(resumed)
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")
    assert len(lines) == len(numbers(tmp_path / "run"))


def test_what_a_resume_changed_outlives_a_kill(
    begin: Begin, script: Script, text: str, tmp_path: Path
) -> None:
    """Also where it comes before the next checkpoint."""
    assert script("pretrain", *FOUR, text, "hydra.run.dir=run").returncode == 0
    process = begin(
        "resume=run", "training.max_steps=5000", "checkpoint.every_steps=null", "optimizer.lr=0.002"
    )
    while process.is_alive() and len(read_json_lines(tmp_path / "run" / "metrics.jsonl")) < 12:
        time.sleep(0.05)
    process.kill()
    process.join()
    assert (tmp_path / "run" / "checkpoints" / "start-00000004").exists()
    assert script("pretrain", "resume=run", "training.max_steps=6").returncode == 0
    config = recorded_config(tmp_path / "run")
    assert config
    assert (config.optimizer.lr, config.training.max_steps) == (0.002, 6)


# A sweep's record


def begun_sweep(script: Script, text: str, *arguments: str) -> None:
    result = script("pretrain", "-m", *FOUR, text, "hydra.sweep.dir=sweep", "seed=1,2", *arguments)
    assert result.returncode == 0, result.stderr


def test_a_sweep_with_references_is_resumed(script: Script, text: str, tmp_path: Path) -> None:
    begun_sweep(
        script,
        text,
        "data.stride=${model.context_length}",
        "hydra.sweep.subdir=${hydra.job.num}",
        "hydra.job.name=x",
    )
    whole = numbers(tmp_path / "sweep" / "1")
    for name in ("0", "1"):
        shutil.rmtree(tmp_path / "sweep" / name)
    result = script("pretrain", "sweep.resume=sweep")
    assert result.returncode == 0, result.stderr
    assert numbers(tmp_path / "sweep" / "1") == whole
    assert script("report", "sweep=sweep").returncode == 0


def test_a_value_from_the_environment_is_given_again(
    script: Script, text: str, environment: dict[str, str], tmp_path: Path
) -> None:
    environment["SECRET_NAME"] = "xyzzy"
    begun_sweep(script, text, "tracking.name=${oc.env:SECRET_NAME}")
    shutil.rmtree(tmp_path / "sweep" / "1")
    result = script("pretrain", "sweep.resume=sweep")
    assert "give tracking.name=VALUE again" in result.stderr
    assert script("pretrain", "sweep.resume=sweep", "tracking.name=mine").returncode == 0
    config = recorded_config(tmp_path / "sweep" / "1")
    assert config
    assert config.tracking.name == "mine"
    assert "xyzzy" not in (tmp_path / "sweep" / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "job", "line"),
    [
        (["+hydra.job.env_set.GIT_TRACE=TRACED"], [], ""),
        (["hydra.launcher._target_=os.abort", "hydra.launcher.setup=[touch TRACED]"], [], ""),
        (["hydra.sweeper.n_trials=${oc.env:HOME}"], [], ""),
        ([], ["+hydra.job.env_set.GIT_TRACE=TRACED"], "a job sets hydra.job.env_set.GIT_TRACE"),
        ([], ["hydra/launcher=joblib"], "a job sets hydra/launcher"),
        ([], ["+new.key=1"], "is nothing that a sweep of this script sets"),
        ([], ["model=../../../evil"], "is nothing that a sweep of this script sets"),
        ([], ["~optimizer"], "is nothing that a sweep of this script sets"),
        ([], ["model={emb_dim:${oc.env:HOME}}"], "is nothing that a sweep of this script sets"),
        ([], ["seed=\u0000["], "is damaged"),
        ([], ["seed=${oc.env:SECRET}"], "give seed=VALUE again"),
    ],
)
def test_a_sweeps_record_sets_only_what_its_script_has(
    script: Script,
    text: str,
    environment: dict[str, str],
    tmp_path: Path,
    arguments: list[str],
    job: list[str],
    line: str,
) -> None:
    traced = tmp_path / "traced"
    arguments, job = ([each.replace("TRACED", str(traced)) for each in some] for some in (arguments, job))
    environment["SECRET"] = "7"
    record = {
        "script": "pretrain",
        "arguments": [*FOUR, text, *arguments, "seed=1"],
        "varied": ["seed"],
        "jobs": [[*FOUR, text, "seed=1", *job]],
    }
    write_json(tmp_path / "sweep" / "sweep.json", record)
    result = script("pretrain", "-m", "sweep.resume=sweep")
    assert not traced.exists()
    if line:
        assert result.returncode == 1
        assert line in result.stderr
        assert not (tmp_path / "sweep" / "0").exists()
    else:
        assert result.returncode == 0, result.stderr
        [line] = [line for line in result.stdout.splitlines() if "not taken from the sweep's record" in line]
        assert arguments[-1].partition("=")[0].lstrip("+") in line
        assert (tmp_path / "sweep" / "0" / "summary.json").exists()
