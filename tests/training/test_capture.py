"""Updates that are queued and captured, as on CUDA, but on the CPU, with plain calls in place of the capture:
against the path that waits for each update. tests/gpu/test_training.py captures for real."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import numbers
from drill import TEXT, outcome
from settings import changed, settings
from torch import Tensor

from llm.checkpoints.checkpoint import read_config
from llm.commands.pretrain import pretrain
from llm.config import PretrainConfig
from llm.errors import UserError
from llm.files import read_json_lines
from llm.model.gpt import GPTModel
from llm.run_folder import step_folders
from llm.runtime import Runtime
from llm.training import acceleration, capture, lifecycle, loop, update
from llm.training.recorder import Recorder
from llm.training.run import Run

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def config(tmp_path: Path) -> PretrainConfig:
    """With a learning rate that is the same in fp32, in which a device keeps it."""
    config = changed(settings(tmp_path), optimizer__lr=2**-6, schedule__name="constant", schedule__warmup=0.0)
    return changed(config, optimizer__name="adamw")


Queued = Callable[[], AbstractContextManager[None]]


@pytest.fixture
def queued(monkeypatch: pytest.MonkeyPatch) -> Queued:
    """A context in which runs go as on a GPU."""

    def plainly(work: Callable[[], Tensor], what: str) -> Callable[[], Tensor]:
        """Some warm-ups, and a result that each call overwrites, as in a graph."""
        for _ in range(2):
            result = work()
        return lambda: result.copy_(work())

    @contextmanager
    def as_on_a_gpu() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(Runtime, "queues", True)
            patch.setattr(capture, "captured", plainly)
            patch.setattr(acceleration, "CAPTURED_UPDATES", 0)
            yield

    return as_on_a_gpu


def losses(run_dir: Path) -> list[float]:
    return [line["train/loss"] for line in numbers(run_dir) if "train/loss" in line]


@pytest.fixture
def captured_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many batches each captured update took."""
    calls: list[int] = []
    original = capture.capture_update

    def capture_and_count(run: Run) -> Callable[..., Tensor]:
        replay = original(run)

        def counted(batches: list[Any]) -> Tensor:
            calls.append(len(batches))
            return replay(batches)

        return counted

    monkeypatch.setattr(acceleration, "capture_update", capture_and_count)
    return calls


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_gives_the_numbers_of_the_plain_path(
    config: PretrainConfig, queued: Queued, captured_calls: list[int], tmp_path: Path, optimizer: str
) -> None:
    """Over seven batches an epoch, four to an update: the last takes what is left, and is not captured."""
    Path(config.data.path or "").write_text(TEXT[:257], encoding="utf-8")
    config = changed(config, optimizer__name=optimizer, training__accumulate=4, training__max_steps=None)
    config = changed(config, training__max_epochs=3.0, model__drop_rate=0.1, samples__every_epoch=True)
    pretrain(config, tmp_path / "plain")
    with queued():
        pretrain(config, tmp_path / "queued")
    assert captured_calls == [4] * 5
    ours, plain = outcome(tmp_path / "queued"), outcome(tmp_path / "plain")
    if optimizer == "adamw":
        assert ours == plain
    else:  # its step is scaled by a tensor, and rounded once more
        assert losses(tmp_path / "queued") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    assert read_config(step_folders(tmp_path / "queued")[0]).runtime.compile is False  # it was auto


def test_it_resumes_where_either_path_has_left_it(
    config: PretrainConfig, queued: Queued, tmp_path: Path
) -> None:
    pretrain(config, tmp_path / "whole")
    with queued():
        pretrain(config, tmp_path / "run")
    assert step_folders(tmp_path / "run")[1].name == "step-00000010"
    with queued():
        pretrain(changed(config, resume=str(step_folders(tmp_path / "run")[1])))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    pretrain(changed(config, resume=str(step_folders(tmp_path / "run")[1])))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def spoil(monkeypatch: pytest.MonkeyPatch, *steps: int) -> list[Run]:
    """Let the loss and the gradient of some updates be NaN; returns the runs that were trained."""
    gradients, train = update.accumulate_gradients, loop.train
    runs = []

    def sometimes_nan(run: Run, *arguments: Any) -> Tensor:
        figures = gradients(run, *arguments)
        if run.step + 1 in steps:
            for parameter in run.model.parameters():
                assert parameter.grad is not None
                parameter.grad.mul_(torch.nan)
            figures = figures * torch.nan
        return figures

    def kept(run: Run, *arguments: Any) -> None:
        runs.append(run)
        train(run, *arguments)

    monkeypatch.setattr(loop, "accumulate_gradients", sometimes_nan)
    monkeypatch.setattr(update, "accumulate_gradients", sometimes_nan)
    monkeypatch.setattr(lifecycle, "train", kept)
    return runs


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_update_that_is_not_finite_changes_nothing(
    config: PretrainConfig, queued: Queued, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    config = changed(config, optimizer__name=optimizer, training__max_skipped=2)
    spoil(monkeypatch, 4, 5, 8)
    plain = pretrain(config, tmp_path / "plain")
    with queued():
        ours = pretrain(config, tmp_path / "queued")
    assert ours.skipped == plain.skipped == 3
    lines = [line for line in read_json_lines(tmp_path / "queued" / "metrics.jsonl") if "train/loss" in line]
    assert [line.get("skipped") for line in lines[3:7]] == [None, 1, 2, None]
    if optimizer == "adamw":
        assert outcome(tmp_path / "queued") == outcome(tmp_path / "plain")
    assert ours.val_loss == pytest.approx(plain.val_loss, rel=1e-5)


def test_too_many_end_the_run_with_the_weights_before_them(
    config: PretrainConfig, queued: Queued, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(config, training__max_skipped=1)
    runs = spoil(monkeypatch, 3, 6, 7)  # when the run stops at the last, the next one is in flight
    with pytest.raises(UserError) as plain:
        pretrain(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    with queued(), pytest.raises(UserError) as ours:
        pretrain(config, tmp_path / "run")
    assert str(ours.value) == str(plain.value)
    assert "step 7: loss nan" in str(ours.value)
    assert "step-00000005;" in str(ours.value)
    for one, other in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert runs[0].counters.steps == runs[1].counters.steps == 7


def test_figures_are_told_in_order_and_before_whatever_needs_them(
    config: PretrainConfig, queued: Queued, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int, int]] = []
    for name in ("updated", "evaluated", "save", "sample"):
        original = getattr(Recorder, name)

        def tell(self: Recorder, *arguments: Any, name: str = name, original: Any = original) -> None:
            told.append((name, self.run.counters.step, len(self.run.in_flight)))
            original(self, *arguments)

        monkeypatch.setattr(Recorder, name, tell)
    with queued():
        pretrain(config, tmp_path / "run")
    updates = [step for name, step, _ in told if name == "updated"]
    assert updates == list(range(12))
    # An update is told while the next one is in flight, but before an evaluation (each 4) or a save (each 5).
    alone = [step for name, step, others in told if name == "updated" and not others]
    assert alone == [0, 4, 8, 9, 11]
    others = [(name, step) for name, step, _ in told if name != "updated"]
    evaluations = [("evaluated", 0), ("evaluated", 4), ("save", 4), ("evaluated", 8), ("save", 9)]
    assert others == [*evaluations, ("evaluated", 11), ("save", 11), ("sample", 11)]
    assert not any(in_flight for name, _, in_flight in told if name != "updated")


@pytest.mark.parametrize("plain", [False, True])
def test_a_run_limited_by_the_clock_comes_out_the_same_again(
    config: PretrainConfig, queued: Queued, tmp_path: Path, caplog: pytest.LogCaptureFixture, plain: bool
) -> None:
    """Its last update was in flight when the clock ran out; in a plain rerun, none is."""
    caplog.set_level("INFO")
    config = changed(config, training__max_steps=None, training__max_minutes=0.005)
    config = changed(config, training__eval_freq=None, checkpoint__every_steps=None)
    if not plain:  # its rates are not the same in fp32
        config = changed(config, schedule__name="wsd")
    with queued():
        first = pretrain(config, tmp_path / "run")
    repeated = changed(PretrainConfig(), rerun=str(tmp_path / "run"), tracking__mode="disabled")
    with nullcontext() if plain else queued():
        again = pretrain(repeated, tmp_path / "again")
    assert (again.steps, again.seconds) == (first.steps, first.seconds)
    assert "the same numbers as" in caplog.text
    lines = [line for line in read_json_lines(tmp_path / "run" / "metrics.jsonl") if "train/loss" in line]
    assert lines[-2]["seconds"] >= 0.3  # so the record goes one further
    assert all(line["lr"] > 0 for line in lines)


@pytest.mark.parametrize(
    ("training", "batch", "captured", "compiled"),
    [
        ({"max_minutes": 0.02}, 16, False, False),
        ({"max_minutes": 1.0}, 16, True, False),
        ({"max_minutes": 60.0}, 16, True, True),
        ({"max_minutes": 60.0, "max_steps": 99}, 16, False, False),
        ({"max_minutes": None, "max_steps": 10_000_000}, 16, True, True),
        ({"max_minutes": None, "max_epochs": 1.9}, 16, False, False),
        ({"max_minutes": 60.0}, 4_000_000, False, True),  # windows that keep a GPU busy
    ],
)
def test_what_pays(
    monkeypatch: pytest.MonkeyPatch, training: dict[str, Any], batch: int, captured: bool, compiled: bool
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *sizes, device=None: ones(*sizes))  # there is no GPU here
    config = PretrainConfig()
    for key, value in training.items():
        setattr(config.training, key, value)
    config.data.batch_size = batch
    run: Any = SimpleNamespace(
        config=config,
        model=GPTModel(config.model),
        batches=range(50),
        optimizers=SimpleNamespace(can_queue=True),
        runtime=SimpleNamespace(processes=1, device=torch.device("cuda")),
    )
    start: Any = SimpleNamespace(config=config)
    acceleration.choose(run, start)
    assert start.config.runtime.compile is run.config.runtime.compile is compiled
    monkeypatch.setattr(torch, "compile", None)  # as where it lacks what it needs
    run.config = config
    acceleration.choose(run, start)
    assert start.config.runtime.compile is False
    run.config = start.config
    assert acceleration.captures(run) is captured
    run.runtime.processes = 2
    assert not acceleration.captures(run)
    run.optimizers.can_queue, run.config.runtime.graph = False, "on"
    with pytest.raises(UserError, match=r"runtime\.graph=on: optimizer\.name=muon cannot be captured"):
        acceleration.choose(run, start)
