"""How much memory an update takes, counted without taking it.

The model, its loss and its optimizer go through two updates over tensors that have shapes and no data
(torch's `FakeTensorMode`), while the bytes of all tensors that are held at once are added up. So whatever is
added to a model or an optimizer is counted too, and no formula has to be kept in step with the code.
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

# Of a device's memory. The rest is for libraries, for what an allocator keeps and cannot use, and for others.
USED_SHARE = 0.75
# Times what is held at once, that a process on a CPU takes at most: the C library keeps what is freed (see
# `_keep_freed_memory` in llm/runtime.py), and what it keeps is not of the sizes that are asked for next. See
# docs/plan.md for what was measured.
KEPT = 2.0
PROCESS = 0.4e9  # bytes of Python, torch and its libraries, in a process on a CPU


@dataclass(frozen=True)
class Memory:
    """Bytes that a process of a run holds. The parts have their peaks at different times."""

    weights: int
    gradients: int  # twice where several processes average them: torch keeps a copy to send
    optimizer: int  # its state
    activations: int  # of a micro-batch, kept for the backward pass
    logits: int  # what the loss holds besides: the logits of a chunk of tokens, the gradients of the head
    step: int  # what the optimizer holds besides, as it steps
    update: int  # all of an update that is held at once, at most
    evaluation: int  # the same of an evaluation
    # In the CPU's memory: the best weights; and as written, these, the newest, and the optimizer's state.
    copies: int

    @property
    def peak(self) -> int:
        """On the device that computes."""
        return max(self.update, self.evaluation)


DEPTH = 8  # blocks of a model that is counted whole; what more of them take is told from the last two


def memory_of(config: PretrainConfig, rows: int, precision: str, device: Device) -> Memory:
    """
    Args:
        config: its `data.batch_size` does not matter.
        rows: windows of a micro-batch, of one process.
        precision: see `Runtime`.
    """
    layers = config.model.n_layers
    if layers <= DEPTH:
        return _counted(config, rows, precision, device)
    less, more = DEPTH - 2 - layers % 2, DEPTH - layers % 2  # every second block is alike
    one, other = (
        _counted(replace(config, model=replace(config.model, n_layers=n)), rows, precision, device)
        for n in (less, more)
    )
    values = {
        part.name: getattr(other, part.name)
        + (layers - more) * (getattr(other, part.name) - getattr(one, part.name)) // 2
        for part in fields(Memory)
    }
    return Memory(**values)


def largest_that_fits(
    candidates: Iterable[int], config: PretrainConfig, precision: str, device: Device
) -> int:
    """The first of some numbers of windows of a micro-batch, as a rule from the largest down, for which the
    device has memory; 1 if none fits."""
    return next((n for n in candidates if fits(memory_of(config, n, precision, device), device)), 1)


def needed(memory: Memory, device: Device) -> float:
    """Bytes that a device has to have: a CPU for the process and its copies, too, and for what is kept."""
    return memory.peak if device.kind == "cuda" else PROCESS + KEPT * memory.peak + memory.copies


def fits(memory: Memory, device: Device) -> bool:
    """Whether a device has enough memory."""
    return needed(memory, device) <= USED_SHARE * device.memory_bytes


def _counted(config: PretrainConfig, rows: int, precision: str, device: Device) -> Memory:
    runtime, processes = Runtime(torch.device("cpu"), precision), config.runtime.processes
    # Tensors of a GPU are stood for by tensors of the CPU, as torch makes the former only where there is one.
    stand_in = standing_for_gpu(device.memory_bytes) if device.kind == "cuda" else nullcontext()
    with stand_in, FakeTensorMode(), _Held() as held:
        model = GPTModel(config.model).train()
        model.checkpoint_activations(config.runtime.checkpoint_activations)
        if (
            device.kind == "cuda" and runtime.dtype == torch.bfloat16
        ):  # whose fused attention draws dropout too
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
    """What each of several processes holds where matrices, gradients and the optimizer's state are shared out
    among them (`runtime.sharding=fsdp`): its share of each; and besides, whole, the matrices around the
    blocks, and in `dtype` those of two blocks: one computes while the next one's are gathered."""
    block = sum(each.numel() for each in model.trf_blocks[0].parameters())
    blocks = len(model.trf_blocks)
    around = memory.weights - 4 * block * blocks
    gathered = around + min(2, blocks) * block * dtype.itemsize
    parts = {
        "weights": memory.weights // processes + gathered,
        "gradients": memory.gradients // processes,
        "optimizer": memory.optimizer // processes,
    }
    # The main process also has all weights there, while it generates a sample.
    copies = memory.copies // processes + memory.weights
    less = {name: getattr(memory, name) - part for name, part in parts.items()}
    # Before the backward pass there are no gradients of which less could be held.
    forward = parts["weights"] + parts["optimizer"] + memory.activations + memory.logits
    return replace(
        memory,
        **parts,
        copies=copies,
        update=max(forward, memory.update - sum(less.values())),
        evaluation=memory.evaluation - less["weights"] - less["optimizer"],
    )


class _Held(TorchDispatchMode):
    """Adds up the bytes of all tensors that exist at once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self._known: set[int] = set()  # addresses of what stands for memory

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:  # a view of what is counted
            return
        self._known.add(storage._cdata)
        self.bytes += storage.nbytes()
        self.most = max(self.most, self.bytes)
        weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())

    def _freed(self, address: int, count: int) -> None:
        self._known.remove(address)
        self.bytes -= count
