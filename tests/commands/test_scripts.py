"""The scripts as a user runs them: files, errors, resuming, interrupting, sweeping, reproducing."""

import json
import re
import shlex
import signal
import time
from pathlib import Path

import pytest
from conftest import TINY, Begin, Script, numbers
from scripts import BRIEF, ROOT, run_python, script_path
from suggestions import did_you_mean

from llm.config import GenerateConfig, PretrainConfig
from llm.config_values import leaf_keys
from llm.files import read_json_lines
from llm.progress import format_count

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.mark.usefixtures("pictures")
def test_a_run_leaves_its_whole_story(script: Script, tmp_path: Path, text: str) -> None:
    arguments = [*TINY, "data=text", text, "training.max_steps=12", "tracking=offline", "hydra.run.dir=run"]
    result = script("pretrain", *arguments)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "run"
    lines = read_json_lines(run / "metrics.jsonl")
    steps = [line for line in lines if "train/loss" in line]
    evaluations = [line for line in lines if "val/loss" in line]
    position = {"step", "tokens_seen", "epoch", "seconds"}
    assert [line["step"] for line in steps] == list(range(12))
    assert [line["step"] for line in evaluations] == [0, 5, 10, 11]
    assert set(steps[0]) == position | {"train/loss", "lr", "grad_norm", "tokens_per_second"}
    assert set(evaluations[0]) == position | {
        "eval/train_loss",
        "val/loss",
        "val/perplexity",
        "val/bits_per_byte",
    }
    # one token is one byte here, so bits per byte are the loss in bits
    assert evaluations[0]["val/bits_per_byte"] == pytest.approx(evaluations[0]["val/loss"] / 0.6931471806)
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["tokens_seen"]) == ("finished", 12, 12 * 2 * 64)
    assert summary["val_bits_per_byte"] == pytest.approx(summary["val_loss"] / 0.6931471806)
    assert summary["best_val_loss"] == min(line["val/loss"] for line in evaluations)
    assert summary["mfu"] > 0
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    [sample] = read_json_lines(run / "samples.jsonl")
    assert set(sample) >= {"step", "prompt", "text", "sampling"}
    assert (sample["step"], len(sample["token_ids"]), sample["stop_reason"]) == (11, 5, "length")
    assert (run / ".hydra" / "config.yaml").exists()
    assert "Ep 1 (Step 000000): Train loss " in (run / "pretrain.log").read_text()
    assert len(list((run / "wandb").glob("offline-run-*"))) == 1
    for hint in (
        "generate.py checkpoint=run",
        "pretrain.py resume=run training.max_steps=",
        "wandb sync run/wandb/",
    ):
        assert hint in result.stdout

    result = script(
        "generate",
        "checkpoint=run",
        "prompt=7 bot",
        "max_new_tokens=4",
        "num_samples=2",
        "hydra.run.dir=text",
    )
    assert result.returncode == 0, result.stderr
    first, second = read_json_lines(tmp_path / "text" / "samples.jsonl")
    assert first["text"].startswith("7 bot")
    assert first["step"] == 11
    alone = script(
        "generate",
        "prompt=7 bot",
        "max_new_tokens=4",
        "checkpoint=run/checkpoints/last",
        "hydra.run.dir=alone",
    )
    assert alone.returncode == 0, alone.stderr
    assert read_json_lines(tmp_path / "alone" / "samples.jsonl") == [first]
    assert second["sample"] == 1


def test_a_change_that_is_refused_is_forgotten(script: Script, tmp_path: Path, text: str) -> None:
    begun = script("pretrain", *TINY, "data=text", text, "training.max_steps=3", "hydra.run.dir=run")
    assert begun.returncode == 0, begun.stderr
    refused = script("pretrain", *TINY, "tokenizer=gpt2", "hydra.run.dir=run")
    assert refused.stderr.startswith("error: run already holds a run: continue it with resume=run, or write")
    refused = script("pretrain", "resume=run", "model.emb_dim=128", "training.max_steps=5")
    assert refused.stderr.startswith("error: resume=run: model.emb_dim=128 (it is 64) cannot change")
    resumed = script("pretrain", "resume=run", "training.max_steps=4")
    assert resumed.returncode == 0, resumed.stderr
    assert [line["step"] for line in numbers(tmp_path / "run") if "train/loss" in line] == [0, 1, 2, 3]


def test_two_processes_train_as_one(
    script: Script, environment: dict[str, str], tmp_path: Path, text: str
) -> None:
    common = [
        *TINY,
        "data=text",
        text,
        "training.max_steps=10",
        "model.drop_rate=0",
        "runtime.precision=fp32",
        "training.accumulate=2",
        "tokenizer=bpe",
        "tokenizer.vocab_size=270",
    ]
    for processes in (1, 2):
        result = script("pretrain", *common, f"runtime.processes={processes}", f"hydra.run.dir=by{processes}")
        assert result.returncode == 0, result.stderr
    one, two = (
        [line["train/loss"] for line in numbers(tmp_path / f"by{n}") if "train/loss" in line] for n in (1, 2)
    )
    assert two == pytest.approx(one, abs=1e-3)  # Muon computes in bf16, where a last bit goes a long way
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2")
    launched = run_python(
        tmp_path,
        environment | BRIEF,
        *torchrun,
        script_path("pretrain"),
        *common,
        "data.cache_dir=new",
        "hydra.run.dir=launched",
    )
    assert launched.returncode == 0, launched.stderr
    assert launched.stdout.count("learnt a tokenizer of 270 tokens") == 1
    assert numbers(tmp_path / "launched") == numbers(tmp_path / "by2")
    assert launched.stdout.count("Ep 1 (Step 000000)") == 1  # the first process speaks for all
    resumed = script("pretrain", "resume=launched", "runtime.processes=2", "training.max_steps=12")
    assert resumed.returncode == 0, resumed.stderr


def test_what_contradicts_a_launcher_is_refused(
    script: Script, environment: dict[str, str], tmp_path: Path, text: str
) -> None:
    """Before any other process is waited for: there is none."""
    begun = script("pretrain", *TINY, "data=text", text, "training.max_steps=2", "hydra.run.dir=run")
    assert begun.returncode == 0, begun.stderr
    environment |= {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for given, why in {
        "resume=run runtime.processes=1": "runtime.processes=1: 2 processes were launched; remove it",
        "rerun=run": "rerun=run: it was trained with runtime.processes=1, and 2 processes were "
        "launched: launch as many",
        "-m seed=1 hydra.sweep.dir=sweep": "torchrun begins one run, not a sweep: run without it, and set "
        "runtime.processes",
    }.items():
        refused = script("pretrain", *given.split())
        assert (refused.returncode, refused.stderr) == (1, f"error: {why}\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_run_cleanly(begin: Begin, tmp_path: Path, text: str, number: signal.Signals) -> None:
    process = begin(*TINY, "data=text", text, "training.max_steps=100000", "hydra.run.dir=run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.is_alive() and not metrics.exists():
        time.sleep(0.02)
    process.send_signal(number)
    if number == signal.SIGHUP:  # a shell often sends it again to its jobs, after the terminal has
        process.send_signal(number)
    _, errors = process.output()
    assert process.exitcode == 128 + number, errors
    assert "Traceback" not in errors
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["stopped_by"]) == ("interrupted", number.name)
    assert (tmp_path / "run" / "checkpoints" / "last").readlink().name == f"step-{summary['steps']:08d}"


def test_a_loss_that_is_not_finite_stops_the_run(script: Script, tmp_path: Path, text: str) -> None:
    result = script(
        "pretrain",
        *TINY,
        "data=text",
        text,
        "training.max_steps=50",
        "training.eval_freq=null",  # which would see it before the next update does
        "optimizer=adamw",
        "optimizer.lr=1e30",
        "schedule=constant",
        "training.grad_clip=null",
        "checkpoint.every_steps=1",
        "hydra.run.dir=run",
    )
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert line.startswith("error: step 1: loss ")
    assert "there is no good checkpoint" in line  # those of step 1 are what gave that loss
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert summary["error"] in line


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["optimizer.lrr=1"], "optimizer.lrr: there is no such key; optimizer has name, lr, weight_decay"),
        (["lr=1"], "lr: there is no such key; did you mean optimizer.lr?"),
        (["~lr"], "lr: there is no such key; did you mean optimizer.lr?"),
        (["-m", "+lr=1,2"], "lr: there is no such key; did you mean optimizer.lr?"),
        (["+optimzer.lr=1"], "optimzer.lr: there is no such key; did you mean optimizer.lr?"),
        (["name=x"], "did you mean tokenizer.name, optimizer.name, schedule.name or tracking.name?"),
        (["-m", "model=gpt124"], "; did you mean gpt124m?"),
        (["--lr", "1"], "unrecognized arguments: --lr; --help shows what can be given; did you mean optimi"),
        (["early_stopping=median"], "early_stopping has keys of its own: set early_stopping.rule, "),
        (["optimizer.lr=abc"], "optimizer.lr=abc: must be a number (peak learning rate)\n"),
        (["training.max_steps=1e3"], "training.max_steps=1000.0: must be a whole number (updates (optimizer"),
        (["data.cross_documents=maybe"], "data.cross_documents=maybe: must be true or false ("),
        (["data.batch_size=1.5"], "data.batch_size=1.5: must be a whole number or auto ("),
        (["optimizer.betas=[1,x]"], "optimizer.betas[1]=x: must be a number\n"),
        (["seed=null"], "seed=null: must be a value, not null (all randomness"),
        (["model=huge"], "model=huge: there is no such choice; model has gpt124m, gpt1558m, "),
        (["model/part=[rotry]"], "model/part=rotry: there is no such choice; model/part has "),
        (["data.train_ratio=1.5"], "data.train_ratio=1.5: must be above 0 and below 1"),
        (["data=text", "data.path=missing"], "data.path=missing: no such file"),
        (["data=the_verdict"], "could not download"),
        (["resume=nowhere"], "nowhere is not a run folder"),
        (["resume=latest", "rerun=latest"], "rerun repeats a run in a new folder, and resume continues one"),
        (["resume="], "an empty name is no run"),
        (["init_from="], "init_from is empty: give a value, or null"),
        (["+new.key=1"], "new.key: there is no such key; the config has model, "),
        (["++model.new=1"], "model.new: there is no such key; model has vocab_size, "),
        (["hydra.new=1"], "hydra.new: there is no such key; --cfg hydra shows Hydra's own"),
        (["model=null"], "model=null: choose one of gpt124m, "),
        (["=1"], "=1: give KEY=VALUE"),
        (["optimzer.lr"], "optimzer.lr: give KEY=VALUE; did you mean optimizer.lr?"),
        (["--foo"], "unrecognized arguments: --foo; --help shows what can be given"),
        (["seed=${nowhere}"], "Interpolation key 'nowhere' not found"),
        (["tracking.name=${oc.env:NOWHERE}"], "Environment variable 'NOWHERE' not found"),
        (["experiment=sweep_sampling"], "Key 'study' not in 'PretrainConfig'"),
        (
            ["hydra.output_subdir=x"],
            "hydra.output_subdir: the record of a run is always in its",
        ),
        (["resume=latest"], "there is no run under outputs/"),
        (["tracking=online"], "tracking=online: Weights & Biases did not start"),
        (["hydra.run.dir=/proc/nothing"], "/proc/nothing"),
    ],
)
def test_errors_are_one_line(script: Script, arguments: list[str], line: str) -> None:
    result = script("pretrain", *arguments)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("error: ")
    assert line in result.stderr


def test_what_is_skipped_is_said_once(script: Script, tmp_path: Path) -> None:
    """Though a text is looked at twice: first for whether the same run was made before."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / ".hidden").touch()
    result = script("pretrain", *TINY, "data=text", "data.path=texts", "training.max_steps=2")
    assert result.stdout.count("skipped hidden (1)") == 1
    assert result.stderr == "error: data.path=texts: no *.txt or *.md file in that folder\n"


@pytest.mark.parametrize(
    ("name", "argument", "meant"),
    [
        ("prepare", "batch_size=1", "data.batch_size"),
        ("generate", "temperature=1", "sampling.temperature"),
        ("benchmark", "lr=1", "optimizer.lr"),
        ("report", "sweeps=latest", "sweep"),
    ],
)
def test_every_script_says_which_key_was_meant(script: Script, name: str, argument: str, meant: str) -> None:
    result = script(name, argument)
    key = argument.partition("=")[0].lstrip("+")
    assert result.returncode == 1
    assert result.stderr == f"error: {key}: there is no such key; did you mean {meant}?\n"


def test_two_letters_swapped_are_understood_in_every_key() -> None:
    for number, key in enumerate(leaf_keys(PretrainConfig)):
        group, dot, name = key.rpartition(".")
        place = number % max(1, len(name) - 1)
        typed = f"{group}{dot}{name[:place]}{name[place : place + 2][::-1]}{name[place + 2 :]}"
        meant = re.split(", | or |; did you mean |\\?", did_you_mean(typed, PretrainConfig))
        assert key in meant or key == typed or len(name) < 4, typed


def test_a_key_without_its_group_is_understood() -> None:
    for typed, meant in {
        "trainig.max_steps": "training.max_steps",
        "optimizer.lrr": "optimizer.lr",
        "steps": "training.max_steps or checkpoint.every_steps",
        "model.lr": "optimizer.lr",
        "run.dir": "hydra.run.dir",
        "launcher": "hydra/launcher",
        "optimizr": "optimizer",
        "sweep.resum": "sweep.resume",
    }.items():
        assert did_you_mean(typed, PretrainConfig) == f"; did you mean {meant}?"
    assert did_you_mean("new.key", PretrainConfig) == did_you_mean("lr", GenerateConfig) == ""


def test_an_error_is_the_status_of_the_process(process: Script) -> None:
    result = process("pretrain", "training.max_steps=-1")
    assert result.returncode == 1
    assert result.stderr.startswith("error: training.max_steps=-1: must be at least 1 ")
    assert len(result.stderr.splitlines()) == 1


IMPORTS = """
import runpy, sys

def imported(*arguments):
    sys.argv = ["pretrain", *arguments]
    try:
        runpy.run_module("experiments.pretrain", run_name="__main__", alter_sys=False)
    except SystemExit:
        pass
    return sorted({"torch", "torch._dynamo", "scipy", "transformers", "wandb"} & {*sys.modules})

slow = [imported(*each.split()) for each in sys.argv[1:]]
print(slow, file=sys.stderr)
"""


def test_what_is_slow_to_import_waits_until_it_is_needed(
    environment: dict[str, str], tmp_path: Path, text: str
) -> None:
    run = " ".join((*TINY, "data=text", text, "training.max_steps=1"))
    result = run_python(tmp_path, environment, "-c", IMPORTS, "--help", "--cfg job", run)
    assert result.stderr.splitlines()[-1] == "[[], [], ['torch']]", result.stderr
    assert "updates                   1" in result.stdout


def test_help_lists_groups(script: Script) -> None:
    for name in ("pretrain", "generate", "evaluate", "benchmark"):
        result = script(name, "--help")
        assert result.returncode == 0
        assert "sampling: greedy" in result.stdout


def test_prepare_makes_what_a_run_then_finds(script: Script, tmp_path: Path, text: str) -> None:
    arguments = [*TINY, "data=text", text, f"data.cache_dir={tmp_path / 'cache'}", "training.max_steps=1"]
    result = script("prepare", *arguments, "training.accumulate=3")
    assert result.returncode == 0, result.stderr
    files = sorted((tmp_path / "cache" / "tokens").iterdir())
    made = [(file.name, file.stat().st_mtime_ns) for file in files]
    assert len(made) == 4  # two of tokens, and a record beside each
    assert all(str(file) in result.stdout for file in files if file.suffix == ".npy")
    size = (tmp_path / "text.txt").stat().st_size
    assert f"training    {format_count(int(0.9 * size))} tokens" in result.stdout
    assert f"an epoch    {int(0.9 * size - 1) // 64 // 2 / 3:.2f} updates" in result.stdout
    result = script("pretrain", *arguments)
    assert result.returncode == 0, result.stderr
    assert [(file.name, file.stat().st_mtime_ns) for file in files] == made


@pytest.mark.parametrize("logging", ["stdout", "disabled", "none"])
def test_hydras_other_logs_can_be_chosen(script: Script, tmp_path: Path, logging: str) -> None:
    chosen = f"hydra/job_logging={logging}"
    result = script("pretrain", chosen, "data=text", "data.path=missing", "tracking=disabled")
    assert result.returncode == 1
    assert result.stderr.startswith("error: data.path=missing: no such file")


@pytest.mark.parametrize("name", ["it's a, b=1 [x] (ü);", "2026"])
def test_paths_of_any_letters_work_as_do_the_commands_printed_for_them(
    script: Script, tmp_path: Path, name: str
) -> None:
    (tmp_path / f"{name}.txt").write_text("all work and no play\n" * 99, "utf-8")
    paths = {"data.path": f"{name}.txt", "hydra.run.dir": name}
    given = [f"{key}={path}" for key, path in paths.items()]
    arguments = (*TINY, "data=text", "training.max_steps=2", *given)
    result = script("pretrain", *arguments)
    assert result.returncode == 0, result.stderr
    printed = [line for line in result.stdout.splitlines() if " python experiments/" in line]
    assert len(printed) == 2
    for line in printed:
        _, path, *printed_arguments = shlex.split(line.partition("  ")[2])
        printed_arguments = [each.replace("max_steps=8", "max_steps=4") for each in printed_arguments]
        result = script(Path(path).stem, *printed_arguments)
        assert result.returncode == 0, result.stderr
    result = script("pretrain", *arguments)
    command = result.stderr.partition("continue it with ")[2].partition(", or write")[0]
    result = script("pretrain", *shlex.split(command), "training.max_steps=99")
    assert result.returncode == 0, result.stderr


def test_a_script_is_a_module_too(environment: dict[str, str]) -> None:
    result = run_python(ROOT, environment, "-m", "experiments.evaluate", "--cfg", "job")
    assert (result.returncode, result.stderr) == (0, "")
    assert "checkpoint: latest" in result.stdout
