"""AdamW and Muon, and which parameters each steps."""

from collections.abc import Iterable

import torch
from torch import nn

from llm.config import OptimizerConfig


class Optimizers:
    """The optimizers of one model, stepped, saved and given a learning rate together."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts

    def set_lr(self, lr: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def build_optimizers(model: nn.Module, config: OptimizerConfig) -> Optimizers:
    """AdamW over all parameters; or Muon over the matrices of the blocks and AdamW over the rest.

    Muon (Jordan et al. 2024) takes AdamW's learning rate, its updates scaled to AdamW's typical size
    (Liu et al. 2025, Muon is Scalable for LLM Training).
    """
    if config.name == "adamw":
        return Optimizers([_adamw(model.parameters(), config)])
    matrices = _block_matrices(model)
    taken = set(map(id, matrices))
    rest = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    muon = torch.optim.Muon(
        matrices,
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    return Optimizers([muon, _adamw(rest, config)])


def _adamw(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019). Weight decay is for matrices, unless config.decay_all."""
    parameters = list(parameters)
    decayed = [parameter for parameter in parameters if config.decay_all or parameter.dim() == 2]
    others = [parameter for parameter in parameters if not (config.decay_all or parameter.dim() == 2)]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    beta1, beta2 = config.betas
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(beta1, beta2),
        eps=config.eps,
        fused=True,
    )


def orthogonalisation_flops(model: nn.Module, config: OptimizerConfig) -> int:
    """Floating-point operations of Muon's five Newton–Schulz steps in one update, 0 for AdamW.

    A step over a matrix of m rows and n columns, m the smaller, is two products of 2 m² n and one of 2 m³.
    """
    if config.name == "adamw":
        return 0
    shapes = [sorted(matrix.shape) for matrix in _block_matrices(model)]
    return sum(5 * (4 * m * m * n + 2 * m**3) for m, n in shapes)


def _block_matrices(model: nn.Module) -> list[nn.Parameter]:
    return [
        parameter
        for name, parameter in model.named_parameters()
        if "trf_blocks" in name and parameter.dim() == 2
    ]
