"""The parts that a GPT is assembled from, and the tables that `model.norm`, `model.position` and
`model.activation` choose from.

A new part is a class here and its line in a table. It is then trained, resumed, swept and reported like any
other; an export to a format that cannot describe it refuses.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.config import ModelConfig
from llm.errors import UserError
from llm.model import cpu
from llm.model.cpu import trains_on_cpu


class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016) with the book's parameter names."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))
        self.shift = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.scale.shape, self.scale, self.shift, self.eps)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang & Sennrich 2019): no mean is taken off, and there is no shift."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if trains_on_cpu(x):
            return cpu.RMSNormalised.apply(x, self.scale, self.eps)
        return F.rms_norm(x, self.scale.shape, self.scale, self.eps)


# By `model.norm`: made from the size of what it normalises and the epsilon; (…, size) to the same shape.
NORMS: dict[str, Callable[[int, float], nn.Module]] = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


class Rotary(nn.Module):
    """Rotary position codes (Su et al. 2021): queries and keys are turned by angles that grow with the
    position, so that their products depend on how far apart they are, and on nothing else.

    The first half of a head's numbers are paired with the second, as in Llama. Pair i turns by
    base^(-2i / head_dim) a token.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        head_dim = config.head_dim
        if head_dim % 2:
            raise UserError(
                f"model.position=rotary turns pairs of numbers: model.emb_dim={config.emb_dim} among "
                f"model.n_heads={config.n_heads} heads gives each {head_dim}, which has to be even"
            )
        # Divided last, as in transformers: at position 500, the last bit of a frequency is 1e-4 of a logit.
        frequencies = 1 / config.rotary_base ** (torch.arange(0, head_dim, 2) / head_dim)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        return positions[..., None] * self.get_buffer("frequencies")


# Of the angles of a rotation, each (…, 1, time, head_dim): the cosines twice, the sines with - and with +.
Turns = tuple[Tensor, Tensor]


def turns_of(angles: Tensor) -> Turns:
    """Angles (…, time, head_dim / 2) made ready to turn heads by, once for all blocks."""
    cos, sin = angles.cos()[..., None, :, :], angles.sin()[..., None, :, :]
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def turned(heads: Tensor, turns: Turns) -> Tensor:
    """Queries or keys (batch, heads, time, head_dim) with their pairs turned, in fp32."""
    cos, sin = turns
    if trains_on_cpu(heads):
        return cpu.Turned.apply(heads, cos, sin)
    heads = heads.float()
    return heads * cos + heads.roll(heads.shape[-1] // 2, dims=-1) * sin


@dataclass(frozen=True)
class Position:
    """How a model tells positions apart: by what is added to the embeddings, or within attention."""

    # Positions (time,) or (batch, time) to what is added to the token embeddings: (…, time, emb_dim).
    embedding: Callable[[ModelConfig], nn.Module] | None = None
    # Positions (time,) or (batch, time) to the angles, in radians and proportional to positions, by which the
    # pairs of numbers of queries and keys are turned: (…, time, head_dim / 2).
    rotation: Callable[[ModelConfig], nn.Module] | None = None


def learned_embedding(config: ModelConfig) -> nn.Module:
    """GPT-2's: a learned vector for each position of the context."""
    return nn.Embedding(config.context_length, config.emb_dim)


# By `model.position`.
POSITIONS: dict[str, Position] = {
    "learned": Position(embedding=learned_embedding),
    "rotary": Position(rotation=Rotary),
}


class SquaredReLU(nn.Module):
    """max(x, 0)² (So et al. 2021, Primer)."""

    def forward(self, x: Tensor) -> Tensor:
        if trains_on_cpu(x):
            return cpu.SquaredReLU.apply(x)
        return F.relu(x).square()


class SwiGLU(nn.Module):
    """Half of the inputs, through SiLU, gates the other half (Shazeer 2020)."""

    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


@dataclass(frozen=True)
class Activation:
    """What stands between the two linear layers of a block's feed-forward network."""

    make: Callable[[], nn.Module]  # (…, inputs · hidden) to (…, hidden)
    inputs: int = 1  # numbers that it takes for each one that it gives; 2 where one gates the other


# By `model.activation`.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": Activation(cpu.TanhGELU),
    "relu2": Activation(SquaredReLU),
    "swiglu": Activation(SwiGLU, inputs=2),
}


def hidden_dim(config: ModelConfig) -> int:
    """The width of a feed-forward network between its two layers. A gated one is by default two thirds as
    wide as GPT-2's, so that it has as many weights (Shazeer 2020), up to the next multiple of 16."""
    if config.hidden_dim is not None:
        return config.hidden_dim
    inputs = ACTIVATIONS[config.activation].inputs
    return 4 * config.emb_dim if inputs == 1 else -(-8 * config.emb_dim // (16 * (1 + inputs))) * 16


def spelled_out(config: ModelConfig) -> ModelConfig:
    """The same model with the numbers that null stands for."""
    return replace(config, hidden_dim=hidden_dim(config), n_kv_heads=config.kv_heads)


class FeedForward(nn.Module):
    """Two linear layers with an activation between them: (…, emb_dim) to the same shape."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        activation, hidden = ACTIVATIONS[config.activation], hidden_dim(config)
        self.layers = nn.Sequential(
            nn.Linear(config.emb_dim, activation.inputs * hidden, bias=config.bias),
            activation.make(),
            nn.Linear(hidden, config.emb_dim, bias=config.bias),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
