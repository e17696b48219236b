"""What makes a GPU's updates faster at the cost of a slower start, and when it pays: compiled blocks, and an
update captured as one CUDA graph.

Both choices follow from a run's config and model and never from a measurement, so that a rerun makes the same
ones. Compiling changes the last bits of numbers, so that choice is recorded, and a run that is resumed with
other limits keeps it.
"""

import logging
import math
import time
from dataclasses import replace

import torch

from llm.errors import UserError
from llm.model.gpt import training_flops_per_token
from llm.progress import format_seconds
from llm.training.capture import capture_update
from llm.training.run import Run
from llm.training.start import Start
from llm.training.state import generator_states, restore_generators
from llm.training.update import share

log = logging.getLogger(__name__)

# Compiling takes 10 to 20 seconds and makes an update a seventh faster. It pays in runs of at least this many
# minutes and floating-point operations (about two minutes of an H100).
COMPILED_MINUTES, COMPILED_FLOPS = 2.0, 5e16
# A capture takes half a second, the time of some forty small updates whose kernels are launched one by one.
CAPTURED_MINUTES, CAPTURED_UPDATES = 0.05, 100
# With batches of at least this many floating-point operations (some 10 ms of an H100), kernels take longer to
# run than to launch (2 ms a block), and a graph would only cost memory.
LARGE_FLOPS = 5e12


def choose(run: Run, start: Start) -> None:
    """Replace `runtime.compile=auto` in the config that is recorded by true or false.

    Raises:
        UserError: see `captures`.
    """
    captures(run)
    runtime = run.config.runtime
    if runtime.compile == "auto":
        update_flops = run.config.training.accumulate * _batch_flops(run)
        compiled = (
            run.runtime.device.type == "cuda"
            and runtime.sharding == "none"
            and _is_long(run, COMPILED_MINUTES, COMPILED_FLOPS / update_flops)
            and _can_compile(run.runtime.device)
        )
        run.config = start.config = replace(run.config, runtime=replace(runtime, compile=compiled))


def captures(run: Run) -> bool:
    """Whether updates are captured as a CUDA graph.

    Raises:
        UserError: `runtime.graph=on`, and the optimizer's steps cannot be captured.
    """
    graph = run.config.runtime.graph
    if graph == "on" and not run.optimizers.can_queue:
        raise UserError(
            f"runtime.graph=on: optimizer.name={run.config.optimizer.name} cannot be captured; "
            f"use runtime.graph=auto or off"
        )
    pays = _batch_flops(run) < LARGE_FLOPS and _is_long(run, CAPTURED_MINUTES, CAPTURED_UPDATES)
    possible = (
        run.optimizers.can_queue
        and run.runtime.processes == 1
        and not run.config.runtime.checkpoint_activations
    )
    return graph == "on" or (graph == "auto" and possible and pays)


def in_words(run: Run) -> str:
    """What was chosen, and how to choose otherwise."""
    runtime = run.config.runtime
    compiled = "compiled" if runtime.compile else "not compiled (in a long run it pays: runtime.compile=true)"
    launched = "all of an update as one CUDA graph" if captures(run) else "one by one"
    return f"{compiled}; launched {launched}"


def accelerate(run: Run) -> None:
    """Compile and capture, as chosen, before the first update, so that no update's time includes it. Weights,
    gradients, the optimizer's state and random streams are left as they are."""
    if run.config.runtime.compile:
        begin = time.perf_counter()
        compile_blocks(run)
        log.info("compiled in %s", format_seconds(time.perf_counter() - begin))
    if captures(run):
        run.captured = capture_update(run)


def compile_blocks(run: Run) -> None:
    # Else dynamo splits each block's graph at the bounds of DDP's buckets, which overlap with compute anyway.
    torch._dynamo.config.optimize_ddp = False
    for block in run.model.trf_blocks:
        block.compile()
    states = generator_states(run.runtime)
    batch = run.training_windows.batch(torch.arange(run.config.data.batch_size))
    with run.runtime.autocast():
        run.trained_model(*share(run, batch)).backward()
    run.optimizers.zero_grad()
    restore_generators(states)


def _can_compile(device: torch.device) -> bool:
    """Whether torch can compile here. For CUDA it needs Triton, a C compiler and Python's headers."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception:  # whatever went wrong: compiling is optional, and the user did not ask for it
        return False
    return True


def _is_long(run: Run, minutes: float, updates: float) -> bool:
    """Whether a run's limits allow at least this many minutes and updates."""
    training = run.config.training
    most = math.inf if training.max_steps is None else training.max_steps
    if training.max_epochs is not None:
        most = min(most, training.max_epochs * len(run.batches) / training.accumulate)
    return most >= updates and (training.max_minutes is None or training.max_minutes >= minutes)


def _batch_flops(run: Run) -> float:
    """Floating-point operations of a forward and backward pass over one batch."""
    tokens = run.config.data.batch_size * run.config.model.context_length
    return tokens * training_flops_per_token(run.model)
