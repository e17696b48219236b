"""A report's section about a ladder: its law, the best sizes by that law, and predictions of larger runs."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm.errors import UserError
from llm.files import as_typed
from llm.overrides import short_key
from llm.progress import format_count, format_times
from llm.sweeps.ladder import (
    BUDGETS,
    SIZES,
    Ladder,
    Prediction,
    is_ladder,
    ladder_of,
    others_varied,
)
from llm.sweeps.ranking import Ranking
from llm.sweeps.scaling import Interval, Rung

TIMES = 1, 2, 4, 10  # multiples of the largest job's compute for which the best sizes are given
CURVE = 40  # points of a curve


@dataclass(frozen=True)
class Scaling:
    """A ladder with predictions of larger runs; or the reason why it has no law."""

    ladder: Ladder | str
    predictions: list[Prediction]

    def lines(self) -> Iterator[tuple[str, str]]:
        """The lines to print, each with its head."""
        if isinstance(self.ladder, str):
            yield "scaling", self.ladder
            return
        yield "scaling", about(self.ladder)
        for each in self.predictions:
            yield "prediction", predicted_in_words(each, self.ladder.measure.unit)
            if each.off is not None:
                yield "outcome", outcome_in_words(each, self.ladder.measure.unit)
            elif each.command:
                yield "command", each.command

    def as_record(self) -> dict[str, Any]:
        """The content of `scaling.json`."""
        if isinstance(self.ladder, str):
            return {"law": None, "why": self.ladder}
        fit = self.ladder.fit
        return {
            "law": fit.form.formula,
            "source": fit.form.source,
            "measure": self.ladder.measure.name,
            "constants": fit.constants,
            "residual": fit.residual,
            "held_out": fit.held_out,
            "noise": fit.noise,
            "rungs": [asdict(rung) for rung in fit.rungs],
            "optimum": [
                {"times": times, "compute": compute, "parameters": sizes, "tokens": tokens}
                for times, compute, sizes, tokens in _optima(self.ladder)
            ],
            "predictions": [
                {
                    "times": each.times,
                    "parameters": each.size.parameters,
                    "tokens": each.size.tokens,
                    "compute": each.size.compute,
                    "epochs": each.epochs,
                    "loss": each.loss,
                    "command": each.command,
                    "folder": str(as_typed(each.folder)),
                    "outcome": each.outcome,
                    "off": each.off,
                    "off_in_intervals": each.off_in_intervals,
                }
                for each in self.predictions
            ],
        }


def scaling_of(rankings: list[Ranking], folder: Path, times: float | None = None) -> Scaling | None:
    """The scaling of a sweep; None if it is no ladder.

    Args:
        folder: the sweep's folder.
        times: predict a run with this many times the compute of the largest job. Larger runs that lie beside
            the sweep are always included.

    Raises:
        UserError: a prediction was asked for, and there is no law to predict by.
    """
    several = len(rankings) > 1
    if several or not is_ladder(rankings[0]):
        if times is not None:
            raise UserError(f"predict={times:g}: {folder} is no ladder: {_why_not(rankings)}")
        return None
    ladder = ladder_of(rankings[0], folder)
    if isinstance(ladder, str):
        if times is not None:
            raise UserError(f"predict={times:g}: {ladder}")
        return Scaling(ladder, [])
    predictions = [*ladder.outcomes()]
    if times is not None:
        asked = ladder.predicted(times)
        predictions = [each for each in predictions if each.folder != asked.folder] + [asked]
    return Scaling(ladder, sorted(predictions, key=lambda each: each.size.compute))


def _why_not(rankings: list[Ranking]) -> str:
    if len(rankings) > 1:
        return "its jobs were evaluated on different texts"
    others = [short_key(key) for key in others_varied(rankings[0])]
    if others:
        return f"{', '.join(others)} var{'y' if len(others) > 1 else 'ies'} too, besides sizes and budgets"
    return f"nothing varies of {', '.join(map(short_key, (*SIZES[1:], *BUDGETS)))}"


# In words


def about(ladder: Ladder) -> str:
    """The law in a line."""
    fit = ladder.fit
    constants = ", ".join(f"{name} {_number(value[0])}" for name, value in fit.constants.items())
    return (
        f"{fit.form.formula}: {constants} ({fit.form.source}); {len(fit.rungs)} settings, off by "
        f"{fit.residual:.2%}; the largest, told from the others, by {fit.held_out:.2%}"
    )


def predicted_in_words(each: Prediction, unit: str) -> str:
    value, low, high = each.loss
    size = f"{each.size.title}, {format_count(each.size.parameters)} parameters"
    if each.epochs > max(1.0, each.epochs_known):
        size += (
            f", {each.epochs:.1f} epochs where the ladder trained for at most {each.epochs_known:.1f};"
            " repeated text counts for less, Muennighoff et al. 2023"
        )
    loss = f"{value:.3f} {unit}, 95 % interval {low:.3f} to {high:.3f}"
    return f"{format_times(each.times)} times the compute ({size}): {loss}"


def outcome_in_words(each: Prediction, unit: str) -> str:
    assert each.outcome is not None
    assert each.off is not None
    assert each.off_in_intervals is not None
    inside = "within" if abs(each.off_in_intervals) <= 1 else "outside"
    return (
        f"{each.outcome:.3f} {unit}: {each.off:+.3f} off the prediction, {abs(each.off_in_intervals):.2f} "
        f"times what its interval reaches, so {inside} it"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= value < 1e6 else f"{value:.3g}"


def _spread(interval: Interval, form: Any = _number) -> str:
    value, low, high = map(form, interval)
    return f"{value} ({low} to {high})"


def _optima(ladder: Ladder) -> Iterator[tuple[float, float, Interval, Interval]]:
    """For each of TIMES: the factor, the compute, and the best numbers of parameters and tokens."""
    for times in TIMES:
        compute = times * ladder.size.compute
        if best := ladder.fit.optimum(compute):
            yield times, compute, *best


# For the page


def scaling_section(scaling: Scaling) -> dict[str, Any]:
    """The section's content, as texts and points."""
    ladder = scaling.ladder
    if isinstance(ladder, str):
        return {"why": ladder}
    fit, unit = ladder.fit, ladder.measure.unit
    rows = [
        [
            f"{format_times(each.times)}×",
            each.size.title,
            format_count(each.size.parameters),
            format_count(each.size.tokens),
            _spread(each.loss, "{:.3f}".format),
            "–" if each.outcome is None else f"{each.outcome:.3f}",
            "–" if each.off is None else f"{each.off:+.3f}",
            "–" if each.off_in_intervals is None else f"{abs(each.off_in_intervals):.2f}",
        ]
        for each in scaling.predictions
    ]
    return {
        "law": f"{fit.form.formula}, L in {unit}, {QUANTITIES} ({fit.form.source})",
        "residual": f"{fit.residual:.2%}",
        "held_out": f"{fit.held_out:.2%}",
        "constants": [[name, *map(_number, value)] for name, value in fit.constants.items()],
        "optima": [
            [f"{times:g}×", f"{compute:.2g}", _spread(sizes, format_count), _spread(tokens, format_count)]
            for times, compute, sizes, tokens in _optima(ladder)
        ],
        "predictions": rows,
        "commands": [each.command for each in scaling.predictions if each.command and each.outcome is None],
        "unit": unit,
        "points": [[rung.compute, rung.loss] for rung in fit.rungs],
        "curves": [curve.tolist() for curve in curves(ladder)],
        "beyond": [[each.size.compute, *each.loss, each.outcome] for each in scaling.predictions],
    }


QUANTITIES = "N parameters, D tokens, C floating-point operations"


def curves(ladder: Ladder) -> Iterator[np.ndarray]:
    """Curves of the law over compute, as points (CURVE, 2): one for each size with several budgets; or, if
    there is no such size, a single one from the smallest size to the largest."""
    by_size: dict[float, list[Rung]] = {}
    ordered = sorted(ladder.fit.rungs, key=lambda each: each.compute)
    for rung in ordered:
        by_size.setdefault(rung.parameters, []).append(rung)
    several = [by_size[size] for size in sorted(by_size) if len(by_size[size]) > 1]
    for first, *_, last in several or [ordered]:
        places = [
            np.geomspace(getattr(first, name), getattr(last, name), CURVE)
            for name in ("parameters", "tokens", "compute")
        ]
        yield np.array([(at[2], ladder.fit.losses(*at)[0]) for at in zip(*places, strict=True)])
