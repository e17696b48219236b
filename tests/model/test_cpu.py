"""What training on a CPU does instead of torch's kernels, against the plain formulas and their gradients."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from gpt2 import SMALL
from torch import Tensor, nn

from llm.config import ModelConfig
from llm.model import cpu
from llm.model.gpt import GPTModel
from llm.model.parts import turned, turns_of

MODERN = replace(
    SMALL, norm="rmsnorm", position="rotary", activation="relu2", bias=False, qk_norm=True, n_kv_heads=2
)


def compare(ours: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Values and the gradients of all inputs, in fp32."""
    for each in inputs:
        each.requires_grad_()
    result, expected = ours(*inputs), plain(*inputs)
    torch.testing.assert_close(result, expected, atol=2e-6, rtol=1e-5)
    gradient = torch.randn(expected.shape)
    for one, other in zip(
        torch.autograd.grad(result, inputs, gradient),
        torch.autograd.grad(expected, inputs, gradient),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention(kv_heads: int) -> None:
    torch.manual_seed(0)
    heads = [torch.randn(3, count, 20, 8) for count in (4, kv_heads, kv_heads)]
    compare(
        lambda q, k, v: cpu.CausalAttention.apply(q, k, v, 0.0),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        *heads,
    )


def test_attention_with_dropout() -> None:
    torch.manual_seed(0)
    heads = [torch.randn(3, 4, 20, 8) for _ in range(3)]

    def ours(*heads: Tensor) -> Tensor:
        torch.manual_seed(1)
        return cpu.CausalAttention.apply(*heads, 0.5)

    def plain(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        torch.manual_seed(1)
        factors = cpu.dropout_factors(torch.Size([3, 4, 20, 20]), 0.5)
        future = torch.ones(20, 20, dtype=torch.bool).triu(1)
        scores = (queries @ keys.transpose(2, 3) / 8**0.5).masked_fill(future, -torch.inf)
        return (scores.softmax(-1) * factors) @ values

    compare(ours, plain, *heads)


@pytest.mark.parametrize("drop_rate", [0.1, 0.5, 0.999])
def test_dropout_keeps_the_share_it_says_independently(drop_rate: float) -> None:
    torch.manual_seed(0)
    factors = cpu.dropout_factors(torch.Size([1001, 999]), drop_rate)
    kept = (factors > 0).float()
    chance = 5 * (drop_rate * (1 - drop_rate) / kept.numel()) ** 0.5  # five standard deviations
    assert kept.mean().item() == pytest.approx(1 - drop_rate, abs=chance + 2**-17)
    both = (kept.flatten()[1:] * kept.flatten()[:-1]).mean().item()  # neighbours come from one draw
    assert both == pytest.approx((1 - drop_rate) ** 2, abs=2 * chance + 2**-16)
    factor = torch.tensor(1 / (1 - drop_rate), dtype=torch.bfloat16).item()
    assert factors.unique().tolist() == [0.0, factor]


def test_norm_rotation_and_activation() -> None:
    torch.manual_seed(0)
    compare(
        lambda x, scale: cpu.RMSNormalised.apply(x, scale, 1e-5),
        lambda x, scale: F.rms_norm(x, (16,), scale, 1e-5),
        torch.randn(3, 5, 16),
        torch.rand(16) + 0.5,
    )
    cos, sin = turns = turns_of(torch.randn(5, 8))

    def rotated(heads: Tensor) -> Tensor:  # pairs as complex numbers, times e^(i · angle)
        pairs = torch.complex(heads[..., :8], heads[..., 8:])
        pairs = pairs * torch.complex(cos[..., :8], sin[..., 8:])
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    heads = torch.randn(3, 2, 5, 16)
    compare(lambda heads: turned(heads, turns), rotated, heads)
    torch.testing.assert_close(turned(heads.detach(), turns), rotated(heads.detach()))
    compare(cpu.SquaredReLU.apply, lambda x: F.relu(x).square(), torch.randn(7, 9))


def test_gelu() -> None:
    x = torch.linspace(-9, 9, 300_001, requires_grad=True)  # more than goes through the cache at once
    compare(cpu._SigmoidGELU.apply, lambda x: F.gelu(x, approximate="tanh"), x.detach())


def test_projections_together_equal_those_alone() -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(2, 5, 16), [torch.randn(size, 16) for size in (16, 8, 8)]
    inputs = [each.requires_grad_() for each in (x, *weights)]
    with torch.autocast("cpu", torch.bfloat16):
        together = cpu.ProjectedTogether.apply(x, *weights)
        alone = [F.linear(x, weight) for weight in weights]
    gradients = [torch.randn(one.shape).bfloat16() for one in alone]
    torch.testing.assert_close(together, tuple(alone))
    for one, other in zip(
        torch.autograd.grad(together, inputs, gradients),
        torch.autograd.grad(alone, inputs, gradients),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=0.05, rtol=0.01)  # x's is summed in bf16 there


@pytest.mark.parametrize(
    "config", [replace(SMALL, qkv_bias=False), MODERN, replace(MODERN, logit_softcap=15.0)]
)
def test_a_model_in_bf16_has_the_gradients_of_fp32(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_computes_in_bf16", lambda: True)  # whatever machine this is
    torch.manual_seed(0)
    model = GPTModel(config)
    idx, targets = torch.randint(97, (2, 24)), torch.randint(97, (2, 24))
    expected = model(idx, targets)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(idx, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3)
    for gradient, fp32, (name, _) in zip(
        torch.autograd.grad(loss, list(model.parameters())), wanted, model.named_parameters(), strict=True
    ):
        assert ((gradient - fp32).norm() / fp32.norm()).item() < 0.05, name


def test_dropout_of_activations() -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 400, dtype=torch.bfloat16, requires_grad=True)
    dropout = cpu.Dropout(0.1)
    kept = dropout(x)
    (gradient,) = torch.autograd.grad(kept, x, torch.ones_like(x))
    torch.testing.assert_close(kept, x * gradient)
    assert (gradient == 0).float().mean().item() == pytest.approx(0.1, abs=0.01)
    torch.manual_seed(3)
    reference = dropout(x.float())  # in fp32, torch's own draws
    torch.manual_seed(3)
    torch.testing.assert_close(reference, nn.Dropout(0.1)(x.float()))
    assert dropout.eval()(x) is x
