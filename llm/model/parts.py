"""The parts that a GPT is assembled from, and the tables that `model.norm`, `model.position` and
`model.activation` choose from.

To add a part, write a class here and add it to its table. It can then be trained, resumed, swept and reported
like any other; exports to formats that cannot describe it are refused.
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
    """Root-mean-square normalisation (Zhang & Sennrich 2019): no mean is subtracted, and there is no
    shift."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if trains_on_cpu(x):
            return cpu.RMSNormalised.apply(x, self.scale, self.eps)
        return F.rms_norm(x, self.scale.shape, self.scale, self.eps)


# By `model.norm`: made from (size, epsilon); a module from (…, size) to the same shape.
NORMS: dict[str, Callable[[int, float], nn.Module]] = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


class Rotary(nn.Module):
    """Rotary position embeddings (RoPE, Su et al. 2021): positions to the angles by which queries and keys
    are rotated. Angles grow with the position, so attention scores depend only on how far apart two tokens
    are.

    The first half of a head's dimensions is paired with the second, as in Llama. Pair i rotates by
    base^(-2i / head_dim) per token.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        head_dim = config.head_dim
        if head_dim % 2:
            raise UserError(
                f"model.position=rotary turns pairs of numbers: model.emb_dim={config.emb_dim} among "
                f"model.n_heads={config.n_heads} heads gives each {head_dim}, which has to be even"
            )
        # The division comes last, as in transformers: a frequency's last bit is 1e-4 of a logit at position
        # 500.
        frequencies = 1 / config.rotary_base ** (torch.arange(0, head_dim, 2) / head_dim)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        return positions[..., None] * self.get_buffer("frequencies")


# Rotations of heads: cosines [cos, cos] and sines [-sin, sin] of their angles, each (…, 1, time, head_dim).
Turns = tuple[Tensor, Tensor]


def turns_of(angles: Tensor) -> Turns:
    """The rotations by angles (…, time, head_dim / 2); computed once and used by all blocks."""
    cos, sin = angles.cos()[..., None, :, :], angles.sin()[..., None, :, :]
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def turned(heads: Tensor, turns: Turns) -> Tensor:
    """Queries or keys (batch, heads, time, head_dim) with their pairs rotated, in fp32."""
    cos, sin = turns
    if trains_on_cpu(heads):
        return cpu.Turned.apply(heads, cos, sin)
    heads = heads.float()
    return heads * cos + heads.roll(heads.shape[-1] // 2, dims=-1) * sin


@dataclass(frozen=True)
class Position:
    """How a model encodes positions: in the embeddings, or by rotating queries and keys."""

    # Makes a module from positions (time,) or (batch, time) to what is added to the token embeddings, (…,
    # time, emb_dim).
    embedding: Callable[[ModelConfig], nn.Module] | None = None
    # Makes a module from positions (time,) or (batch, time) to the angles by which pairs of queries' and
    # keys' dimensions are rotated, (…, time, head_dim / 2); in radians, and proportional to the positions.
    rotation: Callable[[ModelConfig], nn.Module] | None = None


def learned_embedding(config: ModelConfig) -> nn.Module:
    """GPT-2's position embedding: a learned vector for each position of the context."""
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
    """SiLU of one half of the inputs gates the other half (Shazeer 2020)."""

    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


@dataclass(frozen=True)
class Activation:
    """The activation between the two linear layers of a block's feed-forward network."""

    make: Callable[[], nn.Module]  # makes a module from (…, inputs · hidden) to (…, hidden)
    inputs: int = 1  # inputs per output: 2 if one half gates the other


# By `model.activation`.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": Activation(cpu.TanhGELU),
    "relu2": Activation(SquaredReLU),
    "swiglu": Activation(SwiGLU, inputs=2),
}


def hidden_dim(config: ModelConfig) -> int:
    """The hidden width of a feed-forward network. By default a gated one is two thirds as wide as GPT-2's,
    rounded up to a multiple of 16, so that it has as many weights (Shazeer 2020)."""
    if config.hidden_dim is not None:
        return config.hidden_dim
    inputs = ACTIVATIONS[config.activation].inputs
    return 4 * config.emb_dim if inputs == 1 else -(-8 * config.emb_dim // (16 * (1 + inputs))) * 16


def spelled_out(config: ModelConfig) -> ModelConfig:
    """The same model, with explicit values where a key is null and depends on others."""
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
