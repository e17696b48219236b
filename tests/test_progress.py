"""Progress and counts as they are shown."""

import math
import time

import pytest

from llm.progress import Progress, fitted, format_count, format_times

PARTS = ["loss 3.847", "epoch 0.59", "946k tokens", "7.75k tokens/s"]


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0"),
        (812, "812"),
        (999.4, "999"),
        (999.6, "1k"),  # and not 1e+03
        (45_230, "45.2k"),
        (999_529_696, "1G"),
        (16_100_000, "16.1M"),
        (1.25e9, "1.25G"),
        (3.1e12, "3.1T"),
    ],
)
def test_counts_have_three_digits_and_a_unit(count: float, shown: str) -> None:
    assert format_count(count) == shown


@pytest.mark.parametrize(
    ("times", "shown"),
    [
        (7.94e-6, "0.0000079"),
        (0.0, "0"),
        (0.0376, "0.038"),
        (4.48, "4.5"),
        (99.4, "99"),
        (99.6, "99.6"),
        (312.4, "312"),
    ],
)
def test_times_are_short_and_no_power_of_ten(times: float, shown: str) -> None:
    assert format_times(times) == shown


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (120, f"training ━╌  45% · {' · '.join(PARTS)} · 1m10s left"),
        (70, f"training  45% · {' · '.join(PARTS[:3])} · 1m10s left"),
        (39, "training  45% · loss 3.847 · 1m10s left"),
        (36, "trai…  45% · loss 3.847 · 1m10s left"),
        (30, "training  45% · 1m10s left"),
        (20, "t…  45% · 1m10s left"),
        (8, "…  45% ·"),
    ],
)
def test_a_narrow_line_keeps_loss_and_time_left(width: int, line: str) -> None:
    assert fitted("training", "━╌", " 45%", PARTS, "1m10s left", width) == line


@pytest.mark.parametrize(
    ("first", "fraction", "seconds", "shown"),
    [
        (0.0, 0.25, 30.0, " 25% · step · 1m30s left"),
        (0.5, 0.75, 30.0, " 75% · step · 30s left"),
        (0.0, 12.01, 30.0, "100% · step · 0s left"),  # a run resumed with a lower limit
        (12.0, 12.01, 30.0, "100% · step · 30s"),
        (0.0, 0.0, 30.0, "  0% · step · 30s"),
        (0.5, 0.5, 30.0, " 50% · step · 30s"),
        (0.0, -1.0, 30.0, "  0% · step · 30s"),
        (0.0, 1e-9, 30.0, "  0% · step · 30s"),  # 950 years left
        (0.0, math.nan, 30.0, "· step · 30s"),
        (0.0, math.inf, 30.0, "100% · step · 0s left"),
        (0.0, None, 30.0, "· step · 30s"),
    ],
)
def test_no_share_or_time_left_is_absurd(
    first: float,
    fraction: float | None,
    seconds: float,
    shown: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    progress = Progress("training")
    progress.update(first)
    clock[0] += seconds
    progress.update(fraction, "step")
    [line] = caplog.messages
    assert line == f"training {shown}"


def test_what_comes_before_the_first_of_the_work_does_not_count(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    progress = Progress("training")
    for seconds, fraction in ((20.0, 0.02), (10.0, 0.12)):  # a compiler, and a tenth of the work
        clock[0] += seconds
        progress.update(fraction)
    assert caplog.messages == ["training   2% · 20s", "training  12% · 1m28s left"]
