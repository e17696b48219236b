"""AdamW and Muon, which parameters each of them updates, and the table that `optimizer.name` chooses from."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llm.config import OptimizerConfig
from llm.errors import UserError
from llm.model.gpt import GPTModel, block_matrices
from llm.runtime import Runtime
from llm.training.eager import AdamW
from llm.training.muon import Muon, orthogonalising_flops
from llm.training.sharding import is_sharded, sharded_like

State = dict[str, dict[str, Tensor | float]]  # by the parameter's name, then by the optimizer's own name


class Optimizers:
    """All optimizers of one model: stepped, saved and given their learning rate together."""

    def __init__(self, parts: list[torch.optim.Optimizer], runtime: Runtime) -> None:
        self.parts, self.runtime = parts, runtime
        # Whether a step can be queued before the host knows what it depends on: the learning rate, and
        # whether to skip it, are then tensors on the device.
        self.can_queue = runtime.queues and all(map(_can_be_queued, parts))
        if self.can_queue:
            for part in parts:  # capturable by a CUDA graph; without a warning for steps that none captures
                part._warned_capturable_if_run_uncaptured = True
                for group in part.param_groups:
                    group["capturable"] = True
        # By `lr_share`. A graph keeps reading the tensors it was captured with, so these are filled in place.
        self._rates: dict[float, Tensor] = {}
        if self.can_queue:
            shares = {_share(group) for part in parts for group in part.param_groups}
            self._rates = {share: torch.zeros((), device=runtime.device) for share in shares}

    def set_lr(self, lr: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                scaled = lr * _share(group)
                group["lr"] = self._rates[_share(group)].fill_(scaled) if self.can_queue else scaled

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def step_unless(self, skip: Tensor) -> None:
        """Queue a step that changes nothing if `skip`, a boolean on the device, is true."""
        for part in self.parts:
            part.found_inf = skip.float()  # type: ignore[attr-defined]  # made for torch's GradScaler
        self.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state(self, model: nn.Module) -> State:
        """What the optimizers keep for each parameter, as in {"tok_emb.weight": {"exp_avg": …}}; of a sharded
        parameter, this process's rows. Empty before the first step. Hyperparameters are not included: they
        come from the config. All processes of a run have to call it, as each may keep other parameters'
        state.

        Raises:
            UserError: an optimizer keeps something that is neither a tensor nor a number.
        """
        names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        found: State = {}
        for part in self.parts:
            whole = part.gathered_state() if isinstance(part, Muon) else part.state
            for parameter, kept in whole.items():
                for key, value in kept.items():
                    if value is not None and not isinstance(value, Tensor | int | float):
                        raise UserError(
                            f"{type(part).__name__} keeps {key}, a {type(value).__name__}, for "
                            f"{names[parameter]}: checkpoints hold only tensors and numbers"
                        )
                found[names[parameter]] = {key: value for key, value in kept.items() if value is not None}
        return found

    def load_state(self, model: nn.Module, state: State, source: str) -> None:
        """The inverse of `state`.

        Raises:
            UserError: `state` is that of another model.
        """
        names = {parameter: name for name, parameter in model.named_parameters()}
        if unknown := state.keys() - names.values():
            raise UserError(
                f"{source} holds optimizer state for {min(unknown)}, which this model does not have"
            )
        for part in self.parts:
            parameters = [parameter for group in part.param_groups for parameter in group["params"]]
            numbered = {
                number: {key: _taken(value, parameter) for key, value in state[names[parameter]].items()}
                for number, parameter in enumerate(parameters)
                if names[parameter] in state
            }
            part.load_state_dict({"state": numbered, "param_groups": part.state_dict()["param_groups"]})


def _taken(value: Tensor | float, parameter: Tensor) -> Tensor | float:
    """A copy of a piece of optimizer state; one of the parameter's shape is sharded as the parameter is."""
    if not isinstance(value, Tensor) or is_sharded(value):
        return value
    return sharded_like(parameter, value) if value.shape == parameter.shape else value.clone()


def _share(group: dict[str, Any]) -> float:
    """The share of the learning rate that a parameter group gets; see model.mup_base_width."""
    return group.get("lr_share", 1.0)


def _can_be_queued(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer accepts its learning rate and `found_inf` as tensors; torch's AdamW is an Adam."""
    fused_adam = isinstance(optimizer, torch.optim.Adam) and bool(optimizer.defaults["fused"])
    return fused_adam or isinstance(optimizer, Muon)


def adamw(model: nn.Module, config: OptimizerConfig, runtime: Runtime) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov & Hutter 2019) over all parameters."""
    return [_adamw(model, model.parameters(), config)]


def muon(model: nn.Module, config: OptimizerConfig, runtime: Runtime) -> list[torch.optim.Optimizer]:
    """Muon over the matrices of the blocks, AdamW over the rest.

    Muon's steps are orthogonal, so all their singular values grow with the scale of `Muon`, the root of the
    longer side. Dividing the rate by the root of the width ratio keeps them the same at any width, as it has
    to be for learning rates to transfer (Yang et al. 2023, "A Spectral Condition for Feature Learning").
    """
    matrices = block_matrices(model)
    taken = set(map(id, matrices))
    rest = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    scale = _width_ratio(model) ** -0.5
    orthogonalised = Muon(matrices, config.lr * scale, config.weight_decay / scale, config.momentum, runtime)
    orthogonalised.param_groups[0]["lr_share"] = scale
    return [orthogonalised, _adamw(model, rest, config)]


def muon_flops(model: nn.Module) -> int:
    """Floating-point operations of Muon's iterations in one update."""
    return sum(orthogonalising_flops(matrix) for matrix in block_matrices(model))


def _adamw(model: nn.Module, parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> AdamW:
    """AdamW with weight decay on matrices only, unless config.decay_all.

    The entries of AdamW's steps have the same size at any width, and a matrix adds them up over its inputs.
    So the rate of the blocks' matrices is divided by the width ratio, and that of all other parameters is not
    (Yang et al. 2022, Tensor Programs V, table 8), except for the last norm's; see `GPTModel`.
    """
    ratio = _width_ratio(model)
    narrowed = {*map(id, block_matrices(model))}
    if isinstance(model, GPTModel):
        narrowed |= {*map(id, model.final_norm.parameters())}
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for parameter in parameters:
        scale = 1 / ratio if id(parameter) in narrowed else 1.0
        # An update shrinks weights by lr · weight_decay, which is to be the same at any width.
        decay = config.weight_decay / scale if config.decay_all or parameter.dim() == 2 else 0.0
        # torch cannot step sharded parameters and others in one group.
        groups.setdefault((scale, decay, is_sharded(parameter)), []).append(parameter)
    beta1, beta2 = config.betas
    return AdamW(
        [
            {"params": alike, "lr": config.lr * scale, "weight_decay": decay, "lr_share": scale}
            for (scale, decay, _), alike in groups.items()
        ],
        betas=(beta1, beta2),
        eps=config.eps,
        fused=True,
    )


def _width_ratio(model: nn.Module) -> float:
    """See `ModelConfig.width_ratio`; 1 for a model of another library."""
    return model.config.width_ratio if isinstance(model, GPTModel) else 1.0


@dataclass(frozen=True)
class OptimizerEntry:
    """An optimizer, and what the rest of the program needs to know about it."""

    # Returns optimizers that together step every parameter of the model. Their lr is set before each step.
    build: Callable[[nn.Module, OptimizerConfig, Runtime], list[torch.optim.Optimizer]]
    # Floating-point operations of a step, if more than a few per parameter.
    flops: Callable[[nn.Module], int] = lambda model: 0
    # Whether its state is that of one AdamW over all parameters, as in the book's model_and_optimizer.pth.
    has_adamw_state: bool = False


# By `optimizer.name`.
OPTIMIZERS: dict[str, OptimizerEntry] = {
    "adamw": OptimizerEntry(adamw, has_adamw_state=True),
    "muon": OptimizerEntry(muon, flops=muon_flops),
}


def build_optimizers(model: nn.Module, config: OptimizerConfig, runtime: Runtime) -> Optimizers:
    """The optimizers that `config.name` chooses, over all parameters of a model."""
    return Optimizers(OPTIMIZERS[config.name].build(model, config, runtime), runtime)
