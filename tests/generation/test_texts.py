"""Texts, streams, stops and the figures of each token, against what is worked out step by step."""

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from llm.config import ModelConfig, RuntimeConfig, SamplingConfig
from llm.data.tokenizer import load_tokenizer
from llm.errors import NotFinite, UserError
from llm.generation.inference import for_inference
from llm.generation.sampling import filter_logits
from llm.generation.texts import Sample, _Row, generate_texts
from llm.model.gpt import GPTModel
from llm.runtime import start_runtime

CONFIG = ModelConfig(
    vocab_size=257, context_length=16, emb_dim=32, n_heads=2, n_layers=2, tie_weights=False, init="torch"
)
PROMPTS = ["To be", "O", "or not to be, that is the question"]
SAMPLING = SamplingConfig(temperature=1.2, top_k=40)
BYTES = load_tokenizer("bytes")


@pytest.fixture(scope="module")
def model() -> GPTModel:
    torch.manual_seed(5)
    return GPTModel(CONFIG).eval()


def by_row(samples: list[Sample]) -> dict[tuple[int, int], list[int]]:
    return {(sample.prompt_index, sample.index): sample.token_ids for sample in samples}


@pytest.mark.parametrize("packed", [False, True])
def test_a_sample_does_not_depend_on_its_batch(model: GPTModel, packed: bool) -> None:
    if packed:
        model = for_inference(model, start_runtime(RuntimeConfig(device="cpu", precision="fp32")))
    before = torch.get_rng_state()
    alone, three, eight = (
        by_row(list(generate_texts(model, BYTES, PROMPTS, SAMPLING, 30, num_samples=4, batch_size=size)))
        for size in (1, 3, 8)
    )
    assert alone == three == eight
    assert len({tuple(token_ids) for token_ids in alone.values()}) == 12
    fewer = by_row(list(generate_texts(model, BYTES, PROMPTS[:2], SAMPLING, 30)))
    assert fewer == {key: alone[key] for key in ((0, 0), (1, 0))}
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_draws_otherwise(model: GPTModel) -> None:
    one, other, same = (
        by_row(list(generate_texts(model, BYTES, PROMPTS, SAMPLING, 30, seed=seed))) for seed in (1, 2, 1)
    )
    assert one == same
    assert all(one[key] != other[key] for key in one)


def test_each_prompt_may_have_a_maximum_of_its_own(model: GPTModel) -> None:
    samples = list(generate_texts(model, BYTES, PROMPTS, SAMPLING, [3, 30, 7], eos=False))
    assert [len(sample.token_ids) for sample in samples] == [3, 30, 7]
    assert {sample.stop_reason for sample in samples} == {"length"}


def test_the_end_of_text_ends_a_sample(model: GPTModel) -> None:
    config = SamplingConfig(temperature=3.0, top_k=None)
    free, ended = (
        list(generate_texts(model, BYTES, PROMPTS, config, 60, num_samples=20, eos=eos))
        for eos in (False, True)
    )
    for whole, sample in zip(free, ended, strict=True):
        end = whole.token_ids.index(256) if 256 in whole.token_ids else 60
        assert sample.token_ids == whole.token_ids[:end]
        assert sample.stop_reason == ("length" if end == 60 else "eos")
    assert {sample.stop_reason for sample in ended} == {"length", "eos"}


def test_a_stop_text_ends_a_sample_and_is_never_shown(model: GPTModel) -> None:
    stops = ["ab", "b", "xyz", "a\n"]
    config = SamplingConfig(temperature=2.0, top_k=None)
    free = list(generate_texts(model, BYTES, ["a"], config, 200, num_samples=20, eos=False))
    shown: list[str] = []
    stopped = list(
        generate_texts(
            model, BYTES, ["a"], config, 200, 20, batch_size=1, stop=stops, eos=False, show=shown.append
        )
    )
    for whole, sample in zip(free, stopped, strict=True):
        ends = [whole.continuation.find(stop) for stop in stops if stop in whole.continuation]
        assert sample.continuation == whole.continuation[: min(ends, default=None)]
        assert sample.stop_reason == ("stop" if ends else "length")
        assert sample.token_ids == whole.token_ids[: len(sample.token_ids)]
    assert {sample.stop_reason for sample in stopped} == {"stop", "length"}
    assert "".join(shown) == "".join(sample.text for sample in stopped)


def row(stop: list[str], limit: int = 100) -> _Row:
    return _Row(Sample("", 0, 0, 0), [0], limit, BYTES, stop, True)


def test_characters_are_shown_whole() -> None:
    text = "é€😀"
    one = row([], limit=len(text.encode()))
    pieces = [one.add(byte, 0.0, 0.0) for byte in text.encode()]
    assert pieces == ["", "é", "", "", "€", "", "", "", "😀"]
    assert one.sample.continuation == text
    cut = row([], limit=4)  # in the middle of the euro sign
    for byte in text.encode()[:4]:
        cut.add(byte, 0.0, 0.0)
    assert (cut.sample.continuation, cut.sample.stop_reason) == ("é", "length")
    broken = row([])
    for token in (0xC3, 0x41, 300):  # half a character, an A, and no token of this encoding
        broken.add(token, 0.0, 0.0)
    assert broken.sample.continuation == "\ufffdA\ufffd"


def test_what_may_be_a_stop_text_is_held_back() -> None:
    one = row(["abc", "cd"])
    pieces = [one.add(byte, 0.0, 0.0) for byte in b"xabaxabd"]
    assert pieces == ["x", "", "", "ab", "ax", "", "", "abd"]
    assert one.add(ord("c"), 0.0, 0.0) == ""
    assert one.add(ord("d"), 0.0, 0.0) == ""
    assert (one.sample.continuation, one.sample.stop_reason) == ("xabaxabd", "stop")


def test_figures_are_those_of_the_model_and_of_what_was_drawn_from(model: GPTModel) -> None:
    [sample] = generate_texts(model, BYTES, ["To be"], SAMPLING, 25, eos=False)
    ids = torch.tensor([*b"To be", *sample.token_ids])
    for number, token in enumerate(sample.token_ids):
        window = ids[: 5 + number][-16:]
        with torch.no_grad():
            logits = model(window[None])[0, -1]
        assert sample.log_probabilities[number] == pytest.approx(
            torch.log_softmax(logits, dim=-1)[token].item(), abs=1e-5
        )
        drawn_from = torch.distributions.Categorical(logits=filter_logits(logits, SAMPLING))
        assert sample.entropies[number] == pytest.approx(drawn_from.entropy().item(), abs=1e-4)
    assert sample.line()["log_probability"] == pytest.approx(sum(sample.log_probabilities))


def test_repetition_penalty_equals_transformers(model: GPTModel) -> None:
    config = SamplingConfig(temperature=0.0, repetition_penalty=1.3)
    samples = list(generate_texts(model, BYTES, PROMPTS, config, 25, eos=False))
    penalise = RepetitionPenaltyLogitsProcessor(1.3)
    for sample in samples:
        ids = torch.tensor([[*sample.prompt.encode()]])
        for _ in range(25):
            with torch.no_grad():
                logits = model(ids[:, -16:])[:, -1]
            ids = torch.cat([ids, penalise(ids, logits).argmax(-1, keepdim=True)], dim=1)
        assert sample.token_ids == ids[0, -25:].tolist()
    plain = list(generate_texts(model, BYTES, PROMPTS, SamplingConfig(temperature=0.0), 25, eos=False))
    assert [sample.token_ids for sample in plain] != [sample.token_ids for sample in samples]


@pytest.mark.parametrize(("prompt", "line"), [("", "prompt is empty"), ("<|endoftext|>", "token id 256")])
def test_a_prompt_that_cannot_be_is_one_line(prompt: str, line: str) -> None:
    small = GPTModel(ModelConfig(vocab_size=256, context_length=4, emb_dim=8, n_heads=1, n_layers=1))
    with pytest.raises(UserError, match=line):
        list(generate_texts(small, BYTES, ["a", prompt], SAMPLING, 3))
    with pytest.raises(UserError, match=line.replace("prompt", "b.txt")):
        list(generate_texts(small, BYTES, ["a", prompt], SAMPLING, 3, names=["a.txt", "b.txt"]))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(temperature: float) -> None:
    model = GPTModel(CONFIG).eval()
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 1e30)  # finite, but nothing can be computed with it
    texts = generate_texts(model, BYTES, ["ab"], SamplingConfig(temperature, top_k=None), 5)
    with pytest.raises(NotFinite, match="the model gives logits that are not finite"):
        next(texts)
