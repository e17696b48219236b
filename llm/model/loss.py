"""Cross-entropy of a linear output head, without holding the logits of all tokens at once.

With GPT-2's 50,257 tokens the output head is most of a small model's work, and its logits most of the memory.
So the softmax is taken over one chunk of tokens at a time and turned into the gradient of the logits in
place, from which the gradients of hidden states and weights are computed right away. The chunk's logits are
then no longer needed, and the backward pass only scales these gradients.
"""

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm.device import gpu_memory_bytes, gpu_stood_for
from llm.model.cpu import IN_CACHE

CHUNK_TOKENS = 1024  # their logits take 206 MB in fp32 with GPT-2's vocabulary
# On CUDA chunks are larger, up to this share of its memory: a GPU is fastest at large products, and every
# chunk adds to the whole gradient of the head's weights.
CUDA_CHUNK_TOKENS, CUDA_CHUNK_SHARE = 16_384, 1 / 32
SCORED_PARTS = 16  # into which a chunk is split for scoring, which takes several fp32 numbers per logit
ALIGNED = 64  # matrix products are fastest if their sides are multiples of this; GPT-2's 50,257 is odd


def chunk_tokens(device: torch.device, vocab_size: int, dtype: torch.dtype) -> int:
    """How many tokens' logits are held at once. It depends on a GPU's total memory, not on what is free:
    chunks determine the order in which gradients are summed, which has to be the same in a rerun."""
    memory = gpu_memory_bytes(device) if device.type == "cuda" else gpu_stood_for()
    if memory is None:
        return CHUNK_TOKENS
    fit = CUDA_CHUNK_SHARE * memory / (vocab_size * dtype.itemsize)
    return min(max(CHUNK_TOKENS, 2 ** int(math.log2(fit))), CUDA_CHUNK_TOKENS)


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each target: logits (tokens, vocab) and targets (tokens,) to nats (tokens,)."""
    return F.cross_entropy(logits, targets, reduction="none")


def capped(logits: Tensor, cap: float) -> Tensor:
    """Logits smoothly bounded to (-cap, cap): cap · tanh(logits / cap). Gemma 2 (2024), section 2."""
    # tanh(x) = 2 · sigmoid(2x) - 1. On a CPU, torch's tanh takes ten times as long as its sigmoid.
    return torch.sigmoid(logits * (2 / cap)) * (2 * cap) - cap


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None
) -> Tensor:
    """Mean of `F.cross_entropy(hidden @ weight.T, targets)`, a scalar in nats, for training.

    Under autocast the products are computed in autocast's type; the loss is always summed in fp32.

    Args:
        hidden: (tokens, emb_dim).
        weight: (vocab, emb_dim).
        targets: (tokens,), int64.
        softcap: cap of the logits, see `capped`.
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
        matrix = weight.new_empty(-(-vocab_size // ALIGNED) * ALIGNED, weight.shape[1], dtype=dtype)
        matrix[:vocab_size], matrix[vocab_size:] = weight, 0
        nats = torch.zeros((), device=hidden.device)
        hidden_gradients = []
        weight_gradient = None
        chunk = chunk_tokens(hidden.device, vocab_size, dtype)
        for rows, wanted in zip(hidden.to(dtype).split(chunk), targets.split(chunk), strict=True):
            logits = rows @ matrix.T
            if softcap is None:
                nats += _softmax_minus_one_hot(logits, wanted, vocab_size)
            else:
                few = max(1, IN_CACHE // len(matrix))
                for some, theirs in zip(logits.split(few), wanted.split(few), strict=True):
                    nats += _capped_softmax_minus_one_hot(some, theirs, softcap, vocab_size)
            hidden_gradients.append(logits @ matrix)
            weight_gradient = plus_product(weight_gradient, logits.T, rows, weight.dtype)
        assert weight_gradient is not None  # there is a token
        ctx.save_for_backward(torch.cat(hidden_gradients), weight_gradient[:vocab_size])
        ctx.hidden_dtype = hidden.dtype
        return nats / len(targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        scale = scale / len(hidden_gradient)  # the loss is the mean, the gradients are those of the sum
        # In place, as the weights' gradient can be the largest tensor of all.
        hidden_gradient = (hidden_gradient * scale).to(ctx.hidden_dtype)
        return hidden_gradient, weight_gradient.mul_(scale), None, None, None


def plus_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """total + left @ right in `dtype`, computed in place; just the product if there is no total yet."""
    if left.dtype != dtype and sums_products(left.device, left.dtype, dtype):
        # cuBLAS adds to an fp32 total directly, without writing and reading a bf16 product of up to 77 MB.
        if total is None:
            return torch.mm(left, right, out_dtype=dtype)
        return torch.addmm(total, left, right, out_dtype=dtype, out=total)
    product = left @ right
    return product.to(dtype) if total is None else total.add_(product)


@cache
def sums_products(device: torch.device, dtype: torch.dtype, total: torch.dtype) -> bool:
    """Whether torch can add a product of `dtype` matrices to a total of another type. It can on CUDA, except
    for some versions, which is why it is tried."""
    if device.type != "cuda":
        return False
    ones, threes = torch.ones(16, 16, dtype=dtype, device=device), torch.full((16, 16), 3.0, device=device)
    try:
        torch.addmm(threes, ones, ones, out_dtype=total, out=threes)
    except (RuntimeError, TypeError):
        return False
    return bool(threes.eq(19).all())


def _softmax_minus_one_hot(logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Turn logits (tokens, vocab_size and padding) in place into the gradient of their summed cross-entropy:
    softmax, minus 1 at the target. Returns that sum, in nats. Probabilities are clamped to fp32's smallest
    normal number, so a token's loss is at most 87 nats."""
    logits[:, vocab_size:] = -torch.inf  # the padding gets probability 0
    probabilities = torch.softmax(logits, dim=-1, out=logits)
    wanted = torch.arange(len(targets), device=targets.device), targets
    nats = -probabilities[wanted].float().clamp_min(torch.finfo(torch.float32).tiny).log().sum()
    probabilities[wanted] -= 1
    return nats


def _capped_softmax_minus_one_hot(logits: Tensor, targets: Tensor, cap: float, vocab_size: int) -> Tensor:
    """`_softmax_minus_one_hot` for `capped` logits, with the gradient of the logits before the cap."""
    sigmoid = logits.float().mul_(2 / cap).sigmoid_()  # see `capped`
    gradient = sigmoid * (2 * cap)  # capped logits + cap, whose softmax is the same
    nats = _softmax_minus_one_hot(gradient, targets, vocab_size)
    torch.addcmul(sigmoid, sigmoid, sigmoid, value=-1, out=sigmoid)  # a quarter of the derivative of tanh
    torch.mul(gradient, sigmoid.mul_(4), out=logits)
    return nats
