"""Sampling filters against transformers' logits processors, ties and edges included."""

import numpy as np
import pytest
import torch
from gpt2 import pair_with_transformers
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llm.config import SamplingConfig
from llm.generation.sampling import (
    cumulative_in_pieces,
    draw_at,
    draw_from,
    filter_logits,
    next_distribution,
    next_token,
    penalise_repetition,
    uniform_stream,
)

NO_IDS = torch.LongTensor()  # none of these processors looks at them
BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))  # the largest number of a stream


def logits_with_ties() -> torch.Tensor:
    torch.manual_seed(0)
    return (torch.randn(64, 50) * 3).round(decimals=0)  # whole numbers: ties everywhere


@pytest.mark.parametrize("top_k", [None, 1, 7, 50, 1000])
@pytest.mark.parametrize("top_p", [None, 0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("min_p", [None, 0.0, 0.1, 1.0])
@pytest.mark.parametrize("temperature", [0.01, 0.7, 1.4])
def test_filters_equal_transformers(
    temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    logits = logits_with_ties()
    expected = TemperatureLogitsWarper(temperature)(NO_IDS, logits)
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(NO_IDS, expected)
    if top_p is not None:
        expected = TopPLogitsWarper(top_p)(NO_IDS, expected)
    if min_p is not None:
        expected = MinPLogitsWarper(min_p)(NO_IDS, expected)
    assert torch.equal(filter_logits(logits, SamplingConfig(temperature, top_k, top_p, min_p)), expected)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 10.0])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    logits = logits_with_ties()  # positive, zero and negative
    ids = torch.randint(50, (64, 30))  # with repetitions
    seen = torch.zeros(64, 50, dtype=torch.bool).scatter(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    assert torch.equal(penalise_repetition(logits, seen, penalty), expected)


def test_the_order_is_that_of_transformers_generation() -> None:
    _, theirs = pair_with_transformers()
    prompt = torch.randint(97, (3, 10))
    config = SamplingConfig(temperature=0.1, top_k=20, top_p=0.9, min_p=0.2, repetition_penalty=1.5)
    result = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=10,
        do_sample=True,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
    )
    for step, (logits, expected) in enumerate(zip(result.logits, result.scores, strict=True)):
        ids = result.sequences[:, : 10 + step]
        seen = torch.zeros(3, 97, dtype=torch.bool).scatter(1, ids, True)
        penalised = penalise_repetition(logits, seen, config.repetition_penalty)
        assert torch.equal(filter_logits(penalised, config), expected)


@pytest.mark.parametrize("filters", [(None, None, None), (1000, 1.0, 0.0), (7, 0.9, 0.1)])
@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1e-7, 1e-6, 1e-3])
def test_near_temperature_zero_is_greedy(
    temperature: float, filters: tuple[int | None, float | None, float | None]
) -> None:
    torch.manual_seed(1)
    logits = torch.randn(8, 50) * 100
    config = SamplingConfig(temperature, *filters)
    uniform = torch.rand(8)
    assert torch.equal(next_token(logits, config, draw_at(uniform)), logits.argmax(-1))
    distribution = next_distribution(logits, config)
    assert torch.equal(draw_at(uniform)(distribution), logits.argmax(-1))
    assert torch.equal(distribution.sum(-1), torch.ones(8))
    assert torch.equal(distribution.max(-1).values, torch.ones(8))


def test_drawing_from_a_generator_follows_the_probabilities() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2])).repeat(60_000, 1)
    draw = draw_from(torch.Generator().manual_seed(0))
    drawn = next_token(logits, SamplingConfig(1.0, top_k=None), draw)
    frequencies = torch.bincount(drawn, minlength=3) / len(drawn)
    torch.testing.assert_close(frequencies, torch.tensor([0.5, 0.3, 0.2]), atol=0.01, rtol=0)


def test_drawing_at_a_number_is_the_inverse_of_the_cumulative_distribution() -> None:
    numbers = torch.tensor([0.0, 0.4999, 0.5001, 0.7999, 0.8001, BELOW_ONE])
    probabilities = torch.tensor([0.5, 0.3, 0.2]).repeat(6, 1)
    assert draw_at(numbers)(probabilities).tolist() == [0, 0, 1, 1, 2, 2]
    # To the bit, where all the sums are exact: a token has its lower end, and not its upper one.
    ends = torch.tensor([0.5, 0.75])
    either_side = torch.cat([ends, ends.nextafter(torch.zeros(2))])
    exact = torch.tensor([0.5, 0.25, 0.25]).repeat(4, 1)
    assert draw_at(either_side)(exact).tolist() == [1, 2, 0, 1]
    # What may not be drawn is not drawn, at either end or between.
    masked = torch.tensor([0.0, 0.0, 0.7, 0.0, 0.3, 0.0]).repeat(6, 1)
    assert draw_at(numbers)(masked).tolist() == [2, 2, 2, 4, 4, 4]
    # Nor is it where rounding has left the sum below the number.
    short = torch.tensor([[0.5, 0.499999, 0.0]])
    assert draw_at(numbers[-1:])(short).tolist() == [1]


def test_drawing_at_a_number_does_not_depend_on_the_batch() -> None:
    torch.manual_seed(3)
    numbers, probabilities = torch.rand(64), torch.softmax(logits_with_ties(), dim=-1)
    together = draw_at(numbers)(probabilities)
    alone = [draw_at(numbers[row : row + 1])(probabilities[row : row + 1]) for row in range(64)]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(draw_at(numbers.flip(0))(probabilities.flip(0)), together.flip(0))


def test_drawing_at_numbers_follows_the_probabilities_in_a_large_vocabulary() -> None:
    torch.manual_seed(2)
    probabilities = torch.softmax(filter_logits(torch.randn(50_257) * 2, SamplingConfig(1.0, 10)), dim=-1)
    numbers = torch.from_numpy(uniform_stream(7, (0, 0), 1000))
    drawn = torch.cat([draw_at(part)(probabilities.expand(len(part), -1)) for part in numbers.split(100)])
    frequencies = torch.bincount(drawn, minlength=50_257) / len(drawn)
    torch.testing.assert_close(frequencies, probabilities, atol=0.05, rtol=0)
    assert not frequencies[probabilities == 0].any()
    possible = (probabilities > 0).nonzero().flatten()
    extremes = draw_at(torch.tensor([0.0, BELOW_ONE]))(probabilities.expand(2, -1))
    assert torch.equal(extremes, possible[[0, -1]])


@pytest.mark.parametrize("vocab", [1, 255, 256, 257, 50_257])
def test_sums_in_pieces_are_cumulative_sums(vocab: int) -> None:
    torch.manual_seed(6)
    probabilities = torch.softmax(torch.randn(3, vocab) * 3, dim=-1)
    probabilities[torch.rand(3, vocab) < 0.3] = 0
    sums, found = probabilities.cumsum(dim=-1, dtype=torch.float64), cumulative_in_pieces(probabilities)
    torch.testing.assert_close(found[:, :vocab], sums, atol=1e-14, rtol=1e-14)
    assert (found[:, vocab:] == found[:, vocab - 1 : vocab]).all()
    assert (found.diff(dim=-1) >= 0).all()


def test_streams_repeat_differ_and_continue() -> None:
    stream = uniform_stream(123, (0, 1), 1000)
    assert np.array_equal(uniform_stream(123, (0, 1), 2000)[:1000], stream)
    assert not np.isin(stream[:10], uniform_stream(123, (1, 0), 1000)).any()
    assert not np.isin(stream[:10], uniform_stream(124, (0, 1), 1000)).any()
    shuffle = np.random.default_rng((123, 0)).random(1000, dtype=np.float32)  # as of training's first epoch
    assert not np.isin(uniform_stream(123, (0, 0), 10), shuffle).any()
    assert stream.dtype == np.float32
    assert 0 <= stream.min() < 0.01
    assert 0.99 < stream.max() < 1
