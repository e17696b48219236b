"""What `launch` makes of a command line: which keys count as given, and how resumed runs are rewritten."""

import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from arguments import only_shows, rewritten
from hydra.core.override_parser.overrides_parser import OverridesParser
from launch import Interrupted, Invocation, launch
from scripts import as_in_a_process
from sweeping.stopping import interrupts_kept

from llm.config import EvaluateConfig, GenerateConfig, PretrainConfig
from llm.errors import UserError
from llm.outcome import Outcome
from llm.overrides import as_command, as_override

BOOK_GROUPS = {"model", "data", "optimizer", "schedule", "sampling", "runtime"}


@pytest.fixture(autouse=True)
def _as_in_a_process() -> Iterator[None]:
    with as_in_a_process():
        yield


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[Any, Invocation]]]:
    """Launch work that does nothing; returns what it was called with."""
    monkeypatch.chdir(tmp_path)
    calls: list[tuple[Any, Invocation]] = []

    def work(config: Any, invocation: Invocation) -> Outcome:
        calls.append((config, invocation))
        return Outcome(result=1.5)

    def run(name: str, *arguments: str) -> list[tuple[Any, Invocation]]:
        calls.clear()
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        launch(name, {"pretrain": PretrainConfig, "evaluate": EvaluateConfig}[name], work)
        return calls

    return run


Launched = Callable[..., list[tuple[Any, Invocation]]]


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ([], set()),
        (["model.n_layers=4"], {"model.n_layers"}),  # the default, but asked for
        (["++model.n_layers=4", "optimizer.betas=[0.9,0.99]"], {"model.n_layers", "optimizer.betas"}),
        (["model=tiny", "tokenizer=bytes"], {"model", "tokenizer"}),
        (["init_from=run", "samples.prompt=a, b"], {"init_from", "samples.prompt"}),
        (["~experiment", "hydra.job.name=mine"], {"experiment"}),
    ],
)
def test_what_the_command_line_sets_is_given(
    launched: Launched, arguments: list[str], given: set[str]
) -> None:
    [(_, invocation)] = launched("pretrain", *arguments, "hydra.run.dir=run")
    assert invocation == Invocation(Path("run"), frozenset(given))


def test_what_a_chosen_experiment_sets_is_given(launched: Launched) -> None:
    [(config, invocation)] = launched("pretrain", "experiment=book_ch05", "seed=1", "hydra.run.dir=run")
    assert config.model.emb_dim == 768
    assert {key for key in invocation.given if "." not in key} == BOOK_GROUPS | {"experiment", "seed"}
    assert {"data.order", "optimizer.betas", "training.max_minutes"} < invocation.given
    [(_, invocation)] = launched("pretrain", "experiment=[book_ch05,nanogpt_char]", "hydra.run.dir=other")
    assert {"tokenizer", "model.context_length", "samples.prompt"} < invocation.given


def test_an_experiment_may_build_on_another(launched: Launched, tmp_path: Path) -> None:
    mine = tmp_path / "conf" / "experiment" / "mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text(
        "# @package _global_\ndefaults: [nanogpt_char, override /model: tiny, _self_]\nseed: 5\n", "utf-8"
    )
    arguments = ["--config-dir", str(tmp_path / "conf"), "experiment=mine", "hydra.run.dir=run"]
    [(config, invocation)] = launched("pretrain", *arguments)
    assert (config.seed, config.tokenizer.name) == (5, "bytes")
    assert {"experiment", "model", "tokenizer", "seed", "schedule.warmup"} < invocation.given


def test_in_a_sweep_a_jobs_own_overrides_are_given(launched: Launched, tmp_path: Path) -> None:
    arguments = ["-m", "batch_size=1,2", "checkpoint=run", "hydra.sweep.dir=sweep"]
    calls = launched("evaluate", *arguments)
    assert [config.batch_size for config, _ in calls] == [1, 2]
    assert [invocation.run_dir for _, invocation in calls] == [Path("sweep/0"), Path("sweep/1")]
    assert {invocation.given for _, invocation in calls} == {frozenset({"batch_size", "checkpoint"})}
    summary = json.loads((tmp_path / "sweep" / "1" / "summary.json").read_text("utf-8"))
    assert summary == {"status": "finished", "result": 1.5}


@pytest.mark.parametrize(
    ("error", "single", "swept"),
    [
        (UserError("no"), 1, 1),
        (Interrupted(signal.SIGTERM), 143, 143),
        (Interrupted(signal.SIGHUP), 129, 129),
        (KeyboardInterrupt(), 130, 130),
    ],
)
def test_what_becomes_of_work_without_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, single: int, swept: int
) -> None:
    def work(config: Any, invocation: Invocation) -> Outcome:
        raise error

    monkeypatch.chdir(tmp_path)
    for status, arguments in ((single, ["hydra.run.dir=run"]), (swept, ["-m", "hydra.sweep.dir=sweep"])):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            launch("evaluate", EvaluateConfig, work)
        assert ended.value.code == status


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as Python handles it, even where a shell started us in the background and ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("becomes", [None, ImportError("numpy: importing its C extensions failed")])
def test_ctrl_c_is_not_lost_in_an_import(becomes: Exception | None) -> None:
    @interrupts_kept()
    def start() -> None:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        if becomes:
            raise becomes

    with pytest.raises(KeyboardInterrupt):
        start()
    with pytest.raises(ImportError), interrupts_kept():
        raise ImportError
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_flags_may_stand_anywhere() -> None:
    arguments = ["~experiment", "seed=1", "-m", "seed=2", "--config-dir", "conf", "+model=tiny"]
    expected = ["-m", "--config-dir", "conf", "~experiment", "seed=2", "+model=tiny"]
    assert rewritten(arguments, "pretrain", PretrainConfig) == expected


def test_flags_of_hydra() -> None:
    assert only_shows(["seed=1", "--cfg=job"])
    assert not only_shows(["-m", "samples.prompt=--help"])
    with pytest.raises(UserError, match="show one config"):
        rewritten(["-m", "--cfg", "job"], "pretrain", PretrainConfig)


def test_texts_for_people_need_no_quotes() -> None:
    for text, as_hydra_reads_it in (
        ("prompt=Hello, [world]", "prompt='Hello, [world]'"),
        ("prompt='a, b'", "prompt='a, b'"),
        ("prompt='Tis the season", r"prompt='\'Tis the season'"),
        ("prompt=it's $5 for ${you}\\", r"prompt='it\'s $5 for \${you}\\'"),
        ("prompt_file=null", "prompt_file=null"),
        ("prompt_file=été, 1=a.txt", "prompt_file='été, 1=a.txt'"),
        ("checkpoint=${oc.env:HOME}/run", "checkpoint='${oc.env:HOME}/run'"),
        ("tracking.name=Größe", "tracking.name='Größe'"),
        ("hydra.run.dir=out/it's ${seed}", r"hydra.run.dir='out/it\'s ${seed}'"),
        ("hydra.run.dir=out/a,b", "hydra.run.dir='out/a,b'"),
        ("seed=1,2", "seed=1,2"),
    ):
        assert rewritten([text], "generate", GenerateConfig) == [as_hydra_reads_it]
    several = ["-m", "checkpoint=a,été.pth"]
    assert rewritten(several, "generate", GenerateConfig) == ["-m", "checkpoint=a,'été.pth'"]
    assert rewritten(["-m", "prompt=a,b"], "generate", GenerateConfig) == ["-m", "prompt=a,b"]


@pytest.mark.parametrize("folder", ["outputs/run", "a b", "it's", "2026", "a,b", "a\\'b\\"])
def test_a_printed_command_means_what_it_says(folder: str) -> None:
    [python, script, override] = shlex.split(as_command("pretrain", as_override("resume", folder)))
    assert (python, script) == ("python", "experiments/pretrain.py")
    assert OverridesParser.create().parse_override(override).value() == folder
