"""The GPT of the book's chapter 4 (GPT-2's architecture), assembled from parts; its size and its FLOPs.

Modules are made, named and drawn from in the book's order, so that one seed gives the book's weights,
and in fp32 the book's dropout.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.config import ModelConfig
from llm.model.loss import CHUNK_TOKENS, linear_cross_entropy
from llm.model.parts import NORMS, POSITIONS, FeedForward, MultiHeadAttention, Remember, RememberLayer

# Logits (tokens, vocab_size) and the tokens that came (tokens,) to a number for each (tokens,).
Score = Callable[[Tensor, Tensor], Tensor]


class TransformerBlock(nn.Module):
    """Pre-norm block: attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.att = MultiHeadAttention(config)
        self.ff = FeedForward(config)
        self.norm1 = NORMS[config.norm](config.emb_dim)
        self.norm2 = NORMS[config.norm](config.emb_dim)
        self.drop_shortcut = nn.Dropout(config.drop_rate)

    def forward(self, x: Tensor, positions: Tensor, remember: RememberLayer | None = None) -> Tensor:
        x = x + self.drop_shortcut(self.att(self.norm1(x), positions, remember))
        return x + self.drop_shortcut(self.ff(self.norm2(x)))


class GPTModel(nn.Module):
    """Token ids (batch, time) to next-token logits (batch, time, vocab_size)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.emb_dim)
        position = POSITIONS[config.position]
        self.pos_emb = position.embedding(config) if position.embedding else None
        self.drop_emb = nn.Dropout(config.drop_rate)
        self.trf_blocks = nn.Sequential(*[TransformerBlock(config) for _ in range(config.n_layers)])
        self.final_norm = NORMS[config.norm](config.emb_dim)
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
        x = self.tok_emb(idx)
        if self.pos_emb is not None:
            x = x + self.pos_emb(positions)
        x = self.drop_emb(x)
        for layer, block in enumerate(self.trf_blocks):
            x = block(x, positions, partial(remember, layer) if remember else None)
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
    def score_tokens(self, idx: Tensor, targets: Tensor, *scores: Score) -> list[Tensor]:
        """What each of `scores` makes of the logits at each target (batch, time): as many tensors (batch,
        time), fp32. The logits are computed a chunk at a time, as they take vocab_size numbers a token."""
        chunks = zip(
            self.features(idx).flatten(0, 1).split(CHUNK_TOKENS),
            targets.flatten().split(CHUNK_TOKENS),
            strict=True,
        )
        scored = []
        for features, wanted in chunks:
            logits = self.logits(features).float()
            scored.append([score(logits, wanted).float() for score in scores])
        return [torch.cat(each).view(targets.shape) for each in zip(*scored, strict=True)]


def parameter_count(model: nn.Module) -> int:
    """Parameters of a model, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def parameters_of(config: ModelConfig) -> int:
    """Parameters of a model that is not made: all blocks have as many."""
    with torch.device("meta"):  # just shapes: nothing is allocated
        one, two = (parameter_count(GPTModel(replace(config, n_layers=layers))) for layers in (1, 2))
    return one + (config.n_layers - 1) * (two - one)


def matrix_parameters(model: GPTModel) -> int:
    """Weights of all matrix products of a token's way through the model: those of the blocks' linear layers
    and of the output head. Look-ups in an embedding are no products."""
    layers = [module.weight for module in model.trf_blocks.modules() if isinstance(module, nn.Linear)]
    return sum(weight.numel() for weight in [*layers, model.head_weight])


def training_flops_per_token(model: GPTModel) -> int:
    """Floating-point operations of a forward and a backward pass per token.

    6 for each weight of a matrix product, and 12 · layers · width · context for attention; PaLM
    (Chowdhery et al. 2022), appendix B, with the output head counted and look-ups not.
    """
    config = model.config
    attention = 12 * config.n_layers * config.emb_dim * config.context_length
    return 6 * matrix_parameters(model) + attention
