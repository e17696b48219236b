"""Hugging Face's layouts of Llama and its relatives Qwen 3 (with QK-norm), Qwen 2 and Mistral, as far as our
parts can build them. The latter two are only read: whatever they can describe, Llama's can too."""

from dataclasses import replace
from functools import partial
from typing import Any

from llm.checkpoints.layout import Described, Layout, Names, refuse_unsupported, whole_numbers
from llm.config import ModelConfig
from llm.config_rules import validate
from llm.errors import UserError
from llm.model.parts import hidden_dim, spelled_out

_SIZES = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "emb_dim": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_layers": "num_hidden_layers",
    "hidden_dim": "intermediate_size",
}
_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "sliding_window": None,
}
_QWEN = {
    **_LLAMA,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
}
# Defaults of missing keys in each type of config.json, as in transformers.
_DEFAULTS: dict[str, Described] = {
    "llama": _LLAMA,
    "qwen3": {**_QWEN, "head_dim": 128},
    "qwen2": _QWEN,
    "mistral": {
        **_LLAMA,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
}
_SUPPORTED: dict[str, tuple] = {
    "hidden_act": ("silu", "swish"),
    "tie_word_embeddings": (False, True),
    "attention_bias": (False, True),
    "mlp_bias": (False, True),
    "use_sliding_window": (False, True),
    "partial_rotary_factor": (None, 1.0),
    "quantization_config": (None,),
    "per_layer_config": (None,),
    "is_causal": (True,),
}  # the first value is the default of a missing key
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_OUT = "self_attn.o_proj"
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_LINEAR = {
    _QKV[:1]: "att.W_query",
    _QKV[1:2]: "att.W_key",
    _QKV[2:]: "att.W_value",
    (_OUT,): "att.out_proj",
    _MLP[:2]: "ff.layers.0",
    _MLP[2:]: "ff.layers.2",
}
_NORMS = {"input_layernorm": "norm1", "post_attention_layernorm": "norm2"}
_QK_NORMS = {"self_attn.q_norm": "att.query_norm", "self_attn.k_norm": "att.key_norm"}
_PARTS: dict[str, Any] = {"norm": "rmsnorm", "position": "rotary", "activation": "swiglu"}
_KEYS = (
    *("n_kv_heads", "drop_rate", "qkv_bias", "bias", "tie_weights", "norm_eps", "rotary_base"),
    *("init", "mup_base_width"),
)


def _said(described: Described) -> Described:
    return {**_DEFAULTS[described["model_type"]], **described}


def _with_bias(said: Described) -> tuple[str, ...]:
    """The linear layers that have a bias; for Qwen 2 and Mistral they are fixed."""
    match said["model_type"]:
        case "qwen2":
            return _QKV
        case "mistral":
            return ()
    attention = (*_QKV, _OUT) if said["attention_bias"] else ()
    return attention + (_MLP if said["model_type"] == "llama" and said["mlp_bias"] else ())


def _read(described: Described) -> ModelConfig:
    said = _said(described)
    refuse_unsupported(said, _SUPPORTED)
    sizes: dict[str, Any] = whole_numbers(said, _SIZES)
    with_bias = _with_bias(said)
    config = ModelConfig(
        **sizes,
        **_PARTS,
        n_kv_heads=said["num_key_value_heads"],
        qk_norm=said["model_type"] == "qwen3",
        qkv_bias=_QKV[0] in with_bias,
        bias=_OUT in with_bias or _MLP[0] in with_bias,
        tie_weights=bool(said.get("tie_word_embeddings", False)),
        norm_eps=said["rms_norm_eps"],
        rotary_base=_rotary_base(said),
        drop_rate=said["attention_dropout"] or 0.0,  # matters only for another export
    )
    validate(config, "model.")
    config = replace(config, norm_eps=float(config.norm_eps), rotary_base=float(config.rotary_base))
    size = said["head_dim"]
    if size is not None and not (type(size) is int and size * config.n_heads == config.emb_dim):
        raise UserError(
            f"head_dim={size} is not supported; it must be hidden_size / num_attention_heads, "
            f"{config.head_dim}"
        )
    _refuse_windows(said)
    # Values that equal our defaults become null again, so that an exported model is read as the same config.
    if config.n_kv_heads == config.n_heads:
        config = replace(config, n_kv_heads=None)
    plain = replace(config, hidden_dim=None)
    return plain if hidden_dim(plain) == config.hidden_dim else config


def _rotary_base(said: Described) -> Any:
    """The base of rotary positions: transformers 5 writes it to rope_parameters; version 4 wrote it beside
    rope_scaling."""
    name = "rope_scaling" if said.get("rope_scaling") else "rope_parameters"
    rope = said.get(name) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f"{name}={rope} is not supported; it must be of one kind for all layers")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"{name} of rope_type={kind} is not supported; it must be default")
    refuse_unsupported(rope, {"partial_rotary_factor": (None, 1.0)})
    base = rope.get("rope_theta", said["rope_theta"])
    if type(base) not in (int, float):
        raise UserError(f"rope_theta={base} is no number")
    return base


def _refuse_windows(said: Described) -> None:
    """Refuse sliding windows.

    Raises:
        UserError: a layer sees less than the context.
    """
    window, kinds = said["sliding_window"], said.get("layer_types")
    if said["model_type"].startswith("qwen") and not said.get("use_sliding_window"):
        window = None
    context = said["max_position_embeddings"]
    if window is not None and not (type(window) is int and window >= context):
        raise UserError(
            f"sliding_window={window} is not supported; it must be null, or no less than "
            f"max_position_embeddings={context}"
        )
    if kinds and not (isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)):
        raise UserError(f"layer_types={kinds} is not supported; all must be full_attention")


def _describe(model_type: str, architecture: str, config: ModelConfig) -> Described:
    attention_bias = config.qkv_bias or config.bias
    said = spelled_out(config)
    described = {
        "architectures": [architecture],
        "model_type": model_type,
        **{theirs: getattr(said, ours) for ours, theirs in _SIZES.items()},
        "num_key_value_heads": said.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_theta": config.rotary_base, "rope_type": "default"},
        "rope_theta": config.rotary_base,  # where transformers 4 looks for it
        "attention_bias": attention_bias,
        "mlp_bias": config.bias,
        "attention_dropout": config.drop_rate,
        "tie_word_embeddings": config.tie_weights,
    }
    if config.qkv_bias != config.bias:  # Llama has both or neither; this key is our own, see `to_ours`
        described["zero_biases"] = "bias" if config.qkv_bias else "qkv_bias"
    return described


def _block(described: Described) -> list[Names]:
    said = _said(described)
    norms = {**_NORMS, **(_QK_NORMS if said["model_type"] == "qwen3" else {})}
    names: list[Names] = [((f"{theirs}.weight",), (f"{ours}.scale",)) for theirs, ours in norms.items()]
    for theirs, linear in _LINEAR.items():
        for kind in ("weight", "bias") if theirs[0] in _with_bias(said) else ("weight",):
            names.append((tuple(f"{each}.{kind}" for each in theirs), (f"{linear}.{kind}",)))
    return names


def _layout(name: str, model_type: str, architecture: str, **parts: Any) -> Layout:
    return Layout(
        name=name,
        keys=(*_SIZES, *_KEYS),
        parts={**_PARTS, **parts},
        read=_read,
        describe=partial(_describe, model_type, architecture),
        prefix="model.",
        layers=_SIZES["n_layers"],
        blocks="layers.",
        outside={"embed_tokens.weight": "tok_emb.weight", "norm.weight": "final_norm.scale"},
        block=_block,
        buffers=(".rotary_emb.inv_freq",),
    )


LLAMA = _layout("Llama", "llama", "LlamaForCausalLM")
QWEN3 = _layout("Qwen 3", "qwen3", "Qwen3ForCausalLM", qk_norm=True, bias=False)
QWEN2 = _layout("Qwen 2", "qwen2", "Qwen2ForCausalLM", qkv_bias=True, bias=False)
MISTRAL = _layout("Mistral", "mistral", "MistralForCausalLM", qkv_bias=False, bias=False)
