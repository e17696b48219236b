"""The model against transformers' GPT-2, torch's FLOP counter and the book's parameter counts."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from llm.config import ModelConfig
from llm.loss import CHUNK_TOKENS
from llm.model import GPTModel, MultiHeadAttention, parameter_count, training_flops_per_token

SMALL = ModelConfig(vocab_size=97, context_length=24, emb_dim=32, n_heads=4, n_layers=3, qkv_bias=True)


def pair_with_transformers(std: float = 0.02) -> tuple[GPTModel, GPT2LMHeadModel]:
    """A model and transformers' GPT-2 with the same random weights, of standard deviation `std`."""
    torch.manual_seed(1)
    size = GPT2Config(vocab_size=97, n_positions=24, n_embd=32, n_head=4, n_layer=3, initializer_range=std)
    theirs = GPT2LMHeadModel(size).eval()
    weights = theirs.state_dict()
    names = {
        "attn.c_proj": "att.out_proj",
        "mlp.c_fc": "ff.layers.0",
        "mlp.c_proj": "ff.layers.2",
    }
    ours = {
        "tok_emb.weight": weights["transformer.wte.weight"],
        "pos_emb.weight": weights["transformer.wpe.weight"],
        "final_norm.scale": weights["transformer.ln_f.weight"],
        "final_norm.shift": weights["transformer.ln_f.bias"],
    }
    for layer in range(3):
        there, here = f"transformer.h.{layer}.", f"trf_blocks.{layer}."
        for kind in ("weight", "bias"):  # theirs are stored (in, out), and query, key and value as one
            for name, part in zip(
                ("W_query", "W_key", "W_value"),
                weights[f"{there}attn.c_attn.{kind}"].chunk(3, dim=-1),
                strict=True,
            ):
                ours[f"{here}att.{name}.{kind}"] = part.T if kind == "weight" else part
            for name, our_name in names.items():
                part = weights[f"{there}{name}.{kind}"]
                ours[f"{here}{our_name}.{kind}"] = part.T if kind == "weight" else part
        for number in (1, 2):
            ours[f"{here}norm{number}.scale"] = weights[f"{there}ln_{number}.weight"]
            ours[f"{here}norm{number}.shift"] = weights[f"{there}ln_{number}.bias"]
    model = GPTModel(SMALL).eval()
    model.load_state_dict(ours)
    return model, theirs


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
    losses = model.token_losses(idx, targets)
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
    with torch.device("meta"):
        assert parameter_count(GPTModel(config)) == expected


def test_flops_are_those_that_torch_counts() -> None:
    model = GPTModel(replace(SMALL, drop_rate=0.1))  # torch does not count its fused attention on a CPU
    idx = torch.randint(97, (2, 24))
    with FlopCounterMode(display=False) as counter:
        logits = model(idx)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), idx.flatten()).backward()
    assert counter.get_total_flops() / idx.numel() == training_flops_per_token(SMALL)
