"""How large an update of a new run is, and into how many micro-batches it is divided, if that is left to the
device: with `data.batch_size=auto`, and on a CUDA GPU if the user did not set it.

The keys' defaults, and the values in `conf/scale/`, are meant for CPUs.
"""

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from llm.config import AUTO, PretrainConfig
from llm.config_values import value_of
from llm.device import Device
from llm.errors import UserError
from llm.model.gpt import parameters_of, training_flops_per_token, without_weights
from llm.training.memory import largest_that_fits

# Keys that may be chosen for a device. They are recorded, so that a run is resumed and repeated with the
# same.
DEVICE_KEYS = ("data.batch_size", "training.accumulate", "training.eval_freq")

# An update of 124M parameters takes 32,768 tokens: with these, half of an H100's peak was measured. Tokens
# grow with the root of the model's size, as larger models need larger batches. So the default model, a
# hundredth of that size, keeps the batch for which its learning rate was tuned. Rates stay the same: one that
# is low enough for small batches is low enough for large ones, whose gradients are less noisy.
TOKENS, OF_PARAMETERS = 32_768, 124e6
LARGEST_SHARE_OF_TEXT = 1 / 32  # of the training split that one update may take

# Updates are faster than on a CPU, so `eval_freq` is multiplied by 10; or by 40 if an update takes fewer than
# SMALL_FLOPS, as an H200 makes some thirty updates of the default model in the time of one evaluation.
FEWER_EVALUATIONS, FEWER_OF_SMALL, SMALL_FLOPS = 10, 40, 1e11
LEAST_EVALUATIONS = 40  # of a run limited by steps or epochs, unless it would have fewer on a CPU


def update_tokens(config: PretrainConfig) -> int:
    """Tokens of one update."""
    return config.training.accumulate * config.data.batch_size * config.model.context_length


def chosen_for_device(
    config: PretrainConfig, undecided: Collection[str], device: Device, precision: str, training_tokens: int
) -> dict[str, int]:
    """Values of config keys that suit a run's device better than those in the config. How large an update is
    does not depend on the device's memory; into how many micro-batches it is divided does.

    Args:
        undecided: those of `DEVICE_KEYS` that the user did not set.
        training_tokens: size of the training split.

    Raises:
        UserError: `training.update_tokens` cannot be divided evenly.
    """
    undecided = _open_to(device.kind, undecided)
    found = {}
    if _leaves_size_open(config, undecided):
        accumulate = None if "training.accumulate" in undecided else config.training.accumulate
        windows = _windows(config, accumulate or 1, training_tokens)
        rows = windows // (accumulate or 1)
        divisors = [each for each in range(rows, 0, -1) if rows % each == 0]
        fitting = largest_that_fits(divisors, _as_accumulating(config), precision, device)
        found = {
            "data.batch_size": fitting * config.runtime.processes,
            "training.accumulate": accumulate or rows // fitting,
        }
    frequency = config.training.eval_freq
    if "training.eval_freq" in undecided and frequency is not None:
        training, tokens = config.training, update_tokens(with_chosen(config, found))
        flops = tokens * training_flops_per_token(without_weights(config.model))
        epochs = math.inf if training.max_epochs is None else training.max_epochs
        steps = min(training.max_steps or math.inf, epochs * training_tokens / tokens)
        fewer = frequency * (FEWER_OF_SMALL if flops < SMALL_FLOPS else FEWER_EVALUATIONS)
        found["training.eval_freq"] = int(min(fewer, max(frequency, steps / LEAST_EVALUATIONS)))
    return {key: value for key, value in found.items() if value != value_of(config, key)}


def refuse_uneven(config: PretrainConfig, undecided: Collection[str], kind: str) -> None:
    """Check that the sizes in a config fit together, unless they are left to a device of this kind.

    Raises:
        UserError: a batch cannot be divided evenly among the processes, or an update does not have
            `training.update_tokens`.
    """
    if _leaves_size_open(config, _open_to(kind, undecided)):
        return
    size, processes = config.data.batch_size, config.runtime.processes
    if size % processes:
        raise UserError(
            f"data.batch_size={size} cannot be divided evenly among runtime.processes={processes}: make it a "
            f"multiple of {processes}"
        )
    wanted, tokens = config.training.update_tokens, update_tokens(config)
    if wanted is not None and wanted != tokens:
        raise UserError(
            f"training.update_tokens={wanted}: data.batch_size={size} × training.accumulate="
            f"{config.training.accumulate} × model.context_length={config.model.context_length} is {tokens}; "
            f"set data.batch_size={AUTO}, or remove it"
        )


def _open_to(kind: str, undecided: Collection[str]) -> set[str]:
    """The undecided keys that a device of this kind may decide."""
    # Other devices decide nothing by themselves, but with data.batch_size=auto also the accumulation.
    return {*undecided} if kind == "cuda" else {*undecided} & {"training.accumulate"}


def _leaves_size_open(config: PretrainConfig, undecided: set[str]) -> bool:
    return config.data.batch_size == AUTO or {"data.batch_size", "training.accumulate"} <= undecided


def _as_accumulating(config: PretrainConfig) -> PretrainConfig:
    """The config with several micro-batches, so that gradients of an earlier one are counted as memory."""
    return replace(config, training=replace(config.training, accumulate=2))


def _windows(config: PretrainConfig, accumulate: int, training_tokens: int) -> int:
    """Windows that one process takes in an update.

    Raises:
        UserError: `training.update_tokens` cannot be divided evenly.
    """
    context, processes, wanted = (
        config.model.context_length,
        config.runtime.processes,
        config.training.update_tokens,
    )
    if wanted is not None:
        if wanted % (each := context * processes * accumulate):
            raise UserError(
                f"training.update_tokens={wanted}: make it a multiple of {each}, the product of "
                f"model.context_length={context}, runtime.processes={processes} and "
                f"training.accumulate={accumulate}"
            )
        return wanted // (context * processes)
    parameters = parameters_of(config.model)
    tokens = min(TOKENS * math.sqrt(parameters / OF_PARAMETERS), LARGEST_SHARE_OF_TEXT * training_tokens)
    windows = _power_of_two(tokens / context)
    if config.data.batch_size != AUTO:  # no fewer than on a CPU
        windows = max(windows, config.data.batch_size * config.training.accumulate)
    return accumulate * max(1, windows // (processes * accumulate))


def with_chosen(config: PretrainConfig, chosen: dict[str, int]) -> PretrainConfig:
    """The config with the chosen values of some of `DEVICE_KEYS`."""
    groups: dict[str, dict[str, Any]] = {"data": {}, "training": {}}
    for key, value in chosen.items():
        group, _, name = key.partition(".")
        groups[group][name] = value
    return replace(
        config,
        data=replace(config.data, **groups["data"]),
        training=replace(config.training, **groups["training"]),
    )


def _power_of_two(number: float) -> int:
    """The largest power of two that is not above a number, but at least 1."""
    return 1 << max(0, int(number).bit_length() - 1) if number >= 1 else 1
