"""Sharding by FSDP (Zhao et al. 2023), in torch's second version of it: of each matrix every process keeps
its own rows, with their gradients and their optimizer state. A block's are gathered when it computes.

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
    """Share out the matrices of a model, which every process has made alike on the CPU; what each keeps goes
    to its device. All processes have to call it, and whatever computes with the model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(runtime.device.type, (runtime.processes,))
    vectors = {parameter for parameter in model.parameters() if parameter.dim() < 2}
    for vector in vectors:
        vector.data = vector.data.to(runtime.device)
    policy = MixedPrecisionPolicy()
    if runtime.dtype != torch.float32:  # what autocast would make of a block's matrices travels already so
        policy = MixedPrecisionPolicy(runtime.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.trf_blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=vectors)
    fully_shard(model, mesh=mesh, ignored_params=vectors)
    register_fsdp_forward_method(model, "score_tokens")


def release(model: Any) -> None:
    """Free what a forward pass without a backward pass has gathered of a sharded model."""
    if hasattr(model, "reshard"):
        model.reshard()


def is_sharded(tensor: Any) -> bool:
    """Whether it is torch's DTensor. To import that takes half a second, which only sharding needs."""
    return hasattr(tensor, "device_mesh")


def own(tensor: Any) -> Tensor:
    """This process's rows of a tensor, in the same memory; all of one that is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def copied(tensor: Any, is_main: bool) -> Tensor | None:
    """A copy in the CPU's memory of the main process; None in the others. All have to call it for a tensor
    that is sharded, which is gathered for it."""
    whole = tensor.full_tensor() if is_sharded(tensor) else tensor
    return whole.detach().to("cpu", copy=whole is tensor) if is_main else None


def parts_of(tensors: Mapping[str, Any], is_main: bool) -> dict[str, Tensor | Rows]:
    """What a process writes of tensors, in the same memory: its own rows of those that are sharded; and of
    others, which every process has, all in the main one."""
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
    """Of a sharded tensor, the rows of each process; of the last ones fewer, or none."""
    return -(-len(parameter) // parameter.device_mesh.size())


def _first_row(parameter: Any) -> int:
    return _rows_each(parameter) * parameter.device_mesh.get_local_rank()


def _own_of(whole: Tensor, parameter: Any) -> Tensor:
    """Of a whole tensor what this process keeps of a parameter of its shape."""
    if not is_sharded(parameter):
        return whole
    first = _first_row(parameter)
    return whole[first : first + _rows_each(parameter)]


def sharded_like(parameter: Any, whole: Tensor) -> Tensor:
    """A copy of a whole tensor on the device of a parameter of its shape, sharded as that is."""
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
    """Take over whole weights, as of a checkpoint, of the shapes of the model's."""
    for name, parameter in model.state_dict().items():
        own(parameter).copy_(_own_of(tensors[name], parameter))


def clip_gradients(model: nn.Module, most: float | None, runtime: Runtime) -> Tensor:
    """Average the gradients of vectors over the processes, as is done for matrices where they are computed,
    and clip the norm of all gradients to `most`; returns what it was before."""
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
        factor = (most / (norm + 1e-6)).clamp(max=1.0)  # as torch's own
        torch._foreach_mul_([*rows, *vectors], factor)
    return norm
