"""Muon, over stacks of matrices: an optimizer whose updates of a matrix are orthogonal."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm.runtime import Runtime, computes_in_bf16

# Of the polynomial a·x + b·x³ + c·x⁵ that is applied to all singular values of a matrix at once. Five times
# over, it brings those above a hundredth of the matrix's norm to between 0.7 and 1.2: not to 1, but fast.
COEFFICIENTS = 3.4445, -4.7750, 2.0315
ITERATIONS = 5

STACKED_NUMBERS = (
    1 << 25
)  # of matrices that are stacked at most; larger ones keep a device busy by themselves


def orthogonalised(matrices: Tensor) -> Tensor:
    """Matrices (count, rows, columns), best with no more rows than columns, with singular values brought near
    1 and singular vectors kept, by Newton–Schulz iterations (Jordan et al. 2024, Muon)."""
    a, b, c = COEFFICIENTS
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def orthogonalising_flops(matrix: Tensor) -> int:
    """Floating-point operations of `orthogonalised` for one matrix: with m the shorter and n the longer side,
    an iteration is two products of 2 m² n and one of 2 m³."""
    m, n = sorted(matrix.shape)
    return ITERATIONS * (4 * m * m * n + 2 * m**3)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): steps along the gradient's Nesterov momentum, made orthogonal.

    They are scaled by 0.2 · √(longer side) to the typical size of AdamW's, so that both share a learning rate
    and weight decay (Liu et al. 2025, Muon is Scalable for LLM Training).

    It does what `torch.optim.Muon` does, and faster. Matrices of one shape, lying or standing, are stacked,
    as one product of many small matrices takes a fraction of the time of as many products. Where bf16 is
    emulated, and slow, it computes in fp32. And the processes of a run share the work and the state: each
    keeps the momentum of its own matrices alone, makes their steps, and sends these to the others.
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
            by_shape.setdefault(_lying(matrix).shape, []).append(matrix)
        for shape, alike in by_shape.items():
            most = max(1, STACKED_NUMBERS // shape.numel()) * runtime.processes
            self.stacks += [alike[first : first + most] for first in range(0, len(alike), most)]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        [group] = self.param_groups
        for stack in self.stacks:
            directions = self._directions(self._own(stack), group["momentum"])
            steps = [*orthogonalised(torch.stack(directions).to(self.dtype))] if directions else []
            steps = self._everybodys(steps, stack, self.dtype)
            size = 0.2 * max(stack[0].shape) ** 0.5
            torch._foreach_mul_(stack, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(stack, steps, alpha=-group["lr"] * size)

    def gathered_state(self) -> dict[Tensor, dict[str, Tensor]]:
        """The state of all matrices, in every process; empty before the first step. All have to call it."""
        if not self.state:
            return {}
        found: dict[Tensor, dict[str, Tensor]] = {}
        for stack in self.stacks:
            own = [_lying(self.state[matrix]["momentum_buffer"]) for matrix in self._own(stack)]
            momenta = self._everybodys(own, stack, stack[0].dtype)
            for matrix, momentum in zip(stack, momenta, strict=True):
                found[matrix] = {"momentum_buffer": momentum.contiguous()}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of this process's own matrices."""
        super().load_state_dict(state_dict)
        own = {matrix for stack in self.stacks for matrix in self._own(stack)}
        for matrix in self.state.keys() - own:
            del self.state[matrix]

    def _own(self, stack: list[Tensor]) -> list[Tensor]:
        """Those of a stack of matrices that this process makes the steps of."""
        return stack[self.runtime.rank :: self.runtime.processes]

    def _directions(self, matrices: list[Tensor], momentum: float) -> list[Tensor]:
        """Nesterov's momenta, which lie: averages of the gradients, ahead by one more step of averaging."""
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        for matrix in matrices:
            if matrix not in self.state:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        averages = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        return [_lying(each) for each in torch._foreach_lerp(gradients, averages, momentum)]

    def _everybodys(self, own: list[Tensor], stack: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """A tensor for each matrix of a stack and of its shape, given this process's own, which lie."""
        processes = self.runtime.processes
        if processes > 1:
            most = -(-len(stack) // processes)
            sent = torch.zeros((most, *_lying(stack[0]).shape), dtype=dtype, device=stack[0].device)
            for place, tensor in enumerate(own):
                sent[place] = tensor
            received = [torch.empty_like(sent) for _ in range(processes)]
            dist.all_gather(received, sent)
            own = [received[number % processes][number // processes] for number in range(len(stack))]
        return [
            lies if lies.shape == matrix.shape else lies.T for lies, matrix in zip(own, stack, strict=True)
        ]


def _lying(matrix: Tensor) -> Tensor:
    """A matrix, or its transpose: the one with no more rows than columns, whose Gram matrix is smaller."""
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
