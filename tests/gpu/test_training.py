"""Training on CUDA: queued, captured and compiled updates, against plain ones.

Losses are compared with a tolerance, as attention may add up a gradient in another order the next time. The
first loss, and the state of the random stream that dropout draws from, have to be the same to the bit.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import numbers
from drill import TEXT
from settings import changed, settings
from torch import Tensor, nn

from llm.checkpoints.checkpoint import read_training_state
from llm.commands.pretrain import pretrain
from llm.config import PretrainConfig, RuntimeConfig, modern_small
from llm.errors import UserError
from llm.files import read_json_lines
from llm.model import loss as chunked
from llm.model.attention import projected_together
from llm.model.loss import chunk_tokens, linear_cross_entropy
from llm.run_folder import step_folders
from llm.runtime import start_runtime
from llm.training import acceleration, lifecycle, loop, update
from llm.training.recorder import Recorder
from llm.training.run import Launched, Run

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("no_pictures")]

CUDA = torch.device("cuda")


@pytest.fixture
def config(tmp_path: Path) -> PretrainConfig:
    """The default model, over bytes, with dropout; 20 updates."""
    config = changed(settings(tmp_path, max_steps=20), model=modern_small(), data__batch_size=4)
    Path(config.data.path or "").write_text(TEXT * 10, encoding="utf-8")
    config = changed(config, model__drop_rate=0.1, optimizer__lr=0.003, training__eval_iter=1)
    config = changed(config, schedule__name="constant", schedule__warmup=0.0)
    return changed(config, runtime__device="cuda", runtime__precision="auto", runtime__compile=False)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Those that are trained."""
    trained, train = [], loop.train

    def kept(run: Run, *arguments: Any) -> None:
        trained.append(run)
        train(run, *arguments)

    monkeypatch.setattr(lifecycle, "train", kept)
    return trained


def losses(run_dir: Path) -> list[float]:
    return [line["train/loss"] for line in numbers(run_dir) if "train/loss" in line]


def stream(run_dir: Path) -> Tensor:
    """The state of dropout's generator at the newest checkpoint."""
    return read_training_state(step_folders(run_dir)[0]).generators[0]["cuda"]


def compare(ours: Path, expected: Path, tolerance: float = 5e-3) -> None:
    assert losses(ours)[0] == losses(expected)[0]
    assert losses(ours) == pytest.approx(losses(expected), rel=tolerance)
    assert torch.equal(stream(ours), stream(expected))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_captured_update_is_the_one_launched_kernel_by_kernel(
    config: PretrainConfig, runs: list[Run], tmp_path: Path, optimizer: str, accumulate: int
) -> None:
    config = changed(config, optimizer__name=optimizer, training__accumulate=accumulate)
    if accumulate > 1:  # the last update takes fewer batches, and is not captured
        config = changed(config, training__max_steps=None, training__max_epochs=0.21)
    for choice in ("off", "on"):
        pretrain(changed(config, runtime__graph=choice), tmp_path / choice)
    assert [run.captured is not None for run in runs] == [False, True]
    compare(tmp_path / "on", tmp_path / "off")


def test_queued_updates_are_those_that_are_waited_for(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(config, runtime__graph="off", runtime__precision="fp32")
    pretrain(config, tmp_path / "queued")
    monkeypatch.setattr("llm.training.optimizers._can_be_queued", lambda optimizer: False)
    pretrain(config, tmp_path / "waiting")
    compare(tmp_path / "queued", tmp_path / "waiting")


def test_compiled_blocks_in_a_graph(config: PretrainConfig, runs: list[Run], tmp_path: Path) -> None:
    config = changed(config, model__drop_rate=0.0)  # which the compiler draws otherwise
    for choice, compiled in (("off", False), ("on", True)):
        pretrain(changed(config, runtime__graph=choice, runtime__compile=compiled), tmp_path / choice)
    assert runs[1].captured is not None
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "off"), rel=2e-2)


def test_a_captured_run_resumes(config: PretrainConfig, tmp_path: Path) -> None:
    config = changed(config, runtime__graph="on", checkpoint__every_steps=8)
    pretrain(config, tmp_path / "whole")
    pretrain(config, tmp_path / "run")
    earlier = step_folders(tmp_path / "run")[1]
    assert earlier.name == "step-00000016"
    pretrain(changed(config, resume=str(earlier)))
    compare(tmp_path / "run", tmp_path / "whole")
    pretrain(changed(config, resume=str(step_folders(tmp_path / "run")[1]), runtime__graph="off"))
    compare(tmp_path / "run", tmp_path / "whole")


def spoil(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Let the loss and the gradient of some updates be NaN, in a captured update too."""
    gradients, launch, factor = update.accumulate_gradients, loop.launch, torch.ones((), device=CUDA)

    def scaled(run: Run, *arguments: Any) -> Tensor:
        figures = gradients(run, *arguments)
        for parameter in run.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        return figures * factor

    def launch_scaled(run: Run, done: float) -> Launched:
        factor.fill_(torch.nan if run.step + 1 in steps else 1.0)
        return launch(run, done)

    monkeypatch.setattr(update, "accumulate_gradients", scaled)
    monkeypatch.setattr(loop, "launch", launch_scaled)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_graph_skips_an_update_that_is_not_finite(
    config: PretrainConfig, runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    config = changed(config, optimizer__name=optimizer, training__max_skipped=2)
    spoil(monkeypatch, 4, 5, 9)
    for choice in ("off", "on"):
        assert pretrain(changed(config, runtime__graph=choice), tmp_path / choice).skipped == 3
    lines = [line for line in read_json_lines(tmp_path / "on" / "metrics.jsonl") if "train/loss" in line]
    assert [line.get("skipped") for line in lines[3:7]] == [None, 1, 2, None]
    finite = [[loss for loss in losses(tmp_path / choice) if loss is not None] for choice in ("on", "off")]
    assert finite[0] == pytest.approx(finite[1], rel=5e-3)
    with pytest.raises(UserError, match="step 5: loss nan"):
        pretrain(changed(config, runtime__graph="on", training__max_skipped=1), tmp_path / "stopped")
    pretrain(changed(config, runtime__graph="on", training__max_steps=4), tmp_path / "short")
    for stopped, short in zip(runs[2].model.parameters(), runs[3].model.parameters(), strict=True):
        torch.testing.assert_close(stopped, short, rtol=1e-2, atol=1e-3)


def test_figures_come_late_in_order_and_before_whatever_needs_them(
    config: PretrainConfig, runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing is chosen: a graph, in a run that is long enough."""
    monkeypatch.setattr(acceleration, "CAPTURED_UPDATES", 10)
    told: list[tuple[str, int, int]] = []
    for name in ("updated", "evaluated", "save"):
        original = getattr(Recorder, name)

        def tell(self: Recorder, *arguments: Any, name: str = name, original: Any = original) -> None:
            told.append((name, self.run.counters.step, len(self.run.in_flight)))
            original(self, *arguments)

        monkeypatch.setattr(Recorder, name, tell)
    pretrain(config, tmp_path / "run")
    assert runs[0].captured is not None
    assert [step for name, step, _ in told if name == "updated"] == list(range(20))
    assert sum(in_flight for name, _, in_flight in told if name == "updated") > 8
    assert not any(in_flight for name, _, in_flight in told if name != "updated")
    lines = [line for line in read_json_lines(tmp_path / "run" / "metrics.jsonl") if "train/loss" in line]
    assert all(0 < line["tokens_per_second"] < 1e9 for line in lines)


def test_batches_on_their_way_to_the_gpu_are_not_overwritten() -> None:
    runtime = start_runtime(RuntimeConfig(device="cuda"))
    busy = torch.randn(4096, 4096, device=CUDA)
    shared = []
    for number in range(20):
        busy = busy @ busy / 64
        pair = torch.full((64, 512), number), torch.full((64, 512), -number)
        shared.append([runtime.share(tensor) for tensor in pair])
    for number, (inputs, targets) in enumerate(shared):
        assert bool((inputs == number).all())
        assert bool((targets == -number).all())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("chunk", [256, 16_384])
def test_the_chunked_loss(monkeypatch: pytest.MonkeyPatch, autocast: bool, chunk: int) -> None:
    monkeypatch.setattr(chunked, "CUDA_CHUNK_TOKENS", chunk)
    assert chunk_tokens(CUDA, 5003, torch.float32) == chunk
    torch.manual_seed(0)
    hidden = torch.randn(700, 128, device=CUDA, requires_grad=True)
    weight = torch.randn(5003, 128, device=CUDA, requires_grad=True)
    targets = torch.randint(5003, (700,), device=CUDA)
    expected = F.cross_entropy(hidden @ weight.T, targets)
    wanted = torch.autograd.grad(expected, (hidden, weight))
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=5e-3 if autocast else 1e-5)
    for one, other in zip(torch.autograd.grad(loss, (hidden, weight)), wanted, strict=True):
        assert ((one - other).norm() / other.norm()).item() < (0.02 if autocast else 1e-4)


def test_this_torch_adds_products_up_in_fp32() -> None:
    """Or the gradient of the head takes a pass more for each chunk: right, and slower."""
    if not chunked.sums_products(CUDA, torch.bfloat16, torch.float32):
        pytest.skip(f"torch {torch.__version__} does not")


def test_projections_together() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(128, outputs).to(CUDA) for outputs in (128, 64, 64)]
    x = torch.randn(2, 50, 128, device=CUDA, requires_grad=True)
    inputs = [x, *(parameter for layer in layers for parameter in layer.parameters())]
    with torch.autocast("cuda", torch.bfloat16):
        together = projected_together(x, layers, torch.bfloat16)
        alone = tuple(layer(x) for layer in layers)
    torch.testing.assert_close(together, alone, atol=0.02, rtol=0.02)
    gradients = [torch.randn_like(one) for one in alone]
    for one, other in zip(
        torch.autograd.grad(together, inputs, gradients),
        torch.autograd.grad(alone, inputs, gradients),
        strict=True,
    ):
        assert ((one - other).norm() / other.norm()).item() < 0.02


@pytest.mark.gpu(count=2)
def test_two_gpus(config: PretrainConfig, tmp_path: Path) -> None:
    config = changed(config, model__drop_rate=0.0, runtime__graph="auto")
    pretrain(config, tmp_path / "one")
    pretrain(changed(config, runtime__processes=2), tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-2)
    with pytest.raises(UserError, match=r"runtime\.graph=on is for CUDA and one process"):
        pretrain(changed(config, runtime__graph="on", runtime__processes=2), tmp_path / "refused")
