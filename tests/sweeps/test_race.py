"""The evidence that a race rests on: against its definition, and in simulated races whose truth is known."""

import math

import numpy as np
import pytest
from scipy import integrate, stats

from llm.sweeps.race import PRIOR_VARIANCE, evidence, ruled_out


@pytest.mark.parametrize("differences", [[0.3, -0.1, 0.2], [0.021, 0.02, 0.022, 0.025], [1.0, -1.0]])
def test_evidence_is_the_ratio_of_two_densities_of_t(differences: list[float]) -> None:
    count = len(differences)
    t = float(stats.ttest_1samp(differences, 0).statistic)

    def with_effect(size: float) -> float:
        density = stats.nct.pdf(t, count - 1, size * math.sqrt(count))
        return float(density * stats.norm.pdf(size, scale=PRIOR_VARIANCE**0.5))

    averaged, _ = integrate.quad(with_effect, -25, 25, limit=400)
    assert evidence(differences) == pytest.approx(averaged / stats.t.pdf(t, count - 1), rel=1e-4)
    assert evidence(differences[:1]) == 1


def race(figures: np.ndarray, level: float) -> tuple[int, list[int | None]]:
    """The seeds that a race takes, and who left when: figures (settings, seeds)."""
    for seeds in range(3, figures.shape[1] + 1):
        left = ruled_out([row[:seeds].tolist() for row in figures], seeds, level)
        if left.count(None) < 2:
            break
    return seeds, left


def test_however_often_one_looks_the_best_is_seldom_ruled_out() -> None:
    random, trials, level = np.random.default_rng(0), 300, 0.1
    lost = 0
    for _ in range(trials):  # all are equal, so any may be called the best: the first is
        figures = random.normal(size=(3, 12)) * np.array([[1.0], [2.0], [0.5]]) + random.normal(size=12)
        lost += race(figures, level)[1][0] is not None
    assert 0 < lost / trials < level + 3 * (level * (1 - level) / trials) ** 0.5


def test_a_clear_difference_takes_few_seeds() -> None:
    random = np.random.default_rng(0)
    noise = random.normal(size=(40, 2, 20)) / 2**0.5  # so that a difference has a deviation of 1
    taken = [race(each + np.array([[0.0], [3.0]]), 0.05) for each in noise]
    assert all(left == [None, seeds] for seeds, left in taken)  # the worse one leaves
    assert np.mean([seeds for seeds, _ in taken]) < 6


def test_a_setting_whose_run_failed_leaves() -> None:
    assert ruled_out([[1.0, 1.1, 1.2], [0.9]], 3, 0.05) == [None, 2]
    assert ruled_out([[], []], 3, 0.05) == [1, 1]
    assert ruled_out([[1.0, 1.1, 1.2], [2.0, 2.1, 2.2]], 3, 0.05) == [
        None,
        2,
    ]  # the same difference each time
    assert ruled_out([[1.0, 1.1, 1.2], [1.0, 1.1, 1.2]], 3, 0.05) == [None, None]
