"""A ladder and its scaling law as a picture."""

from pathlib import Path
from typing import Any

import numpy as np

from llm.files import replacing
from llm.progress import format_count
from llm.sweeps.ladder import Ladder, Prediction
from llm.sweeps.pictures import COLOURS, ORANGE
from llm.sweeps.scaling import Rung
from llm.sweeps.scaling_report import CURVE, QUANTITIES, curves

TITLES = {"tokens": "Tokens", "parameters": "Parameters", "compute": "Compute (floating-point operations)"}
MOST_NAMED = 8  # curves in a legend


def draw_scaling(ladder: Ladder, predictions: list[Prediction], path: Path) -> None:
    """Draw the loss over compute, with a curve for each size, the lowest loss that the law allows, and larger
    runs. If sizes and budgets both vary, also draw it over tokens and parameters."""
    from matplotlib.figure import Figure  # not pyplot, which would change a notebook's backend

    both = ladder.fit.optimum(ladder.size.compute) is not None
    picture = Figure(figsize=(15 if both else 8, 5.2), dpi=130, layout="constrained")
    compute, *others = picture.subplots(1, 3 if both else 1, sharey=True, squeeze=False)[0]
    _draw_compute(compute, ladder, predictions)
    compute.set_ylabel(ladder.measure.title)
    for axes, over, of in zip(others, ("tokens", "parameters"), ("parameters", "tokens"), strict=False):
        _draw_over(axes, ladder, over, of)
    constants = ", ".join(f"{name} {value[0]:.4g}" for name, value in ladder.fit.constants.items())
    picture.suptitle(f"{ladder.fit.form.formula}: {constants}; {QUANTITIES}", fontsize=10)
    with replacing(path) as temporary:
        picture.savefig(temporary, format="png")


def _draw_compute(axes: Any, ladder: Ladder, predictions: list[Prediction]) -> None:
    rungs = sorted(ladder.fit.rungs, key=lambda each: each.parameters)
    colours = _colours([rung.parameters for rung in rungs])
    for rung in rungs:
        _draw_rung(axes, rung, rung.compute, colours[rung.parameters])
    for curve, colour in zip(curves(ladder), colours.values(), strict=False):
        axes.plot(*curve.T, color=colour, lw=1.5)
    most = max([each.size.compute for each in predictions] or [ladder.size.compute])
    frontier = np.geomspace(min(rung.compute for rung in rungs), most, CURVE)
    losses = []
    for each in frontier:
        if best := ladder.fit.optimum(each):
            (size, *_), (tokens, *_) = best
            losses.append(ladder.fit.losses(size, tokens, each)[0])
    if losses:
        axes.plot(frontier, losses, "--", color="black", lw=1, label="best size for the compute")
    for number, each in enumerate(predictions):
        value, low, high = each.loss
        label = "predicted, 95 %" if not number else None
        error = [[value - low], [high - value]]
        axes.errorbar(each.size.compute, value, error, fmt="D", ms=5, color="black", capsize=4, label=label)
        if each.outcome is not None:
            axes.plot(
                each.size.compute,
                each.outcome,
                "*",
                ms=14,
                color=ORANGE,
                label="came out" if not number else None,
            )
    _finish(axes, "compute")


def _draw_over(axes: Any, ladder: Ladder, over: str, of: str) -> None:
    """Draw the loss over one quantity, with a curve for each value of the other."""
    fit = ladder.fit
    values = sorted({getattr(rung, of) for rung in fit.rungs})
    colours = _colours(values)
    ends = [getattr(rung, over) for rung in fit.rungs]
    for rung in fit.rungs:
        _draw_rung(axes, rung, getattr(rung, over), colours[getattr(rung, of)])
    places = np.geomspace(min(ends), max(ends), CURVE)
    for value in values:
        pairs = [(place, value) if over == "parameters" else (value, place) for place in places]
        losses = [fit.losses(n, d, compute=1.0)[0] for n, d in pairs]
        name = f"{format_count(value)} {of}" if len(values) <= MOST_NAMED else None
        axes.plot(places, losses, color=colours[value], lw=1.5, label=name)
    _finish(axes, over)


def _draw_rung(axes: Any, rung: Rung, place: float, colour: str) -> None:
    axes.plot([place] * len(rung.losses), rung.losses, "o", color=colour, ms=4, alpha=0.7, mew=0)


def _finish(axes: Any, over: str) -> None:
    axes.set_xscale("log")
    axes.set_xlabel(TITLES[over])
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def _colours(values: list[float]) -> dict[float, str]:
    """Colours by size or budget, in order."""
    kinds = COLOURS["light"]["kinds"]
    return {value: kinds[number % len(kinds)] for number, value in enumerate(sorted({*values}))}
