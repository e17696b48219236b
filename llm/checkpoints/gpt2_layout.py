"""GPT-2 in Hugging Face's layout, which is also the book's model."""

from typing import Any

from llm.checkpoints.layout import (
    Described,
    Layout,
    Names,
    misfits,
    refuse_unsupported,
    spelled,
    whole_numbers,
)
from llm.config import ModelConfig
from llm.errors import UserError

_SIZES = {
    "vocab_size": "vocab_size",
    "context_length": "n_positions",
    "emb_dim": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
}
_SUPPORTED: dict[str, tuple] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True, False),
    "quantization_config": (None,),
}  # the values with which GPT-2 is the book's model; the first is what a config means that does not say
_DROPPED = ("embd", "attn", "resid")  # places of dropout
_OUTSIDE = {
    "wte.weight": "tok_emb.weight",
    "wpe.weight": "pos_emb.weight",
    "ln_f.weight": "final_norm.scale",
    "ln_f.bias": "final_norm.shift",
}
_NORMS = {"ln_1": "norm1", "ln_2": "norm2"}
_LINEAR = {
    "attn.c_attn": ("att.W_query", "att.W_key", "att.W_value"),
    "attn.c_proj": ("att.out_proj",),
    "mlp.c_fc": ("ff.layers.0",),
    "mlp.c_proj": ("ff.layers.2",),
}


def _read(described: Described) -> ModelConfig:
    refuse_unsupported(described, _SUPPORTED)
    sizes: dict[str, Any] = whole_numbers(described, _SIZES)
    if described.get("n_inner") not in (None, 4 * sizes["emb_dim"]):
        raise UserError(f"n_inner={described['n_inner']} is not supported; it must be 4 times n_embd")
    config = ModelConfig(**sizes, qkv_bias=True)
    config.tie_weights = bool(described.get("tie_word_embeddings", True))
    rate, *others = (described.get(f"{place}_pdrop", 0.1) for place in _DROPPED)
    if others == [rate, rate] and type(rate) in (int, float):
        config.drop_rate = rate  # of no effect but on an export: a run that begins here says its own
    return config


def _describe(config: ModelConfig) -> Described:
    return {
        "architectures": ["GPT2LMHeadModel"],
        **{name: supported[0] for name, supported in _SUPPORTED.items()},
        **{theirs: getattr(config, ours) for ours, theirs in _SIZES.items()},
        "n_inner": None,
        **{f"{place}_pdrop": config.drop_rate for place in _DROPPED},
        "tie_word_embeddings": config.tie_weights,
    }


def _block(described: Described) -> list[Names]:
    names: list[Names] = []
    for theirs, ours in _NORMS.items():
        names += [((f"{theirs}.weight",), (f"{ours}.scale",)), ((f"{theirs}.bias",), (f"{ours}.shift",))]
    for theirs, linear in _LINEAR.items():
        for kind in ("weight", "bias"):
            names.append(((f"{theirs}.{kind}",), tuple(f"{each}.{kind}" for each in linear)))
    return names


GPT2 = Layout(
    name="GPT-2",
    keys=(*_SIZES, "drop_rate", "qkv_bias", "tie_weights", "init", "mup_base_width"),
    read=_read,
    describe=_describe,
    prefix="transformer.",
    layers=_SIZES["n_layers"],
    blocks="h.",
    outside=_OUTSIDE,
    block=_block,
    tied=True,
    turned=True,
    buffers=(".attn.bias", ".attn.masked_bias"),
)


def refuse_unless_gpt2(config: ModelConfig, what: str) -> None:
    """Refuse a model that a format made for GPT-2 cannot describe.

    Raises:
        UserError: the model has a part that GPT-2 does not have.
    """
    if other := misfits(GPT2, config):
        raise UserError(
            f"{what} can describe only GPT-2, and this model has {spelled(config, other[:1])}: "
            f"it cannot be exported so"
        )
