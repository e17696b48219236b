"""The decode loop against the book's, written out again step by step."""

import numpy as np
import pytest
import torch
from gpt2 import pair_with_transformers

from llm.config import ModelConfig, RuntimeConfig, SamplingConfig
from llm.generation.decoding import Decoding, generate
from llm.generation.inference import for_inference
from llm.generation.sampling import draw_at, next_token, uniform_stream
from llm.model.gpt import GPTModel
from llm.runtime import start_runtime

CONFIG = ModelConfig(
    vocab_size=61,
    context_length=8,
    emb_dim=16,
    n_heads=2,
    n_layers=2,
    drop_rate=0.5,
    tie_weights=False,
    init="torch",
)


def model() -> GPTModel:
    """With weights so large that the likeliest token depends on every token of the window. With those of a
    fresh model it depends on the last one alone, and greedy text is one token again and again."""
    torch.manual_seed(3)
    gpt = GPTModel(CONFIG)
    with torch.no_grad():
        for parameter in gpt.trf_blocks.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return gpt


def book_generate(
    model: GPTModel, idx: torch.Tensor, new: int, context: int, temperature: float, top_k: int | None
) -> torch.Tensor:
    """Chapter 5's steps: crop, last logits, top-k filter, temperature, draw."""
    model.eval()
    for _ in range(new):
        with torch.no_grad():
            logits = model(idx[:, -context:])[:, -1, :]
        if top_k is not None:
            kept, _ = torch.topk(logits, top_k)
            logits = torch.where(logits < kept[:, -1:], torch.tensor(-torch.inf), logits)
        if temperature > 0:
            chosen = torch.multinomial(torch.softmax(logits / temperature, dim=-1), num_samples=1)
        else:
            chosen = torch.argmax(logits, dim=-1, keepdim=True)
        idx = torch.cat((idx, chosen), dim=1)
    return idx


@pytest.mark.parametrize("length", range(1, 12))
def test_greedy_equals_the_book_up_to_the_context_and_past_it(length: int) -> None:
    torch.manual_seed(length)
    prompt = torch.randint(61, (3, length))
    gpt = model()
    expected = book_generate(gpt, prompt, 20, 8, 0.0, None)
    gpt.train()  # as in the middle of training: no dropout while it generates, and then as before
    assert torch.equal(generate(gpt, prompt, 20, context_size=8), expected)
    assert gpt.training


@pytest.mark.parametrize("context", [1, 2, 5, 8])
def test_each_of_ragged_rows_equals_the_book_alone(context: int) -> None:
    gpt = model().eval()
    prompts = [torch.randint(61, (length,)).tolist() for length in (3, 1, 12, 7, 8, 9, 3)]
    decoding = Decoding(gpt, prompts, 20, context)
    for _ in range(20):
        decoding.append(decoding.logits().argmax(dim=-1).tolist())
    for prompt, ids in zip(prompts, decoding.token_ids, strict=True):
        assert ids == book_generate(gpt, torch.tensor([prompt]), 20, context, 0.0, None)[0].tolist()


@pytest.mark.parametrize("length", [1, 5, 8, 11])
def test_sampling_equals_the_book_on_the_same_stream(length: int) -> None:
    torch.manual_seed(length)
    prompt = torch.randint(61, (3, length))
    gpt = model()
    torch.manual_seed(11)
    expected = book_generate(gpt, prompt, 20, 8, 1.4, 25)
    torch.manual_seed(11)
    assert torch.equal(generate(gpt, prompt, 20, context_size=8, temperature=1.4, top_k=25), expected)
    before = torch.get_rng_state()
    own = torch.Generator().manual_seed(11)
    drawn = generate(gpt, prompt, 20, context_size=8, temperature=1.4, top_k=25, generator=own)
    assert torch.equal(drawn, expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_greedy_equals_transformers() -> None:
    gpt, theirs = pair_with_transformers(std=0.5)
    for length in (1, 3, 10):
        prompt = torch.randint(97, (2, length))
        expected = theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=24 - length,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert torch.equal(generate(gpt, prompt, 24 - length, context_size=24), expected)


def test_a_row_ends_at_eos_and_the_others_continue() -> None:
    prompt = torch.randint(61, (3, 5))
    gpt = model()
    free = generate(gpt, prompt, 20, context_size=8)
    eos = int(free[0, 7])
    ends = [row.index(eos) if eos in row else 20 for row in free[:, 5:].tolist()]
    assert ends[0] < max(ends)  # so the first row is filled up
    result = generate(gpt, prompt, 20, context_size=8, eos_id=eos)
    assert result.shape == (3, 5 + max(ends))
    for free_row, row, end in zip(free[:, 5:].tolist(), result[:, 5:].tolist(), ends, strict=True):
        assert row == free_row[:end] + [eos] * (max(ends) - end)
    alone = generate(gpt, prompt[:1], 20, context_size=8, eos_id=eos)
    assert torch.equal(alone, free[:1, : 5 + ends[0]])


def window_logits(gpt: GPTModel, window: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return gpt(torch.tensor([window]))[0, -1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("past_context", "context", "jump"),
    [("exact", 8, 1), ("exact", 5, 1), ("half", 8, 4), ("half", 7, 3), ("half", 2, 1), ("half", 1, 1)],
)
def test_logits_of_ragged_rows_are_those_of_their_windows(
    past_context: str, context: int, jump: int, seed: int
) -> None:
    compare_with_windows(model().eval(), past_context, context, jump, seed)


def compare_with_windows(gpt: GPTModel, past_context: str, context: int, jump: int, seed: int) -> None:
    """Rows of different lengths, equal ones among them, that end in any order, past the context too."""
    torch.manual_seed(seed)
    order, tokens = torch.randperm(6).tolist(), torch.randint(61, (25, 6))
    ends = {3: order[:1], 7: order[1:3], 15: order[3:5], 24: order[5:]}
    prompts = [[1, 2, 3], [4], [5] * 12, [1, 2, 3], list(range(8)), [9, 9]]
    decoding = Decoding(gpt, prompts, 25, context, past_context)
    for step in range(25):
        logits = decoding.logits()
        for row, found in zip(decoding.rows, logits, strict=True):
            ids = decoding.token_ids[row]
            start = next(start for start in range(0, len(ids), jump) if len(ids) - start <= context)
            torch.testing.assert_close(found, window_logits(gpt, ids[start:]), atol=1e-5, rtol=1e-5)
        decoding.append([int(tokens[step, row]) for row in decoding.rows])
        decoding.end(ends.get(step, []))
    assert not decoding.rows
    for step, rows in ends.items():
        for row in rows:
            assert decoding.token_ids[row] == prompts[row] + tokens[: step + 1, row].tolist()


def test_a_row_draws_the_same_in_any_batch() -> None:
    gpt, config = model().eval(), SamplingConfig(temperature=1.4, top_k=25)
    prompts = [torch.randint(61, (length,)).tolist() for length in (3, 1, 12, 7, 8, 9, 3, 3)]
    uniforms = torch.from_numpy(np.stack([uniform_stream(5, (row,), 20) for row in range(8)]))

    def drawn(batch_size: int) -> list[list[int]]:
        rows = []
        for start in range(0, 8, batch_size):
            batch = slice(start, start + batch_size)
            decoding = Decoding(gpt, prompts[batch], 20, 8)
            for step in range(20):
                draw = draw_at(uniforms[batch, step])
                decoding.append(next_token(decoding.logits(), config, draw).tolist())
            rows += decoding.token_ids
        return rows

    alone = drawn(1)
    assert drawn(3) == alone
    assert drawn(8) == alone
    assert len({tuple(row[-20:]) for row in alone}) == 8


@pytest.mark.parametrize(
    ("precision", "cache_dtype", "tolerance"),
    [
        ("fp32", torch.float32, 1e-5),
        ("bf16", torch.float32, 0.03),
        ("bf16", torch.bfloat16, 0.03),  # as on a GPU
        ("int8", torch.float32, 0.03),
    ],
)
def test_models_made_ready_decode(precision: str, cache_dtype: torch.dtype, tolerance: float) -> None:
    """Kept keys and values give the logits of the same weights over the whole window."""
    ready = for_inference(model(), start_runtime(RuntimeConfig(device="cpu", precision=precision)))
    ready.cache_dtype = cache_dtype
    decoding = Decoding(ready, [[1, 2, 3], [4], [5] * 12], 12, 8, "half")
    for step in range(12):
        for ids, found in zip(decoding.token_ids, decoding.logits(), strict=True):
            start = next(start for start in range(0, len(ids), 4) if len(ids) - start <= 8)
            wanted = window_logits(ready, ids[start:])
            assert (found - wanted).norm() <= tolerance * wanted.norm()
        decoding.append([7 * step % 61, 60 - step, step])


def tokens_computed(gpt: GPTModel, prompts: list[list[int]], new: int, past_context: str) -> list[int]:
    """How many tokens go through the model at each step."""
    counts: list[int] = []
    handle = gpt.tok_emb.register_forward_hook(lambda module, args, out: counts.append(args[0].numel()))
    decoding = Decoding(gpt.eval(), prompts, new, 8, past_context)
    steps = []
    for _ in range(new):
        decoding.logits()
        decoding.append([1] * len(prompts))
        steps.append(sum(counts))
        counts.clear()
    handle.remove()
    return steps


def test_a_step_computes_one_token_a_row_and_a_shared_prompt_once() -> None:
    assert tokens_computed(model(), [[1, 2, 3, 4]] * 5, 5, "exact") == [4, 5, 5, 5, 5]
    past = tokens_computed(model(), [[1, 2, 3, 4]], 13, "exact")
    assert past == [4, 1, 1, 1, 1, *[8] * 8]  # past the context the whole window, as the book does
    half = tokens_computed(model(), [[1, 2, 3, 4]], 13, "half")
    assert half == [4, 1, 1, 1, 1, 5, 1, 1, 1, 5, 1, 1, 1]


def test_rows_that_differ_are_computed_side_by_side() -> None:
    # Of two equal prompts one is computed, and the shorter one is filled up.
    assert tokens_computed(model(), [[1, 2, 3], [4], [1, 2, 3]], 2, "exact") == [2 * 3, 3]
    prompts = [[1, 2, 3, 4], [5, 6, 7, 8, 9, 10]]
    # The second row is past the context from the fourth step on, the first from the sixth.
    assert tokens_computed(model(), prompts, 6, "exact") == [2 * 6, 2, 2, 2 + 8, 2 + 8, 2 * 8]
    assert tokens_computed(model(), prompts, 8, "half") == [2 * 6, 2, 2, 2 + 5, 2, 2 + 5, 2, 2 + 5]
