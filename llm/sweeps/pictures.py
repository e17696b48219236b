"""A sweep as a picture: its curves, and the loss against what was swept."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from llm.files import replacing
from llm.sweeps.jobs import compact, order, short_key, title_of
from llm.sweeps.results import (
    Result,
    by_setting,
    is_numeric,
    mean_of,
    means_over,
    plotted_keys,
    values_of,
    wants_log,
    writable,
)

FEW = 8  # settings that can be told apart by colour

# Colours that people see apart who do not see all of them: an order from good to bad, and eight kinds.
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


def draw_sweep(results: list[Result], path: Path) -> None:
    """The curves, and beside them the loss against what was swept."""
    from matplotlib.figure import Figure  # not pyplot, which would change a notebook's backend

    keys = plotted_keys(results)
    if not any(result.val_loss is not None for result in results):
        keys = []
    panels = keys[:1] if len(keys) == 2 else keys[:4]
    across = 2 if len(panels) == 4 else 1
    rows = max(1, len(panels) // across)
    figure = Figure(figsize=(15 if panels else 9, 6.2 if rows < 3 else 8), dpi=130, layout="constrained")
    grid = figure.add_gridspec(rows, 3, width_ratios=[1.2, 0.5, 0.5])
    _draw_curves(figure.add_subplot(grid[:, 0] if panels else grid[:, :]), results)
    for number, key in enumerate(panels):
        row, column = divmod(number, across)
        axes = figure.add_subplot(grid[row, 1 + column] if across == 2 else grid[row, 1:])
        if len(keys) == 2:
            _draw_heatmap(axes, results, *keys)
        else:
            _draw_values(axes, results, key)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw_curves(axes: Any, results: list[Result]) -> None:
    """Validation loss of all jobs, and the smoothed training loss where they are few."""
    from matplotlib.collections import LineCollection
    from matplotlib.ticker import EngFormatter

    settings = by_setting(results)
    few_jobs = len(results) <= 5 * FEW
    colours, legend = _job_colours(results, settings)
    best_last = sorted(results, key=lambda result: result.rank, reverse=True)
    shown = [result.evaluations for result in best_last]
    axes.add_collection(
        LineCollection(
            [np.column_stack([rows[1], rows[3]]) for rows in shown],
            colors=[colours[result] for result in best_last],
            linewidths=1.8 if few_jobs else 0.6,
            alpha=1 if few_jobs else 0.7,
        )
    )
    if few_jobs:
        shown += [result.training[[0, 1, 2, 4]] for result in best_last]
        for result in best_last:
            axes.plot(result.training[1], result.training[4], ":", lw=0.9, color=colours[result])
    losses = np.concatenate([rows[3] for rows in shown])
    tokens = np.concatenate([rows[1] for rows in shown])
    if np.isfinite(losses).any():
        low, high = _loss_range(shown, losses[np.isfinite(losses)])
        axes.set_ylim(low - 0.03 * (high - low), high + 0.03 * (high - low))
        axes.set_xlim(0, 1.01 * max(tokens))
    axes.set_title(
        "Validation loss" + ", and dotted the smoothed training loss" * few_jobs, loc="left", fontsize=10
    )
    axes.set_xlabel("Tokens seen")
    axes.set_ylabel("Loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        handles = [axes.plot([], [], lw=2, color=colour)[0] for colour in legend.values()]
        axes.legend(handles, [_label(name, 40) for name in legend], frameon=False, fontsize=8)
    else:
        _draw_colour_bar(axes, [result.val_loss for result in results if result.val_loss is not None])


def _loss_range(curves: list[np.ndarray], losses: np.ndarray) -> tuple[float, float]:
    """From the least loss to where the usual job is after a tenth of its way, or to the greatest if that is
    about as much: the fall at the beginning, and a job that diverges, would press all else flat."""
    early = [
        rows[3][(rows[1] >= 0.1 * rows[1][-1]) & np.isfinite(rows[3])][:1] for rows in curves if rows.size
    ]
    usual = 1.1 * float(np.median(np.concatenate(early))) if any(map(len, early)) else math.inf
    low, high = float(losses.min()), float(losses.max())
    return low, high if high < 1.2 * usual else usual


def _job_colours(
    results: list[Result], settings: list[list[Result]]
) -> tuple[dict[Result, Any], dict[str, Any]]:
    """A colour for each result: by its setting, with a legend, or of many settings by rank of the loss."""
    from matplotlib.colors import LinearSegmentedColormap

    ramp = LinearSegmentedColormap.from_list("ramp", COLOURS["light"]["ramp"])
    if len(settings) <= FEW:
        [*keys] = settings[0][0].setting
        ordered = len(keys) == 1 and is_numeric(values_of(results, keys[0]))
        by_value = (
            sorted(settings, key=lambda group: order(group[0].setting.get(keys[0], "")))
            if ordered
            else settings
        )
        shades = [
            ramp(place / max(1, len(by_value) - 1)) if ordered else COLOURS["light"]["kinds"][place]
            for place in range(len(by_value))
        ]
        titles = [title_of(group[0].setting) or "the one setting" for group in by_value]
        colours = {result: shade for group, shade in zip(by_value, shades, strict=True) for result in group}
        return colours, dict(zip(titles, shades, strict=True))
    ranked = sorted(results, key=lambda result: result.rank)
    return {result: ramp(place / (len(ranked) - 1)) for place, result in enumerate(ranked)}, {}


def _draw_colour_bar(axes: Any, losses: list[float]) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap

    bar = axes.figure.colorbar(
        ScalarMappable(cmap=LinearSegmentedColormap.from_list("ramp", COLOURS["light"]["ramp"])),
        cax=axes.inset_axes([0.42, 0.95, 0.54, 0.02]),  # where losses have fallen from by then
        orientation="horizontal",
    )
    places = [0, 0.25, 0.5, 0.75, 1]
    bar.set_ticks(places, labels=[f"{value:.3f}" for value in np.quantile(losses, places)] if losses else [])
    bar.set_label("Final validation loss; colour by rank", fontsize=8)
    bar.ax.tick_params(labelsize=8)


def _draw_values(axes: Any, results: list[Result], key: str) -> None:
    """Final losses over a swept key, the mean at each value, and a ring about the least."""
    from matplotlib.ticker import NullLocator

    finished = [result for result in results if result.val_loss is not None and key in result.job.setting]
    values = values_of(finished, key)
    numeric = is_numeric(values)
    place = {value: float(value) if numeric else float(number) for number, value in enumerate(values)}
    losses = [result.figures["val_loss"] for result in finished]
    axes.plot(
        [place[result.job.setting[key]] for result in finished],
        losses,
        "o",
        color=COLOURS["light"]["kinds"][0],
        alpha=0.6 if len(results) < 100 else 0.15,
        markersize=5,
        markeredgewidth=0,
    )
    means = means_over(finished, key, numeric)
    spots = [value if numeric else place[str(value)] for value, _ in means]
    axes.plot(spots, [loss for _, loss in means], "-", color=COLOURS["light"]["kinds"][1], lw=1.8)
    if means:
        least = min(range(len(means)), key=lambda each: means[each][1])
        name, loss = means[least]
        ring = {"ms": 11, "mfc": "none", "mew": 1.8, "color": COLOURS["light"]["kinds"][1]}
        axes.plot([spots[least]], [loss], "o", **ring)
        title = f"Final loss, least mean {loss:.3f} at {short_key(key)}={compact(str(name))}"
        axes.set_title(_label(title, 60), loc="left", fontsize=10 if len(plotted_keys(results)) < 4 else 8)
    if numeric and wants_log(key, values):
        axes.set_xscale("log")
    if numeric and len(values) <= FEW:
        axes.set_xticks([place[value] for value in values], [compact(value) for value in values])
        axes.xaxis.set_minor_locator(NullLocator())
    elif not numeric:
        axes.set_xticks(range(len(values)), [_label(value) for value in values], fontsize=8)
    if losses and min(losses) > 0 and max(losses) > 4 * min(losses):
        axes.set_yscale("log")
    axes.set_xlabel(_label(short_key(key)))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_heatmap(axes: Any, results: list[Result], *keys: str) -> None:
    """The mean final loss over two keys, shaded by rank."""
    down, along = sorted(keys, key=lambda key: len(values_of(results, key)))
    rows, columns = values_of(results, down), values_of(results, along)
    means = {
        (group[0].setting.get(down), group[0].setting.get(along)): mean_of(
            result.val_loss for result in group
        )
        for group in by_setting(results)
    }
    ordered = sorted(value for value in means.values() if value is not None)
    shades = [
        [
            math.nan if (value := means.get((row, column))) is None else -ordered.index(value)
            for column in columns
        ]
        for row in rows
    ]
    axes.imshow(shades, cmap="Blues", aspect="auto", vmin=-1.6 * len(ordered), vmax=0.6 * len(ordered))
    if len(rows) * len(columns) <= 150:
        for (row, column), value in means.items():
            if value is not None and row in rows and column in columns:
                axes.text(
                    columns.index(column),
                    rows.index(row),
                    f"{value:.3f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                )
    axes.set_xticks(range(len(columns)), [_label(compact(value)) for value in columns], fontsize=8)
    axes.set_yticks(range(len(rows)), [_label(compact(value)) for value in rows], fontsize=8)
    axes.set_xlabel(_label(short_key(along)))
    axes.set_ylabel(_label(short_key(down)))
    axes.set_title("Mean final validation loss, the lower the darker (by rank)", loc="left", fontsize=10)


def _label(text: str, most: int = 20) -> str:
    """A text that fits beside an axis and is not taken for mathematics."""
    shown = text if len(text) <= most else text[: most - 1] + "…"
    return (writable(shown) or "").replace("$", r"\$")
