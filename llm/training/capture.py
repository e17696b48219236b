"""An update as one CUDA graph. A GPU runs a small model's kernels faster than a process can launch them one
by one; a graph launches them all at once."""

from collections.abc import Callable

import torch
from torch import Tensor

from llm.cuda_graph import captured
from llm.data.windows import Batch
from llm.training.run import Run
from llm.training.state import generator_states, restore_generators
from llm.training.update import queue_update, share


def capture_update(run: Run) -> Callable[[list[Batch]], Tensor]:
    """Capture `queue_update` over `accumulate` batches. Weights, the optimizer's state and random streams are
    left as they are.

    Gradients live in the graph's private memory and are allocated anew in each update. The learning rate is
    read from the tensor that `Optimizers.set_lr` fills. Dropout continues from the state of torch's generator
    at each replay, and a replay advances it as far as the kernels would have. So neither checkpoints nor
    updates outside the graph need to know about it.

    Returns:
        A function that makes the update over the given batches, as `queue_update`.
    """
    config, runtime = run.config, run.runtime
    shape = config.data.batch_size // runtime.processes, config.model.context_length
    zeros = torch.zeros(shape, dtype=torch.int64, device=runtime.device)
    static = [(zeros.clone(), zeros.clone()) for _ in range(config.training.accumulate)]
    states = generator_states(runtime)
    run.optimizers.set_lr(config.optimizer.lr)
    run.skipped_in_a_row.fill_(torch.inf)  # so that warm-up updates are skipped; `train` resets it
    replay = captured(lambda: queue_update(run, static, len(static)), "an update")
    restore_generators(states)

    def update(batches: list[Batch]) -> Tensor:
        for places, batch in zip(static, batches, strict=True):
            for place, rows in zip(places, share(run, batch), strict=True):
                place.copy_(rows)
        return replay()

    return update
