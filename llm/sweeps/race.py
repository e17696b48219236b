"""A race of settings: seeds are added until one setting is left, with an error rate that holds at any time.

A p-value is valid for a number of seeds that was fixed in advance. Looking after each seed, and stopping when
it is low, finds differences where there are none. The test here may be looked at any time: its evidence is an
e-value, which for equal settings exceeds 1 / level with a probability of at most `level` over all looks
together (Ville 1939).
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llm.files import parse_json, read_content
from llm.records import RECORD_BYTES, Record, figure, flag, text

OUTCOME = "race.json"  # in the sweep's folder: the outcome of the race, or its state so far
KINDS = {"verdict": text, "decided": flag, "best": text, "seeds": figure, "jobs": figure, "level": figure}

# The variance of the prior for the size of an effect, in standard deviations of a pair's difference. With 10,
# differences of 2, 3 and 5 deviations take 6, 5 and 4 seeds.
PRIOR_VARIANCE = 10.0


def evidence(differences: Sequence[float]) -> float:
    """How much likelier paired differences are with an effect than without: an e-value, 1 for fewer than two.

    The Bayes factor of a t-test with a normal prior on the effect's size (Gönen et al. 2005, "The Bayesian
    two-sample t test"). With the scale-invariant prior on the noise it is a martingale for equal settings
    whatever their noise, so that one may stop at any time (Pérez-Ortiz et al. 2024, "E-statistics, group
    invariance and anytime-valid testing").
    """
    count = len(differences)
    if count < 2:
        return 1.0
    middle, noise = float(np.mean(differences)), float(np.std(differences, ddof=1)) / math.sqrt(count)
    if not noise:  # runs that are the same to the bit, or differ by the same
        return math.inf if middle else 1.0
    freedom, wider = count - 1, 1 + count * PRIOR_VARIANCE
    ratio = (middle / noise) ** 2 / freedom
    log = (count / 2) * (math.log1p(ratio) - math.log1p(ratio / wider)) - math.log(wider) / 2
    return math.exp(min(log, 700.0))


def ruled_out(settings: Sequence[Sequence[float]], seeds: int, level: float) -> list[int | None]:
    """After how many seeds each setting left the race; None for those still in it.

    A setting leaves once a remaining rival has a lower mean over their common seeds, and the evidence for a
    difference is at least (settings - 1) / level. So the truly best setting leaves with a probability of at
    most `level` (Bonferroni's bound over its rivals). A setting also leaves if it lacks the figure of a seed
    because its run failed.

    Args:
        settings: the final figures of each setting (lower is better), in the order in which seeds were added.
        seeds: how many seeds the remaining settings have been run with.
    """
    left: list[int | None] = [None] * len(settings)
    for count in range(1, seeds + 1):
        racing = [number for number, at in enumerate(left) if at is None]
        there = [number for number in racing if len(settings[number]) >= count]
        for number in racing:
            if number not in there or any(
                _beats(settings[rival][:count], settings[number][:count], (len(settings) - 1) / level)
                for rival in there
            ):
                left[number] = count
    return left


def read_race(folder: Path) -> Record:
    """The outcome of the race in a sweep's folder; empty if the sweep is no race, or the record is
    damaged."""
    values = parse_json(read_content(folder / OUTCOME, RECORD_BYTES))
    return {name: kind(values.get(name)) for name, kind in KINDS.items()} if isinstance(values, dict) else {}


def _beats(rival: Sequence[float], figures: Sequence[float], enough: float) -> bool:
    differences = [own - other for own, other in zip(figures, rival, strict=True)]
    return sum(differences) > 0 and evidence(differences) >= enough
