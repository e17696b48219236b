"""The decode loop against the book's, written out again step by step."""

import torch

from llm.config import ModelConfig
from llm.generation import generate, sample_generator
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


def test_greedy_equals_the_book_past_the_context() -> None:
    prompt = torch.randint(61, (3, 5))
    expected = book_generate(model(), prompt, 20, 8, 0.0, None)
    assert torch.equal(generate(model(), prompt, 20, context_size=8), expected)


def test_sampling_on_the_global_stream_equals_the_book() -> None:
    prompt = torch.randint(61, (3, 5))
    gpt = model()
    torch.manual_seed(11)
    expected = book_generate(gpt, prompt, 20, 8, 1.4, 25)
    torch.manual_seed(11)
    assert torch.equal(generate(gpt, prompt, 20, context_size=8, temperature=1.4, top_k=25), expected)


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


def test_an_own_stream_leaves_torchs_alone_and_repeats() -> None:
    gpt, prompt = model(), torch.randint(61, (1, 5))
    before = torch.get_rng_state()
    texts = [
        generate(
            gpt, prompt, 20, 8, temperature=5.0, generator=sample_generator(123, index, torch.device("cpu"))
        )
        for index in (0, 1, 0)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(texts[0], texts[2])
    assert not torch.equal(texts[0], texts[1])
