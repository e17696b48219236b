"""Two settings and their difference as a picture."""

from pathlib import Path

import numpy as np

from llm.errors import shown
from llm.files import replacing
from llm.sweeps.comparing import Measure
from llm.sweeps.pictures import BLUE, ORANGE, UNRANKED
from llm.sweeps.verdict import Difference, Figures

TITLE = 40  # characters of a setting


def draw_difference(
    titles: tuple[str, str], figures: tuple[Figures, Figures], found: Difference, measure: Measure, path: Path
) -> None:
    """A dot for each seed, those of one seed joined, and the means; beside it the difference: each seed's,
    the mean and its interval."""
    from matplotlib.figure import Figure  # not pyplot, which would change a notebook's backend

    picture = Figure(figsize=(9, 4.2), dpi=130, layout="constrained")
    seeds, change = picture.subplots(1, 2, width_ratios=[1.3, 1])
    common = sorted(figures[0].keys() & figures[1].keys())
    for seed in common:
        seeds.plot([0, 1], [each[seed] for each in figures], color=UNRANKED, linewidth=1, zorder=1)
    for place, (each, colour) in enumerate(zip(figures, (BLUE, ORANGE), strict=True)):
        values = np.array([*each.values()])
        seeds.scatter(np.full(len(values), place), values, s=30, color=colour, zorder=2)
        seeds.hlines(values.mean(), place - 0.16, place + 0.16, color=colour, linewidth=2.5)
    names = [f"{name}: {shown(title, keep='')[:TITLE]}" for name, title in zip("ab", titles, strict=True)]
    seeds.set_xticks([0, 1], names)
    seeds.set_xlim(-0.5, 1.5)
    seeds.set_ylabel(measure.title)
    seeds.set_title(f"Each seed, and the means ({found.seeds} seeds)", loc="left", fontsize=10)
    change.axvline(0, color="black", linewidth=1)
    if found.paired:
        change.scatter(
            [figures[1][seed] - figures[0][seed] for seed in common],
            np.ones(len(common)),
            s=30,
            color=UNRANKED,
        )
    colour = BLUE if found.decided else UNRANKED
    error = [[found.mean - found.low], [found.high - found.mean]]
    change.errorbar(found.mean, 0, xerr=error, fmt="o", color=colour, capsize=5, linewidth=2)
    change.set_yticks(
        [0, 1] if found.paired else [0], ["mean, 95 %", "each seed"][: 2 if found.paired else 1]
    )
    change.set_ylim(-0.7, 1.7 if found.paired else 0.7)
    change.set_xlabel(f"b - a, {measure.unit}")
    verdict = "more than the noise of seeds" if found.decided else "within the noise of seeds"
    change.set_title(f"The difference: {verdict}", loc="left", fontsize=10)
    for axes in (seeds, change):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    with replacing(path) as temporary:
        picture.savefig(temporary, format="png")
