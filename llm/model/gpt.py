"""The GPT of the book's chapter 4 (GPT-2's architecture), assembled from parts; its size and its FLOPs.

Modules are created and named as in the book, and draw random numbers in the same order, so that a seed gives
the book's weights and, in fp32, the book's dropout.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from llm.config import ModelConfig
from llm.errors import UserError
from llm.model.attention import MultiHeadAttention, Remember, RememberLayer
from llm.model.cpu import Dropout
from llm.model.loss import SCORED_PARTS, capped, chunk_tokens, linear_cross_entropy
from llm.model.parts import NORMS, POSITIONS, FeedForward, Turns, turns_of

# A function of logits (tokens, vocab_size) and targets (tokens,) that gives each target a number, (tokens,).
Score = Callable[[Tensor, Tensor], Tensor]


class TransformerBlock(nn.Module):
    """Pre-norm block: attention and feed-forward network, each added to the residual stream; one after the
    other, or in parallel (as in GPT-J, Wang & Komatsuzaki 2021)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.att = MultiHeadAttention(config)
        self.ff = FeedForward(config)
        self.norm1 = NORMS[config.norm](config.emb_dim, config.norm_eps)
        self.norm2 = NORMS[config.norm](config.emb_dim, config.norm_eps)
        self.drop_shortcut = Dropout(config.drop_rate)
        self.parallel = config.parallel_blocks
        self.checkpoints_activations = False  # see `GPTModel.checkpoint_activations`
        # Weights of the residual stream, and of the embeddings before the first block.
        self.residual_scalars = nn.Parameter(torch.tensor([1.0, 0.0])) if config.residual_scalars else None

    def forward(
        self,
        x: Tensor,
        embedded: Tensor,
        turns: Turns | None = None,
        remember: RememberLayer | None = None,
        value_embedding: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            x: the residual stream, (batch, time, emb_dim).
            embedded: the embeddings before the first block, of the same shape.
            turns, remember, value_embedding: see `MultiHeadAttention`.
        """
        arguments = x, embedded, turns, remember, value_embedding
        if self.checkpoints_activations and torch.is_grad_enabled():
            return checkpoint(self._forward, *arguments, use_reentrant=False)
        return self._forward(*arguments)

    def _forward(
        self,
        x: Tensor,
        embedded: Tensor,
        turns: Turns | None,
        remember: RememberLayer | None,
        value_embedding: Tensor | None,
    ) -> Tensor:
        if self.residual_scalars is not None:
            x = self.residual_scalars[0] * x + self.residual_scalars[1] * embedded
        attended = x + self.drop_shortcut(self.att(self.norm1(x), turns, remember, value_embedding))
        return attended + self.drop_shortcut(self.ff(self.norm2(x if self.parallel else attended)))


class GPTModel(nn.Module):
    """Token ids (batch, time) to next-token logits (batch, time, vocab_size).

    Besides the book's parts it has those that `ModelConfig` turns on. Value embeddings, residual scalars and
    smeared embeddings are from modded-nanogpt (Jordan et al. 2024, 2025), softcapped logits from Gemma 2
    (2024).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.emb_dim)
        position = POSITIONS[config.position]
        self.pos_emb = position.embedding(config) if position.embedding else None
        self.rotation = position.rotation(config) if position.rotation else None
        # For each dimension, the share of the previous token's embedding that is added to a token's.
        self.smear = nn.Parameter(torch.zeros(config.emb_dim)) if config.smear else None
        self.drop_emb = nn.Dropout(config.drop_rate)
        self.trf_blocks = nn.Sequential(*[TransformerBlock(config) for _ in range(config.n_layers)])
        self.final_norm = NORMS[config.norm](config.emb_dim, config.norm_eps)
        # How generation runs the model, set by llm/generation/inference.py.
        self.cache_dtype = torch.float32  # of the KV cache
        self.captures_steps = True  # whether a step on CUDA is captured as a graph
        self.compiles_steps = False
        # With tied weights there is no second tensor, so nothing is saved, counted or updated twice.
        self.out_head = (
            None if config.tie_weights else nn.Linear(config.emb_dim, config.vocab_size, bias=False)
        )
        # Every other block has value embeddings, including the last.
        with_values = range((config.n_layers - 1) % 2, config.n_layers, 2) if config.value_embeddings else ()
        kv_dim = config.kv_heads * config.head_dim
        self.value_embs = nn.ModuleDict(
            {str(layer): nn.Embedding(config.vocab_size, kv_dim) for layer in with_values}
        )
        if config.init != "torch":
            self._init_as_gpt2()
        if config.mup_base_width is not None:
            self._init_for_width()

    def _init_as_gpt2(self) -> None:
        """Radford et al. 2019, section 2.3: normally distributed weights, with those at the end of a residual
        branch scaled down by the root of the number of branches. With init=zero_projections the latter are 0,
        and so is an untied head: each block starts as the identity (Zhang et al. 2019, Fixup), and all tokens
        as equally likely."""
        for name, parameter in self.named_parameters():
            ends_branch = name.endswith(("out_proj.weight", "ff.layers.2.weight"))
            zero = self.config.init == "zero_projections" and (ends_branch or name == "out_head.weight")
            if name.endswith("bias") or zero:
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                branches = 2 * self.config.n_layers if ends_branch else 1
                nn.init.normal_(parameter, std=0.02 / math.sqrt(branches))

    @torch.no_grad()
    def _init_for_width(self) -> None:
        """Scale the initial weights by the width, relative to the base width (µP; Yang et al. 2022, Tensor
        Programs V, table 8). The blocks' matrices shrink with the root of the width, as torch's defaults do
        anyway, and the logits with the width. The latter is done in the last norm: its weights start smaller,
        and its learning rate is divided by as much (llm/training/optimizers.py). To AdamW that is the same as
        dividing the logits, and no other code has to know about it."""
        if self.config.init != "torch":
            for matrix in block_matrices(self):
                matrix.mul_(self.config.width_ratio**-0.5)
        for parameter in self.final_norm.parameters():
            parameter.div_(self.config.width_ratio)

    def checkpoint_activations(self, wanted: bool) -> None:
        """See `RuntimeConfig`."""
        for block in self.trf_blocks.modules():
            if isinstance(block, TransformerBlock):
                block.checkpoints_activations = wanted

    @property
    def head_weight(self) -> Tensor:
        """The output head's weight, (vocab_size, emb_dim)."""
        return self.tok_emb.weight if self.out_head is None else self.out_head.weight

    def features(
        self,
        idx: Tensor,
        positions: Tensor | None = None,
        remember: Remember | None = None,
        before: Tensor | None = None,
    ) -> Tensor:
        """The final hidden states, which the output head reads, (batch, time, emb_dim).

        Args:
            idx: token ids (batch, time), time at most context_length.
            positions: (time,) or (batch, time); 0, 1, … by default.
            remember: stores keys and values in a cache, see `Remember`.
            before: the token before each row of idx, (batch,); none by default, as at the start of a window.
        """
        if positions is None:
            positions = torch.arange(idx.shape[1], device=idx.device)
        x = self.tok_emb(idx)
        if self.smear is not None:
            first = torch.zeros_like(x[:, :1]) if before is None else self.tok_emb(before[:, None])
            x = x + self.smear * torch.cat([first, x[:, :-1]], dim=1)
        if self.pos_emb is not None:
            x = x + self.pos_emb(positions)
        turns = None if self.rotation is None else turns_of(self.rotation(positions))
        x = embedded = self.drop_emb(x)
        for layer, block in enumerate(self.trf_blocks):
            value_embedding = self.value_embs[str(layer)](idx) if str(layer) in self.value_embs else None
            keep = None if remember is None else partial(remember, layer)
            x = block(x, embedded, turns, keep, value_embedding)
        return self.final_norm(x)

    def logits(self, features: Tensor) -> Tensor:
        """The output head: features (…, emb_dim) to logits (…, vocab_size)."""
        return self._capped(self._products(features))

    def _products(self, features: Tensor) -> Tensor:
        head = self.out_head
        return F.linear(features, self.head_weight) if head is None else head(features)

    def _capped(self, logits: Tensor) -> Tensor:
        cap = self.config.logit_softcap
        return logits if cap is None else capped(logits.float(), cap)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (batch, time, vocab_size) for token ids (batch, time); or, given targets (batch, time),
        their mean cross-entropy in nats, without ever holding all logits at once."""
        features = self.features(idx)
        return self.logits(features) if targets is None else self.loss_of(features, targets)

    def loss_of(self, features: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy in nats of targets (batch, time), given features (batch, time, emb_dim)."""
        return linear_cross_entropy(
            features.flatten(0, 1), self.head_weight, targets.flatten(), self.config.logit_softcap
        )

    @torch.no_grad()
    def score_tokens(self, idx: Tensor, targets: Tensor, *scores: Score) -> list[Tensor]:
        """Score each target (batch, time) by each of `scores`: one fp32 tensor (batch, time) per score.
        Logits are computed a chunk of tokens at a time, as they take vocab_size numbers per token."""
        tokens = chunk_tokens(idx.device, self.config.vocab_size, torch.float32)
        few = tokens // SCORED_PARTS
        wanted_of_parts = iter(targets.flatten().split(few))
        scored = []
        for chunk in self.features(idx).flatten(0, 1).split(tokens):
            for part in self._products(chunk).split(few):
                logits, wanted = self._capped(part).float(), next(wanted_of_parts)
                scored.append([score(logits, wanted).float() for score in scores])
        return [torch.cat(each).view(targets.shape) for each in zip(*scored, strict=True)]


def parameter_count(model: nn.Module) -> int:
    """Number of parameters of a model; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def block_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The matrices within the blocks, in the order of the model's parameters."""
    return [
        parameter
        for name, parameter in model.named_parameters()
        if "trf_blocks" in name and parameter.dim() == 2
    ]


def description(config: ModelConfig) -> str:
    """A model's size, and which parts are not GPT-2's: "4 layers, width 128, …, rotary, rmsnorm"."""
    default = ModelConfig()
    chosen = {name: getattr(config, name) for name in ("position", "norm", "activation")}
    words = [
        f"{config.n_layers} layers, width {config.emb_dim}, {config.n_heads} heads",
        f"{config.n_kv_heads} of keys and values" if config.n_kv_heads else "",
        f"context {config.context_length}",
        *(value for name, value in chosen.items() if value != getattr(default, name)),
        f"hidden width {config.hidden_dim}" if config.hidden_dim else "",
        "QK-norm" if config.qk_norm else "",
        "value embeddings" if config.value_embeddings else "",
        "residual scalars" if config.residual_scalars else "",
        "smeared embeddings" if config.smear else "",
        "parallel blocks" if config.parallel_blocks else "",
        f"logits capped at {config.logit_softcap:g}" if config.logit_softcap else "",
        "projections from zero" if config.init == "zero_projections" else "",
        "" if config.bias else "no biases",
        f"µP from width {config.mup_base_width}" if config.mup_base_width else "",
    ]
    return ", ".join(word for word in words if word)


class _Undrawn(TorchFunctionMode):
    """Skips weight initialisation. On the meta device it would do nothing, but import torch's compiler, which
    takes half a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def without_weights(config: ModelConfig) -> GPTModel:
    """A model on the meta device: it has shapes, but no memory is allocated."""
    with torch.device("meta"), _Undrawn():
        return GPTModel(config)


def parameters_of(config: ModelConfig) -> int:
    """Number of parameters of a model, without building it in full."""
    # Blocks of even and of odd number may differ, so the depth is extrapolated in steps of two.
    few = 2 - config.n_layers % 2
    less, more = (parameter_count(without_weights(replace(config, n_layers=n))) for n in (few, few + 2))
    return less + (config.n_layers - few) // 2 * (more - less)


def at_width(config: ModelConfig, width: int) -> ModelConfig:
    """The same model at another width. Heads keep their size, so their number grows with the width.

    Raises:
        UserError: the width cannot be divided into whole heads.
    """
    kept = {name: getattr(config, name) for name in ("n_heads", "n_kv_heads", "hidden_dim")}
    scaled = {name: size * width // config.emb_dim for name, size in kept.items() if size is not None}
    wider = replace(config, emb_dim=width, **scaled)
    if width % config.head_dim or wider.kv_heads * config.n_heads != wider.n_heads * config.kv_heads:
        step = config.head_dim * config.n_heads // config.kv_heads
        raise UserError(
            f"width {width} cannot be divided into heads of {config.head_dim} as model.emb_dim="
            f"{config.emb_dim} is: make it a multiple of {step}"
        )
    return wider


def matrix_parameters(model: GPTModel) -> int:
    """Number of weights that a token is multiplied by in a forward pass: those of the blocks' linear layers
    and of the output head. Embedding look-ups are no multiplications."""
    layers = [module.weight for module in model.trf_blocks.modules() if isinstance(module, nn.Linear)]
    return sum(weight.numel() for weight in [*layers, model.head_weight])


def training_flops_per_token(model: GPTModel) -> int:
    """Floating-point operations of a forward and backward pass per token.

    6 for each weight of a matrix product, and 12 · layers · width · context for attention: PaLM (Chowdhery et
    al. 2022), appendix B, counting the output head but not embedding look-ups.
    """
    config = model.config
    attention = 12 * config.n_layers * config.emb_dim * config.context_length
    return 6 * matrix_parameters(model) + attention
