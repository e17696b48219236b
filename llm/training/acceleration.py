"""What makes a GPU's updates faster for a slower start, and where that pays: compiled blocks, and an update
as one CUDA graph.

Each choice follows from a run's config and model, and from no measurement, so that a rerun makes the same.
Compiled blocks change the last bits of numbers, so that choice is recorded: a run that is resumed with other
limits keeps it.
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

# The compiler takes 10 to 20 seconds, and makes an update a seventh faster. It pays in a run of this many
# minutes, or floating-point operations: some two minutes of an H100.
COMPILED_MINUTES, COMPILED_FLOPS = 2.0, 5e16
# A capture takes half a second, in which a GPU makes some forty small updates launched one by one.
CAPTURED_MINUTES, CAPTURED_UPDATES = 0.05, 100
# Floating-point operations of a batch whose kernels take longer than to launch them: some 10 ms of an H100,
# where the launches of a block take 2 ms. A graph would only take memory.
LARGE_FLOPS = 5e12


def choose(run: Run, start: Start) -> None:
    """Let the config that is recorded say true or false where `runtime.compile` is auto.

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
    """Whether updates are captured.

    Raises:
        UserError: they are to be, and the optimizer's steps cannot be.
    """
    graph = run.config.runtime.graph
    if graph == "on" and not run.optimizers.can_queue:
        raise UserError(
            f"runtime.graph=on: optimizer.name={run.config.optimizer.name} cannot be captured; "
            f"use runtime.graph=auto or off"
        )
    pays = _batch_flops(run) < LARGE_FLOPS and _is_long(run, CAPTURED_MINUTES, CAPTURED_UPDATES)
    alone, again = run.runtime.processes == 1, run.config.runtime.checkpoint_activations
    possible = run.optimizers.can_queue and alone and not again
    return graph == "on" or (graph == "auto" and possible and pays)


def in_words(run: Run) -> str:
    """What is chosen, and how to choose otherwise."""
    runtime = run.config.runtime
    compiled = "compiled" if runtime.compile else "not compiled (in a long run it pays: runtime.compile=true)"
    launched = "all of an update as one CUDA graph" if captures(run) else "one by one"
    return f"{compiled}; launched {launched}"


def accelerate(run: Run) -> None:
    """Compile and capture, as chosen, and wait for it here, so that no update's time includes it. Weights,
    gradients, the optimizer's state and random streams are left as they are."""
    if run.config.runtime.compile:
        begin = time.perf_counter()
        compile_blocks(run)
        log.info("compiled in %s", format_seconds(time.perf_counter() - begin))
    if captures(run):
        run.captured = capture_update(run)


def compile_blocks(run: Run) -> None:
    # Otherwise dynamo cuts each block into graphs at the sizes of DDP's buckets, which overlap anyway.
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
    except Exception:  # of any kind: nobody asked for it, and runs do without
        return False
    return True


def _is_long(run: Run, minutes: float, updates: float) -> bool:
    """Whether no limit ends a run before so many minutes and updates."""
    training = run.config.training
    most = math.inf if training.max_steps is None else training.max_steps
    if training.max_epochs is not None:
        most = min(most, training.max_epochs * len(run.batches) / training.accumulate)
    return most >= updates and (training.max_minutes is None or training.max_minutes >= minutes)


def _batch_flops(run: Run) -> float:
    """Floating-point operations of a forward and a backward pass over one batch."""
    tokens = run.config.data.batch_size * run.config.model.context_length
    return tokens * training_flops_per_token(run.model)
