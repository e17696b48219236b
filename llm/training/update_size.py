"""How large an update of a new run is, and how it is divided into micro-batches, where that is left to the
device: with `data.batch_size=auto`; and on a CUDA GPU, if nobody has said.

The keys' own values, and those of `conf/scale/`, are for CPUs.
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

# What may be chosen for a device. All of it is recorded, so that a run is resumed and repeated with the same.
DEVICE_KEYS = ("data.batch_size", "training.accumulate", "training.eval_freq")

# Of an update of 124M parameters: with as many, half of what an H100 can do was measured. They grow with the
# root of the model's size, as larger models need larger batches. So the default model, at a hundredth of that
# size, keeps its batch, for which its learning rate was tuned. Rates stay: one that is low enough for small
# batches is so for large ones, whose gradients are less noisy.
TOKENS, OF_PARAMETERS = 32_768, 124e6
LARGEST_SHARE_OF_TEXT = 1 / 32  # an update takes no more of the training split

# Updates take less time than on a CPU, so there are this many times as many from one evaluation to the next;
# and more of small ones, of fewer floating-point operations: an H200 evaluates the default model in the time
# of some thirty of its updates.
FEWER_EVALUATIONS, FEWER_OF_SMALL, SMALL_FLOPS = 10, 40, 1e11
LEAST_EVALUATIONS = 40  # of a run limited by steps or epochs, but for those that have fewer on a CPU


def update_tokens(config: PretrainConfig) -> int:
    """Tokens of one update."""
    return config.training.accumulate * config.data.batch_size * config.model.context_length


def chosen_for_device(
    config: PretrainConfig, undecided: Collection[str], device: Device, precision: str, training_tokens: int
) -> dict[str, int]:
    """The keys, and their values, that suit a run's device better than those of the config. The memory of the
    device decides only how many micro-batches an update is made of.

    Args:
        undecided: those of `DEVICE_KEYS` that nobody has given.
        training_tokens: of the training split.

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
    """See that the sizes of a config go together, unless they are left to a device of this kind.

    Raises:
        UserError: the processes cannot share a batch evenly, or an update has not `training.update_tokens`.
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
    """Those of the undecided keys that a device of this kind decides."""
    return {*undecided} if kind == "cuda" else {*undecided} & {"training.accumulate"}  # only with auto


def _leaves_size_open(config: PretrainConfig, undecided: set[str]) -> bool:
    return config.data.batch_size == AUTO or {"data.batch_size", "training.accumulate"} <= undecided


def _as_accumulating(config: PretrainConfig) -> PretrainConfig:
    """So that the gradients of an earlier micro-batch are counted."""
    return replace(config, training=replace(config.training, accumulate=2))


def _windows(config: PretrainConfig, accumulate: int, training_tokens: int) -> int:
    """Windows of an update, of one process.

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
    """A config with other values of some of `DEVICE_KEYS`."""
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
    """The largest that is not above the number, and at least 1."""
    return 1 << max(0, int(number).bit_length() - 1) if number >= 1 else 1
