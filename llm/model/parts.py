"""The parts that a GPT is assembled from, and the tables that `model.norm`, `model.position` and
`model.activation` choose from.

A new part is a class here and its line in a table. It is then trained, resumed, swept and reported like any
other; an export to a format that cannot describe it refuses.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.config import ModelConfig
from llm.model.kv_cache import Attended

# What generation gives the model to keep keys and values of new tokens, see llm/model/kv_cache.py: a function
# of (layer, keys, values), and the same for one layer.
Remember = Callable[[int, Tensor, Tensor], Attended]
RememberLayer = Callable[[Tensor, Tensor], Attended]


class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016) with the book's parameter names."""

    def __init__(self, emb_dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.scale.shape, self.scale, self.shift, eps=1e-5)


# By `model.norm`: made from emb_dim; (…, emb_dim) to the same shape.
NORMS: dict[str, Callable[[int], nn.Module]] = {"layernorm": LayerNorm}


@dataclass(frozen=True)
class Position:
    """How a model tells positions apart: by what is added to the embeddings, or within attention."""

    # Positions (time,) or (batch, time) to what is added to the token embeddings: (…, time, emb_dim).
    embedding: Callable[[ModelConfig], nn.Module] | None = None
    # Queries or keys (batch, heads, time, head_dim) and their positions to the same shape: rotary codes.
    rotation: Callable[[ModelConfig], nn.Module] | None = None


def learned_embedding(config: ModelConfig) -> nn.Module:
    """GPT-2's: a learned vector for each position of the context."""
    return nn.Embedding(config.context_length, config.emb_dim)


# By `model.position`.
POSITIONS: dict[str, Position] = {"learned": Position(embedding=learned_embedding)}


@dataclass(frozen=True)
class Activation:
    """What stands between the two linear layers of a block's feed-forward network."""

    make: Callable[[], nn.Module]  # (…, inputs · hidden) to (…, hidden)
    inputs: int = 1  # numbers that it takes for each one that it gives; 2 where one gates the other


# By `model.activation`.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": Activation(partial(nn.GELU, approximate="tanh")),  # the tanh form is GPT-2's
}


class MultiHeadAttention(nn.Module):
    """Causal self-attention: (batch, time, emb_dim) to the same shape."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.W_query = nn.Linear(config.emb_dim, config.emb_dim, bias=config.qkv_bias)
        self.W_key = nn.Linear(config.emb_dim, config.emb_dim, bias=config.qkv_bias)
        self.W_value = nn.Linear(config.emb_dim, config.emb_dim, bias=config.qkv_bias)
        self.out_proj = nn.Linear(config.emb_dim, config.emb_dim)
        self.dropout = nn.Dropout(config.drop_rate)
        rotation = POSITIONS[config.position].rotation
        self.rotation = rotation(config) if rotation else None

    def forward(self, x: Tensor, positions: Tensor, remember: RememberLayer | None = None) -> Tensor:
        """`positions` are those of x, (time,) or (batch, time); `remember` keeps keys and values."""
        batch, time, emb_dim = x.shape
        # (batch, heads, time, head_dim)
        queries, keys, values = (
            project(x).view(batch, time, self.n_heads, -1).transpose(1, 2)
            for project in (self.W_query, self.W_key, self.W_value)
        )
        if self.rotation is not None:
            # Angles want fp32, as bf16 cannot tell large positions apart; attention, the values' precision.
            queries, keys = (self.rotation(heads, positions).to(values.dtype) for heads in (queries, keys))
        drop_rate = self.dropout.p if self.training else 0.0
        if drop_rate > 0 and queries.dtype == torch.float32:
            context = self._attend_as_in_the_book(queries, keys, values)
        else:
            mask = None
            if remember is not None:
                keys, values, mask = remember(keys, values)
            context = F.scaled_dot_product_attention(
                queries.to(keys.dtype), keys, values, mask, drop_rate, is_causal=time > 1
            )
        return self.out_proj(context.transpose(1, 2).reshape(batch, time, emb_dim))

    def _attend_as_in_the_book(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The same attention, step by step: fused kernels draw dropout in an order of their own."""
        scores = queries @ keys.transpose(2, 3)  # (batch, heads, time, time)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(diagonal=1)
        weights = torch.softmax(scores.masked_fill(future, -torch.inf) / math.sqrt(keys.shape[-1]), dim=-1)
        return self.dropout(weights) @ values


class FeedForward(nn.Module):
    """Two linear layers, four times as wide between them, with an activation: (…, emb_dim) to the same."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        activation, hidden = ACTIVATIONS[config.activation], 4 * config.emb_dim
        self.layers = nn.Sequential(
            nn.Linear(config.emb_dim, activation.inputs * hidden),
            activation.make(),
            nn.Linear(hidden, config.emb_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
