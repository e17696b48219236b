"""How large an update of a new run is on a CUDA GPU, and how often it is evaluated there, if nobody has said.

The keys' own values, and those of `conf/scale/`, are for CPUs.
"""

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from llm.config import ModelConfig, PretrainConfig, value_of
from llm.device import gpu_memory_bytes
from llm.model.gpt import parameters_of
from llm.model.parts import ACTIVATIONS, hidden_dim
from llm.runtime import Runtime

# What may be chosen for a GPU. All of it is recorded, so that a run is resumed and repeated with the same.
DEVICE_KEYS = ("data.batch_size", "training.accumulate", "training.eval_freq")

# Of an update of 124M parameters: with as many, half of what an H100 can do was measured. They grow with the
# root of the model's size, as larger models need larger batches. So the default model, at a hundredth of that
# size, keeps its batch, for which its learning rate was tuned. Rates stay: one that is low enough for small
# batches is so for large ones, whose gradients are less noisy.
TOKENS, OF_PARAMETERS = 32_768, 124e6
LARGEST_SHARE_OF_TEXT = 1 / 32  # an update takes no more of the training split

PARAMETER_BYTES = 18  # a weight, its gradient and AdamW's two averages in fp32, and the weight in bf16
# Of the memory that these leave, for activations by `activation_bytes`. The rest is for the logits of a chunk
# of tokens, for the steps of the optimizer, for what torch keeps and cannot use, and for other programs.
USED_SHARE = 0.5

FEWER_EVALUATIONS = 10  # times as many updates from one evaluation to the next, as updates take less time
LEAST_EVALUATIONS = 40  # of a run limited by steps, but for those that have fewer on a CPU


def activation_bytes(model: ModelConfig, number_bytes: int) -> int:
    """Memory that training takes for each token of a micro-batch, at most: what the backward pass needs.

    Of each block, 24 numbers for each one of its width, for the residual stream and what attention reads and
    writes, and two for each one within the feed-forward network. That is what rotary positions with QK-norm
    take; GPT-2's parts take two thirds of it. See tests/training/test_update_size.py.

    Args:
        number_bytes: 2 in bf16, 4 in fp32.
    """
    hidden = hidden_dim(model) * ACTIVATIONS[model.activation].inputs
    return model.n_layers * number_bytes * (24 * model.emb_dim + 2 * hidden)


def chosen_for_device(
    config: PretrainConfig, undecided: Collection[str], runtime: Runtime, training_tokens: int
) -> dict[str, int]:
    """The keys, and their values, that suit a run's device better than those of the config; the same in all
    of its processes. On all but CUDA GPUs there are none.

    Args:
        undecided: those of `DEVICE_KEYS` that nobody has given.
        training_tokens: of the training split.
    """
    if runtime.device.type != "cuda" or not undecided:
        return {}
    memory_bytes = runtime.agree(gpu_memory_bytes(runtime.device))
    return chosen_for_gpu(config, undecided, memory_bytes, runtime.dtype.itemsize, training_tokens)


def chosen_for_gpu(
    config: PretrainConfig,
    undecided: Collection[str],
    memory_bytes: float,
    number_bytes: int,
    training_tokens: int,
) -> dict[str, int]:
    """`chosen_for_device` of a GPU with so much memory, which decides only how many micro-batches an update
    is made of.

    Args:
        number_bytes: see `activation_bytes`.
    """
    found = {}
    if {"data.batch_size", "training.accumulate"} <= {*undecided}:
        batch_size, accumulate = _batch(config, memory_bytes, number_bytes, training_tokens)
        found = {"data.batch_size": batch_size, "training.accumulate": accumulate}
    frequency, steps = config.training.eval_freq, config.training.max_steps
    if "training.eval_freq" in undecided and frequency is not None:
        fewer = FEWER_EVALUATIONS * frequency
        if steps is not None:
            fewer = min(fewer, max(frequency, steps // LEAST_EVALUATIONS))
        found["training.eval_freq"] = fewer
    return {key: value for key, value in found.items() if value != value_of(config, key)}


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


def _batch(
    config: PretrainConfig, memory_bytes: float, number_bytes: int, training_tokens: int
) -> tuple[int, int]:
    """Windows of a batch, over all processes, and batches of an update. An update has no fewer windows than
    on a CPU, and else a power of two."""
    model, processes = config.model, config.runtime.processes
    parameters = parameters_of(model)
    tokens = min(TOKENS * math.sqrt(parameters / OF_PARAMETERS), LARGEST_SHARE_OF_TEXT * training_tokens)
    windows = max(
        config.data.batch_size * config.training.accumulate, _power_of_two(tokens / model.context_length)
    )
    fitting = windows_that_fit(model, memory_bytes, number_bytes)
    rows = min(max(1, windows // processes), fitting)  # of a process
    return rows * processes, max(1, round(windows / (rows * processes)))


def windows_that_fit(model: ModelConfig, memory_bytes: float, number_bytes: int) -> int:
    """Windows of a micro-batch that a GPU has memory for, by this page's estimate: a power of two, and at
    least 1 even if that is too many."""
    free = USED_SHARE * (memory_bytes - PARAMETER_BYTES * parameters_of(model))
    return _power_of_two(free / (model.context_length * activation_bytes(model, number_bytes)))


def _power_of_two(number: float) -> int:
    """The largest that is not above the number, and at least 1."""
    return 1 << max(0, int(number).bit_length() - 1) if number >= 1 else 1
