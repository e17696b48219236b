"""The training state of a run, and its form in a checkpoint: tensors and plain values."""

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from llm.checkpoints.staging import Rows, Tensors


@dataclass
class TrainingState:
    """Everything that a run needs to continue exactly, besides its weights and config."""

    run_id: str
    counters: dict[str, Any]
    batches: dict[str, int]  # position in the data
    data: list[str]  # fingerprints of the training and the validation tokens
    resumed: list[dict[str, Any]]
    optimizer: dict[str, dict[str, Any]]  # tensors and numbers, by the parameter's name, then their own
    generators: dict[int, dict[str, Tensor]]  # random states of each process, by rank and kind of device
    epoch_generator: Tensor | None  # the book's order: the CPU's random state when the epoch began


def split(state: TrainingState) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of a training state by name, and its plain values."""
    values = {item.name: getattr(state, item.name) for item in fields(state)}
    optimizer, generators, epoch_generator = (
        values.pop(name) for name in ("optimizer", "generators", "epoch_generator")
    )
    tensors = {
        f"generator/{rank}/{kind}": tensor
        for rank, states in generators.items()
        for kind, tensor in states.items()
    }
    if epoch_generator is not None:
        tensors["epoch_generator"] = epoch_generator
    numbers: dict[str, dict[str, float]] = {}
    for parameter, kept in optimizer.items():
        for key, value in kept.items():
            if isinstance(value, Tensor | Rows):
                tensors[f"optimizer/{parameter}/{key}"] = value
            else:
                numbers.setdefault(parameter, {})[key] = value
    return tensors, {**values, "optimizer_numbers": numbers}


def joined(tensors: dict[str, Tensor], values: dict[str, Any]) -> TrainingState:
    """The inverse of `split`."""
    optimizer: dict[str, dict[str, Any]] = {
        name: dict(numbers) for name, numbers in values.get("optimizer_numbers", {}).items()
    }
    generators: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "optimizer":
            parameter, _, key = rest.rpartition("/")
            optimizer.setdefault(parameter, {})[key] = tensor
        elif kind == "generator":
            rank, _, device = rest.partition("/")
            generators.setdefault(int(rank), {})[device] = tensor
    return TrainingState(
        **{name: values[name] for name in ("run_id", "counters", "batches", "data", "resumed")},
        optimizer=optimizer,
        generators=generators,
        epoch_generator=tensors.get("epoch_generator"),
    )
