"""Optuna's search: which jobs to try next. Imported only if a sweep is a search."""

from dataclasses import dataclass
from typing import Any

import optuna
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from llm.errors import UserError
from llm.overrides import split_override
from llm.records import read_lines
from llm.sweeps.comparing import LOSS, Measure, comparisons
from llm.sweeps.jobs import Job

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class Search:
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011). What it tries next is a function of
    the seed and the jobs so far."""

    distributions: dict[str, BaseDistribution]  # by searched key
    seed: int
    n_startup_trials: int  # drawn at random before the estimator chooses

    def example(self) -> list[str]:
        """Example overrides of the searched keys, to check whether their types fit."""
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(self.seed))
        return self._as_overrides(study.ask(self.distributions).params)

    def suggest(self, jobs: list[Job], count: int) -> list[list[str]]:
        """Overrides of the searched keys for `count` more jobs, chosen together.

        Raises:
            UserError: the jobs so far were evaluated on different texts, so that none is the best.
        """
        compared = comparisons(jobs)
        if len(compared) > 1:
            raise UserError(
                f"the jobs of this search were evaluated on {' and '.join(each.title for each in compared)}, "
                f"which do not compare: search no key of the data, and set training.final_eval=full"
            )
        measure = compared[0].measure if compared else LOSS
        sampler = optuna.samplers.TPESampler(
            seed=self.seed + len(jobs), n_startup_trials=self.n_startup_trials
        )
        study = optuna.create_study(sampler=sampler)
        for job in jobs:
            study.add_trial(self._as_trial(job, measure))
        trials = [study.ask(self.distributions) for _ in range(count)]
        return [self._as_overrides(trial.params) for trial in trials]

    def _as_trial(self, job: Job, measure: Measure) -> optuna.trial.FrozenTrial:
        """A job as a trial of Optuna's. A failed one counts as if it had been stopped before its first
        evaluation; an interrupted one says nothing yet."""
        given = dict(split_override(override) for override in job.overrides)
        params = {key: _as_number(given[key], kind) for key, kind in self.distributions.items()}
        if (final := job.final(measure.name)) is not None:
            return optuna.trial.create_trial(value=final, params=params, distributions=self.distributions)
        ended = job.state in ("finished", "stopped", "failed")
        best = _best_so_far(job, measure) if ended else None
        return optuna.trial.create_trial(
            state=optuna.trial.TrialState.PRUNED if ended else optuna.trial.TrialState.FAIL,
            params=params,
            distributions=self.distributions,
            intermediate_values={} if best is None else {job.summary["steps"]: best},
        )

    def _as_overrides(self, params: dict[str, Any]) -> list[str]:
        """Overrides for parameters, with floats rounded to four digits, so that names stay readable."""
        for key, bounds in self.distributions.items():
            if isinstance(bounds, FloatDistribution):
                params[key] = min(max(float(f"{params[key]:.4g}"), bounds.low), bounds.high)
        return [f"{key}={value}" for key, value in params.items()]


def _best_so_far(job: Job, measure: Measure) -> float | None:
    """The best value among a job's evaluations so far."""
    if measure == LOSS:
        return job.summary.get("best_val_loss")
    lines = read_lines(job.folder / "metrics.jsonl")
    return min((value for line in lines if (value := line.get(measure.line)) is not None), default=None)


def as_distribution(override: Override) -> BaseDistribution:
    """Optuna's distribution for a sweep in Hydra's grammar."""
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        low, high, log = sweep.start, sweep.end, "log" in sweep.tags
        assert low is not None  # Hydra's parser asks for both
        assert high is not None
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=log)
        return FloatDistribution(low, high, log=log)
    if isinstance(sweep, RangeSweep) and isinstance(sweep.start, int) and isinstance(sweep.step, int):
        values = range(sweep.start, int(sweep.stop or 0), sweep.step)
        return IntDistribution(values[0], values[-1], step=sweep.step)
    return CategoricalDistribution(list(override.sweep_string_iterator()))


def _as_number(value: str, distribution: BaseDistribution) -> Any:
    match distribution:
        case FloatDistribution():
            return float(value)
        case IntDistribution():
            return int(value)
    return value
