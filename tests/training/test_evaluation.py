"""The metrics against sums over every token, one at a time."""

import math

import pytest
import torch

from llm.config import ModelConfig, RuntimeConfig
from llm.model.gpt import GPTModel
from llm.runtime import start_runtime
from llm.training.evaluation import METRICS, Metric, evaluate


def test_metrics_are_those_of_single_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = GPTModel(ModelConfig(11, 8, 16, 2, 1, drop_rate=0.5)).train()
    lengths = torch.tensor([0, *range(1, 11)])  # an end of text stands for no bytes
    batches = [(torch.randint(11, (rows, 8)), torch.randint(11, (rows, 8))) for rows in (3, 3, 1)]
    monkeypatch.setitem(
        METRICS,
        "mean_rank",
        Metric(
            lambda sums: sums.scores["mean_rank"] / sums.tokens,
            "mean rank",
            score=lambda logits, targets: (logits > logits.gather(1, targets[:, None])).sum(dim=1),
        ),
    )
    runtime = start_runtime(RuntimeConfig(device="cpu", precision="fp32"))
    found = evaluate(model, batches, lengths, runtime, max_batches=3)
    as_in_the_book = evaluate(model, batches, lengths, runtime, max_batches=3, weigh_batches_equally=True)
    assert model.training
    assert found == evaluate(model, [*batches, batches[0]], lengths, runtime, max_batches=3)

    model.eval()
    nats: list[list[float]] = []
    ranks, size = [], 0
    for inputs, targets in batches:
        with torch.no_grad():
            probabilities = model(inputs).double().softmax(dim=-1)
        nats.append([])
        for row, wanted in zip(probabilities.flatten(0, 1).tolist(), targets.flatten().tolist(), strict=True):
            nats[-1].append(-math.log(row[wanted]))
            ranks.append(sum(other > row[wanted] for other in row))
            size += int(lengths[wanted])
    total, tokens = sum(map(sum, nats)), sum(map(len, nats))
    assert found == pytest.approx(
        {
            "loss": total / tokens,
            "perplexity": math.exp(total / tokens),
            "bits_per_byte": total / math.log(2) / size,
            "mean_rank": sum(ranks) / tokens,
        },
        rel=1e-5,
    )
    assert as_in_the_book["loss"] == pytest.approx(sum(sum(each) / len(each) for each in nats) / 3, rel=1e-5)
    assert as_in_the_book["bits_per_byte"] == found["bits_per_byte"]


def test_ends_of_text_alone_have_no_bits_per_byte() -> None:
    model = GPTModel(ModelConfig(11, 8, 16, 2, 1))
    runtime = start_runtime(RuntimeConfig(device="cpu", precision="fp32"))
    ends = torch.zeros(2, 8, dtype=torch.int64)
    found = evaluate(model, [(ends, ends)], torch.tensor([0, *range(1, 11)]), runtime)
    assert found["bits_per_byte"] == math.inf
    assert 0 < found["loss"] < 20
