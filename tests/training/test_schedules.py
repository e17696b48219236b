"""Schedules against torch's own and figures worked by hand."""

import pytest
import torch

from llm.config import ScheduleConfig
from llm.training.schedules import lr_factor


def test_cosine_is_torchs() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=0.1)
    config = ScheduleConfig("cosine", warmup=0.0, final=0.1)
    for step in range(41):
        assert lr_factor(config, step / 40) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
        ("wsd", [0.0, 0.5, 1.0, 1.0, 0.6, 0.2]),  # halfway through the decay from 1 to 0.2: 0.6
        ("cosine", [0.0, 0.5, 1.0, 0.6, None, 0.2]),  # half a cosine is halfway at its middle
    ],
)
def test_by_hand(name: str, expected: list[float | None]) -> None:
    config = ScheduleConfig(name, warmup=0.2, decay=0.4, final=0.2)
    for progress, factor in zip([0.0, 0.1, 0.2, 0.6, 0.8, 1.0], expected, strict=True):
        if factor is not None:
            assert lr_factor(config, progress) == pytest.approx(factor)
