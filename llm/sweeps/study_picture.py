"""A study of samples as a picture: heatmaps or curves of its main measures."""

import math
from pathlib import Path

from llm.files import replacing
from llm.overrides import title_of
from llm.sweeps.jobs import Job
from llm.sweeps.pictures import BLUE, draw_heatmap, label
from llm.sweeps.ranking import grid_of, values_of
from llm.sweeps.study import MAIN_METRICS, METRICS, axes_of, figure, metric_cells, subject_of


def draw_study(jobs: list[Job], path: Path) -> None:
    """Heatmaps over two swept keys, at the first value of any others, or curves over the only one."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    settings = [job.setting for job in jobs]
    down, along, others = axes_of(jobs)
    fixed = {key: values_of(settings, key)[0] for key in others}
    grid = grid_of(settings, down, along, fixed)
    height = 2.8 + 0.8 * len(grid.rows) if down else 5
    picture = Figure(figsize=(max(9, 1.5 + 2.2 * len(grid.columns)), height), dpi=150)
    for axes, metric in zip(picture.subplots(2, 3).flat, MAIN_METRICS, strict=True):
        if down:
            draw_heatmap(axes, grid, metric_cells(jobs, metric))
        else:
            values = [None if number is None else figure(jobs[number], metric) for number in grid.cells[0]]
            axes.plot([math.nan if value is None else value for value in values], "o-", color=BLUE)
            axes.set_xticks(range(len(values)), map(label, grid.columns))
            axes.set_xlabel(label(grid.along))
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
            if METRICS[metric][1].endswith("%}"):
                axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        axes.set_title(METRICS[metric][0], fontsize=10, loc="left")
    slice_shown = f"\nonly {label(title_of(fixed), 90)} is shown" if fixed else ""
    picture.suptitle(f"Sampling study\n{label(subject_of(jobs), 90)}{slice_shown}", fontsize=10)
    picture.tight_layout()
    with replacing(path) as temporary:
        picture.savefig(temporary, format="png")
