"""Learning-rate schedules as pure functions of progress, the share of the run that is done, 0 to 1.

Progress may be measured in steps, epochs or minutes; the shapes are the same.
"""

import math

from llm.config import ScheduleConfig, TrainingConfig


def lr_factor(config: ScheduleConfig, progress: float) -> float:
    """The factor on the learning rate at `progress`: linear warmup from 0, then the schedule."""
    if progress < config.warmup:
        return progress / config.warmup
    match config.name:
        case "constant":
            return 1.0
        case "cosine":
            return cosine(progress, config.warmup, config.final)
        case "wsd":
            return warmup_stable_decay(progress, config.decay, config.final)
    raise AssertionError(config.name)


def cosine(progress: float, warmup: float, final: float) -> float:
    """Half a cosine from 1 at `warmup` to `final` at the end (Loshchilov & Hutter 2017, SGDR)."""
    share = min((progress - warmup) / max(1 - warmup, 1e-9), 1.0)
    return final + (1 - final) * (1 + math.cos(math.pi * share)) / 2


def warmup_stable_decay(progress: float, decay: float, final: float) -> float:
    """1, then linear decay to `final` over the last share `decay` of the run (Hu et al. 2024, MiniCPM)."""
    left = max(1 - progress, 0.0)
    return 1.0 if left >= decay else final + (1 - final) * left / decay


def spent(training: TrainingConfig, steps: int, epoch: float, seconds: float) -> dict[str, float]:
    """For each limit that is set, by its key: the share of it spent after `steps` updates, `epoch` passes
    over the data and `seconds` of training."""
    shares = {}
    if training.max_steps is not None:
        shares["max_steps"] = steps / training.max_steps
    if training.max_epochs is not None:
        shares["max_epochs"] = epoch / training.max_epochs
    if training.max_minutes is not None:
        shares["max_minutes"] = seconds / (60 * training.max_minutes)
    return shares
