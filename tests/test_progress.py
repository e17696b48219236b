"""Counts as they are shown."""

import pytest

from llm.progress import format_count


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
