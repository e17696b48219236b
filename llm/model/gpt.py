"""The GPT of the book's chapter 4 (GPT-2's architecture), its parameter count and its FLOPs.

Modules are made, named and drawn from in the book's order, so that one seed gives the book's weights,
and in fp32 the book's dropout.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.config import ModelConfig
from llm.model.kv_cache import Attended
from llm.model.loss import CHUNK_TOKENS, linear_cross_entropy

# What generation hands to the model to keep (layer, keys, values) of new tokens; see llm/model/kv_cache.py.
Remember = Callable[[int, Tensor, Tensor], Attended]


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

    def forward(self, x: Tensor, remember: Callable[[Tensor, Tensor], Attended] | None = None) -> Tensor:
        batch, time, emb_dim = x.shape
        # (batch, heads, time, head_dim)
        queries, keys, values = (
            project(x).view(batch, time, self.n_heads, -1).transpose(1, 2)
            for project in (self.W_query, self.W_key, self.W_value)
        )
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


class LayerNorm(nn.Module):
    """Layer normalisation with the book's parameter names."""

    def __init__(self, emb_dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.scale.shape, self.scale, self.shift, eps=1e-5)


class FeedForward(nn.Module):
    """Two linear layers, four times as wide between them, with GPT-2's tanh form of GELU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(config.emb_dim, 4 * config.emb_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * config.emb_dim, config.emb_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class TransformerBlock(nn.Module):
    """Pre-LayerNorm block: attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.att = MultiHeadAttention(config)
        self.ff = FeedForward(config)
        self.norm1 = LayerNorm(config.emb_dim)
        self.norm2 = LayerNorm(config.emb_dim)
        self.drop_shortcut = nn.Dropout(config.drop_rate)

    def forward(self, x: Tensor, remember: Callable[[Tensor, Tensor], Attended] | None = None) -> Tensor:
        x = x + self.drop_shortcut(self.att(self.norm1(x), remember))
        return x + self.drop_shortcut(self.ff(self.norm2(x)))


class GPTModel(nn.Module):
    """Token ids (batch, time) to next-token logits (batch, time, vocab_size)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.emb_dim)
        self.pos_emb = nn.Embedding(config.context_length, config.emb_dim)
        self.drop_emb = nn.Dropout(config.drop_rate)
        self.trf_blocks = nn.Sequential(*[TransformerBlock(config) for _ in range(config.n_layers)])
        self.final_norm = LayerNorm(config.emb_dim)
        self.cache_dtype = torch.float32  # of keys and values that generation keeps
        self.compiled_features: Callable[..., Tensor] | None = None  # `features` for steps of one shape
        # With tied weights there is no second tensor, so none is saved, counted or stepped twice.
        self.out_head = (
            None if config.tie_weights else nn.Linear(config.emb_dim, config.vocab_size, bias=False)
        )
        if config.init == "gpt2":
            self._init_as_gpt2()

    def _init_as_gpt2(self) -> None:
        """Radford et al. 2019, section 2.3: normal weights, those that end a residual branch scaled down
        by the root of the number of branches."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                ends_branch = name.endswith(("out_proj.weight", "ff.layers.2.weight"))
                branches = 2 * self.config.n_layers if ends_branch else 1
                nn.init.normal_(parameter, std=0.02 / math.sqrt(branches))

    @property
    def head_weight(self) -> Tensor:
        """The output head: (vocab_size, emb_dim)."""
        return self.tok_emb.weight if self.out_head is None else self.out_head.weight

    def features(
        self, idx: Tensor, positions: Tensor | None = None, remember: Remember | None = None
    ) -> Tensor:
        """Token ids (batch, time), time at most context_length, to what the output head reads:
        (batch, time, emb_dim). Positions are 0, 1, … unless given, (batch, time)."""
        if positions is None:
            positions = torch.arange(idx.shape[1], device=idx.device)
        x = self.drop_emb(self.tok_emb(idx) + self.pos_emb(positions))
        for layer, block in enumerate(self.trf_blocks):
            x = block(x, partial(remember, layer) if remember else None)
        return self.final_norm(x)

    def logits(self, features: Tensor) -> Tensor:
        """Through the output head: (…, emb_dim) to (…, vocab_size)."""
        return F.linear(features, self.head_weight) if self.out_head is None else self.out_head(features)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (batch, time, vocab_size); or, given targets (batch, time), their mean cross-entropy in
        nats, without ever holding all logits at once."""
        features = self.features(idx)
        if targets is None:
            return self.logits(features)
        return linear_cross_entropy(features.flatten(0, 1), self.head_weight, targets.flatten())

    @torch.no_grad()
    def token_losses(self, idx: Tensor, targets: Tensor) -> Tensor:
        """The cross-entropy of each target (batch, time) in nats: (batch, time), fp32."""
        losses = [
            F.cross_entropy(self.logits(rows).float(), wanted, reduction="none")
            for rows, wanted in zip(
                self.features(idx).flatten(0, 1).split(CHUNK_TOKENS),
                targets.flatten().split(CHUNK_TOKENS),
                strict=True,
            )
        ]
        return torch.cat(losses).view(targets.shape)


def parameter_count(model: nn.Module) -> int:
    """Parameters of a model, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def training_flops_per_token(config: ModelConfig) -> int:
    """Floating-point operations of a forward and a backward pass per token.

    6 for each weight of a matrix product, and 12 · layers · width · context for attention; PaLM
    (Chowdhery et al. 2022), appendix B, with the output head counted and look-ups not.
    """
    block_weights = 12 * config.emb_dim**2
    head_weights = config.vocab_size * config.emb_dim
    attention = 12 * config.n_layers * config.emb_dim * config.context_length
    return 6 * (config.n_layers * block_weights + head_weights) + attention
