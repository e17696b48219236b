"""Plots of a run's loss curves, and of next-token probabilities."""

import math
from pathlib import Path

from llm.files import replacing
from llm.records import Record, read_lines

TRAIN_COLOUR, VALIDATION_COLOUR = "#1f6fb4", "#d1495b"
# The model's own distribution, then each stage of sampling.
STAGE_COLOURS = [
    "#9aa5b1",
    "#1f6fb4",
    "#edae49",
    "#d1495b",
    "#3a7d44",
    "#6c4f9c",
]


def plot_losses(run_dir: Path) -> Path:
    """Draw `loss.png`: training and validation loss over epochs, and over tokens seen on a second axis."""
    from matplotlib.figure import Figure  # not pyplot, which would change a notebook's backend
    from matplotlib.ticker import EngFormatter, MaxNLocator

    lines = read_lines(run_dir / "metrics.jsonl")
    steps = [line for line in lines if "train/loss" in line]
    evaluations = [line for line in lines if "val/loss" in line]
    figure = Figure(figsize=(8, 5), dpi=150)
    axes = figure.subplots()
    axes.plot(
        _column(steps, "epoch"),
        _column(steps, "train/loss"),
        color=TRAIN_COLOUR,
        alpha=0.25,
        linewidth=1,
        label="training, each update",
    )
    for name, label, colour in (
        ("eval/train_loss", "training, evaluated", TRAIN_COLOUR),
        ("val/loss", "validation", VALIDATION_COLOUR),
    ):
        axes.plot(
            _column(evaluations, "epoch"),
            _column(evaluations, name),
            color=colour,
            linewidth=2,
            marker="o",
            markersize=4,
            label=label,
        )
    axes.set_xlabel("Epochs")
    axes.set_ylabel("Loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.spines["right"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8))
    axes.legend(frameon=False, loc="upper right")  # loc="best" can be slow
    last = steps[-1] if steps else {}
    if last.get("epoch") and last.get("tokens_seen"):
        tokens_per_epoch = last["tokens_seen"] / last["epoch"]
        tokens = axes.secondary_xaxis(
            "top", functions=(lambda epoch: epoch * tokens_per_epoch, lambda seen: seen / tokens_per_epoch)
        )
        tokens.set_xlabel("Tokens seen")
        tokens.xaxis.set_major_locator(MaxNLocator(nbins=8))
        tokens.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.tight_layout()
    path = run_dir / "loss.png"
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    return path


def _column(lines: list[Record], name: str) -> list[float]:
    """The values of a column; a missing one is NaN, a gap in the curve."""
    return [math.nan if (value := line.get(name)) is None else value for line in lines]


def plot_next_token(path: Path, tokens: list[str], stages: dict[str, list[float]], text: str) -> Path:
    """Draw how likely each of `tokens` is to come next after `text`, with one bar per stage of sampling: the
    book's bar chart (chapter 5.3.1)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6, 0.55 * len(tokens) + 1.5), 4.8), dpi=150)
    axes = figure.subplots()
    width = 0.8 / len(stages)
    for number, (stage, probabilities) in enumerate(stages.items()):
        centres = [place + (number - (len(stages) - 1) / 2) * width for place in range(len(tokens))]
        axes.bar(centres, probabilities, width, color=STAGE_COLOURS[number % len(STAGE_COLOURS)], label=stage)
    labels = [repr(token).replace("$", r"\$") for token in tokens]
    axes.set_xticks(range(len(tokens)), labels, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.6, len(tokens) - 0.4)
    axes.set_ylabel("Probability")
    axes.yaxis.set_major_formatter("{x:.0%}")
    shown = text if len(text) <= 60 else "…" + text[-60:]
    axes.set_title("Next token after " + repr(shown).replace("$", r"\$"), loc="left", fontsize=10)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")  # loc="best" can be slow
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    return path
