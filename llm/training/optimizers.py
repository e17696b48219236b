"""AdamW and Muon, and which parameters each steps."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from llm.config import OptimizerConfig
from llm.errors import UserError


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

    def state(self, model: nn.Module) -> dict[str, dict[str, Tensor]]:
        """The averages that the optimizers keep, by the parameter's name in `model` and their own, as in
        {"tok_emb.weight": {"exp_avg": …}}; empty before the first step. Hyperparameters are the config's."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        return {names[parameter]: state for part in self.parts for parameter, state in part.state.items()}

    def load_state(self, model: nn.Module, state: dict[str, dict[str, Tensor]], source: str) -> None:
        """The inverse of `state`.

        Raises:
            UserError: it is that of another optimizer or another model.
        """
        names = {parameter: name for name, parameter in model.named_parameters()}
        for part in self.parts:
            parameters = [parameter for group in part.param_groups for parameter in group["params"]]
            wanted = _STATE_KEYS[type(part)] if state else set()
            for parameter in parameters:
                averages = state.get(names[parameter], {})
                shapes = {tensor.shape for key, tensor in averages.items() if key != "step"}
                if averages.keys() != wanted or not shapes <= {parameter.shape}:
                    raise UserError(
                        f"{source} holds the state of another optimizer or model: {names[parameter]} needs "
                        f"{', '.join(sorted(wanted))} of its shape"
                    )
            numbered = {
                number: {key: tensor.clone() for key, tensor in state[names[parameter]].items()}
                for number, parameter in enumerate(parameters)
                if names[parameter] in state
            }
            part.load_state_dict({"state": numbered, "param_groups": part.state_dict()["param_groups"]})


_STATE_KEYS: dict[type, set[str]] = {
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
    torch.optim.Muon: {"momentum_buffer"},
}


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
