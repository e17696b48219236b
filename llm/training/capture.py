"""An update as one CUDA graph. A GPU computes a small model's kernels faster than a process can launch them
one by one; a graph is launched at once."""

from collections.abc import Callable

import torch
from torch import Tensor

from llm.cuda_graph import captured
from llm.data.windows import Batch
from llm.training.run import Run
from llm.training.state import generator_states, restore_generators
from llm.training.update import queue_update, share


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
    replay = captured(lambda: queue_update(run, static, len(static)), "an update")
    restore_generators(states)

    def update(batches: list[Batch]) -> Tensor:
        for places, batch in zip(static, batches, strict=True):
            for place, rows in zip(places, share(run, batch), strict=True):
                place.copy_(rows)
        return replay()

    return update
