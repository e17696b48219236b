"""Scaling laws: how the loss falls with parameters, tokens and compute, fitted to runs of different sizes and
budgets.

Everything here is a function of numbers. Losses may be in any unit, such as bits per byte; their logarithms
are fitted, so that errors are shares of the loss.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np

DELTA = 1e-3  # of the Huber loss: larger residuals of the log count by their size, not their square
REPLICATES = 1000
LEVEL = 0.05  # of intervals: how often they miss
ITERATIONS = 60
LEAST_RUNGS = 3  # sizes, or budgets, that a law needs
WITH_FLOOR = 5  # settings that a law in one quantity needs to determine where it levels off
BOTH = 6  # settings that a law in parameters and tokens needs: more than it has constants
HELD_OUT = 0.25  # share of a ladder, its largest rungs, that forms are tried on
ALONE = 0.95  # correlation of two quantities' logarithms above which their effects cannot be separated
EXPONENTS = 0.01, 3.0
SAME = 1.01  # factor within which two sizes are one

Interval = tuple[float, float, float]  # a value, and the ends of its interval


@dataclass(frozen=True)
class Rung:
    """A setting of a ladder."""

    parameters: float
    tokens: float
    compute: float  # floating-point operations of training
    losses: tuple[float, ...]  # the final figure of each seed

    @property
    def loss(self) -> float:
        """Their geometric mean, as logarithms are fitted."""
        return math.exp(sum(map(math.log, self.losses)) / len(self.losses))


@dataclass(frozen=True)
class Form:
    """The form of a law: E plus a term coefficient / x^exponent for each quantity x; or a power of that
    sum."""

    formula: str
    source: str
    quantities: tuple[str, ...]  # of `Rung`
    symbols: tuple[tuple[str, str], ...]  # of each coefficient and exponent
    floor: bool = True  # whether E is fitted; else it is 0
    power: bool = False  # whether it is Kaplan's law in both quantities

    @property
    def constants(self) -> int:
        return int(self.floor) + 2 * len(self.quantities)


KAPLAN = "Kaplan et al. 2020, Scaling Laws for Neural Language Models"
HOFFMANN = "Hoffmann et al. 2022, Training Compute-Optimal Large Language Models, approach 3"
BOTH_QUANTITIES = "parameters", "tokens"
# More parameters help equally at any number of tokens, down to a floor.
SUM = Form("L = E + A / N^α + B / D^β", HOFFMANN, BOTH_QUANTITIES, (("A", "α"), ("B", "β")))
# More parameters help less if there are few tokens.
POWER = Form(
    "L = ((N_c / N)^(α_N / α_D) + D_c / D)^α_D",
    f"{KAPLAN}, equation 1.5",
    BOTH_QUANTITIES,
    (("N_c", "α_N"), ("D_c", "α_D")),
    floor=False,
    power=True,
)
_ALONE = {"parameters": ("N", "A", "α"), "tokens": ("D", "B", "β"), "compute": ("C", "K", "γ")}


def law_of(quantity: str, floor: bool) -> Form:
    """A power law in one quantity, with a floor or without."""
    letter, coefficient, exponent = _ALONE[quantity]
    formula = f"L = {'E + ' * floor}{coefficient} / {letter}^{exponent}"
    return Form(formula, KAPLAN, (quantity,), ((coefficient, exponent),), floor)


def form_for(rungs: Sequence[Rung]) -> Form | str:
    """The form of law that a ladder can determine; or a line that says why there is none.

    With at least three sizes and three budgets that vary independently, a law in both: of the two forms, the
    one that predicts the largest rungs better from the others. If both grow together, a law in compute; if
    only one of them varies, a law in that one.
    """
    sizes = distinct([rung.parameters for rung in rungs])
    budgets = distinct([rung.tokens for rung in rungs])
    floor = len(rungs) >= WITH_FLOOR
    there = f"{sizes} size{'s' * (sizes != 1)} and {budgets} budget{'s' * (budgets != 1)} of tokens"
    if min(sizes, budgets) >= LEAST_RUNGS:
        if len(rungs) < BOTH or abs(np.corrcoef(_logs(rungs, SUM).T)[0, 1]) > ALONE:
            return law_of("compute", floor)
        return min((SUM, POWER), key=lambda form: held_out(rungs, form))
    if sizes >= LEAST_RUNGS and budgets == 1:
        return law_of("parameters", floor)
    if budgets >= LEAST_RUNGS and sizes == 1:
        return law_of("tokens", floor)
    return (
        f"no scaling law can be fitted to {there}: it takes {LEAST_RUNGS} of one with the other the same, or "
        f"{LEAST_RUNGS} of each"
    )


def distinct(values: Sequence[float]) -> int:
    """How many values there are, counting those that differ by less than a hundredth as one."""
    count, last = 0, 0.0
    for value in sorted(values):
        if value > last * SAME:
            count, last = count + 1, value
    return count


@dataclass(frozen=True)
class Fit:
    """A fitted law, with bootstrap replicates of its constants."""

    form: Form
    rungs: tuple[Rung, ...]
    centre: np.ndarray  # mean log of each quantity, (quantities,)
    theta: np.ndarray  # (1, constants): log E, then of each term its log at the centre and its exponent
    replicates: np.ndarray  # (REPLICATES, constants)
    off: np.ndarray  # (REPLICATES,): standard deviation of log losses about the law, apart from seeds
    noise: float  # standard deviation of the log losses of seeds about their mean; 0 with a single seed
    rate: tuple[float, float]  # (g, log c): operations per token are c · N^g

    def losses(self, parameters: float, tokens: float, compute: float) -> np.ndarray:
        """The loss of a run by the law, then by each of its replicates: (1 + REPLICATES,)."""
        there = {"parameters": parameters, "tokens": tokens, "compute": compute}
        logs = np.log([[there[name] for name in self.form.quantities]]) - self.centre
        return np.exp(_log_losses(self._all, logs, self.form)[0][:, 0])

    def predict(self, parameters: float, tokens: float, compute: float) -> Interval:
        """The loss of a new run, with an interval that accounts for the uncertainty of the constants, the
        noise of its seed, and as much error beyond the ladder as there was within it (see `held_out`)."""
        losses, random = self.losses(parameters, tokens, compute), np.random.default_rng(1)
        spread = np.sqrt(self.off**2 + self.noise**2 + self.held_out**2)
        return _interval(losses[0], losses[1:] * np.exp(spread * random.standard_normal(len(spread))))

    @cached_property
    def constants(self) -> dict[str, Interval]:
        """The constants by symbol, with intervals; E first."""
        rows, first = self._all, int(self.form.floor)
        found = {"E": np.exp(rows[:, 0])} if self.form.floor else {}
        for number, (coefficient, exponent) in enumerate(self.form.symbols):
            log, power = rows[:, first + 2 * number], rows[:, first + 2 * number + 1]
            found[coefficient], found[exponent] = np.exp(log + power * self.centre[number]), power
        if self.form.power:
            (u, a, v, p), (n, d) = rows.T, self.centre
            with np.errstate(over="ignore"):  # if a law hardly falls with N, N_c may overflow
                found = {"N_c": np.exp(n + u / a), "α_N": a * p, "D_c": np.exp(d + v), "α_D": p}
        return {name: _interval(values[0], values[1:]) for name, values in found.items()}

    def optimum(self, compute: float) -> tuple[Interval, Interval] | None:
        """The parameters and tokens with the lowest loss for a given compute; None if the law does not
        separate them.

        With c · N^g operations per token, A / N^α + B / D^β is lowest where its derivative along C = c N^g D
        is 0: N^(α + gβ) = (αA / gβB) · (C/c)^β, as in Hoffmann et al. for g = 1 and c = 6. A power of such a
        sum is lowest where the sum is.
        """
        if len(self.form.quantities) < 2:
            return None
        (g, log_c), (log_a, alpha, log_b, beta) = self.rate, self._all.T[int(self.form.floor) :]
        if self.form.power:
            beta = np.ones_like(beta)
        log_a, log_b = log_a + alpha * self.centre[0], log_b + beta * self.centre[1]
        log_n = log_a - log_b + np.log(alpha / (g * beta)) + beta * (math.log(compute) - log_c)
        log_n = log_n / (alpha + g * beta)
        sizes, tokens = np.exp(log_n), np.exp(math.log(compute) - log_c - g * log_n)
        return _interval(sizes[0], sizes[1:]), _interval(tokens[0], tokens[1:])

    @cached_property
    def held_out(self) -> float:
        """How far off predictions of the ladder's largest rungs are; see the function `held_out`."""
        return held_out(self.rungs, self.form)

    @property
    def residual(self) -> float:
        """The root mean square error of the law at the rungs' mean losses, as a share."""
        said = [self.losses(rung.parameters, rung.tokens, rung.compute)[0] for rung in self.rungs]
        errors = np.log(said) - np.log([rung.loss for rung in self.rungs])
        return float(np.sqrt(np.mean(errors**2)))

    @property
    def _all(self) -> np.ndarray:
        return np.concatenate([self.theta, self.replicates])


def fit(rungs: Sequence[Rung], form: Form, seed: int = 0) -> Fit:
    """Fit a law to the mean loss of each rung, by the Huber loss of its logarithm (Hoffmann et al. 2022).

    For intervals, the law is fitted again to losses as they might have come out: the law's own, plus
    deviations of seeds resampled from those of all rungs (a bootstrap of residuals, Efron & Tibshirani 1993,
    "An Introduction to the Bootstrap", chapter 9), plus normal noise for the rungs' deviations from the law
    that seeds do not explain.

    Args:
        rungs: at least one more than the form has constants.
        seed: of the bootstrap.
    """
    theta, centre = _least(rungs, form)
    logs, means = _logs(rungs, form) - centre, np.log([rung.loss for rung in rungs])
    said = _log_losses(theta, logs, form)[0][0]
    freedom = len(rungs) - form.constants
    seeds, deviations = _deviations(rungs)
    noise = float(np.sqrt(np.mean(deviations**2))) if len(deviations) else 0.0
    excess = float(np.sum((said - means) ** 2)) / freedom - noise**2 * float(np.mean(1 / seeds))
    random = np.random.default_rng(seed)
    off = np.sqrt(max(0.0, excess) * freedom / random.chisquare(freedom, REPLICATES))
    drawn = said + off[:, None] * random.standard_normal((REPLICATES, len(rungs)))
    if len(deviations):
        for number, count in enumerate(seeds):
            drawn[:, number] += random.choice(deviations, (REPLICATES, int(count))).mean(axis=1)
    replicates, _ = _descend(np.repeat(theta, REPLICATES, axis=0), logs, drawn, form)
    sizes = np.log([rung.parameters for rung in rungs])
    rate = np.polyfit(sizes, np.log([rung.compute / rung.tokens for rung in rungs]), int(np.ptp(sizes) > 0))
    return Fit(form, tuple(rungs), centre, theta, replicates, off, noise, (float(rate[0]), float(rate[-1])))


def held_out(rungs: Sequence[Rung], form: Form) -> float:
    """The root mean square error, as a share, with which a law that is fitted to all but the largest rungs
    predicts these."""
    ordered = sorted(rungs, key=lambda rung: rung.compute)
    kept = len(ordered) - max(1, round(HELD_OUT * len(ordered)))
    theta, centre = _least(ordered[:kept], form)
    said = _log_losses(theta, _logs(ordered[kept:], form) - centre, form)[0][0]
    return float(np.sqrt(np.mean((said - np.log([rung.loss for rung in ordered[kept:]])) ** 2)))


def _least(rungs: Sequence[Rung], form: Form) -> tuple[np.ndarray, np.ndarray]:
    """The constants (1, constants) that fit best, relative to the centre (quantities,), and that centre."""
    logs, means = _logs(rungs, form), np.log([rung.loss for rung in rungs])
    centre, starts = logs.mean(axis=0), _starts(means, form)
    found, costs = _descend(starts, logs - centre, np.broadcast_to(means, (len(starts), len(means))), form)
    return found[[np.argmin(costs)]], centre


def _logs(rungs: Sequence[Rung], form: Form) -> np.ndarray:
    """The log quantities of rungs: (rungs, quantities)."""
    return np.log([[getattr(rung, name) for name in form.quantities] for rung in rungs])


def _deviations(rungs: Sequence[Rung]) -> tuple[np.ndarray, np.ndarray]:
    """The number of seeds of each rung; and, for rungs with several, the deviations of the seeds' log losses
    from their mean, scaled up to the size that they have about the true mean."""
    several = [np.log(rung.losses) for rung in rungs if len(rung.losses) > 1]
    apart = [(each - each.mean()) * math.sqrt(len(each) / (len(each) - 1)) for each in several]
    return np.array([len(rung.losses) for rung in rungs]), np.concatenate([np.empty(0), *apart])


def _interval(value: float, replicates: np.ndarray) -> Interval:
    low, high = np.quantile(replicates, [LEVEL / 2, 1 - LEVEL / 2])
    return float(value), float(low), float(high)


# Minimising the Huber loss


def _log_losses(theta: np.ndarray, logs: np.ndarray, form: Form) -> tuple[np.ndarray, np.ndarray]:
    """The log losses (laws, rungs) of laws (laws, constants) at log quantities (rungs, quantities) relative
    to the centre, and their derivatives by the constants (laws, rungs, constants)."""
    first = int(form.floor)
    exponents = theta[:, None, first + 1 :: 2]  # (laws, 1, quantities)
    if form.power:
        exponents = np.stack([exponents[..., 0], np.ones_like(exponents[..., 1])], axis=2)
    parts = theta[:, None, first::2] - exponents * logs
    if form.floor:
        parts = np.concatenate([np.repeat(theta[:, None, :1], len(logs), axis=1), parts], axis=2)
    highest = parts.max(axis=2, keepdims=True)
    shares = np.exp(parts - highest)
    total = shares.sum(axis=2, keepdims=True)
    shares /= total
    sums = (highest + np.log(total))[:, :, 0]
    slopes = np.empty((*sums.shape, theta.shape[1]))
    slopes[:, :, 0] = shares[:, :, 0]
    slopes[:, :, first::2] = shares[:, :, first:]
    slopes[:, :, first + 1 :: 2] = -shares[:, :, first:] * logs
    if form.power:
        slopes *= theta[:, None, 3:]
        slopes[:, :, 3] = sums
        sums = sums * theta[:, 3:]
    return sums, slopes


def _starts(means: np.ndarray, form: Form) -> np.ndarray:
    """A grid of constants to start from: (starts, constants). The loss is divided among the floor and the
    terms."""
    exponents, level, terms = (0.1, 0.3, 0.8), means.mean(), len(form.quantities)
    starts: list[list[float]] = []
    if form.power:
        for power in (0.03, 0.1, 0.3):
            term = level / power - math.log(2)
            starts += [[term, exponent, term, power] for exponent in (0.5, 1.0, 2.0)]
        return np.array(starts)
    for share in (0.05, 0.3, 0.6, 0.9) if form.floor else (0.0,):
        for powers in product(exponents, repeat=terms):
            term = level + math.log((1 - share) / terms)
            floor = [level + math.log(share)] if form.floor else []
            starts.append([*floor, *(value for power in powers for value in (term, power))])
    return np.array(starts)


def _descend(
    theta: np.ndarray, logs: np.ndarray, wanted: np.ndarray, form: Form
) -> tuple[np.ndarray, np.ndarray]:
    """The constants (fits, constants) at which the Huber loss of log losses wanted (fits, rungs) is lowest,
    and that loss (fits,). All fits at once, by the Levenberg–Marquardt method (Marquardt 1963) within bounds,
    with residuals reweighted in each iteration."""
    first, room = int(form.floor), 200.0 if form.power else 7.0
    low, high = np.full(theta.shape[1], wanted.min() - room), np.full(theta.shape[1], wanted.max() + room)
    low[first + 1 :: 2], high[first + 1 :: 2] = EXPONENTS
    if form.floor:
        high[0] = wanted.min()
    theta = np.clip(theta, low, high)
    said, slopes = _log_losses(theta, logs, form)
    cost, damping = _huber(said - wanted), np.full(len(theta), 1e-2)
    for _ in range(ITERATIONS):
        errors = said - wanted
        weights = 1 / np.maximum(np.abs(errors), DELTA)
        gradient = np.einsum("fr,frc->fc", weights * errors, slopes)
        stuck = ((theta <= low) & (gradient > 0)) | ((theta >= high) & (gradient < 0))
        free = slopes * ~stuck[:, None]
        curvature = np.einsum("fr,fra,frb->fab", weights, free, free)
        diagonal = np.einsum("faa->fa", curvature)
        diagonal *= 1 + damping[:, None]
        diagonal += 1e-12 * diagonal.max(axis=1, keepdims=True) + 1e-300  # so that none is 0
        tried = theta - np.linalg.solve(curvature, (gradient * ~stuck)[..., None])[..., 0]
        tried = np.clip(tried, low, high)
        tried_said, tried_slopes = _log_losses(tried, logs, form)
        tried_cost = _huber(tried_said - wanted)
        better = tried_cost < cost
        theta, said = np.where(better[:, None], tried, theta), np.where(better[:, None], tried_said, said)
        slopes = np.where(better[:, None, None], tried_slopes, slopes)
        cost = np.where(better, tried_cost, cost)
        damping = np.clip(np.where(better, damping / 4, damping * 4), 1e-9, 1e9)
    return theta, cost


def _huber(errors: np.ndarray) -> np.ndarray:
    """The Huber loss summed over rungs, in units of DELTA: half the square up to DELTA, linear beyond."""
    size = np.abs(errors)
    return np.where(size <= DELTA, size**2 / (2 * DELTA), size - DELTA / 2).sum(axis=1)
