"""Whether a difference between two settings is more than the noise of seeds.

Each setting is run with several seeds. Two runs with the same seed draw the same batches in the same order,
and the effect of that cancels out in their difference.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np
from scipy import special

LEVEL = 0.05  # how often equal settings are declared different
POWER = 0.8  # probability of finding a difference as large as the observed one
MOST_SEEDS = 1000  # larger numbers of seeds are not named

Figures = Mapping[int, float]  # by seed


def figures_by_seed(runs: Iterable[tuple[int, float]]) -> Figures:
    """The figures of a setting's runs by seed; the mean, if a seed was run several times."""
    found: dict[int, list[float]] = {}
    for seed, figure in runs:
        found.setdefault(seed, []).append(figure)
    return {seed: mean(figures) for seed, figures in found.items()}


@dataclass(frozen=True)
class Difference:
    """The figure of b minus that of a: its mean, an interval for the true one, and how often seeds alone
    differ as much.
    """

    mean: float
    low: float  # of the interval that holds the true difference in all but LEVEL of comparisons
    high: float
    p: float  # how often equal settings come to a mean difference at least as large
    spread: float  # the standard deviation of the difference of two runs
    seeds: int  # of each setting, the fewer of both
    paired: bool

    @property
    def decided(self) -> bool:
        return self.p < LEVEL

    @property
    def seeds_needed(self) -> int | None:
        """How many seeds of each setting would find so large a difference with probability POWER, at least
        one more than there are; None for more than MOST_SEEDS. By the noncentral t distribution (Cohen 1988,
        "Statistical power analysis for the behavioral sciences")."""
        for count in range(self.seeds + 1, MOST_SEEDS + 1):
            freedom = count - 1 if self.paired else 2 * (count - 1)
            limit = special.stdtrit(freedom, 1 - LEVEL / 2)
            # Past some 37, what is beyond the limit is all of it, and scipy's series may not converge.
            shift = min(37.0, abs(self.mean) / self.spread * math.sqrt(count)) if self.spread else 37.0
            if special.nctdtr(freedom, shift, limit) <= 1 - POWER:
                return count
        return None


def difference(a: Figures, b: Figures) -> Difference | None:
    """Compare two settings; None if there are too few seeds to estimate their noise.

    If they have at least two seeds in common, by Student's paired t-test over these seeds alone (Student
    1908, "The probable error of a mean"); else by Welch's t-test (1947, "The generalization of 'Student's'
    problem"), in which the settings may differ in their noise. Both are for normally distributed figures.
    """
    common = sorted(a.keys() & b.keys())
    if len(common) >= 2:
        differences = np.array([b[seed] - a[seed] for seed in common])
        count, freedom = len(common), len(common) - 1.0
        error = float(differences.std(ddof=1)) / math.sqrt(count)
        middle = float(differences.mean())
    elif min(len(a), len(b)) >= 2:
        variances = [float(np.var([*each.values()], ddof=1)) / len(each) for each in (a, b)]
        error, count = math.sqrt(sum(variances)), min(len(a), len(b))
        parts = sum(variance**2 / (len(each) - 1) for variance, each in zip(variances, (a, b), strict=True))
        freedom = sum(variances) ** 2 / parts if parts else count - 1.0
        middle = mean(b.values()) - mean(a.values())
    else:
        return None
    reach = float(special.stdtrit(freedom, 1 - LEVEL / 2)) * error
    # With no noise at all, runs are the same to the bit, or they are different.
    p = 2 * float(special.stdtr(freedom, -abs(middle) / error)) if error else float(not middle)
    spread = error * math.sqrt(count)
    return Difference(middle, middle - reach, middle + reach, p, spread, count, len(common) >= 2)


def possibly_best(settings: Sequence[Figures]) -> list[bool | None]:
    """Which settings cannot be distinguished from the best (lower figures are better); None if there are too
    few seeds to tell. The truly best setting is among them in all but LEVEL of sweeps, however many settings
    there are and whichever happens to come first (Gupta 1965, "On some multiple decision rules"). A setting
    is ruled out only if the first one is better in a one-sided t-test at LEVEL divided by the number of the
    others (Bonferroni's bound); so each may have its own noise.
    """
    several = [number for number, each in enumerate(settings) if len(each) > 1]
    kept: list[bool | None] = [None] * len(settings)
    if len(several) < 2:
        return kept
    first = min(several, key=lambda number: mean(settings[number].values()))
    kept[first] = True
    for number in several:
        if number != first and (found := difference(settings[first], settings[number])):
            one_sided = found.p / 2 if found.mean > 0 else 1 - found.p / 2
            kept[number] = one_sided >= LEVEL / (len(several) - 1)
    return kept


def noise(settings: Sequence[Figures]) -> float | None:
    """The standard deviation between seeds of the same setting, pooled over all settings with several
    seeds."""
    several = [[*each.values()] for each in settings if len(each) > 1]
    freedom = sum(len(values) - 1 for values in several)
    return math.sqrt(sum(np.var(values) * len(values) for values in several) / freedom) if several else None
