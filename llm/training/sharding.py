"""Sharding by FSDP (Zhao et al. 2023), as in torch's FSDP2: each process keeps its own rows of every matrix,
with their gradients and optimizer state. A block's matrices are gathered when the block computes.

Vectors (norms, biases, scalars) are a thousandth of a model. Every process keeps them whole, in fp32, so that
only matrices are rounded to bf16, as without sharding.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm.checkpoints.staging import Rows
from llm.model.gpt import GPTModel
from llm.runtime import Runtime


def shard(model: GPTModel, runtime: Runtime) -> None:
    """Shard the matrices of a model that every process has initialised identically on the CPU, and move each
    process's rows to its device. All processes have to call it, and also anything that computes with the
    model.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(runtime.device.type, (runtime.processes,))
    vectors = {parameter for parameter in model.parameters() if parameter.dim() < 2}
    for vector in vectors:
        vector.data = vector.data.to(runtime.device)
    policy = MixedPrecisionPolicy()
    if (
        runtime.dtype != torch.float32
    ):  # send a block's matrices in the type to which autocast would cast them
        policy = MixedPrecisionPolicy(runtime.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.trf_blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=vectors)
    fully_shard(model, mesh=mesh, ignored_params=vectors)
    register_fsdp_forward_method(model, "score_tokens")


def release(model: Any) -> None:
    """Free what a forward pass without a backward pass left gathered of a sharded model."""
    if hasattr(model, "reshard"):
        model.reshard()


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor; without importing that class, which takes half a second."""
    return hasattr(tensor, "device_mesh")


def own(tensor: Any) -> Tensor:
    """This process's rows of a tensor (a view), or the whole tensor if it is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def copied(tensor: Any, is_main: bool) -> Tensor | None:
    """A copy in the CPU's memory of the main process, None in the others. A sharded tensor is gathered, so
    all processes have to call it."""
    whole = tensor.full_tensor() if is_sharded(tensor) else tensor
    return whole.detach().to("cpu", copy=whole is tensor) if is_main else None


def parts_of(tensors: Mapping[str, Any], is_main: bool) -> dict[str, Tensor | Rows]:
    """What this process writes of some tensors, as views: its own rows of sharded ones. The others, which all
    processes hold, are written by the main one."""
    parts: dict[str, Tensor | Rows] = {}
    for name, tensor in tensors.items():
        if not is_sharded(tensor):
            if is_main:
                parts[name] = tensor
        elif len(own(tensor)):
            parts[name] = Rows(own(tensor), _first_row(tensor), tuple(tensor.shape))
    return parts


def copies_of(parts: Mapping[str, Tensor | Rows]) -> dict[str, Tensor | Rows]:
    """Copies in the CPU's memory."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", copy=True)

    return {
        name: part._replace(own=copy(part.own)) if isinstance(part, Rows) else copy(part)
        for name, part in parts.items()
    }


def _rows_each(parameter: Any) -> int:
    """Rows of a sharded tensor per process; the last processes may have fewer, or none."""
    return -(-len(parameter) // parameter.device_mesh.size())


def _first_row(parameter: Any) -> int:
    return _rows_each(parameter) * parameter.device_mesh.get_local_rank()


def _own_of(whole: Tensor, parameter: Any) -> Tensor:
    """The rows of a whole tensor that this process keeps of a parameter of the same shape."""
    if not is_sharded(parameter):
        return whole
    first = _first_row(parameter)
    return whole[first : first + _rows_each(parameter)]


def sharded_like(parameter: Any, whole: Tensor) -> Tensor:
    """A copy of a whole tensor, sharded like a parameter of the same shape, on its device."""
    if not is_sharded(parameter):
        return whole.clone()
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        _own_of(whole, parameter).to(parameter.device, copy=True),
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


@torch.no_grad()
def load_weights(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy whole weights, such as a checkpoint's, into a model; shapes have to match."""
    for name, parameter in model.state_dict().items():
        own(parameter).copy_(_own_of(tensors[name], parameter))


def clip_gradients(model: nn.Module, most: float | None, runtime: Runtime) -> Tensor:
    """Clip the norm of all gradients to `most`, and return the norm before clipping. Gradients of vectors are
    averaged over the processes first; those of matrices were when they were computed."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    vectors = [gradient for gradient in gradients if not is_sharded(gradient)]
    rows = [own(gradient) for gradient in gradients if is_sharded(gradient)]
    together = torch.cat([vector.flatten() for vector in vectors])
    dist.all_reduce(together)
    together /= runtime.processes
    for vector, averaged in zip(vectors, together.split([each.numel() for each in vectors]), strict=True):
        vector.copy_(averaged.view_as(vector))
    square = nn.utils.get_total_norm(rows).square()
    dist.all_reduce(square)
    norm = (square + nn.utils.get_total_norm(vectors).square()).sqrt()
    if most is not None:
        factor = (most / (norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grads_with_norm_
        torch._foreach_mul_([*rows, *vectors], factor)
    return norm
