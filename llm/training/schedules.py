"""Learning-rate schedules as pure functions of progress, the share of the run that is done, 0 to 1.

Progress may be measured in steps, epochs or minutes; the shapes are the same. Warmup is read at the end of an
update and decay at its beginning, so that no update is wasted on a rate of zero: the first one gets its share
of the warmup, and the last one more than `final`.
"""

import math
from collections.abc import Callable

from llm.config import ScheduleConfig, TrainingConfig


def constant(progress: float, config: ScheduleConfig) -> float:
    """Always 1."""
    return 1.0


def cosine(progress: float, config: ScheduleConfig) -> float:
    """Half a cosine from 1 after the warmup to `final` at the end (Loshchilov & Hutter 2017, SGDR)."""
    share = min((progress - config.warmup) / max(1 - config.warmup, 1e-9), 1.0)
    return config.final + (1 - config.final) * (1 + math.cos(math.pi * share)) / 2


def warmup_stable_decay(progress: float, config: ScheduleConfig) -> float:
    """1, then linear decay to `final` over the last share `decay` of the run (Hu et al. 2024, MiniCPM)."""
    left = max(1 - progress, 0.0)
    return 1.0 if left >= config.decay else config.final + (1 - config.final) * left / config.decay


# By `schedule.name`: functions from progress (after the warmup) and the config to the factor on the rate.
SCHEDULES: dict[str, Callable[[float, ScheduleConfig], float]] = {
    "constant": constant,
    "cosine": cosine,
    "wsd": warmup_stable_decay,
}


def lr_factor(config: ScheduleConfig, begin: float, end: float) -> float:
    """The factor on the learning rate of the update that takes progress from `begin` to `end`: `end / warmup`
    during the warmup, then the schedule at `begin`. With 20 updates and warmup 0.2, the first four get 1/4,
    2/4, 3/4 and 1."""
    if end <= config.warmup:
        return end / config.warmup
    return SCHEDULES[config.name](max(begin, config.warmup), config)


def spent(training: TrainingConfig, steps: int, epoch: float, seconds: float) -> dict[str, float]:
    """The share of each limit that is set, by its key, spent after `steps` updates, `epoch` passes over the
    data and `seconds` of training."""
    shares = {}
    if training.max_steps is not None:
        shares["max_steps"] = steps / training.max_steps
    if training.max_epochs is not None:
        shares["max_epochs"] = epoch / training.max_epochs
    if training.max_minutes is not None:
        shares["max_minutes"] = seconds / (60 * training.max_minutes)
    return shares
