"""Verdicts on settings: against scipy's own tests, and by simulation of runs whose truth is known."""

import numpy as np
import pytest
from scipy import stats

from llm.sweeps.verdict import LEVEL, POWER, Figures, difference, noise, possibly_best

A = {1: 2.0281, 2: 2.0154, 3: 2.0115, 4: 2.0201}
B = {1: 2.0235, 2: 2.0116, 3: 2.0128, 4: 2.0150}


def by_seed(values: np.ndarray, first: int = 0) -> Figures:
    return dict(enumerate(values.tolist(), first))


def test_in_pairs_it_is_students_test() -> None:
    found = difference(A, B)
    assert found is not None
    scipys = stats.ttest_rel([*B.values()], [*A.values()])
    interval = scipys.confidence_interval(1 - LEVEL)
    assert (found.p, found.low, found.high) == pytest.approx((scipys.pvalue, interval.low, interval.high))
    assert (found.paired, found.seeds) == (True, 4)
    # by hand: -0.0046, -0.0038, 0.0013 and -0.0051, whose squared deviations add up to 26.09e-6
    assert found.mean == pytest.approx(-0.00305)
    assert found.spread == pytest.approx((26.09e-6 / 3) ** 0.5)


def test_without_pairs_it_is_welchs() -> None:
    other = {seed + 10: value for seed, value in B.items() if seed > 1}
    found = difference(A, other)
    assert found is not None
    scipys = stats.ttest_ind([*other.values()], [*A.values()], equal_var=False)
    interval = scipys.confidence_interval(1 - LEVEL)
    assert (found.p, found.low, found.high) == pytest.approx((scipys.pvalue, interval.low, interval.high))
    assert (found.paired, found.seeds) == (False, 3)


def test_a_single_seed_says_nothing() -> None:
    assert difference({1: 2.0}, {1: 1.0}) is None
    assert difference({1: 2.0, 2: 2.1}, {3: 1.0}) is None


def test_runs_that_are_the_same_to_the_bit_do_not_differ() -> None:
    same, other = difference(A, A), difference(A, {seed: value + 1 for seed, value in A.items()})
    assert same is not None
    assert other is not None
    assert (same.decided, same.p, other.decided) == (False, 1.0, True)


@pytest.mark.parametrize("seeds", [3, 5, 30])
@pytest.mark.parametrize("shared", [0.0, 2.0])  # what a seed does to both settings
def test_equal_settings_are_declared_different_as_often_as_said(seeds: int, shared: float) -> None:
    random, trials = np.random.default_rng(seeds), 2000
    alarms = {"paired": 0, "not": 0}
    for _ in range(trials):
        of_seed, of_a, of_b = random.normal(size=(3, seeds))
        a, b = of_seed * shared + of_a, of_seed * shared + of_b
        for name, first in (("paired", 0), ("not", 1000)):
            found = difference(by_seed(a), by_seed(b if name == "paired" else of_b, first))
            assert found is not None
            alarms[name] += found.decided
    chance = 4 * (LEVEL * (1 - LEVEL) / trials) ** 0.5  # four standard deviations
    assert alarms["paired"] / trials == pytest.approx(LEVEL, abs=chance)
    if not shared:  # equal noise; with three seeds Welch's test is shy
        assert 0.02 < alarms["not"] / trials < LEVEL + chance


@pytest.mark.parametrize("paired", [True, False])
def test_the_seeds_that_are_needed_find_the_difference(paired: bool) -> None:
    random = np.random.default_rng(0)
    first = 0 if paired else 1000
    found = difference(by_seed(np.array([0.0, 0.1, 0.3])), by_seed(np.array([0.9, 0.0, 1.2]), first))
    assert found is not None
    needed = found.seeds_needed
    assert needed is not None
    spread = found.spread if paired else found.spread / 2**0.5  # of one setting

    def power(seeds: int) -> float:
        trials = 4000
        b = random.normal(found.mean, spread, size=(trials, seeds))
        a = np.zeros_like(b) if paired else random.normal(0, spread, size=(trials, seeds))
        test = stats.ttest_rel if paired else stats.ttest_ind
        return float(np.mean(test(b, a, axis=1).pvalue < LEVEL))

    assert power(needed) > POWER - 0.03 > power(needed - 2)


def test_no_number_of_seeds_shows_what_is_not_there() -> None:
    found = difference({1: 0.0, 2: 1.0, 3: 2.0}, {1: 1.0, 2: 0.0, 3: 2.0})
    assert found is not None
    assert found.mean == 0
    assert found.seeds_needed is None


@pytest.mark.parametrize("noises", [[1, 1, 1, 1], [1, 3, 0.3, 0.3]])
def test_the_best_setting_is_seldom_ruled_out(noises: list[float]) -> None:
    random, trials = np.random.default_rng(1), 400
    lost = 0
    for _ in range(trials):  # all are equal, so any may be called the best: the first is
        figures = random.normal(size=(4, 4)) * np.array(noises)[:, None] + random.normal(size=4)
        lost += possibly_best([by_seed(values) for values in figures])[0] is False
    assert lost / trials < LEVEL + 3 * (LEVEL * (1 - LEVEL) / trials) ** 0.5
    assert lost > 0


def test_what_is_worse_is_ruled_out() -> None:
    apart = np.random.default_rng(2).normal(scale=0.01, size=(3, 5)) + np.array([[1.0], [0.0], [0.0]])
    settings = [*(by_seed(values) for values in apart), {1: 0.5}]
    assert possibly_best(settings) == [False, True, True, None]
    # By hand: differences of 1 and 2, a mean of 1.5, a standard error of 0.5. t is 3, one-sided p 0.1024.
    assert possibly_best([{1: 0.0, 2: 0.0}, {1: 1.0, 2: 2.0}]) == [True, True]
    assert possibly_best([{1: 0.0, 2: 0.0}, {1: 1.9, 2: 2.1}]) == [True, False]  # t is 20, p 0.0159
    assert possibly_best([{1: 0.0}, {1: 1.0}]) == [None, None]


def test_the_noise_of_seeds_is_pooled() -> None:
    settings = [{1: 1.0, 2: 3.0}, {1: 0.0, 2: 3.0, 3: 6.0}, {1: 5.0}]
    assert noise(settings) == pytest.approx(((2 + 18) / 3) ** 0.5)  # squares of 1, 1 and of 3, 0, 3
    assert noise([{1: 1.0}]) is None
