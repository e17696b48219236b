"""Replacements for torch's operations that are slow in training on a CPU.

tests/model/test_cpu.py compares each with its plain formula. Speeds were measured on a Zen 5 core with torch
2.13.
"""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llm.device import gpu_stood_for
from llm.runtime import computes_in_bf16

SHORT = 512  # tokens up to which `CausalAttention`, which keeps all attention weights, is used

IN_CACHE = 1 << 18  # numbers that stay in a core's cache through several elementwise operations


def trains_on_cpu(x: Tensor) -> bool:
    """Whether x is on a CPU and needs a gradient. False while torch compiles, as its compiler fuses
    operations itself."""
    trains = x.device.type == "cpu" and x.requires_grad and not torch.compiler.is_compiling()
    return trains and gpu_stood_for() is None


def trains_in_bf16_on_cpu(x: Tensor) -> bool:
    """Whether `trains_on_cpu`, and x is in bf16, for which this CPU has instructions."""
    return x.dtype == torch.bfloat16 and trains_on_cpu(x) and _computes_in_bf16()


@cache
def _computes_in_bf16() -> bool:
    return computes_in_bf16(torch.device("cpu"))


class CausalAttention(torch.autograd.Function):
    """Causal attention: queries (batch, heads, time, head_dim), and keys and values with as many heads or a
    divisor of that, to (batch, heads, time, head_dim).

    Computed by batched matrix products, keeping the attention weights (time, time) for the backward pass.
    torch's fused attention does not keep them, but in bf16 forward and backward take six times as long for
    128 tokens, and three times as long for 256.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, drop_rate: float) -> Tensor:
        batch, heads, time, head_dim = queries.shape
        # Query heads that share a key head are stacked along time, so that one product serves the group.
        together = batch * keys.shape[1], -1, head_dim
        queries = queries.reshape(together) * head_dim**-0.5
        keys, values = keys.reshape(together), values.reshape(together)
        future = torch.full((time, time), -torch.inf, dtype=queries.dtype).triu_(1)
        future = future.repeat(queries.shape[1] // time, 1).expand(len(queries), -1, -1)
        scores = torch.baddbmm(future, queries, keys.transpose(1, 2))
        weights = torch.softmax(scores, dim=-1, out=scores)
        factors = dropout_factors(weights.shape, drop_rate) if drop_rate > 0 else None
        ctx.save_for_backward(queries, keys, values, weights, factors)
        context = (weights if factors is None else weights * factors) @ values
        return context.view(batch, heads, time, head_dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        queries, keys, values, weights, factors = ctx.saved_tensors
        batch, _, time, head_dim = gradient.shape
        gradient = gradient.reshape(queries.shape)
        used, of_weights = weights, gradient @ values.transpose(1, 2)
        if factors is not None:
            used, of_weights = weights * factors, of_weights.mul_(factors)
        of_values = used.transpose(1, 2) @ gradient
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_queries = (of_scores @ keys).mul_(head_dim**-0.5)
        of_keys = of_scores.transpose(1, 2) @ queries
        apart = batch, -1, time, head_dim
        return of_queries.view(apart), of_keys.view(apart), of_values.view(apart), None


class ProjectedTogether(torch.autograd.Function):
    """x (…, size) times several weights (outputs, size), by one product in bf16: (…, outputs) of each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.outputs, ctx.x_dtype = [len(weight) for weight in weights], x.dtype
        matrix = x.new_empty(sum(ctx.outputs), x.shape[-1], dtype=torch.bfloat16)
        for rows, weight in zip(matrix.split(ctx.outputs), weights, strict=True):
            rows.copy_(weight)
        x = x.to(matrix.dtype)
        ctx.save_for_backward(x, matrix)
        return (x @ matrix.T).split(ctx.outputs, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        x, matrix = ctx.saved_tensors
        gradient = torch.cat(gradients, dim=-1)
        of_weights = (gradient.flatten(0, -2).T @ x.flatten(0, -2)).float()
        return (gradient @ matrix).to(ctx.x_dtype), *of_weights.split(ctx.outputs)


class Dropout(nn.Dropout):
    """Dropout; when training in bf16 on a CPU, with masks that are cheaper to draw than torch's."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.p > 0 and trains_in_bf16_on_cpu(x):
            return _Dropped.apply(x, self.p)
        return super().forward(x)


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, drop_rate: float) -> Tensor:
        factors = dropout_factors(x.shape, drop_rate)
        ctx.save_for_backward(factors)
        return x * factors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (factors,) = ctx.saved_tensors
        return gradient * factors, None


def dropout_factors(shape: torch.Size, drop_rate: float) -> Tensor:
    """The factors that dropout multiplies by, in bf16: 0 with probability `drop_rate` (rounded to 16 bits),
    else 1 / (1 - drop_rate). Each draw of the generator serves four numbers; `bernoulli_` draws for each, and
    takes four times as long."""
    numbers = math.prod(shape)
    draws = torch.empty(-(-numbers // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = draws.view(torch.int16)[:numbers].view(shape)
    # In place on 16-bit integers, which vectorise best: 1 where kept, times the bits of the bf16 factor.
    factor = torch.tensor(1 / (1 - drop_rate), dtype=torch.bfloat16).view(torch.int16).item()
    return torch.ge(bits, round(drop_rate * 2**16) - 2**15, out=bits).mul_(factor).view(torch.bfloat16)


class TanhGELU(nn.GELU):
    """GELU's tanh approximation, as in GPT-2; when training in bf16 on a CPU, written with a sigmoid. Forward
    and backward together then take 60 % of the time, as torch's tanh is slow, and backward computes it again.
    """

    def __init__(self) -> None:
        super().__init__(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        return _SigmoidGELU.apply(x) if trains_in_bf16_on_cpu(x) else super().forward(x)


class _SigmoidGELU(torch.autograd.Function):
    """x · sigmoid(2u), where u = √(2/π) (x + 0.044715 x³): the same, as tanh(u) = 2 · sigmoid(2u) - 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        linear = 2 * math.sqrt(2 / math.pi)  # 2u = x · (linear + cubic · x²)
        cubic = 0.044715 * linear
        result, derivative = torch.empty_like(x), torch.empty_like(x)
        # Some numbers at a time, in fp32, so that they stay in the core's cache from operation to operation.
        parts = (each.view(-1).split(IN_CACHE) for each in (x, result, derivative))
        for some, its_result, its_derivative in zip(*parts, strict=True):
            numbers = some.float()
            square = numbers.square()
            sigmoid = (square * cubic).add_(linear).mul_(numbers).sigmoid_()
            numbers = numbers * sigmoid
            its_result.copy_(numbers)
            # sigmoid + result · (1 - sigmoid) · (2u)'
            steep = square.mul_(3 * cubic).add_(linear).mul_(numbers)
            its_derivative.copy_((sigmoid + steep).addcmul_(sigmoid, steep, value=-1))
        ctx.save_for_backward(derivative)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (derivative,) = ctx.saved_tensors
        return gradient * derivative


class RMSNormalised(torch.autograd.Function):
    """x / √(mean(x²) + eps) · scale over the last dimension of x (…, size), in fp32; scale is (size,).
    torch's backward pass takes twice as long, as it makes many small steps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        ctx.x_dtype = x.dtype
        x = x.float()
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean_square.add_(eps).rsqrt_()
        normal = x * inverse
        ctx.save_for_backward(normal, inverse, scale)
        return normal * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        normal, inverse, scale = ctx.saved_tensors
        product = gradient * normal
        along = (product * scale).mean(dim=-1, keepdim=True)  # the component along x, which only scales x
        of_x = torch.addcmul(gradient * scale, normal, along, value=-1).mul_(inverse)
        return of_x.to(ctx.x_dtype), product.flatten(0, -2).sum(0), None


class Turned(torch.autograd.Function):
    """Heads (batch, heads, time, head_dim) with their pairs rotated, in fp32; cos and sin as in `Turns`."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.heads_dtype = heads.dtype
        return _turned(heads.float(), cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, -sin).to(ctx.heads_dtype), None, None


def _turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = heads * cos
    halves = turned.chunk(2, dim=-1), reversed(heads.chunk(2, dim=-1)), sin.chunk(2, dim=-1)
    for half, other, its_sin in zip(*halves, strict=True):
        half.addcmul_(other, its_sin)
    return turned


class SquaredReLU(torch.autograd.Function):
    """max(x, 0)², with one tensor kept for the backward pass, and one pass over it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = x.relu()
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return (gradient * positive).mul_(2)
