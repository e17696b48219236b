"""Schedules against torch's own and figures worked by hand."""

from pathlib import Path

import pytest
import torch
from conftest import numbers
from settings import changed, settings

from llm.commands.pretrain import pretrain
from llm.config import ScheduleConfig
from llm.training.schedules import lr_factor

pytestmark = pytest.mark.usefixtures("no_pictures")


def factors(config: ScheduleConfig, updates: int) -> list[float]:
    """The factor of each update of a run of so many."""
    return [lr_factor(config, step / updates, (step + 1) / updates) for step in range(updates)]


def test_cosine_is_torchs() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=0.1)
    for factor in factors(ScheduleConfig("cosine", warmup=0.0, final=0.1), 40):
        assert factor == pytest.approx(scheduler.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        # 1 to 0.2 over the last four tenths: a tenth before the end, a quarter of the way is left.
        ("wsd", [0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4]),
        # At 6/10, halfway between the warmup's end and the run's, half a cosine is halfway.
        ("cosine", [0.5, 1, 1, None, None, None, 0.6, None, None, None]),
    ],
)
def test_by_hand(name: str, expected: list[float | None]) -> None:
    config = ScheduleConfig(name, warmup=0.2, decay=0.4, final=0.2)
    for found, factor in zip(factors(config, 10), expected, strict=True):
        assert factor is None or found == pytest.approx(factor)
    if name == "cosine":
        assert factors(config, 10)[-1] > 0.2


@pytest.mark.parametrize(
    ("warmup", "updates", "expected"),
    [
        (0.02, 1, [1]),
        (1.0, 1, [1]),
        (0.02, 20, [1] * 10),  # the warmup ends within the first update
        (0.25, 20, [0.2, 0.4, 0.6, 0.8, 1, 1]),
        (0.3, 5, [2 / 3, 1, 1]),  # and here within the second, at 1.5 updates
        (1.0, 4, [0.25, 0.5, 0.75, 1]),
    ],
)
def test_every_update_trains(warmup: float, updates: int, expected: list[float]) -> None:
    config = ScheduleConfig("wsd", warmup=warmup, decay=0.5, final=0.0)
    found = factors(config, updates)
    assert found[: len(expected)] == pytest.approx(expected)
    assert min(found) > 0


def test_the_first_update_of_a_run_trains_whatever_limits_it(tmp_path: Path) -> None:
    config = changed(settings(tmp_path, max_steps=1), schedule__warmup=0.5, optimizer__lr=0.25)
    pretrain(config, tmp_path / "one")
    assert numbers(tmp_path / "one")[0]["lr"] == 0.25
    by_clock = changed(config, training__max_minutes=10.0, training__max_steps=8)
    pretrain(by_clock, tmp_path / "two")
    rates = [line["lr"] for line in numbers(tmp_path / "two") if "lr" in line]
    assert rates[:4] == [0.0625, 0.125, 0.1875, 0.25]
    # Ten minutes last far longer than this: the clock decides, and what it said is repeated to the bit.
    alone = changed(config, training__max_minutes=1e-3, training__max_steps=None)
    pretrain(alone, tmp_path / "three")
    pretrain(changed(alone, rerun=str(tmp_path / "three")), tmp_path / "four")
    assert numbers(tmp_path / "three") == numbers(tmp_path / "four")
    assert numbers(tmp_path / "three")[0]["lr"] > 0
