"""Cached decoding of models with each part against the plain model, over windows or under a banded mask."""

from dataclasses import replace

import pytest
import torch
from parts import EVERY_PART, random_model
from torch import Tensor

from llm.config import ModelConfig, RuntimeConfig, SamplingConfig
from llm.data.tokenizer import load_tokenizer
from llm.errors import UserError
from llm.generation import decoding
from llm.generation.decoding import Decoding
from llm.generation.inference import for_inference
from llm.generation.texts import generate_texts
from llm.model.gpt import GPTModel
from llm.model.kv_cache import Attended
from llm.runtime import start_runtime

BASE = ModelConfig(vocab_size=61, context_length=6, emb_dim=24, n_heads=4, n_layers=2)
MODERN = replace(BASE, **EVERY_PART, rotary_base=50.0, hidden_dim=20)
EVERYTHING = replace(MODERN, position="learned", activation="swiglu")
CONFIGS = {
    "rmsnorm": replace(BASE, norm="rmsnorm"),
    "rotary": replace(BASE, position="rotary"),
    "relu2": replace(BASE, activation="relu2"),
    "swiglu": replace(BASE, activation="swiglu"),
    "no biases": replace(BASE, bias=False),
    "QK-norm": replace(BASE, qk_norm=True),
    "grouped queries": replace(BASE, n_kv_heads=2),
    "value embeddings": replace(BASE, value_embeddings=True),
    "residual scalars": replace(BASE, residual_scalars=True),
    "smear": replace(BASE, smear=True),
    "capped logits": replace(BASE, logit_softcap=5.0),
    "learned and all": EVERYTHING,
    "rotary and all": MODERN,
    "rotary, smear": replace(BASE, position="rotary", smear=True),
    "rotary, one head of keys": replace(BASE, position="rotary", n_kv_heads=1, qk_norm=True, qkv_bias=True),
    "three layers": replace(MODERN, n_layers=3),
    "one layer": replace(MODERN, n_layers=1, vocab_size=257),
    "context 1": replace(MODERN, context_length=1),
    "context 1, learned": replace(EVERYTHING, context_length=1, n_layers=1),
    "context 2": replace(MODERN, context_length=2, n_heads=2, emb_dim=12, n_kv_heads=1),
}
SLIDING = [name for name, config in CONFIGS.items() if config.position == "rotary"]
STEPS = 40


@torch.no_grad()
def windows_by_brute_force(model: GPTModel, ids: Tensor) -> Tensor:
    """Logits after each token of a row (time,), from the last context_length tokens: (time, vocab)."""
    context = model.config.context_length
    begun = model(ids[None, :context])[0]
    windows = ids.unfold(0, context, 1)[1:] if len(ids) > context else ids.new_empty(0, context)
    return torch.cat([begun, model(windows)[:, -1]])


@torch.no_grad()
def band_by_brute_force(model: GPTModel, ids: Tensor) -> Tensor:
    """The same from the whole row, with each block attending to the last context_length positions alone."""
    distance = torch.arange(len(ids))[:, None] - torch.arange(len(ids))
    band = (distance >= 0) & (distance < model.config.context_length)

    def remember(layer: int, keys: Tensor, values: Tensor) -> Attended:
        return keys, values, band

    return model.logits(model.features(ids[None], remember=remember))[0].float()


def compare(model: GPTModel, past_context: str, tolerance: float = 1e-5) -> None:
    """Rows of different lengths, two of them equal at first, that end in any order, far past the context."""
    torch.manual_seed(5)
    vocab, context = model.config.vocab_size, model.config.context_length
    prompts = [torch.randint(vocab, (length,)).tolist() for length in (3, 1, context, 27, 3 * context)]
    rows = [*prompts, prompts[3], prompts[0]]
    ends = {4: [0], 9: [4, 2], 30: [5]}
    tokens = torch.randint(vocab, (STEPS, len(rows))).tolist()
    cached = Decoding(model, rows, STEPS, context, past_context)
    found: list[list[Tensor]] = [[] for _ in rows]
    for step, new in enumerate(tokens):
        for row, logits in zip(cached.rows, cached.logits(), strict=True):
            found[row].append(logits)
        cached.append([new[row] for row in cached.rows])
        cached.end(ends.get(step, []))
    brute_force = band_by_brute_force if past_context == "slide" else windows_by_brute_force
    for prompt, ids, logits in zip(rows, cached.token_ids, found, strict=True):
        wanted = brute_force(model, torch.tensor(ids))[len(prompt) - 1 : -1]
        if tolerance <= 1e-5:
            torch.testing.assert_close(torch.stack(logits), wanted, atol=tolerance, rtol=tolerance)
        else:
            error = (torch.stack(logits) - wanted).norm(dim=-1) / wanted.norm(dim=-1)
            assert error.max() < tolerance


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_exact_is_the_window_computed_anew(config: ModelConfig) -> None:
    compare(random_model(config), "exact")


@pytest.mark.parametrize("name", SLIDING)
def test_slide_is_attention_to_the_last_positions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(random_model(CONFIGS[name]), "slide")
    monkeypatch.setattr(decoding, "COUNTED_POSITIONS", 0)  # counted from anew every few tokens
    compare(random_model(CONFIGS[name]), "slide")


def test_slide_is_exact_up_to_the_context_and_differs_past_it() -> None:
    model = random_model(MODERN)
    ids = torch.randint(61, (12,))
    band, windows = band_by_brute_force(model, ids), windows_by_brute_force(model, ids)
    torch.testing.assert_close(band[:6], windows[:6], atol=1e-5, rtol=1e-5)
    assert ((band - windows)[6:].norm(dim=-1) > 0.1).all()


@pytest.mark.parametrize(
    ("precision", "cache_dtype", "tolerance"),
    [
        ("fp32", torch.float32, 1e-5),
        ("bf16", torch.float32, 0.05),
        ("bf16", torch.bfloat16, 0.05),  # as on a GPU
        ("int8", torch.float32, 0.05),
    ],
)
@pytest.mark.parametrize("name", ["rotary and all", "rotary, one head of keys", "context 2"])
def test_models_made_ready_decode(
    name: str, precision: str, cache_dtype: torch.dtype, tolerance: float
) -> None:
    runtime = start_runtime(RuntimeConfig(device="cpu", precision=precision))
    ready = for_inference(random_model(CONFIGS[name]), runtime)
    ready.cache_dtype = cache_dtype
    for past_context in ("exact", "slide"):
        compare(ready, past_context, tolerance)


@pytest.mark.parametrize("past_context", ["exact", "half", "slide"])
def test_a_sample_does_not_depend_on_its_batch(past_context: str) -> None:
    model = random_model(replace(MODERN, vocab_size=257))
    prompts, tokenizer = ["ab", "abcdefghijklmnopqrst", "a"], load_tokenizer("bytes")

    def texts(batch_size: int) -> list[list[int]]:
        samples = generate_texts(
            model, tokenizer, prompts, SamplingConfig(), 30, 2, 7, batch_size, past_context=past_context
        )
        return [sample.token_ids for sample in samples]

    alone = texts(1)
    assert texts(4) == texts(6) == alone
    assert len({tuple(ids) for ids in alone}) == 6


def test_slide_computes_a_token_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(replace(MODERN, context_length=4))
    counts: list[int] = []
    model.trf_blocks[0].register_forward_hook(lambda module, args, out: counts.append(out[..., 0].numel()))

    def computed(prompt: int, new: int) -> list[int]:
        steps, cached = [], Decoding(model, [[1] * prompt] * 3, new, 4, "slide")
        for _ in range(new):
            cached.logits()
            cached.append([1] * 3)
            steps.append(sum(counts))
            counts.clear()
        return steps

    assert computed(2, 30) == [2, *[3] * 29]
    # With 2 blocks of 4 positions and a smear of 1, none but the last 8 tokens count.
    assert computed(100, 3) == [8, 3, 3]
    monkeypatch.setattr(decoding, "COUNTED_POSITIONS", 0)
    assert computed(2, 60) == [2, *[3] * 30, 8, *[3] * 24, 8, *[3] * 3]  # from 32 positions on, anew


def test_learned_positions_cannot_slide() -> None:
    with pytest.raises(UserError, match=r"^past_context=slide needs .* model.position=learned, .* exact$"):
        Decoding(random_model(BASE), [[1]], 5, 6, "slide")
