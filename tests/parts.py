"""Models of all of today's parts, weights at which each of them matters, and what generation draws."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from llm.config import ModelConfig, SamplingConfig
from llm.generation.steps import Drawn
from llm.model.gpt import GPTModel
from llm.runtime import Runtime

CPU = Runtime(torch.device("cpu"), "fp32")

EVERY_PART: dict[str, Any] = {
    "norm": "rmsnorm",
    "position": "rotary",
    "activation": "relu2",
    "bias": False,
    "n_kv_heads": 2,
    "qk_norm": True,
    "value_embeddings": True,
    "residual_scalars": True,
    "smear": True,
    "parallel_blocks": True,
    "logit_softcap": 5.0,
    "tie_weights": False,
}


def random_model(config: ModelConfig) -> GPTModel:
    """In evaluation mode, with weights large enough for each part and each token of the window to matter, and
    none at the value that it starts from."""
    torch.manual_seed(1)
    model = GPTModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model


SAMPLINGS = {
    "plain": SamplingConfig(),
    "greedy": SamplingConfig(temperature=0.0),
    "filters and penalty": SamplingConfig(temperature=1.4, top_k=25, top_p=0.9, repetition_penalty=1.3),
}
RAGGED = [[1, 2, 3], [4], [5] * 12, [1, 2, 3], list(range(30)), [9, 9]]  # prompts


def drawn_with(
    loop: Callable[..., Iterator[Drawn]],
    model: GPTModel,
    prompts: list[list[int]],
    limits: list[int],
    sampling: SamplingConfig,
    past_context: str,
) -> list[Drawn]:
    """What each row draws until its limit."""
    torch.manual_seed(4)
    uniforms = torch.rand(max(limits), len(prompts))
    rows: list[Drawn] = [[] for _ in prompts]
    for drawn in loop(
        model, prompts, uniforms, sampling, past_context, lambda row: len(rows[row]) >= limits[row]
    ):
        for each in drawn:
            rows[each[0]].append(each)
    return rows


def assert_drawn(found: list[Drawn], wanted: list[Drawn], tolerance: float) -> None:
    """The same tokens, with figures as close as that."""
    for one, other in zip(found, wanted, strict=True):
        assert [each[:2] for each in one] == [each[:2] for each in other]
        figures = [torch.tensor([each[2:] for each in row]) for row in (one, other)]
        torch.testing.assert_close(*figures, atol=tolerance, rtol=tolerance)
