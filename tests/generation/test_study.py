"""Figures of samples, by hand."""

import math

import pytest

from llm.generation.study import distinct_share, repeated_share, sample_metrics
from llm.generation.texts import Sample


def test_distinct_and_repeated_by_hand() -> None:
    samples = [[1, 2, 1, 2, 3], [1, 2]]
    # bigrams: 12 21 12 23 | 12
    assert distinct_share(samples, 1) == 3 / 7
    assert distinct_share(samples, 2) == 3 / 5
    assert repeated_share(samples, 2) == pytest.approx(1 / 5)  # the second 12 of the first sample alone
    assert repeated_share([[7] * 10], 4) == pytest.approx(6 / 7)
    assert distinct_share(samples, 6) is None
    assert repeated_share([], 4) is None


def test_means_are_over_tokens() -> None:
    one = Sample("p", 0, 0, 1, "", [5, 6, 7], [-1.0, -2.0, -3.0], [0.5, 0.5, 0.5], "length")
    other = Sample("p", 0, 1, 1, "", [5], [-6.0], [1.5], "eos")
    metrics = sample_metrics([one, other])
    assert metrics["log_probability"] == -3.0
    assert metrics["perplexity"] == pytest.approx(math.exp(3.0))
    assert metrics["entropy"] == 0.75
    assert metrics["length"] == 2.0
    assert metrics["distinct_1"] == 3 / 4
    nothing = sample_metrics([Sample("p", 0, 0, 1, stop_reason="eos")])
    assert (nothing["perplexity"], nothing["distinct_1"], nothing["length"]) == (None, None, 0.0)
