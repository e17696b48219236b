"""How much memory an update takes, counted without allocating it.

The model, its loss and its optimizer go through two updates with tensors that have shapes but no data
(torch's `FakeTensorMode`), while the bytes of all live tensors are added up. So a new model part or optimizer
is counted without further ado, and no formula has to be kept in step with the code.
"""

import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from llm.config import PretrainConfig
from llm.device import Device, standing_for_gpu
from llm.model.attention import MultiHeadAttention
from llm.model.gpt import GPTModel
from llm.model.loss import token_loss
from llm.runtime import Runtime
from llm.training.optimizers import build_optimizers

# The share of a device's memory that a run may plan to use. The rest is for libraries, for what the allocator
# keeps but cannot use, and for other processes.
USED_SHARE = 0.75
# On a CPU, a process takes up to this many times the bytes that are live at once: the C library keeps freed
# memory (see `_keep_freed_memory` in llm/runtime.py), in sizes other than those asked for next. Measured in
# docs/plan.md.
KEPT = 2.0
PROCESS = 0.4e9  # bytes of Python, torch and its libraries in a process on a CPU


@dataclass(frozen=True)
class Memory:
    """Bytes that one process of a run holds. The parts peak at different times."""

    weights: int
    gradients: int  # twice if several processes average them: torch keeps a copy to send
    optimizer: int  # its state
    activations: int  # of a micro-batch, kept for the backward pass
    logits: int  # temporaries of the loss: the logits of a chunk of tokens, the gradients of the head
    step: int  # temporaries of the optimizer's step
    update: int  # peak during an update
    evaluation: int  # peak during an evaluation
    # In the CPU's memory: the best weights; and a checkpoint being written, with the best weights, the newest
    # ones and the optimizer's state.
    copies: int

    @property
    def peak(self) -> int:
        """The peak on the device that computes."""
        return max(self.update, self.evaluation)


DEPTH = 8  # deeper models are extrapolated from two of about this many blocks


def memory_of(config: PretrainConfig, rows: int, precision: str, device: Device) -> Memory:
    """Count the memory of a process of a run.

    Args:
        config: its `data.batch_size` is ignored.
        rows: windows in a micro-batch of one process.
        precision: see `Runtime`.
    """
    layers = config.model.n_layers
    if layers <= DEPTH:
        return _counted(config, rows, precision, device)
    # Blocks of even and of odd number may differ, so the depth is extrapolated in steps of two.
    low, high = DEPTH - 2 - layers % 2, DEPTH - layers % 2
    at_low, at_high = (
        _counted(replace(config, model=replace(config.model, n_layers=n)), rows, precision, device)
        for n in (low, high)
    )

    def extrapolated(part: str) -> int:
        value = getattr(at_high, part)
        return value + (layers - high) * (value - getattr(at_low, part)) // 2

    return Memory(**{part.name: extrapolated(part.name) for part in fields(Memory)})


def largest_that_fits(
    candidates: Iterable[int], config: PretrainConfig, precision: str, device: Device
) -> int:
    """The first of some candidate micro-batch sizes, in windows, that fits the device's memory; 1 if none
    does. Give the largest first."""
    return next((n for n in candidates if fits(memory_of(config, n, precision, device), device)), 1)


def needed(memory: Memory, device: Device) -> float:
    """Bytes that a run takes of a device's memory; on a CPU that includes the process itself, the copies for
    checkpoints, and memory that was freed but is kept."""
    return memory.peak if device.kind == "cuda" else PROCESS + KEPT * memory.peak + memory.copies


def fits(memory: Memory, device: Device) -> bool:
    """Whether a run fits a device's memory."""
    return needed(memory, device) <= USED_SHARE * device.memory_bytes


def _counted(config: PretrainConfig, rows: int, precision: str, device: Device) -> Memory:
    runtime, processes = Runtime(torch.device("cpu"), precision), config.runtime.processes
    # torch makes CUDA tensors only where there is a GPU, so CPU tensors stand in for them.
    stand_in = standing_for_gpu(device.memory_bytes) if device.kind == "cuda" else nullcontext()
    with stand_in, FakeTensorMode(), _Held() as held:
        model = GPTModel(config.model).train()
        model.checkpoint_activations(config.runtime.checkpoint_activations)
        if device.kind == "cuda" and runtime.dtype == torch.bfloat16:
            # There, fused attention applies dropout itself; a CPU would hold the masks.
            for module in model.modules():
                if isinstance(module, MultiHeadAttention):
                    module.dropout.p = 0.0
        weights = held.bytes
        optimizers = build_optimizers(model, config.optimizer, runtime)
        parameters = list(model.parameters())
        shape = rows, config.model.context_length
        for _ in range(2):  # the first makes the optimizer's state
            held.most = held.bytes
            before = held.bytes
            for _ in range(min(2, config.training.accumulate)):
                begin = held.bytes
                inputs, targets = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
                with runtime.autocast():
                    features = model.features(inputs)
                    activations = held.bytes - begin
                    update, held.most = held.most, held.bytes
                    loss = model.loss_of(features, targets)
                    del features
                    logits, update = held.most - begin - activations, max(update, held.most)
                    loss.backward()
                del loss
            gradients = sum(each.grad.nbytes for each in parameters if each.grad is not None)
            if config.training.grad_clip is not None:
                norm = nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
                nn.utils.clip_grads_with_norm_(parameters, config.training.grad_clip, norm)
            update, held.most = max(update, held.most), held.bytes
            optimizers.step()
            step = held.most - before - gradients
            update = max(update, held.most)
            optimizers.zero_grad()
        state = held.bytes - weights
        held.most = held.bytes
        model.eval()
        shape = rows * processes, config.model.context_length  # one process evaluates
        tokens = torch.zeros(shape, dtype=torch.int64)
        with runtime.autocast():
            model.score_tokens(tokens, tokens, token_loss)
        evaluation = held.most
    averaged = gradients if processes > 1 and config.runtime.sharding == "none" else 0
    whole = Memory(
        weights=weights,
        gradients=gradients + averaged,
        optimizer=state,
        activations=activations,
        logits=logits,
        step=step,
        update=update + averaged,
        evaluation=evaluation,
        copies=3 * weights + state,
    )
    return sharded(whole, model, runtime.dtype, processes) if config.runtime.sharding == "fsdp" else whole


def sharded(memory: Memory, model: GPTModel, dtype: torch.dtype, processes: int) -> Memory:
    """What each process holds with `runtime.sharding=fsdp`: its share of the weights, the gradients and the
    optimizer's state; and, gathered, the matrices outside the blocks and (in `dtype`) those of two blocks, as
    one block's are gathered while another computes."""
    block = sum(each.numel() for each in model.trf_blocks[0].parameters())
    blocks = len(model.trf_blocks)
    around = memory.weights - 4 * block * blocks
    gathered = around + min(2, blocks) * block * dtype.itemsize
    parts = {
        "weights": memory.weights // processes + gathered,
        "gradients": memory.gradients // processes,
        "optimizer": memory.optimizer // processes,
    }
    # While it generates a sample, the main process also holds all weights in the CPU's memory.
    copies = memory.copies // processes + memory.weights
    less = {name: getattr(memory, name) - part for name, part in parts.items()}
    # The forward pass holds no gradients yet, so it may be where the peak is.
    forward = parts["weights"] + parts["optimizer"] + memory.activations + memory.logits
    return replace(
        memory,
        **parts,
        copies=copies,
        update=max(forward, memory.update - sum(less.values())),
        evaluation=memory.evaluation - less["weights"] - less["optimizer"],
    )


class _Held(TorchDispatchMode):
    """Counts the bytes of all live tensors, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self._known: set[int] = set()  # addresses of the storages that are counted

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:  # the tensor is a view of one that is counted
            return
        self._known.add(storage._cdata)
        self.bytes += storage.nbytes()
        self.most = max(self.most, self.bytes)
        weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())

    def _freed(self, address: int, count: int) -> None:
        self._known.remove(address)
        self.bytes -= count
