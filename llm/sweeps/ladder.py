"""Ladders: sweeps over sizes and budgets, the law of their losses, and larger runs that it is tried on."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from statistics import mean
from typing import Any

from llm.checkpoints.checkpoint import recorded_config
from llm.config import ModelConfig, PretrainConfig
from llm.config_values import value_of
from llm.files import as_typed
from llm.model.gpt import at_width, parameters_of, training_flops_per_token, without_weights
from llm.overrides import as_override
from llm.records import lines_from_end
from llm.run_folder import holds_run, read_summary
from llm.sweeps.commands import LIMITS, command_again
from llm.sweeps.comparing import BITS_PER_BYTE, LOSS, Measure
from llm.sweeps.jobs import Job
from llm.sweeps.ranking import Ranking, settings_of, varied_keys
from llm.sweeps.scaling import Fit, Interval, Rung, distinct, fit, form_for

# What a ladder varies, besides the seed: sizes and budgets.
SIZES = (
    "model",
    *(f"model.{name}" for name in ("emb_dim", "n_heads", "n_kv_heads", "n_layers", "hidden_dim")),
)
BUDGETS = ("data.batch_size", "training.accumulate", *(f"training.{limit}" for limit in LIMITS))
WIDTHS = ("emb_dim", "n_heads", "n_kv_heads", "hidden_dim")  # what grows with the width
WIDEST = 8  # times as wide as the largest job, up to where a larger model is looked for
LAST_LINES = 10_000  # bytes at the end of metrics that hold whole lines


@dataclass(frozen=True)
class Size:
    """How large a run is, or will be."""

    model: ModelConfig
    parameters: int
    steps: int
    tokens: float
    compute: float  # floating-point operations of training

    @property
    def title(self) -> str:
        return f"{self.model.n_layers} layers, width {self.model.emb_dim}, {self.steps:,} updates"


@dataclass(frozen=True)
class Prediction:
    """What a run larger than all of a ladder should come to, and what it came to, if there is one."""

    times: float  # the compute of the ladder's largest job
    size: Size
    epochs: float  # fractions included
    epochs_known: float  # those of the ladder's largest job
    loss: Interval
    folder: Path  # where the run is, or is to be
    command: str | None  # that trains or resumes it
    outcome: float | None = None

    @property
    def off(self) -> float | None:
        """How far the outcome is from the prediction."""
        return None if self.outcome is None else self.outcome - self.loss[0]

    @property
    def off_in_intervals(self) -> float | None:
        """The same in units of the interval's half towards the outcome: within 1, it is in the interval."""
        value, low, high = self.loss
        return None if self.off is None else self.off / (high - value if self.off > 0 else value - low)


@dataclass(frozen=True)
class Ladder:
    """A sweep over sizes and budgets, with the law of its losses."""

    fit: Fit
    measure: Measure
    largest: Job
    size: Size  # of the largest job
    folder: Path  # of the sweep; larger runs are beside it

    def predicted(self, times: float) -> Prediction:
        """A run of about so many times the compute of the largest job: of the widths that heads of its size
        allow and of the updates, neither fewer than it has, those whose loss the law says is lowest. Where it
        does not say, budgets grow as they do in the ladder. The depth stays."""
        found = [*self._candidates(times)]
        if self.fit.optimum(self.size.compute):
            size = min(found, key=lambda each: self.fit.losses(each.parameters, each.tokens, each.compute)[0])
        else:
            grown = times ** self._growth()
            size = min(found, key=lambda each: abs(math.log(each.parameters / self.size.parameters / grown)))
        folder = self.folder.with_name(f"{self.folder.name}-times-{times:g}")
        return self._prediction(times, size, folder)

    def outcomes(self) -> Iterator[Prediction]:
        """The larger runs beside the sweep that have finished, on the same text, with what was predicted."""
        for folder in sorted(self.folder.parent.glob(f"{escape(self.folder.name)}-times-*")):
            job = Job(folder, folder.name, [], {}, read_summary(folder))
            same_text = (job.evaluated_on, job.part) == (self.largest.evaluated_on, self.largest.part)
            size = size_of(job)
            if size and same_text and job.final(self.measure.name) is not None:
                yield self._prediction(size.compute / self.size.compute, size, folder)

    def _prediction(self, times: float, size: Size, folder: Path) -> Prediction:
        loss = self.fit.predict(size.parameters, size.tokens, size.compute)
        outcome = Job(folder, "", [], {}, read_summary(folder)).final(self.measure.name)
        known = _epochs(self.largest.folder)
        epochs = known * size.tokens / self.size.tokens
        return Prediction(times, size, epochs, known, loss, folder, self._command(size, folder), outcome)

    def _candidates(self, times: float) -> Iterator[Size]:
        model, size = self.size.model, self.size
        a_step = size.tokens / size.steps
        width_step = model.head_dim * model.n_heads // model.kv_heads
        for width in range(model.emb_dim, WIDEST * model.emb_dim + 1, width_step):
            wider = at_width(model, width)
            parameters, flops = measured(wider)
            steps = round(times * size.compute / (flops * a_step))
            if "tokens" not in self._varied():
                steps = size.steps
            if steps < size.steps:
                return
            yield Size(wider, parameters, steps, steps * a_step, flops * steps * a_step)
            if "parameters" not in self._varied():
                return

    def _varied(self) -> list[str]:
        names = ("parameters", "tokens")
        return [name for name in names if distinct([getattr(rung, name) for rung in self.fit.rungs]) > 1]

    def _growth(self) -> float:
        """The power of compute that parameters grow with in the ladder."""
        logs = [(math.log(rung.compute), math.log(rung.parameters)) for rung in self.fit.rungs]
        (low, small), (high, large) = min(logs), max(logs)
        return (large - small) / (high - low)

    def _command(self, size: Size, folder: Path) -> str | None:
        if holds_run(folder):
            resumed = as_override("resume", as_typed(folder))
            return command_again("pretrain", PretrainConfig, Job(folder, "", []), resumed)
        changed = {"training.max_steps": size.steps}
        changed |= {
            f"model.{name}": getattr(size.model, name) for name in WIDTHS if getattr(size.model, name)
        }
        changed = {key: value for key, value in changed.items() if value != self._recorded(key)}
        others = [f"training.{limit}" for limit in LIMITS if limit != "max_steps"]
        return command_again(
            "pretrain",
            PretrainConfig,
            self.largest,
            *(f"{key}={value}" for key, value in changed.items()),
            *(f"{key}=null" for key in others if self._recorded(key) is not None),
            as_override("hydra.run.dir", as_typed(folder)),
        )

    def _recorded(self, key: str) -> Any:
        config = recorded_config(self.largest.folder)
        return config and value_of(config, key)


def is_ladder(ranking: Ranking) -> bool:
    """Whether sizes and budgets are all that varies between settings."""
    return bool(_varied(ranking)) and not others_varied(ranking)


def others_varied(ranking: Ranking) -> list[str]:
    """The keys that vary and have to be the same in a ladder."""
    return [key for key in _varied(ranking) if key not in (*SIZES, *BUDGETS)]


def _varied(ranking: Ranking) -> list[str]:
    return [key for key in varied_keys(settings_of(ranking.results)) if key != "seed"]


def ladder_of(ranking: Ranking, folder: Path) -> Ladder | str:
    """The law of a ladder's losses, in bits per byte where they are known; or in a line why there is none.

    What a job has not finished, or did not record, does not count.
    """
    results = [result for result in ranking.results if result.final is not None]
    measured = all(result.job.final(BITS_PER_BYTE.name) is not None for result in results)
    measure = BITS_PER_BYTE if measured else ranking.of.measure
    rungs: list[tuple[Rung, Job, Size]] = []
    for group in ranking.groups:
        sized = [(result.job, size) for result in group if (size := size_of(result.job))]
        found = [(job, size, job.final(measure.name)) for job, size in sized]
        losses = tuple(loss for _, _, loss in found if loss is not None and loss > 0)
        if losses:
            job, size, _ = found[0]
            tokens, compute = (
                mean(getattr(each, name) for _, each in sized) for name in ("tokens", "compute")
            )
            rungs.append((Rung(size.parameters, tokens, compute, losses), job, size))
    form = form_for([rung for rung, _, _ in rungs])
    if isinstance(form, str):
        return form
    _, largest, size = max(rungs, key=lambda each: each[0].compute)
    return Ladder(fit([rung for rung, _, _ in rungs], form), measure, largest, size, folder)


def size_of(job: Job) -> Size | None:
    """How large a finished run was; None if it did not finish, or its records do not say."""
    config = recorded_config(job.folder)
    steps, tokens = (job.summary.get(name) for name in ("steps", "tokens_seen"))
    if config is None or not steps or not tokens or job.final(LOSS.name) is None:
        return None
    parameters, flops = measured(config.model)
    return Size(config.model, parameters, steps, tokens, flops * tokens)


def measured(config: ModelConfig) -> tuple[int, int]:
    """The parameters of a model that is not made, and the operations of training it on a token."""
    one, two = (training_flops_per_token(without_weights(replace(config, n_layers=n))) for n in (1, 2))
    return parameters_of(config), one + (config.n_layers - 1) * (two - one)


def _epochs(run_dir: Path) -> float:
    """The epochs that a run has trained for; 0 if its metrics do not say."""
    lines = lines_from_end(run_dir / "metrics.jsonl", LAST_LINES)
    return next((line["epoch"] for line in lines if line.get("epoch")), 0.0)
