"""Muon, an optimizer whose updates of matrices are orthogonal; computed for stacks of matrices at once."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm.runtime import Runtime, computes_in_bf16
from llm.training.eager import Optimizer
from llm.training.sharding import is_sharded, own

# Coefficients of the polynomial a·x + b·x³ + c·x⁵ that an iteration applies to a matrix's singular values.
# Five iterations bring those above a hundredth of the matrix's norm to between 0.7 and 1.2: not to 1, but
# fast.
COEFFICIENTS = 3.4445, -4.7750, 2.0315
ITERATIONS = 5

STACKED_NUMBERS = 1 << 25  # largest stack; larger matrices keep a device busy by themselves


def orthogonalised(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices near 1 and keep their singular vectors, by Newton–Schulz
    iterations (Jordan et al. 2024, Muon).

    Args:
        matrices: (count, rows, columns); fastest with no more rows than columns.
    """
    a, b, c = COEFFICIENTS
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    if x.dtype == torch.float32 and x.shape[2] >= 2 * x.shape[1]:
        return _product_of_iterations(x @ x.mT) @ x
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _product_of_iterations(gram: Tensor) -> Tensor:
    """The product of all factors by which the iterations multiply wide matrices X, given X Xᵀ (count, rows,
    rows). It takes little more than half the work of multiplying X itself in every iteration, but in bf16 its
    rounding errors grow out of hand.

    Each iteration multiplies X by F = a + b G + c G², where G is the current Gram matrix X Xᵀ. F commutes
    with G, so the next Gram matrix is G F².
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
    """Floating-point operations for one matrix, without the shortcut for wide ones in fp32: with m the
    shorter and n the longer side, an iteration is two products of 2 m² n operations and one of 2 m³."""
    m, n = sorted(matrix.shape)
    return ITERATIONS * (4 * m * m * n + 2 * m**3)


class Muon(Optimizer):
    """Muon (Jordan et al. 2024): steps along the gradient's Nesterov momentum, made orthogonal.

    Steps are scaled by 0.2 · √(longer side) to the typical size of AdamW's, so that both can share a learning
    rate and weight decay (Liu et al. 2025, Muon is Scalable for LLM Training).

    It does what `torch.optim.Muon` does, only faster. Matrices of the same shape (up to transposition) are
    stacked, as one batched product of many small matrices is far faster than as many single ones. Where bf16
    is emulated, and therefore slow, it computes in fp32.

    The processes of a run share the work. Each keeps the momentum of its own matrices only, computes their
    steps, and sends these to the others. If the matrices are sharded, each process keeps its rows of every
    momentum, and gathers its own matrices' momenta to compute their steps.
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
        """Like torch's fused optimizers, accept the learning rate as a tensor, and change nothing if the
        tensor `found_inf`, an attribute, is 1; so that nothing here waits for a GPU."""
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
        """The state of all matrices, in every process, sharded as the matrices are; empty before the first
        step. All processes have to call it."""
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
        """Load the state of this process's own matrices."""
        super().load_state_dict(state_dict)
        ours = {matrix for stack in self.stacks for matrix in self._own(stack)}
        for matrix in self.state.keys() - ours:
            del self.state[matrix]

    def _own(self, stack: list[Tensor]) -> list[Tensor]:
        """The matrices of a stack whose momentum this process keeps."""
        if is_sharded(stack[0]):
            return stack
        return stack[self.runtime.rank :: self.runtime.processes]

    def _directions(self, matrices: list[Tensor], momentum: float, found_inf: Tensor | None) -> list[Tensor]:
        """Nesterov momenta: running averages of the gradients, one averaging step ahead. Of sharded matrices,
        this process's rows."""
        gradients = [own(matrix.grad) for matrix in matrices if matrix.grad is not None]
        for matrix in matrices:
            if matrix not in self.state:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        averages = [own(self.state[matrix]["momentum_buffer"]) for matrix in matrices]
        if found_inf is not None:  # a skipped step must leave the averages as they are
            gradients = [torch.where(found_inf > 0, *each) for each in zip(averages, gradients, strict=True)]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        return list(torch._foreach_lerp(gradients, averages, momentum))

    def _of_rows(self, directions: list[Tensor], shape: torch.Size) -> list[Tensor]:
        """This process's rows of the steps for a stack of sharded matrices, given its rows of their
        directions.

        Matrices are dealt out to the processes in turn. Each process gathers the rows of its own matrices
        from the others, orthogonalises them, and sends everyone their rows of the result.
        """
        rank, processes, (rows, columns) = self.runtime.rank, self.runtime.processes, shape
        each, most = -(-len(directions) // processes), -(-rows // processes)
        ours = len(directions[rank::processes])
        # Indexed by a matrix's number among those of its process, that process, the row and the column.
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
        """Apply `made` to a tensor for each matrix of a stack, shared among the processes.

        Args:
            ours: the tensors for this process's own matrices.
            made: applied to these, stacked and wide, in `dtype`.

        Returns:
            The results for all matrices of the stack, in its matrices' shapes and type.
        """
        shape, processes = _lying(stack[0]).shape, self.runtime.processes
        if ours:
            stacked = made(torch.stack([_lying(tensor) for tensor in ours]).to(dtype))
        if processes > 1:
            sent = torch.zeros(-(-len(stack) // processes), *shape, dtype=dtype, device=stack[0].device)
            if ours:
                sent[: len(ours)] = stacked
            received = torch.empty(processes, *sent.shape, dtype=dtype, device=sent.device)
            dist.all_gather(list(received), sent)
            # Matrices were dealt out in turn.
            stacked = received.transpose(0, 1).flatten(0, 1)[: len(stack)]
        all_lying = stacked.to(stack[0].dtype).unbind()
        return [
            lying if lying.shape == matrix.shape else lying.T
            for lying, matrix in zip(all_lying, stack, strict=True)
        ]


def _exchanged(pieces: Tensor) -> Tensor:
    """Send pieces[:, process] to each process; the pieces received from each, in the same shape (count,
    processes, …)."""
    sent = pieces.transpose(0, 1).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    return received.transpose(0, 1).contiguous()


def _lying(matrix: Tensor) -> Tensor:
    """A matrix or its transpose, whichever has no more rows than columns, and so a small Gram matrix."""
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
