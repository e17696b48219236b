"""Muon, over stacks of matrices: an optimizer whose updates of a matrix are orthogonal."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm.runtime import Runtime, computes_in_bf16
from llm.training.eager import Optimizer
from llm.training.sharding import is_sharded, own

# Of the polynomial a·x + b·x³ + c·x⁵ that is applied to all singular values of a matrix at once. Five times
# over, it brings those above a hundredth of the matrix's norm to between 0.7 and 1.2: not to 1, but fast.
COEFFICIENTS = 3.4445, -4.7750, 2.0315
ITERATIONS = 5

STACKED_NUMBERS = 1 << 25  # in a stack, at most; larger matrices keep a device busy by themselves


def orthogonalised(matrices: Tensor) -> Tensor:
    """Matrices (count, rows, columns), best with no more rows than columns, with singular values brought near
    1 and singular vectors kept, by Newton–Schulz iterations (Jordan et al. 2024, Muon)."""
    a, b, c = COEFFICIENTS
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    if x.dtype == torch.float32 and x.shape[2] >= 2 * x.shape[1]:
        return _product_of_iterations(x @ x.mT) @ x
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _product_of_iterations(gram: Tensor) -> Tensor:
    """All that the iterations multiply long matrices X by, given X Xᵀ (count, rows, rows): little more than
    half of the work of going through X each time. In bf16, the rounding errors of this grow out of hand.

    Each multiplies by a + b G + c G², where G is the Gram matrix of what the ones before it have made of X.
    That commutes with G, so that the next one's Gram matrix is G times its square.
    """
    a, b, c = COEFFICIENTS
    product = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    for iteration in range(ITERATIONS):
        rest = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        product = torch.baddbmm(product, rest, product, beta=a) if iteration else rest + a * product
        if iteration < ITERATIONS - 1:
            once = torch.baddbmm(gram, rest, gram, beta=a)
            gram = torch.baddbmm(once, rest, once, beta=a)
    return product


def orthogonalising_flops(matrix: Tensor) -> int:
    """Floating-point operations for one matrix, without the shorter way of long ones in fp32: with m the
    shorter and n the longer side, an iteration is two products of 2 m² n and one of 2 m³."""
    m, n = sorted(matrix.shape)
    return ITERATIONS * (4 * m * m * n + 2 * m**3)


class Muon(Optimizer):
    """Muon (Jordan et al. 2024): steps along the gradient's Nesterov momentum, made orthogonal.

    They are scaled by 0.2 · √(longer side) to the typical size of AdamW's, so that both share a learning rate
    and weight decay (Liu et al. 2025, Muon is Scalable for LLM Training).

    It does what `torch.optim.Muon` does, and faster. Matrices of one shape, lying or standing, are stacked,
    as one product of many small matrices takes a fraction of the time of as many products. Where bf16 is
    emulated, and slow, it computes in fp32. And the processes of a run share the work and the state: each
    keeps the momentum of its own matrices alone, makes their steps, and sends these to the others. Where
    matrices are sharded, each keeps its rows of every momentum, and gets the rest of its own matrices when it
    makes their steps.
    """

    def __init__(
        self, matrices: list[nn.Parameter], lr: float, weight_decay: float, momentum: float, runtime: Runtime
    ) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.runtime = runtime
        self.dtype = torch.bfloat16 if computes_in_bf16(runtime.device) else torch.float32
        self.stacks: list[list[Tensor]] = []
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for matrix in matrices:
            shape = matrix.shape if is_sharded(matrix) else _lying(matrix).shape
            by_shape.setdefault(shape, []).append(matrix)
        for shape, alike in by_shape.items():
            most = max(1, STACKED_NUMBERS // shape.numel()) * runtime.processes
            self.stacks += [alike[first : first + most] for first in range(0, len(alike), most)]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """As in torch's fused optimizers, the learning rate may be a tensor, and a step changes nothing where
        the attribute `found_inf`, a tensor, is 1: so nothing here waits for a GPU."""
        [group] = self.param_groups
        lr, found_inf = group["lr"], getattr(self, "found_inf", None)
        if found_inf is not None:
            lr = lr * (1 - found_inf)
        for stack in self.stacks:
            ours = self._own(stack)
            directions = self._directions(ours, group["momentum"], found_inf) if ours else []
            if is_sharded(stack[0]):
                steps = self._of_rows(directions, stack[0].shape)
            else:
                steps = self._of_all(directions, stack, orthogonalised, self.dtype)
            size = 0.2 * max(stack[0].shape) ** 0.5
            weights = [own(matrix) for matrix in stack]
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
            if isinstance(lr, Tensor):
                torch._foreach_mul_(steps, -lr * size)
                torch._foreach_add_(weights, steps)
            else:
                torch._foreach_add_(weights, steps, alpha=-lr * size)

    def gathered_state(self) -> dict[Tensor, dict[str, Tensor]]:
        """The state of all matrices, in every process, sharded if they are; empty before the first step. All
        have to call it."""
        if not self.state:
            return {}
        found: dict[Tensor, dict[str, Tensor]] = {}
        for stack in self.stacks:
            momenta = [self.state[matrix]["momentum_buffer"] for matrix in self._own(stack)]
            if not is_sharded(stack[0]):
                momenta = self._of_all(momenta, stack, lambda stacked: stacked, stack[0].dtype)
            for matrix, momentum in zip(stack, momenta, strict=True):
                found[matrix] = {"momentum_buffer": momentum.contiguous()}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of this process's own matrices."""
        super().load_state_dict(state_dict)
        ours = {matrix for stack in self.stacks for matrix in self._own(stack)}
        for matrix in self.state.keys() - ours:
            del self.state[matrix]

    def _own(self, stack: list[Tensor]) -> list[Tensor]:
        """Those of a stack of matrices that this process keeps the momentum of."""
        if is_sharded(stack[0]):
            return stack
        return stack[self.runtime.rank :: self.runtime.processes]

    def _directions(self, matrices: list[Tensor], momentum: float, found_inf: Tensor | None) -> list[Tensor]:
        """Nesterov's momenta: averages of the gradients, ahead by one more step of averaging; of sharded
        matrices, their rows here."""
        gradients = [own(matrix.grad) for matrix in matrices if matrix.grad is not None]
        for matrix in matrices:
            if matrix not in self.state:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        averages = [own(self.state[matrix]["momentum_buffer"]) for matrix in matrices]
        if found_inf is not None:  # gradients that leave the averages as they are
            gradients = [torch.where(found_inf > 0, *each) for each in zip(averages, gradients, strict=True)]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        return list(torch._foreach_lerp(gradients, averages, momentum))

    def _of_rows(self, directions: list[Tensor], shape: torch.Size) -> list[Tensor]:
        """This process's rows of the steps of a stack of sharded matrices, given those of their directions.
        Matrices are dealt out in turn; each process gets the rows of its own from all others, and sends them
        their rows of the steps."""
        rank, processes, (rows, columns) = self.runtime.rank, self.runtime.processes, shape
        each, most = -(-len(directions) // processes), -(-rows // processes)
        ours = len(directions[rank::processes])
        # By the number of a matrix among those of its process, the process, the row and the column.
        pieces = torch.zeros(each, processes, most, columns, dtype=self.dtype, device=self.runtime.device)
        for place, direction in zip(pieces.flatten(0, 1), directions, strict=False):
            place[: len(direction)] = direction
        whole = _exchanged(pieces).flatten(1, 2)[:ours, :rows]
        pieces.zero_()
        if ours:
            standing = rows > columns
            steps = orthogonalised(whole.mT if standing else whole)
            pieces.flatten(1, 2)[:ours, :rows] = steps.mT if standing else steps
        returned = _exchanged(pieces).flatten(0, 1)
        return [
            place[: len(direction)].to(direction.dtype)
            for place, direction in zip(returned, directions, strict=False)
        ]

    def _of_all(
        self, ours: list[Tensor], stack: list[Tensor], made: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> list[Tensor]:
        """What `made` makes of a tensor for each matrix of a stack, when it gets them stacked and lying, in a
        type; given those of this process's own matrices."""
        shape, processes = _lying(stack[0]).shape, self.runtime.processes
        if ours:
            stacked = made(torch.stack([_lying(tensor) for tensor in ours]).to(dtype))
        if processes > 1:
            sent = torch.zeros(-(-len(stack) // processes), *shape, dtype=dtype, device=stack[0].device)
            if ours:
                sent[: len(ours)] = stacked
            received = torch.empty(processes, *sent.shape, dtype=dtype, device=sent.device)
            dist.all_gather(list(received), sent)
            # The matrices are dealt out in turn.
            stacked = received.transpose(0, 1).flatten(0, 1)[: len(stack)]
        all_lying = stacked.to(stack[0].dtype).unbind()
        return [
            lying if lying.shape == matrix.shape else lying.T
            for lying, matrix in zip(all_lying, stack, strict=True)
        ]


def _exchanged(pieces: Tensor) -> Tensor:
    """Pieces (count, processes, …), those for each process, to those from each, of the same shape."""
    sent = pieces.transpose(0, 1).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    return received.transpose(0, 1).contiguous()


def _lying(matrix: Tensor) -> Tensor:
    """A matrix, or its transpose: the one with no more rows than columns, whose Gram matrix is smaller."""
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
