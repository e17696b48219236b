"""Folders of Llama's layout and its kin's, in and out, against transformers; what our parts cannot express is
refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Script
from gpt2 import with_random_weights
from safetensors.torch import load_file, save_file
from tokenizers import (
    ByteLevelBPETokenizer,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

from llm.checkpoints.huggingface import export_huggingface
from llm.checkpoints.opening import open_weights, tokenizer_of
from llm.checkpoints.weights import build_model
from llm.config import ModelConfig
from llm.data.tokenizer import encode, end_of_text_id, load_tokenizer
from llm.errors import UserError
from llm.files import read_json_lines
from llm.model.gpt import GPTModel

SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}
IDS = torch.tensor([[1, 5, 2, 90, 11, 3, 299, 8], [7, 7, 0, 98, 4, 60, 1, 1]])
PARTS: dict[str, Any] = {"norm": "rmsnorm", "position": "rotary", "activation": "swiglu"}
OURS = ModelConfig(300, 16, 32, 4, 3, tie_weights=False, bias=False, norm_eps=1e-6, hidden_dim=80, **PARTS)


def theirs(model_type: str = "llama", **settings: Any) -> Any:
    """A model of transformers with random weights, biases and norms among them."""
    config = transformers.AutoConfig.for_model(model_type, **{**SMALL, **settings})
    return with_random_weights(transformers.AutoModelForCausalLM.from_config(config))


def our_model(folder: Path) -> GPTModel:
    return build_model(open_weights(str(folder)))


def rewrite(folder: Path, **changes: Any) -> None:
    """Change config.json; None takes a key out."""
    file = folder / "config.json"
    described = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in described.items() if value is not None}))


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        open_weights(str(folder))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("model_type", "settings", "expected"),
    [
        ("llama", {}, OURS),
        ("llama", {"intermediate_size": 96}, replace(OURS, hidden_dim=None)),  # our default for this width
        (
            "llama",
            {"num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
            replace(OURS, n_kv_heads=2, tie_weights=True, norm_eps=1e-5),
        ),
        ("llama", {"num_key_value_heads": 1, "head_dim": 8}, replace(OURS, n_kv_heads=1)),
        ("llama", {"attention_bias": True}, replace(OURS, qkv_bias=True, bias=True)),
        ("llama", {"mlp_bias": True}, replace(OURS, bias=True)),
        ("llama", {"attention_bias": True, "mlp_bias": True}, replace(OURS, qkv_bias=True, bias=True)),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 500}, "hidden_act": "swish"},
            replace(OURS, rotary_base=500.0),
        ),
        ("qwen3", {"head_dim": 8, "num_key_value_heads": 2}, replace(OURS, qk_norm=True, n_kv_heads=2)),
        (
            "qwen3",
            {"head_dim": 8, "num_key_value_heads": 4, "attention_bias": True, "tie_word_embeddings": True},
            replace(OURS, qk_norm=True, qkv_bias=True, bias=True, tie_weights=True),
        ),
        ("qwen2", {"num_key_value_heads": 2}, replace(OURS, n_kv_heads=2, qkv_bias=True)),
        ("mistral", {"num_key_value_heads": 2, "sliding_window": None}, replace(OURS, n_kv_heads=2)),
        ("mistral", {"num_key_value_heads": 4, "sliding_window": 16}, OURS),  # as far as the context
    ],
)
@torch.no_grad()
def test_weights_of_transformers_give_its_logits(
    tmp_path: Path, model_type: str, settings: dict[str, Any], expected: ModelConfig
) -> None:
    model = theirs(model_type, **settings)
    model.save_pretrained(tmp_path)
    ours = our_model(tmp_path)
    assert ours.config == expected
    torch.testing.assert_close(ours(IDS), model(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"rope_parameters": None, "rope_theta": 700}),  # as transformers 4 wrote it
        ("llama", {"rope_parameters": None, "rope_theta": 700, "rope_scaling": {"type": "default"}}),
        ("llama", {"rope_parameters": {"rope_type": "default"}}),
        (
            "llama",
            dict.fromkeys(
                ("rms_norm_eps", "num_key_value_heads", "hidden_act", "tie_word_embeddings", "head_dim")
            ),
        ),
        ("llama", dict.fromkeys(("attention_bias", "mlp_bias", "attention_dropout", "rope_parameters"))),
        ("llama", {"max_position_embeddings": None}),
        ("qwen3", {"max_position_embeddings": None, "rms_norm_eps": None, "layer_types": None}),
        ("qwen2", {"use_sliding_window": None, "sliding_window": None, "layer_types": None}),
    ],
)
@torch.no_grad()
def test_keys_that_are_missing_or_old_mean_what_they_mean_to_transformers(
    tmp_path: Path, model_type: str, changes: dict[str, Any]
) -> None:
    settings = {"num_key_value_heads": 4, **({"head_dim": 8} if model_type == "qwen3" else {})}
    theirs(model_type, **settings).save_pretrained(tmp_path)
    rewrite(tmp_path, **changes)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = our_model(tmp_path)
    torch.testing.assert_close(ours(IDS), opened(IDS).logits, atol=1e-5, rtol=1e-5)
    assert ours.config.context_length == opened.config.max_position_embeddings


@torch.no_grad()
def test_shards_half_precision_and_other_names_load_too(tmp_path: Path) -> None:
    model = theirs(tie_word_embeddings=True)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    torch.testing.assert_close(our_model(tmp_path / "shards")(IDS), expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    tensors = load_file(file)
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # a buffer of old versions
    names: list[Callable[[str], str]] = [
        lambda name: name.removeprefix("model."),
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
    ]
    for renamed in names:
        save_file({renamed(name): tensor for name, tensor in {**tensors, **old}.items()}, file)
        torch.testing.assert_close(our_model(tmp_path / "other")(IDS), expected, atol=1e-5, rtol=1e-5)
    save_file({**tensors, "norm.weight": tensors["model.norm.weight"] + 1}, file)
    assert "holds norm.weight a second time: which of the two counts is unknown" in refused(file.parent)
    model.bfloat16().save_pretrained(tmp_path / "half")
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    torch.testing.assert_close(our_model(tmp_path / "half")(IDS), half(IDS).logits, atol=1e-5, rtol=1e-5)


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("model_type", "changes", "line"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu is not supported; it must be silu or swish"),
        (
            "llama",
            {"rope_parameters": YARN},
            "rope_parameters of rope_type=yarn is not supported; it must be",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling of rope_type=linear is not supported",
        ),
        (
            "llama",
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "must be of one kind for all",
        ),
        ("llama", {"rope_parameters": [1e4]}, "rope_parameters=[10000.0] is not supported"),
        ("llama", {"rope_parameters": {"rope_theta": "x"}}, "rope_theta=x is no number"),
        ("llama", {"rope_parameters": {"rope_theta": 10**400}}, "model.rotary_base=1000"),
        ("llama", {"rope_parameters": {"rope_theta": 1.0}}, "model.rotary_base=1.0: must be above 1"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config={'quant_method'"),
        ("llama", {"head_dim": 16}, "head_dim=16 is not supported; it must be hidden_size / num_attention"),
        ("llama", {"head_dim": "8"}, "head_dim=8 is not supported"),
        ("llama", {"sliding_window": 8}, "sliding_window=8 is not supported; it must be null, or no less"),
        ("llama", {"layer_types": ["sliding_attention"] * 3}, "all must be full_attention"),
        ("llama", {"layer_types": 5}, "layer_types=5 is not supported"),
        ("llama", {"is_causal": False}, "is_causal=False is not supported; it must be True"),
        ("llama", {"attention_bias": "no"}, "attention_bias=no is not supported; it must be False or True"),
        ("llama", {"tie_word_embeddings": 2}, "tie_word_embeddings=2 is not supported"),
        ("llama", {"tie_word_embeddings": True}, "says tie_word_embeddings=true, and lm_head.weight is not"),
        ("llama", {"rms_norm_eps": "small"}, "model.norm_eps='small': must be float"),
        ("llama", {"rms_norm_eps": -1}, "model.norm_eps=-1: must be above 0"),
        ("llama", {"num_key_value_heads": 3}, "model.n_kv_heads=3 must divide model.n_heads=4 evenly"),
        ("llama", {"num_key_value_heads": "2"}, "model.n_kv_heads='2': must be int"),
        ("llama", {"num_attention_heads": 5}, "model.emb_dim=32 cannot be divided evenly"),
        ("llama", {"num_attention_heads": 0}, "model.n_heads=0: must be at least 1"),
        ("llama", {"num_attention_heads": 32, "head_dim": 1}, "model.position=rotary turns pairs of numbers"),
        ("llama", {"num_hidden_layers": 10**4}, "num_hidden_layers=10000, and the weights have 3"),
        (
            "llama",
            {"hidden_size": 10**6, "head_dim": None},
            "embed_tokens.weight has shape (300, 32), and the",
        ),
        ("llama", {"intermediate_size": 10**6}, "(80, 32), and the config's model wants (1000000, 32)"),
        ("llama", {"intermediate_size": "wide"}, "intermediate_size=wide is no whole number"),
        ("llama", {"vocab_size": True}, "vocab_size=True is no whole number"),
        ("llama", {"vocab_size": None}, "config's model wants (32000, 32)"),  # what Llama means by nothing
        ("llama", {"mlp_bias": True}, "mlp.gate_proj.bias has shape nothing, and the config's model wants"),
        (
            "llama",
            {"model_type": "gemma"},
            "model_type=gemma is not supported; it must be one of gpt2, llama",
        ),
        ("llama", {"model_type": ["llama"]}, "model_type=['llama'] is not supported"),
        ("llama", {"model_type": "qwen3"}, "self_attn.q_norm.weight has shape nothing"),
        ("llama", {"model_type": "mistral", "sliding_window": None}, "sliding_window=4096 is not supported"),
        ("qwen3", {"head_dim": None}, "head_dim=128 is not supported"),  # what Qwen 3 means by nothing
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window=8 is not supported"),
        ("qwen3", {"model_type": "llama"}, "self_attn.k_norm.weight has shape (8,), and the config's model"),
    ],
)
def test_what_our_parts_cannot_express_is_refused(
    tmp_path: Path, model_type: str, changes: dict[str, Any], line: str
) -> None:
    theirs(model_type, head_dim=8, num_key_value_heads=4).save_pretrained(tmp_path)
    if changes.get("sliding_window", 0) is None:  # so that the context is longer than Mistral's window
        changes = {**changes, "max_position_embeddings": 8192}
    rewrite(tmp_path, **changes)
    assert line in refused(tmp_path)


def test_a_head_that_is_missing_is_named(tmp_path: Path) -> None:
    theirs(tie_word_embeddings=True).save_pretrained(tmp_path)
    rewrite(tmp_path, tie_word_embeddings=None)
    line = "config.json says tie_word_embeddings=false, or nothing, and there is no lm_head.weight"
    assert line in refused(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 2, "tie_weights": True, "bias": False, "hidden_dim": 48, "rotary_base": 5e5},
        {"n_kv_heads": 1, "qkv_bias": True, "bias": False, "norm_eps": 1e-6},
        {"qkv_bias": True},
        {"qk_norm": True, "bias": False, "n_kv_heads": 2},
        {"qk_norm": True, "bias": False, "qkv_bias": True, "tie_weights": True, "rotary_base": 1e6},
    ],
)
@torch.no_grad()
def test_transformers_opens_an_export_which_comes_back_as_it_was(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = ModelConfig(300, 512, 64, 4, 2, tie_weights=False, **PARTS)
    config = replace(config, **changes)
    ours = with_random_weights(GPTModel(config))
    export_huggingface(ours, "bytes", tmp_path / "export")
    opened: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", output_loading_info=True
    )
    model, report = opened
    assert type(model).__name__ == ("Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM")
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(0, 300, (2, 512), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model(ids).logits, ours(ids), atol=1e-5, rtol=1e-5)
    back = open_weights(str(tmp_path / "export"))
    assert back.model == config
    assert back.tensors.keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(back.tensors[name], tensor), name
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    assert tokenizer.encode("Él<|endoftext|>") == [*"Él".encode(), 256]
    assert (model.config.bos_token_id, model.config.eos_token_id) == (256, 256)
    # biases that the export added stay once somebody has trained them
    if "zero_biases" in json.loads((tmp_path / "export" / "config.json").read_text()):
        for name, bias in model.named_parameters():
            if name.endswith("bias"):
                bias.fill_(0.1)
        model.save_pretrained(tmp_path / "trained")
        trained = our_model(tmp_path / "trained")
        assert trained.config == replace(config, qkv_bias=True, bias=True)
        torch.testing.assert_close(trained(ids), model(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"activation": "relu2"},
            "no model that can be written for transformers has model.activation=relu2 (what",
        ),
        (
            {**PARTS, "value_embeddings": True, "logit_softcap": 15.0, "residual_scalars": True},
            "has model.value_embeddings=True, model.residual_scalars=True, model.logit_softcap=15.0 (",
        ),
        ({**PARTS, "smear": True}, "has model.smear=True ("),
        (
            {"position": "rotary"},
            "has no model of all these parts: GPT-2 has no model.position=rotary; Llama has no "
            "model.norm=layernorm, model.activation=gelu; Qwen 3 has no ",
        ),
        ({**PARTS, "qk_norm": True}, "Llama has no model.qk_norm=True; Qwen 3 has no model.bias=True ("),
    ],
)
def test_a_model_that_no_layout_describes_is_refused_by_its_parts(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    config = replace(ModelConfig(300, 16, 32, 4, 2), **changes)
    with pytest.raises(UserError) as error:
        export_huggingface(GPTModel(config), "bytes", tmp_path / "export")
    assert str(error.value).startswith("format=huggingface: ")
    assert said in str(error.value)
    assert "what can be exported: GPT-2's parts; rmsnorm, rotary and swiglu, as Llama" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "export").exists()


TRAINED_ON = "99 bottles of beer on the wall, naïve café — 日本語\n" * 80
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)


def split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), last])


DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL])
NUMBERS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), BYTE_LEVEL])


def write_tokenizer(folder: Path, steps: Any, about: dict[str, Any], **more: Any) -> None:
    """A byte-level BPE of 300 tokens, of which the first two are special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = steps, decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [TRAINED_ON],
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|endoftext|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    for name, value in more.items():
        setattr(tokenizer, name, value)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


NOTHING_ADDED = processors.Sequence(
    [processors.ByteLevel(), processors.TemplateProcessing("$A", "$A $B", [])]
)
BEGIN_ADDED = processors.TemplateProcessing("<|endoftext|> $A", "<|endoftext|> $A $B", [("<|endoftext|>", 0)])


@pytest.mark.parametrize("kept", [False, True])  # in a checkpoint, which has no config.json of theirs
@pytest.mark.parametrize(
    ("model_type", "steps", "about"),
    [
        ("llama", BYTE_LEVEL, {}),  # which GPT-2's class is not, and so no end of text is known
        ("llama", BYTE_LEVEL, {"tokenizer_class": "GPT2Tokenizer"}),
        (
            "llama",
            split_by(LLAMA3),
            {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"},
        ),
        ("llama", split_by(LLAMA3), {"tokenizer_class": "TokenizersBackend", "eos_token": "<|im_end|>"}),
        ("llama", split_by(QWEN), {"tokenizer_class": "LlamaTokenizerFast"}),
        ("llama", DIGITS, {}),
        ("llama", NUMBERS, {"tokenizer_class": "LlamaTokenizer"}),
        ("qwen3", split_by(QWEN), {"tokenizer_class": "TokenizersBackend"}),
        ("mistral", DIGITS, {"tokenizer_class": "GPT2Tokenizer"}),
    ],
)
def test_ids_of_a_folders_tokenizer_are_transformers(
    tmp_path: Path, kept: bool, model_type: str, steps: Any, about: dict[str, Any]
) -> None:
    folder = tmp_path / "theirs"
    write_tokenizer(folder, steps, about, post_processor=NOTHING_ADDED)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(str(folder))
    if kept:
        for name, content in getattr(ours, "files").items():  # noqa: B009
            (tmp_path / name).write_bytes(content)
        ours = load_tokenizer(str(tmp_path))
    for text in (TRAINED_ON, "a  12\n 3  x<|endoftext|>  ٣٤x  ²³½Ⅷ\t7 '1 's<|im_end|>9", "  1", " \n "):
        assert encode(text, ours) == tokenizer.encode(text)
    if tokenizer.eos_token_id is not None:
        assert end_of_text_id(ours) == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("model_type", "steps", "about", "more", "line"),
    [
        (
            "llama",
            split_by(LLAMA3),
            {},
            {"post_processor": BEGIN_ADDED},
            "adds tokens to each text (Template",
        ),
        ("llama", BYTE_LEVEL, {"add_bos_token": True}, {}, "has add_bos_token=true"),
        (
            "llama",
            pre_tokenizers.Metaspace(),
            {},
            {"decoder": decoders.Metaspace()},
            "is decoded by Metaspace",
        ),
        (
            "llama",
            DIGITS,
            {"tokenizer_class": "GPT2TokenizerFast"},
            {},
            "cuts words otherwise than GPT2Token",
        ),
        ("llama", split_by(QWEN), {"tokenizer_class": "Qwen2Tokenizer"}, {}, "is a Qwen2Tokenizer, and only"),
        ("qwen3", split_by(QWEN), {}, {}, "is a Qwen2Tokenizer, and only byte-level BPE"),
        ("qwen2", split_by(QWEN), {"tokenizer_class": "TokenizersBackend"}, {}, "is a Qwen2Tokenizer, and"),
    ],
)
def test_tokenizers_that_transformers_would_read_otherwise_are_refused(
    tmp_path: Path, model_type: str, steps: Any, about: dict[str, Any], more: dict[str, Any], line: str
) -> None:
    write_tokenizer(tmp_path, steps, about, **more)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UserError) as error:
        load_tokenizer(str(tmp_path))
    assert line in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_files_that_are_gpt2s_by_the_models_type_stay_so_in_an_export(tmp_path: Path, qk_norm: bool) -> None:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([TRAINED_ON], 300, special_tokens=["<|endoftext|>"], show_progress=False)
    (tmp_path / "vocabulary").mkdir()
    bpe.save_model(str(tmp_path / "vocabulary"))
    model = GPTModel(replace(OURS, qk_norm=qk_norm))
    export_huggingface(model, str(tmp_path / "vocabulary"), tmp_path / "export")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    ours = load_tokenizer(tokenizer_of(open_weights(str(tmp_path / "export"))))
    text = "9 bottles of naïve beer — 日本<|endoftext|> on the wall"
    assert tokenizer.encode(text) == bpe.encode(text).ids == encode(text, ours)
    assert tokenizer.eos_token_id == end_of_text_id(ours) == 0


def test_a_run_with_these_parts_is_exported_opened_by_transformers_and_tuned(
    script: Script, tmp_path: Path, no_pictures: None
) -> None:
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    write_tokenizer(tmp_path / "llama3", split_by(LLAMA3), about)
    (tmp_path / "text.txt").write_text(TRAINED_ON, encoding="utf-8")

    def ran(name: str, *arguments: str) -> str:
        done = script(name, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    common = (
        "data=text",
        "data.path=text.txt",
        "data.batch_size=2",
        "training.max_minutes=null",
        "samples.max_new_tokens=3",
        "tracking=disabled",
    )
    parts = [f"model.{key}={value}" for key, value in {**PARTS, "n_kv_heads": 1, "bias": "false"}.items()]
    run = (*common, "model=tiny", *parts, "tokenizer.name=llama3", "training.max_steps=4")
    ran("pretrain", *run, "hydra.run.dir=run")
    assert "opens with AutoModelForCausalLM" in ran("export", "checkpoint=run", "to=export")

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    assert type(model).__name__ == "LlamaForCausalLM"
    text, ours = "9 bottles of naïve beer<|im_end|>", our_model(tmp_path / "run")
    ids = torch.tensor([tokenizer.encode(text)])
    assert encode(text, load_tokenizer(str(tmp_path / "export"))) == ids[0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), model(ids).logits, atol=1e-5, rtol=1e-5)
    begin = tokenizer("9 bottles", return_tensors="pt")
    expected = tokenizer.decode(model.generate(**begin, max_new_tokens=12, do_sample=False)[0])
    greedy = ("prompt=9 bottles", "max_new_tokens=12", "sampling=greedy", "runtime.precision=fp32")
    ran("generate", "checkpoint=export", *greedy, "hydra.run.dir=generated")
    [sample] = read_json_lines(tmp_path / "generated" / "samples.jsonl")
    assert sample["text"] == expected

    tune = (*common, "optimizer=adamw", "optimizer.lr=1e-12", "init_from=export", "training.max_steps=1")
    ran("pretrain", *tune, "hydra.run.dir=tuned")
    ran("pretrain", "resume=tuned", "training.max_steps=2")
    tuned, exported = open_weights(str(tmp_path / "tuned")), open_weights(str(tmp_path / "export"))
    assert tuned.model == exported.model == ours.config
    for name, tensor in exported.tensors.items():
        torch.testing.assert_close(tuned.tensors[name], tensor, atol=1e-6, rtol=0)
    assert encode(text, load_tokenizer(tokenizer_of(tuned))) == ids[0].tolist()
    refusal = script("pretrain", *tune, "model.norm=layernorm")
    assert "model.norm=layernorm: the weights of export have rmsnorm; remove it" in refusal.stderr
