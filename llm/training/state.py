"""Everything that a run needs to continue exactly: gathered by `snapshot`, restored by `restore`.

Whatever is added to the one has to be added to the other; tests/drill.py shows whether anything is missing.
"""

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm.checkpoints.checkpoint import (
    STATE_TENSORS,
    WEIGHTS,
    read_shard,
    read_training_state,
    read_weights,
    state_of,
)
from llm.checkpoints.parts import Found
from llm.checkpoints.staging import Rows
from llm.checkpoints.training_state import TrainingState
from llm.checkpoints.weights import Weights, build_model, check_shapes, compare_shapes
from llm.checkpoints.writing import Snapshot
from llm.data.tokenizer_files import kept_files
from llm.errors import UserError
from llm.model.gpt import GPTModel
from llm.overrides import as_argument
from llm.progress import format_value
from llm.runtime import Runtime, computes_in_bf16
from llm.training.optimizers import OPTIMIZERS
from llm.training.run import Run
from llm.training.sharding import copied, is_sharded, load_weights, parts_of
from llm.training.start import Start
from llm.training.summary import Counters

log = logging.getLogger(__name__)


def checkpoint_due(run: Run, saved: Counters) -> bool:
    """Whether to save again, given the counters at the last checkpoint."""
    settings, steps, seconds = run.config.checkpoint, run.step + 1, run.counters.seconds
    steps_due = settings.every_steps is not None and steps - saved.steps >= settings.every_steps
    minutes_due = (
        settings.every_minutes is not None and seconds - saved.seconds >= 60 * settings.every_minutes
    )
    return steps_due or minutes_due


def copy_weights(model: nn.Module, is_main: bool = True) -> dict[str, Tensor]:
    """Copies of a model's weights in the CPU's memory of the main process; none in the others. A sharded
    model is gathered tensor by tensor, so all processes have to call it."""
    copies = {name: copied(tensor, is_main) for name, tensor in model.state_dict().items()}
    return {name: copy for name, copy in copies.items() if copy is not None}


def generator_states(runtime: Runtime) -> dict[str, Tensor]:
    """The states of torch's global random generators: the CPU's, and the device's, which dropout draws
    from."""
    return {kind: _GENERATORS[kind].get_rng_state() for kind in {"cpu", runtime.device.type}}


def restore_generators(states: dict[str, Tensor]) -> None:
    """The inverse of `generator_states`."""
    for kind, state in states.items():
        _GENERATORS[kind].set_rng_state(state)


_GENERATORS: dict[str, Any] = {"cpu": torch, "cuda": torch.cuda, "mps": torch.mps}


def whole_model(run: Run) -> tuple[GPTModel, Runtime]:
    """The model of a run for use by the main process alone, and the runtime to use it with. Of a sharded
    model, which need not fit one GPU, it is a copy on the CPU; the other processes have to call
    `copy_weights`."""
    runtime = replace(run.runtime, compile=False)  # compiling takes longer than one sample
    if not run.sharded:
        return run.model, runtime
    copy = Weights(run.config.model, copy_weights(run.model), None, str(run.run_dir))
    cpu = torch.device("cpu")
    precision = runtime.precision if computes_in_bf16(cpu) and runtime.precision == "bf16" else "fp32"
    return build_model(copy), replace(runtime, device=cpu, precision=precision)


def parts_of_weights(run: Run) -> dict[str, Tensor | Rows]:
    """What this process writes of the weights, as views; of a sharded model, its rows."""
    return parts_of(run.model.state_dict(), run.runtime.is_main)


def snapshot(run: Run, run_id: str, record_sizes: dict[str, int]) -> Snapshot:
    """A run's state; its tensors are views, not copies. All processes have to call it. In a sharded run each
    gets its own part, otherwise the main one gets everything.

    Args:
        record_sizes: how many bytes of each of the run's records belong to this state.
    """
    runtime = run.runtime
    place, epoch_generator = run.batches.state()
    kept: dict[str, Any] = run.optimizers.state(run.model)
    if run.sharded:
        generators = {runtime.rank: generator_states(runtime)}
        kept = {name: parts_of(state, runtime.is_main) for name, state in kept.items()}
    else:
        generators = dict(enumerate(runtime.gather(generator_states(runtime))))
    state = TrainingState(
        run_id=run_id,
        counters=asdict(run.counters),
        batches=place,
        data=run.data,
        resumed=run.resumed,
        optimizer=kept,
        generators=generators,
        epoch_generator=epoch_generator if runtime.is_main else None,
    )
    weights, tokenizer = parts_of_weights(run), kept_files(run.tokenizer)
    return Snapshot(run.counters.steps, run.config, weights, state, record_sizes, tokenizer)


def restore(run: Run, start: Start) -> None:
    """Restore a run from the checkpoint of `start`; the inverse of `snapshot`.

    Raises:
        UserError: the checkpoint is damaged, or of other data or another model; or the run is at its end.
    """
    folder = start.checkpoint
    assert folder is not None
    if run.sharded:
        state = restore_shard(run.model, run.runtime.rank, folder)
    else:
        weights = read_weights(folder)
        check_shapes(run.model, weights.tensors, folder)
        load_weights(run.model, weights.tensors)
        del weights  # the model has them
        state = read_training_state(folder)
    run.optimizers.load_state(run.model, state.optimizer, str(folder))
    try:
        run.counters = Counters(**state.counters)
        run.batches.load_state(state.batches, state.epoch_generator)
        run.resumed = state.resumed
        if own := state.generators.get(run.runtime.rank):  # absent if the run continues with more processes
            restore_generators({kind: own[kind] for kind in generator_states(run.runtime) if kind in own})
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{folder} is damaged or of another format: {error}") from error
    if state.data != run.data:
        raise UserError(
            f"the text or its tokens are not those that {start.run_dir} was trained on: give that text with "
            f"data.path, or start a new run with {as_argument('init_from', start.run_dir)}"
        )
    if run.progress() >= 1 and start.was_finished:
        limit = run.binding_limit()
        value = format_value(getattr(run.config.training, limit))
        raise UserError(
            f"{start.run_dir} is finished: training.{limit}={value} is spent; to continue, raise it"
        )
    changed = {key: list(values) for key, values in start.changes.items() if not key.startswith("tracking.")}
    run.resumed = [*run.resumed, {"steps": run.counters.steps, "changed": changed}]


def restore_shard(model: nn.Module, rank: int, folder: Path) -> TrainingState:
    """Read this process's rows from a checkpoint, by however many processes it was written: the weights into
    the model, the rest into the state that is returned.

    Raises:
        UserError: the checkpoint is damaged, or of another model.
    """
    weights, parameters = model.state_dict(), dict(model.named_parameters())

    def into_model(found: Found) -> dict[str, Tensor]:
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        compare_shapes(shapes, {name: tuple(size) for name, (size, _) in found.items()}, folder)
        return weights

    def into_memory(found: Found) -> dict[str, Tensor]:
        targets = {}
        for name, (size, dtype) in found.items():
            kind, _, rest = name.partition("/")
            parameter: Any = parameters.get(rest.rpartition("/")[0]) if kind == "optimizer" else None
            if is_sharded(parameter) and size == parameter.shape:
                targets[name] = torch.zeros_like(parameter, dtype=dtype)
            elif kind != "generator" or rest.partition("/")[0] == str(rank):
                targets[name] = torch.zeros(size, dtype=dtype)
        return targets

    read_shard(folder, WEIGHTS, into_model)
    return state_of(folder, read_shard(folder, STATE_TENSORS, into_memory))


def begin_from(run: Run, source: Weights) -> None:
    """Start a new run from given weights, and from their optimizer state if they have one that fits.

    Raises:
        UserError: the weights are those of another model.
    """
    tensors = dict(source.tensors)
    positions, learned = run.config.model.context_length, tensors.get("pos_emb.weight")
    if learned is not None:  # a run may use fewer positions than were learned
        tensors["pos_emb.weight"] = learned[:positions]
    check_shapes(run.model, tensors, source.origin)
    load_weights(run.model, tensors)
    if not source.optimizer_state:
        return
    if OPTIMIZERS[run.config.optimizer.name].has_adamw_state and positions == source.model.context_length:
        run.optimizers.load_state(run.model, source.optimizer_state, source.origin)
    else:
        log.info(
            "the optimizer state in %s is not used: it is AdamW's, for a context of %d tokens",
            source.origin,
            source.model.context_length,
        )
