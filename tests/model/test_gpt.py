"""The model against transformers' GPT-2, torch's FLOP counter and the book's parameter counts."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from gpt2 import SMALL, pair_with_transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from llm.config import ModelConfig
from llm.errors import UserError
from llm.model.attention import projected_together
from llm.model.gpt import (
    GPTModel,
    MultiHeadAttention,
    at_width,
    parameter_count,
    parameters_of,
    training_flops_per_token,
    without_weights,
)
from llm.model.loss import CHUNK_TOKENS, token_loss


def test_logits_equal_those_of_transformers() -> None:
    model, theirs = pair_with_transformers()
    idx = torch.randint(97, (2, 24))
    with torch.no_grad():
        torch.testing.assert_close(model(idx), theirs(idx).logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("tie_weights", [False, True])
def test_token_losses_equal_cross_entropy_over_all_logits(tie_weights: bool) -> None:
    model = GPTModel(replace(SMALL, tie_weights=tie_weights))
    idx, targets = torch.randint(97, (50, 24)), torch.randint(97, (50, 24))
    assert idx.numel() > CHUNK_TOKENS
    expected = torch.nn.functional.cross_entropy(model(idx).transpose(1, 2), targets, reduction="none")
    [losses] = model.score_tokens(idx, targets, token_loss)
    torch.testing.assert_close(losses, expected)
    assert not losses.requires_grad
    torch.testing.assert_close(model(idx, targets), expected.mean())


def test_dropout_by_hand_and_fused_attention_agree_without_dropout() -> None:
    torch.manual_seed(2)
    attention = MultiHeadAttention(SMALL)
    x = torch.randn(2, 24, 32)
    heads = [
        project(x).view(2, 24, 4, 8).transpose(1, 2)
        for project in (attention.W_query, attention.W_key, attention.W_value)
    ]
    by_hand = attention.out_proj(attention._attend_as_in_the_book(*heads).transpose(1, 2).reshape(2, 24, 32))
    torch.testing.assert_close(attention(x), by_hand, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_projections_by_one_product_are_those_of_each_layer(bias: bool) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(16, outputs, bias=bias) for outputs in (16, 8, 8)]
    x = torch.randn(2, 5, 16, requires_grad=True)
    together, alone = projected_together(x, layers, torch.float32), [layer(x) for layer in layers]
    torch.testing.assert_close(together, tuple(alone))
    inputs = [x, *(parameter for layer in layers for parameter in layer.parameters())]
    gradients = [torch.randn_like(one) for one in alone]
    torch.testing.assert_close(
        torch.autograd.grad(together, inputs, gradients), torch.autograd.grad(alone, inputs, gradients)
    )


def test_no_position_sees_a_later_one() -> None:
    model = GPTModel(SMALL).eval()
    idx = torch.randint(97, (1, 24))
    changed = idx.clone()
    changed[0, 12:] = (idx[0, 12:] + 1) % 97
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[:, :12], model(changed)[:, :12])


@pytest.mark.parametrize(
    ("tie_weights", "expected"),
    [(False, 163_009_536 - 1024 * 768 + 256 * 768), (True, 124_412_160 - 1024 * 768 + 256 * 768)],
)  # the book's chapter 4 counts 163,009,536 and 124,412,160 at a context of 1024
def test_parameters_of_gpt2_small(tie_weights: bool, expected: int) -> None:
    config = ModelConfig(50257, 256, 768, 12, 12, 0.1, tie_weights=tie_weights, init="torch")
    assert parameter_count(without_weights(config)) == parameters_of(config) == expected


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"norm": "rmsnorm", "position": "rotary", "activation": "relu2", "bias": False, "qk_norm": True},
        {"activation": "swiglu", "tie_weights": False, "logit_softcap": 15.0},
        {"n_kv_heads": 1, "hidden_dim": 56},
        {"value_embeddings": True, "residual_scalars": True, "smear": True, "n_kv_heads": 2, "n_layers": 3},
    ],
    ids=", ".join,
)
def test_flops_are_those_that_torch_counts(parts: dict[str, Any]) -> None:
    # With dropout, as torch does not count its fused attention on a CPU.
    model = GPTModel(replace(SMALL, drop_rate=0.1, **parts))
    idx = torch.randint(97, (2, 24))
    with FlopCounterMode(display=False) as counter:
        logits = model(idx)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), idx.flatten()).backward()
    assert counter.get_total_flops() / idx.numel() == training_flops_per_token(model)


def test_a_model_at_another_width_keeps_its_heads_size() -> None:
    config = ModelConfig(97, 8, 64, n_heads=4, n_layers=2, n_kv_heads=2, hidden_dim=160)
    wider = at_width(config, 96)
    assert (wider.n_heads, wider.n_kv_heads, wider.hidden_dim, wider.head_dim) == (6, 3, 240, 16)
    assert at_width(config, 64) == config
    for width in (40, 48):  # two heads and a half; three, of which 1.5 of keys
        with pytest.raises(UserError, match="make it a multiple of 32"):
            at_width(config, width)
