"""AdamW and Muon, which parameters each steps, and the table that `optimizer.name` chooses from."""

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
    """The optimizers of one model: stepped, saved and given a learning rate together."""

    def __init__(self, parts: list[torch.optim.Optimizer], runtime: Runtime) -> None:
        self.parts, self.runtime = parts, runtime
        # Whether a step can be queued before anybody knows what it depends on: the learning rate, and whether
        # the step is skipped, are then numbers on the device.
        self.can_queue = runtime.queues and all(map(_can_be_queued, parts))
        if self.can_queue:
            for part in parts:  # a CUDA graph may capture steps; torch warns of those that none does
                part._warned_capturable_if_run_uncaptured = True
                for group in part.param_groups:
                    group["capturable"] = True
        # By the share of the learning rate: a graph reads where it was captured with.
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
        """Queue a step that changes nothing where `skip`, a truth value on the device, holds."""
        for part in self.parts:
            part.found_inf = skip.float()  # type: ignore[attr-defined]  # made for torch's GradScaler
        self.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state(self, model: nn.Module) -> State:
        """What the optimizers keep for each parameter, as in {"tok_emb.weight": {"exp_avg": …}}: of a sharded
        one, a process's rows. Empty before the first step. Hyperparameters are not state: they come from the
        config. All processes of a run have to call it, as each may keep the state of other parameters.

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
            UserError: it is the state of another model.
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
    """A copy of what an optimizer keeps for a parameter, sharded as that is where it is of its shape."""
    if not isinstance(value, Tensor):
        return value
    if is_sharded(value):
        return value
    return sharded_like(parameter, value) if value.shape == parameter.shape else value.clone()


def _share(group: dict[str, Any]) -> float:
    """What parameters of a group get of the learning rate; see model.mup_base_width."""
    return group.get("lr_share", 1.0)


def _can_be_queued(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it takes its learning rate, and `found_inf`, as tensors; torch's AdamW is an Adam."""
    fused_adam = isinstance(optimizer, torch.optim.Adam) and bool(optimizer.defaults["fused"])
    return fused_adam or isinstance(optimizer, Muon)


def adamw(model: nn.Module, config: OptimizerConfig, runtime: Runtime) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov & Hutter 2019) over all parameters."""
    return [_adamw(model, model.parameters(), config)]


def muon(model: nn.Module, config: OptimizerConfig, runtime: Runtime) -> list[torch.optim.Optimizer]:
    """Muon over the matrices of the blocks, AdamW over the rest.

    Muon's steps are orthogonal, so all their singular values grow with `Muon`'s scale, the root of the longer
    side. With the rate divided by the root of the width ratio they stay the same at any width, as those of a
    weight have to for all widths to learn alike (Yang et al. 2023, "A Spectral Condition for Feature
    Learning").
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

    Its steps' entries are of one size at any width, and those of a matrix add up over its inputs. So the rate
    of the blocks' matrices is divided by the width ratio, and that of all others stays (Yang et al. 2022,
    Tensor Programs V, table 8), but for the last norm's; see `GPTModel`.
    """
    ratio = _width_ratio(model)
    narrowed = {*map(id, block_matrices(model))}
    if isinstance(model, GPTModel):
        narrowed |= {*map(id, model.final_norm.parameters())}
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for parameter in parameters:
        scale = 1 / ratio if id(parameter) in narrowed else 1.0
        # What a weight loses in an update is lr · weight_decay of it: as much at any width.
        decay = config.weight_decay / scale if config.decay_all or parameter.dim() == 2 else 0.0
        # torch steps those that are sharded apart from others.
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
    """See `ModelConfig`; 1 for a model of another library."""
    return model.config.width_ratio if isinstance(model, GPTModel) else 1.0


@dataclass(frozen=True)
class OptimizerEntry:
    """An optimizer, and what the rest of the program needs to know of it."""

    # To optimizers that together step every parameter of a model; lr is set before each step.
    build: Callable[[nn.Module, OptimizerConfig, Runtime], list[torch.optim.Optimizer]]
    # Floating-point operations of an update, where they are more than a few per parameter.
    flops: Callable[[nn.Module], int] = lambda model: 0
    # Whether its state is that of one AdamW over all parameters, as in the book's model_and_optimizer.pth.
    has_adamw_state: bool = False


# By `optimizer.name`.
OPTIMIZERS: dict[str, OptimizerEntry] = {
    "adamw": OptimizerEntry(adamw, has_adamw_state=True),
    "muon": OptimizerEntry(muon, flops=muon_flops),
}


def build_optimizers(model: nn.Module, config: OptimizerConfig, runtime: Runtime) -> Optimizers:
    """The optimizers that `config.name` chooses, for all parameters of a model."""
    return Optimizers(OPTIMIZERS[config.name].build(model, config, runtime), runtime)
