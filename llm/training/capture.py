"""An update as one CUDA graph. A GPU computes a small model's kernels faster than a process can launch them
one by one; a graph is launched at once."""

from collections.abc import Callable

import torch
from torch import Tensor

from llm.data.windows import Batch
from llm.errors import UserError, first_line
from llm.training.run import Run
from llm.training.state import generator_states, restore_generators
from llm.training.update import queue_update, share

WARM_UPS = 3  # calls before the capture, in which kernels are chosen and an optimizer's state is made


def capture_update(run: Run) -> Callable[[list[Batch]], Tensor]:
    """`queue_update` of an update's usual number of batches, captured. Weights, the optimizer's state and
    random streams are left as they are.

    Gradients are made anew in each update, in memory of the graph's own. The learning rate is read where
    `Optimizers.set_lr` writes it. Dropout continues from the state that torch's generator has at each replay,
    and a replay moves that as far as its kernels would have: so checkpoints, and updates that are not
    captured, need know nothing of it.
    """
    config, runtime = run.config, run.runtime
    shape = config.data.batch_size // runtime.processes, config.model.context_length
    zeros = torch.zeros(shape, dtype=torch.int64, device=runtime.device)
    static = [(zeros.clone(), zeros.clone()) for _ in range(config.training.accumulate)]
    states = generator_states(runtime)
    run.optimizers.set_lr(config.optimizer.lr)
    run.skipped_in_a_row.fill_(torch.inf)  # so that all updates are skipped, until `train` knows better
    replay = captured(lambda: queue_update(run, static, len(static)))
    restore_generators(states)

    def update(batches: list[Batch]) -> Tensor:
        for places, batch in zip(static, batches, strict=True):
            for place, rows in zip(places, share(run, batch), strict=True):
                place.copy_(rows)
        return replay()

    return update


def captured(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`work`, which reads and writes the same memory whenever it is called, as one CUDA graph. It is called a
    few times for that. What it returns is overwritten by the next replay.

    Raises:
        UserError: it cannot be captured.
    """
    # On a stream of their own, as torch's notes on CUDA graphs want it.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = work()
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise
        raise UserError(
            f"an update cannot be captured as a CUDA graph here ({first_line(error)}); run with "
            f"runtime.graph=off"
        ) from error

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
