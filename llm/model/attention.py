"""Causal self-attention: the book's, with the parts that newer models add to it."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.config import ModelConfig
from llm.model.cpu import SHORT, CausalAttention, ProjectedTogether, trains_in_bf16_on_cpu, trains_on_cpu
from llm.model.kv_cache import Attended
from llm.model.parts import RMSNorm, Turns, turned

# Given by generation to store the keys and values of new tokens in a cache, see llm/model/kv_cache.py: a
# function of (layer, keys, values) that returns what to attend to; and the same for a single layer.
Remember = Callable[[int, Tensor, Tensor], Attended]
RememberLayer = Callable[[Tensor, Tensor], Attended]


def projected_together(x: Tensor, layers: Sequence[nn.Linear], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The outputs of several linear layers for x (…, inputs), by a single product, which a GPU computes
    faster than several smaller ones: (…, outputs) of each layer."""
    weight = torch.cat([layer.weight.to(dtype) for layer in layers])
    biases = [layer.bias.to(dtype) for layer in layers if layer.bias is not None]
    together = F.linear(x.to(dtype), weight, torch.cat(biases) if biases else None)
    return together.split([len(layer.weight) for layer in layers], dim=-1)


class MultiHeadAttention(nn.Module):
    """Causal self-attention: (batch, time, emb_dim) to the same shape.

    With fewer key/value heads than query heads, each serves a group of query heads (grouped-query attention,
    Ainslie et al. 2023), and the KV cache shrinks accordingly. Queries and keys may be normalised in each
    head (QK-norm, Henry et al. 2020; with RMSNorm, as in Qwen 3), which bounds their products.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        kv_dim = config.kv_heads * config.head_dim
        self.W_query = nn.Linear(config.emb_dim, config.emb_dim, bias=config.qkv_bias)
        self.W_key = nn.Linear(config.emb_dim, kv_dim, bias=config.qkv_bias)
        self.W_value = nn.Linear(config.emb_dim, kv_dim, bias=config.qkv_bias)
        self.W_together: nn.Module | None = None  # for inference: these three stacked
        self.out_proj = nn.Linear(config.emb_dim, config.emb_dim, bias=config.bias)
        self.dropout = nn.Dropout(config.drop_rate)
        self.query_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.groups = config.n_heads // config.kv_heads  # query heads per key/value head

    def forward(
        self,
        x: Tensor,
        turns: Turns | None = None,
        remember: RememberLayer | None = None,
        value_embedding: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            x: (batch, time, emb_dim).
            turns: with rotary positions, the rotations of queries and keys.
            remember: stores keys and values in a cache, and returns what to attend to.
            value_embedding: added to the values, (batch, time, kv_dim).
        """
        batch, time, emb_dim = x.shape
        queries, keys, values = self._projected(x)
        if value_embedding is not None:
            values = values + value_embedding.to(values.dtype)
        # (batch, heads, time, head_dim)
        queries, keys, values = (
            projected.view(batch, time, -1, self.head_dim).transpose(1, 2)
            for projected in (queries, keys, values)
        )
        # Norms and rotations are computed in fp32, as bf16 cannot tell large positions apart; attention in
        # the precision of the values.
        if self.query_norm is not None and self.key_norm is not None:
            queries, keys = self.query_norm(queries.float()), self.key_norm(keys.float())
        if turns is not None:
            queries, keys = turned(queries, turns), turned(keys, turns)
        queries, keys = queries.to(values.dtype), keys.to(values.dtype)
        drop_rate = self.dropout.p if self.training else 0.0
        if drop_rate > 0 and queries.dtype == torch.float32:
            context = self._attend_as_in_the_book(queries, keys, values)
        elif trains_in_bf16_on_cpu(queries) and remember is None and time <= SHORT:
            context = CausalAttention.apply(queries, keys, values, drop_rate)
        else:
            mask = None
            if remember is not None:
                keys, values, mask = remember(keys, values)
            context = F.scaled_dot_product_attention(
                queries.to(keys.dtype),
                keys,
                values,
                mask,
                drop_rate,
                is_causal=mask is None and time > 1,
                enable_gqa=self.groups > 1,
            )
        return self.out_proj(context.transpose(1, 2).reshape(batch, time, emb_dim))

    def _projected(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values (batch, time, …)."""
        if self.W_together is not None:
            return self.W_together(x).split([x.shape[-1], *2 * [x.shape[-1] // self.groups]], dim=-1)
        layers = self.W_query, self.W_key, self.W_value
        if trains_on_cpu(x) and torch.is_autocast_enabled("cpu") and self.W_query.bias is None:
            return ProjectedTogether.apply(x, *(layer.weight for layer in layers))
        if x.is_cuda and torch.is_autocast_enabled("cuda"):
            return projected_together(x, layers, torch.get_autocast_dtype("cuda"))
        return tuple(layer(x) for layer in layers)

    def _attend_as_in_the_book(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The same attention step by step, so that dropout is drawn in the book's order, unlike in fused
        kernels."""
        if self.groups > 1:
            keys, values = (heads.repeat_interleave(self.groups, dim=1) for heads in (keys, values))
        scores = queries @ keys.transpose(2, 3)  # (batch, heads, time, time)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(diagonal=1)
        weights = torch.softmax(scores.masked_fill(future, -torch.inf) / math.sqrt(keys.shape[-1]), dim=-1)
        return self.dropout(weights) @ values
