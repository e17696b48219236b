"""Cross-entropy of a linear output head, without holding the logits of all tokens at once.

With GPT-2's 50,257 tokens the output head is most of a small model's work, and its logits most of the memory.
So the softmax is taken over one chunk of tokens at a time and turned into its own gradient in place, from
which the gradients of hidden states and weights follow at once. The chunk's logits are then no longer needed,
and the backward pass only scales the gradients.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_TOKENS = 1024  # whose logits are held at once: 206 MB in fp32 with GPT-2's vocabulary
ALIGNED = 64  # matrix products are fastest when their sides are multiples of this; GPT-2's 50,257 is odd


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of each target: logits (tokens, vocab) and targets (tokens,) to nats (tokens,)."""
    return F.cross_entropy(logits, targets, reduction="none")


def capped(logits: Tensor, cap: float) -> Tensor:
    """Logits bounded smoothly to (-cap, cap): cap · tanh(logits / cap). Gemma 2 (2024), section 2."""
    return (logits / cap).tanh_() * cap


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None
) -> Tensor:
    """Mean of `F.cross_entropy(hidden @ weight.T, targets)`, a scalar in nats, for training.

    Under autocast the products are computed in its type, and the loss is summed in fp32.

    Args:
        hidden: (tokens, emb_dim). weight: (vocab, emb_dim). targets: (tokens,), int64.
        softcap: the logits are `capped` by it.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return _LinearCrossEntropy.apply(hidden, weight, targets, dtype, softcap)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        softcap: float | None,
    ) -> Tensor:
        vocab_size = len(weight)
        matrix = F.pad(weight.to(dtype), (0, 0, 0, -vocab_size % ALIGNED))
        nats = torch.zeros((), device=hidden.device)
        hidden_gradients = []
        weight_gradient = torch.zeros_like(weight)
        for rows, wanted in zip(
            hidden.to(dtype).split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True
        ):
            logits = rows @ matrix.T
            if softcap is not None:
                tanh = logits.div_(softcap).tanh_()
                logits = tanh * softcap
            logits[:, vocab_size:] = -torch.inf  # the padding gets probability 0
            nats += _softmax_minus_one_hot(logits, wanted)
            if softcap is not None:
                logits.mul_(tanh.square_().neg_().add_(1))  # the derivative of tanh
            hidden_gradients.append(logits @ matrix)
            weight_gradient += (logits.T @ rows)[:vocab_size]
        ctx.save_for_backward(torch.cat(hidden_gradients), weight_gradient)
        ctx.hidden_dtype = hidden.dtype
        return nats / len(targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        scale = scale / len(hidden_gradient)  # the loss is the mean, the gradients are those of the sum
        return (hidden_gradient * scale).to(ctx.hidden_dtype), weight_gradient * scale, None, None, None


def _softmax_minus_one_hot(logits: Tensor, targets: Tensor) -> Tensor:
    """Turn logits (tokens, vocab) in place into the gradient of their summed cross-entropy: the softmax, less
    1 at the target. Returns that sum, in nats. Probabilities are clamped to fp32's smallest normal number,
    so a token's loss is at most 87 nats."""
    probabilities = torch.softmax(logits, dim=-1, out=logits)
    wanted = torch.arange(len(targets), device=targets.device), targets
    nats = -probabilities[wanted].float().clamp_min(torch.finfo(torch.float32).tiny).log().sum()
    probabilities[wanted] -= 1
    return nats
