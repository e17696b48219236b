"""Whether a difference between two settings is more than the noise of seeds.

Each setting is run with several seeds. Where both were run with the same seed, the two runs drew the same
batches in the same order, so what that adds to both cancels out in their difference.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean

import numpy as np
from scipy import stats

LEVEL = 0.05  # how often equal settings are declared different
POWER = 0.8  # how surely a difference as large as the one seen is to be found
MOST_SEEDS = 1000  # beyond which no number is named

Figures = Mapping[int, float]  # by seed


@dataclass(frozen=True)
class Difference:
    """b's figure less a's: its mean, where the true one lies, and how often seeds alone differ as much."""

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
            limit = stats.t.ppf(1 - LEVEL / 2, freedom)
            # Past some 37, what is beyond the limit is all of it, and scipy's series may not converge.
            shift = min(37.0, abs(self.mean) / self.spread * math.sqrt(count)) if self.spread else 37.0
            if stats.nct.sf(limit, freedom, shift) >= POWER:
                return count
        return None


def difference(a: Figures, b: Figures) -> Difference | None:
    """Compare two settings; None where there are too few seeds to know their noise.

    Where at least two seeds are common to both, by Student's t-test of the differences (Student 1908, "The
    probable error of a mean"), over these seeds alone. Else by Welch's (1947, "The generalization of
    'Student's' problem"), which lets each setting have a noise of its own. Either is exact for figures that
    are normally distributed.
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
    reach = float(stats.t.ppf(1 - LEVEL / 2, freedom)) * error
    # With no noise at all, runs are the same to the bit, or they are different.
    p = 2 * float(stats.t.sf(abs(middle) / error, freedom)) if error else float(not middle)
    spread = error * math.sqrt(count)
    return Difference(middle, middle - reach, middle + reach, p, spread, count, len(common) >= 2)


def told_apart(settings: Sequence[Figures]) -> set[tuple[int, int]]:
    """Which pairs of settings differ by more than the noise of seeds, by their numbers, the lower first.

    All pairs are compared, for whichever setting comes out best was chosen by its noise as well; and the
    level is Holm's (1979, "A simple sequentially rejective multiple test procedure"), at which the chance
    that any two equal settings are declared different stays below LEVEL.
    """
    found = [
        (each.p, pair)
        for pair in combinations(range(len(settings)), 2)
        if (each := difference(settings[pair[0]], settings[pair[1]]))
    ]
    return set(_rejected(sorted(found)))


def _rejected(found: list[tuple[float, tuple[int, int]]]) -> Iterator[tuple[int, int]]:
    for place, (p, pair) in enumerate(found):
        if p >= LEVEL / (len(found) - place):
            return
        yield pair


def noise(settings: Sequence[Figures]) -> float | None:
    """The standard deviation between seeds of one setting, pooled over all that have several."""
    several = [[*each.values()] for each in settings if len(each) > 1]
    freedom = sum(len(values) - 1 for values in several)
    return math.sqrt(sum(np.var(values) * len(values) for values in several) / freedom) if several else None
