"""The decode loop against the book's, written out again step by step."""

import pytest
import torch
from test_model import pair_with_transformers

from llm.config import ModelConfig
from llm.generation import Decoding, generate
from llm.model import GPTModel

CONFIG = ModelConfig(
    vocab_size=61, context_length=8, emb_dim=16, n_heads=2, n_layers=2, drop_rate=0.5, init="torch"
)


def model() -> GPTModel:
    torch.manual_seed(3)
    return GPTModel(CONFIG)


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
    assert torch.equal(generate(gpt, prompt, 20, context_size=8), expected)


@pytest.mark.parametrize("length", [1, 5, 8, 11])
def test_sampling_equals_the_book_on_the_same_stream(length: int) -> None:
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
    gpt, theirs = pair_with_transformers()
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


def test_a_row_ends_at_eos_and_the_others_go_on() -> None:
    prompt = torch.randint(61, (3, 5))
    gpt = model()
    free = generate(gpt, prompt, 20, context_size=8)
    eos = int(free[0, 7])
    result = generate(gpt, prompt, 20, context_size=8, eos_id=eos)
    for free_row, row in zip(free[:, 5:].tolist(), result[:, 5:].tolist(), strict=True):
        end = free_row.index(eos) if eos in free_row else len(free_row)
        kept = free_row[:end][: len(row)]
        assert row == kept + [eos] * (len(row) - len(kept))
    assert eos not in generate(gpt, prompt[:1], 20, context_size=8, eos_id=eos)[0, 5:].tolist()


def window_logits(gpt: GPTModel, window: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return gpt(torch.tensor([window]))[0, -1]


@pytest.mark.parametrize(("past_context", "jump"), [("exact", 1), ("half", 4)])
def test_logits_of_ragged_rows_are_those_of_their_windows(past_context: str, jump: int) -> None:
    """Rows of different lengths, equal ones among them, that end in any order, past the context too."""
    gpt = model().eval()
    prompts = [[1, 2, 3], [4], [5] * 12, [1, 2, 3], list(range(8)), [9, 9]]
    decoding = Decoding(gpt, prompts, 25, 8, past_context)
    tokens = torch.randint(61, (25, len(prompts)), generator=torch.Generator().manual_seed(4))
    ends = {3: [0], 7: [5, 2], 15: [4]}
    for step in range(25):
        logits = decoding.logits()
        assert len(logits) == len(decoding.rows)
        for row, found in zip(decoding.rows, logits, strict=True):
            ids = decoding.token_ids[row]
            start = next(start for start in range(0, len(ids), jump) if len(ids) - start <= 8)
            torch.testing.assert_close(found, window_logits(gpt, ids[start:]), atol=1e-5, rtol=1e-5)
        decoding.append([int(tokens[step, row]) for row in decoding.rows])
        decoding.end(ends.get(step, []))
    assert sorted(decoding.rows) == [1, 3]
    lengths = [len(ids) - len(prompt) for ids, prompt in zip(decoding.token_ids, prompts, strict=True)]
    assert lengths == [4, 25, 8, 25, 16, 8]


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
