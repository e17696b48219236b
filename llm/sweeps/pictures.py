"""Sweeps as pictures: curves, the loss against what was swept, heatmaps."""

import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from llm.errors import shown
from llm.files import replacing
from llm.overrides import compact, short_key, title_of
from llm.sweeps.comparing import LOSS, Measure
from llm.sweeps.jobs import order
from llm.sweeps.ranking import (
    Grid,
    HeatCell,
    Ranking,
    is_numeric,
    loss_cells,
    loss_grid,
    mean_of,
    means_over,
    plotted_keys,
    settings_of,
    values_of,
    varied_keys,
    wants_log,
)
from llm.sweeps.results import Result

MOST_TEXTS = 4  # one below the other
FEW = 8  # settings that can be told apart by colour
MOST_TICKS = 20  # along a side of a heatmap
MOST_NAMES = 40  # one under the other

# Colours that colour-blind people can distinguish: an order from good to bad, and eight kinds.
COLOURS = {
    "light": {
        "ramp": ["#2a1a6e", "#1f5fa8", "#17868c", "#6c942c", "#c98500"],
        "kinds": ["#0072b2", "#d55e00", "#009e73", "#b0508a", "#a67c00", "#3a9ad0", "#5b4bb7", "#6b6b6b"],
    },
    "dark": {
        "ramp": ["#ffe26b", "#9fd67a", "#4fb3b0", "#5a8fd8", "#9078d8"],
        "kinds": ["#56b4e9", "#ff9040", "#2fc79a", "#e08cc0", "#f0d060", "#9ec9ff", "#a99bff", "#a8a8a8"],
    },
}
BLUE, ORANGE = COLOURS["light"]["kinds"][:2]
UNRANKED = "#b5bac1"


def draw_sweep(rankings: list[Ranking], path: Path) -> None:
    """Draw the curves, and beside them the final figure over what was swept: a row for each text, at most
    MOST_TEXTS."""
    from matplotlib.figure import Figure  # not pyplot, which would change a notebook's backend

    drawn = rankings[:MOST_TEXTS]
    layouts = [_layout(ranking) for ranking in drawn]
    heights = [6.2 if layout.rows < 3 else 8 for layout in layouts]
    width = 15 if any(layout.keys for layout in layouts) else 9
    picture = Figure(figsize=(width, sum(heights)), dpi=130, layout="constrained")
    parts = picture.subfigures(len(drawn), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, ranking, layout in zip(parts, drawn, layouts, strict=True):
        _draw_ranking(part, ranking, layout)
        if len(rankings) > 1:
            more = f"; {len(rankings) - len(drawn)} more are not drawn" * (ranking is drawn[-1])
            part.suptitle(label(ranking.of.title, 100) + more * (len(rankings) > len(drawn)))
    with replacing(path) as temporary:
        picture.savefig(temporary, format="png")


@dataclass(frozen=True)
class Layout:
    """What is drawn beside the curves."""

    grid: Grid | None
    keys: list[str]  # a panel each; with a grid, one

    @property
    def across(self) -> int:
        return 2 if len(self.keys) == 4 else 1

    @property
    def rows(self) -> int:
        return max(1, len(self.keys) // self.across)


def _layout(ranking: Ranking) -> Layout:
    if all(result.final is None for result in ranking.results):
        return Layout(None, [])
    settings = settings_of(ranking.results)
    varied = {*varied_keys(settings)}
    grid, keys = loss_grid(ranking.groups), [key for key in plotted_keys(settings) if key in varied]
    return Layout(grid, keys[:1] if grid else keys[:4])


def _draw_ranking(picture: Any, ranking: Ranking, layout: Layout) -> None:
    results, groups, measure = ranking.results, ranking.groups, ranking.of.measure
    panels, across = layout.keys, layout.across
    places = picture.add_gridspec(layout.rows, 3, width_ratios=[1.2, 0.5, 0.5])
    _draw_curves(picture.add_subplot(places[:, 0] if panels else places[:, :]), results, groups, measure)
    for number, key in enumerate(panels):
        row, column = divmod(number, across)
        axes = picture.add_subplot(places[row, 1 + column] if across == 2 else places[row, 1:])
        if layout.grid:
            draw_heatmap(axes, layout.grid, loss_cells(ranking))
            title = f"Mean final {measure.title}, darker is lower (by rank)"
            axes.set_title(title, loc="left", fontsize=10)
        else:
            numeric = is_numeric(values_of(settings_of(results), key))
            (_draw_values if numeric else _draw_names)(axes, results, key, measure)
            _draw_noise(axes, ranking, numeric)
            if across == 2:
                axes.title.set_fontsize(8)


def _draw_curves(axes: Any, results: list[Result], groups: list[list[Result]], measure: Measure) -> None:
    """Draw the evaluations of all jobs, and the smoothed training losses if jobs are few and share a
    tokenizer."""
    from matplotlib.collections import LineCollection
    from matplotlib.ticker import EngFormatter

    few_jobs = len(results) <= 5 * FEW
    colours, legend = _job_colours(results, groups)
    best_last = sorted(results, key=lambda result: result.rank, reverse=True)
    curves = [result.evaluations for result in best_last]
    axes.add_collection(
        LineCollection(
            [np.column_stack([rows[1], rows[3]]) for rows in curves],
            colors=[colours[result] for result in best_last],
            linewidths=1.8 if few_jobs else 0.6,
            alpha=1 if few_jobs else 0.7,
        )
    )
    if with_training := few_jobs and measure == LOSS:
        curves += [result.training[[0, 1, 2, 4]] for result in best_last]
        for result in best_last:
            axes.plot(result.training[1], result.training[4], ":", lw=0.9, color=colours[result])
    for group in groups if few_jobs else []:
        if band := _between_seeds(group):
            axes.fill_between(*band, color=colours[group[0]], alpha=0.15, lw=0)
    losses = np.concatenate([rows[3] for rows in curves])
    tokens = np.concatenate([rows[1] for rows in curves])
    if np.isfinite(losses).any():
        low, high = _loss_range(curves, losses[np.isfinite(losses)])
        axes.set_ylim(low - 0.03 * (high - low), high + 0.03 * (high - low))
        axes.set_xlim(0, 1.01 * max(tokens))
    title = f"{measure.title.capitalize()} on eval_iter batches"
    title += ", dotted the smoothed training loss" * with_training
    axes.set_title(title, loc="left", fontsize=10, y=1)  # not above the colour bar
    axes.set_xlabel("Tokens seen")
    axes.set_ylabel(_axis_title(measure))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        handles = [axes.plot([], [], lw=2, color=colour)[0] for colour in legend.values()]
        axes.legend(handles, [label(name, 40) for name in legend], frameon=False, fontsize=8)
    else:
        _draw_colour_bar(axes, [result.final for result in results if result.final is not None], measure)


def _between_seeds(group: list[Result]) -> tuple[np.ndarray, ...] | None:
    """Tokens seen, and the lowest and highest evaluation among a setting's seeds there; None with a single
    seed, or if the seeds were not evaluated at the same places."""
    curves = [result.evaluations for result in group if result.evaluations.size]
    if len(curves) < 2 or any(not np.array_equal(rows[1], curves[0][1]) for rows in curves):
        return None
    losses = np.stack([rows[3] for rows in curves])
    return curves[0][1], losses.min(axis=0), losses.max(axis=0)


def _loss_range(curves: list[np.ndarray], losses: np.ndarray) -> tuple[float, float]:
    """The range of losses to show: from the lowest to that of the median job after a tenth of its training,
    or to the highest if that is not much more. The steep beginning, or a job that diverges, would flatten
    everything else."""
    early = [
        rows[3][(rows[1] >= 0.1 * rows[1][-1]) & np.isfinite(rows[3])][:1] for rows in curves if rows.size
    ]
    usual = 1.1 * float(np.median(np.concatenate(early))) if any(map(len, early)) else math.inf
    low, high = float(losses.min()), float(losses.max())
    return low, high if high < 1.2 * usual else usual


def _job_colours(
    results: list[Result], groups: list[list[Result]]
) -> tuple[dict[Result, Any], dict[str, Any]]:
    """A colour for each result: by its setting, with a legend; or by the rank of its loss, if settings are
    many."""
    ramp = _ramp()
    if len(groups) > FEW:
        ranked = sorted((each for each in results if each.final is not None), key=lambda each: each.rank)
        shades = {each: ramp(place / max(1, len(ranked) - 1)) for place, each in enumerate(ranked)}
        return {each: shades.get(each, UNRANKED) for each in results}, {}
    [*keys] = groups[0][0].setting
    kinds: list[Any] = COLOURS["light"]["kinds"]
    if len(keys) == 1 and is_numeric(values_of(settings_of(results), keys[0])):
        groups = sorted(groups, key=lambda group: order(group[0].setting.get(keys[0], "")))
        kinds = [ramp(place / max(1, len(groups) - 1)) for place in range(len(groups))]
    shaded = [*zip(groups, kinds, strict=False)]
    legend = {title_of(group[0].setting) or "the one setting": shade for group, shade in shaded}
    return {result: shade for group, shade in shaded for result in group}, legend


def _ramp() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("ramp", COLOURS["light"]["ramp"])


def _draw_colour_bar(axes: Any, losses: list[float], measure: Measure) -> None:
    from matplotlib.cm import ScalarMappable

    bar = axes.figure.colorbar(
        ScalarMappable(cmap=_ramp()),
        cax=axes.inset_axes([0.55, 1.02, 0.4, 0.015]),  # beside the title
        orientation="horizontal",
        ticklocation="top",
    )
    places = [0, 0.25, 0.5, 0.75, 1]
    bar.set_ticks(places, labels=[f"{value:.3f}" for value in np.quantile(losses, places)] if losses else [])
    bar.set_label(f"Final {measure.title}; colour by rank, grey without one", fontsize=8)
    bar.ax.tick_params(labelsize=8)


def _draw_noise(axes: Any, ranking: Ranking, upright: bool) -> None:
    """Draw the noise of seeds as a band: a standard deviation to either side of the lowest mean."""
    means = [mean_of(result.final for result in group) for group in ranking.groups]
    there = [value for value in means if value is not None]
    if ranking.noise and there:
        span = min(there) - ranking.noise, min(there) + ranking.noise
        (axes.axhspan if upright else axes.axvspan)(*span, color=UNRANKED, alpha=0.35, lw=0, zorder=0)


def _axis_title(measure: Measure) -> str:
    return f"Loss ({measure.unit})" if measure == LOSS else measure.unit.capitalize()


def _draw_values(axes: Any, results: list[Result], key: str, measure: Measure) -> None:
    """Draw final figures over a swept number, the mean at each value, and a ring around the lowest."""
    from matplotlib.ticker import NullLocator

    finished = [result for result in results if result.final is not None and key in result.job.setting]
    values = values_of(settings_of(finished), key)
    place = {value: float(value) for value in values}
    losses = [result.figures[measure.name] for result in finished]
    axes.plot(
        [place[result.job.setting[key]] for result in finished],
        losses,
        "o",
        color=BLUE,
        alpha=0.6 if len(results) < 100 else 0.15,
        markersize=5,
        markeredgewidth=0,
    )
    means = means_over(finished, key)
    axes.plot([place[value] for value, _ in means], [loss for _, loss in means], "-", color=ORANGE, lw=1.8)
    if means:
        value, loss = min(means, key=lambda each: each[1])
        axes.plot([place[value]], [loss], "o", ms=11, mfc="none", mew=1.8, color=ORANGE)
        title = f"Final {measure.title}, lowest mean {loss:.3f} at {short_key(key)}={compact(value)}"
        axes.set_title(label(title, 80), loc="left", fontsize=10)
    if wants_log(key, values):
        axes.set_xscale("log")
    if len(values) <= FEW:
        axes.set_xticks([place[value] for value in values], [compact(value) for value in values])
        axes.xaxis.set_minor_locator(NullLocator())
    if losses and min(losses) > 0 and max(losses) > 4 * min(losses):
        axes.set_yscale("log")
    axes.set_xlabel(label(short_key(key)))
    axes.set_ylabel(_axis_title(measure))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_names(axes: Any, results: list[Result], key: str, measure: Measure) -> None:
    """Draw the final figures at each value of a key that is not a number, and their mean; the lowest on
    top."""
    means = sorted(means_over(results, key), key=lambda each: each[1], reverse=True)[-MOST_NAMES:]
    place = {value: number for number, (value, _) in enumerate(means)}
    drawn = [
        result for result in results if result.final is not None and result.job.setting.get(key) in place
    ]
    axes.plot(
        [result.figures[measure.name] for result in drawn],
        [place[result.job.setting[key]] for result in drawn],
        "o",
        color=BLUE,
        alpha=0.6,
        markersize=5,
        markeredgewidth=0,
    )
    axes.plot([loss for _, loss in means], range(len(means)), "|", color=ORANGE, ms=16, mew=2)
    axes.set_yticks(range(len(means)), [label(value) for value, _ in means], fontsize=8)
    title = f"Final {measure.title} at each {label(short_key(key))}, and the mean"
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(_axis_title(measure))
    axes.margins(y=0.5 / max(1, len(means)))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw_heatmap(axes: Any, grid: Grid, cells: list[HeatCell]) -> None:
    """Draw the cells of settings at their places, with their texts if there is room."""
    places = [[None if number is None else cells[number] for number in row] for row in grid.cells]
    shades = [[math.nan if cell is None or cell[0] is None else cell[0] for cell in row] for row in places]
    axes.imshow(shades, cmap="Blues", aspect="auto", vmin=-0.1, vmax=1.3)  # neither white nor all but black
    if len(grid.rows) * len(grid.columns) <= 150:
        for (y, row), x in product(enumerate(places), range(len(grid.columns))):
            if cell := row[x]:
                colour = "white" if (cell[0] or 0) > 0.75 else "black"
                axes.text(x, y, cell[1], ha="center", va="center", fontsize=8, color=colour)
    for set_ticks, values in ((axes.set_xticks, grid.columns), (axes.set_yticks, grid.rows)):
        every = math.ceil(len(values) / MOST_TICKS)
        set_ticks(range(0, len(values), every), map(label, values[::every]))
    axes.tick_params(labelsize=8)
    axes.set_xlabel(label(grid.along))
    axes.set_ylabel(label(grid.down))


def label(text: str, most: int = 20) -> str:
    """A text for a label, shortened, and escaped so that it is not read as mathematics."""
    cut = text if len(text) <= most else text[: most - 1] + "…"
    return shown(cut, keep="").replace("$", r"\$")
