"""Sampling filters against transformers' logits processors, ties and edges included."""

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llm.config import SamplingConfig
from llm.sampling import filter_logits, next_token

NO_IDS = torch.LongTensor()  # none of these processors looks at them


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


def test_temperature_zero_takes_the_likeliest() -> None:
    logits = torch.randn(8, 50)
    assert torch.equal(next_token(logits, SamplingConfig(temperature=0.0)), logits.argmax(-1))


def test_draws_follow_the_probabilities() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2])).repeat(60_000, 1)
    drawn = next_token(logits, SamplingConfig(1.0, top_k=None), torch.Generator().manual_seed(0))
    frequencies = torch.bincount(drawn, minlength=3) / len(drawn)
    torch.testing.assert_close(frequencies, torch.tensor([0.5, 0.3, 0.2]), atol=0.01, rtol=0)
