"""The settings of a sweep: what varies between them, their ranking, and their places in a heatmap."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from statistics import mean

from llm.overrides import compact, short_key
from llm.records import figure_in
from llm.sweeps.comparing import Comparison
from llm.sweeps.jobs import order, repetitions
from llm.sweeps.results import Result, or_infinite
from llm.sweeps.verdict import Figures, figures_by_seed, noise, possibly_best

Setting = dict[str, str]  # the keys that vary between jobs, with a job's values

MEANS = 20  # values drawn at random are divided into this many parts, each with a mean


# Which settings are best


@dataclass(frozen=True)
class Ranking:
    """The settings of jobs that were evaluated on the same text, best first."""

    of: Comparison
    groups: list[list[Result]]  # the results of each setting

    @property
    def results(self) -> list[Result]:
        return [result for group in self.groups for result in group]

    @cached_property
    def possibly_best(self) -> list[bool | None]:
        """Whether each setting may be the best, see `llm.sweeps.verdict`; None with a single seed."""
        return possibly_best([figures_of(group) for group in self.groups])

    @cached_property
    def noise(self) -> float | None:
        """The standard deviation between seeds, over the settings that may be the best."""
        kept = [group for group, may in zip(self.groups, self.possibly_best, strict=True) if may]
        return noise([figures_of(group) for group in kept or self.groups])


def by_setting(results: list[Result]) -> list[list[Result]]:
    """Results grouped by setting, so that those in a group differ only in their seeds; lowest mean loss
    first."""
    return sorted(repetitions(results, lambda result: result.setting), key=mean_rank)


def figures_of(group: list[Result]) -> Figures:
    """The final figures of a setting."""
    return figures_by_seed((each.job.seed, each.final) for each in group if each.final is not None)


def mean_rank(group: list[Result]) -> tuple[float, float]:
    """For sorting: the mean final figure; settings without one come last, by their mean so far."""
    final, last = (result.final for result in group), (result.last for result in group)
    return or_infinite(mean_of(final)), or_infinite(mean_of(last))


def mean_of(values: Iterable[float | None]) -> float | None:
    """The mean of those values that are not None; None if there are none."""
    there = [value for value in values if value is not None]
    return mean(there) if there else None


# What varies


def settings_of(results: list[Result]) -> list[Setting]:
    return [result.job.setting for result in results]


def swept_keys(settings: list[Setting]) -> list[str]:
    """The keys that vary, with the seed last."""
    keys = dict.fromkeys(key for setting in settings for key in setting)
    return sorted(keys, key=lambda key: key == "seed")


def plotted_keys(settings: list[Setting]) -> list[str]:
    """The keys to plot losses over: those that vary, without the seed unless nothing else varies."""
    keys = swept_keys(settings)
    return [key for key in keys if key != "seed"] or keys


def varied_keys(settings: list[Setting]) -> list[str]:
    """The swept keys that vary among these settings."""
    return [key for key in swept_keys(settings) if len({setting.get(key) for setting in settings}) > 1]


def values_of(settings: list[Setting], key: str) -> list[str]:
    """The values of a key, numbers first and in order."""
    return sorted({setting[key] for setting in settings if key in setting}, key=order)


def is_numeric(values: list[str]) -> bool:
    return all(figure_in(value) is not None for value in values)


def wants_log(key: str, values: list[str]) -> bool:
    """Whether an axis should be logarithmic: positive numbers that span a decade, or learning rates."""
    numbers = [figure_in(value) or 0.0 for value in values]
    low, high = min(numbers, default=0.0), max(numbers, default=0.0)
    return 0 < low < high and (high >= 10 * low or short_key(key) == "lr")


def means_over(results: list[Result], key: str) -> list[tuple[str, float]]:
    """The mean final loss at each value of a key, in order. If there are too many numbers for that, as when
    they were drawn at random, the mean of each of MEANS parts, at the number in its middle."""
    finished = [result for result in results if result.final is not None and key in result.job.setting]
    finished.sort(key=lambda result: order(result.job.setting[key]))
    values = values_of(settings_of(finished), key)
    if is_numeric(values) and len(values) > 2 * MEANS:
        size = math.ceil(len(finished) / MEANS)
        parts = [finished[start : start + size] for start in range(0, len(finished), size)]
    else:
        parts = [[result for result in finished if result.job.setting[key] == value] for value in values]
    return [
        (part[len(part) // 2].job.setting[key], mean(result.figures[result.measure.name] for result in part))
        for part in parts
    ]


# Heatmaps


@dataclass(frozen=True)
class Grid:
    """The places of settings in a heatmap over two keys."""

    down: str  # the key of the rows; empty for none
    along: str  # the key of the columns; empty for none
    rows: list[str]  # values as they are shown
    columns: list[str]
    cells: list[list[int | None]]  # numbers of settings


HeatCell = tuple[float | None, str]  # a shade from 0 to 1, or None without a value; and a text


def grid_of(
    settings: list[Setting], down: str | None, along: str | None, fixed: Setting | None = None
) -> Grid:
    """The grid of those settings that have the values in `fixed`, with rows and columns for all settings."""
    there = {
        (setting.get(down or ""), setting.get(along or "")): number
        for number, setting in enumerate(settings)
        if (fixed or {}).items() <= setting.items()
    }
    rows = [*values_of(settings, down)] if down else [None]
    columns = [*values_of(settings, along)] if along else [None]
    return Grid(
        short_key(down or ""),
        short_key(along or ""),
        [compact(row or "") for row in rows],
        [compact(column or "") for column in columns],
        [[there.get((row, column)) for column in columns] for row in rows],
    )


def loss_grid(groups: list[list[Result]]) -> Grid | None:
    """Settings over the two keys that vary, with the fewer values down. None if not exactly two keys vary, or
    if more than half of the cells would be empty, as when values were drawn at random."""
    settings = [group[0].setting for group in groups]
    keys = sorted(varied_keys(settings), key=lambda key: len(values_of(settings, key)))
    if len(keys) != 2 or len(settings) < math.prod(len(values_of(settings, key)) for key in keys) / 2:
        return None
    return grid_of(settings, keys[0], keys[1])


def loss_cells(ranking: Ranking) -> list[HeatCell]:
    """A cell for each setting, with its mean final loss (the lower, the darker) and a star if it may be the
    best."""
    means = [mean_of(result.final for result in group) for group in ranking.groups]
    texts = [
        "–" if value is None else f"{value:.3f}" + " ★" * bool(may)
        for value, may in zip(means, ranking.possibly_best, strict=True)
    ]
    return [*zip(shades_by_rank(means), texts, strict=True)]


def shades_by_rank(values: list[float | None]) -> list[float | None]:
    """Shades in even steps from 1 for the lowest value to 0 for the highest, so that a diverged job does not
    make all others look alike."""
    ordered = sorted(value for value in values if value is not None)
    return [
        None if value is None else 1 - ordered.index(value) / max(1, len(ordered) - 1) for value in values
    ]


def shades_by_size(values: list[float | None]) -> list[float | None]:
    """Shades in proportion to values, from 0 for the lowest to 1 for the highest."""
    there = [value for value in values if value is not None]
    low, high = min(there, default=0.0), max(there, default=0.0)
    return [None if value is None else (value - low) / ((high - low) or 1) for value in values]
