"""Our GPT and transformers' GPT-2 with the same weights."""

from typing import TypeVar

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from llm.config import ModelConfig
from llm.model.gpt import GPTModel

Model = TypeVar("Model", bound=torch.nn.Module)
SMALL = ModelConfig(vocab_size=97, context_length=24, emb_dim=32, n_heads=4, n_layers=3, qkv_bias=True)


def with_random_weights(model: Model) -> Model:
    """A model in evaluation mode whose weights are random, biases and norms too: begun at 0 or 1, these would
    hide that they are swapped or missing."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, float(parameter.dim() == 1 and "bias" not in name), 0.2)
    return model.eval()


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
