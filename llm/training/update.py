"""The arithmetic of an update: gradients accumulated over micro-batches, clipping, the optimizer's step."""

from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from llm.data.windows import Batch
from llm.training.run import Run
from llm.training.sharding import clip_gradients


def accumulate_gradients(run: Run, batches: Iterable[Batch], count: int) -> Tensor:
    """Compute the gradient of the mean loss over `count` batches, clipped, in the parameters' `grad`.

    Args:
        batches: of each batch, this process's rows, on the device.

    Returns:
        The loss, and the norm of the gradient before clipping, (2,).
    """
    runtime, clip = run.runtime, run.config.training.grad_clip
    loss = torch.zeros((), device=runtime.device)
    for number, (inputs, targets) in enumerate(batches, start=1):
        # Gradients add up over the micro-batches; processes average them once, at the last one. Sharded
        # gradients are averaged every time, so that no process ever holds a whole one.
        exchange = runtime.processes == 1 or run.sharded or number == count
        with nullcontext() if exchange else run.trained_model.no_sync(), runtime.autocast():  # type: ignore[operator]
            # Each batch's loss is a mean. Divided by the number of batches, the gradients add up to that of
            # the mean over all of them, as if they were one large batch.
            batch_loss = run.trained_model(inputs, targets) / count
            batch_loss.backward()
        loss += batch_loss.detach()
    if run.sharded:
        return torch.stack([runtime.mean(loss), clip_gradients(run.model, clip, runtime)])
    parameters = list(run.model.parameters())
    grad_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if clip is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip, grad_norm)
    return torch.stack([runtime.mean(loss), grad_norm])


def share(run: Run, batch: Batch) -> Batch:
    """This process's rows of a batch, on the device."""
    inputs, targets = map(run.runtime.share, batch)
    return inputs, targets


def queue_update(run: Run, batches: Iterable[Batch], count: int) -> Tensor:
    """Queue a whole update, including the decision whether to skip it, without waiting for the device.

    Once more than `max_skipped` in a row were skipped, all later ones are skipped too, so that the weights
    stay as they are until the host learns of it.

    Returns:
        As `accumulate_gradients`.
    """
    figures, skipped = accumulate_gradients(run, batches, count), run.skipped_in_a_row
    skips = ~figures.isfinite().all() | (skipped > run.config.training.max_skipped)
    skipped.copy_(torch.where(skips, skipped + 1, 0))
    run.optimizers.step_unless(skips)
    run.optimizers.zero_grad()
    return figures
