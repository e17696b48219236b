"""Compute-optimal model sizes and token counts, by published scaling laws."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from llm.config import ModelConfig
from llm.model.gpt import at_width, parameters_of

FLOPS_PER_PARAMETER = 6  # in training, per token; all of these laws count compute so


@dataclass(frozen=True)
class Law:
    name: str
    source: str
    parameters: Callable[[float], float]  # optimal number of them, for a compute in floating-point operations

    def tokens(self, flops: float) -> float:
        return flops / FLOPS_PER_PARAMETER / self.parameters(flops)


def _ratio(tokens: float) -> Callable[[float], float]:
    """A fixed number of tokens per parameter, at any compute."""
    return lambda flops: math.sqrt(flops / FLOPS_PER_PARAMETER / tokens)


def _fitted(a: float, alpha: float, b: float, beta: float) -> Callable[[float], float]:
    """Where E + a / parameters^alpha + b / tokens^beta is lowest: Hoffmann et al. 2022, equation 4."""
    scale = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
    return lambda flops: scale * (flops / FLOPS_PER_PARAMETER) ** (beta / (alpha + beta))


HOFFMANN = "Hoffmann et al. 2022, arXiv:2203.15556"
LAWS = (
    Law("20 tokens a parameter", f"{HOFFMANN}, approaches 1 and 2 in round figures", _ratio(20)),
    Law("fitted to losses", f"{HOFFMANN}, approach 3", _fitted(406.4, 0.34, 410.7, 0.28)),
    Law(
        "the same, fitted again",
        "Besiroglu et al. 2024, arXiv:2404.10102",
        _fitted(482.01, 0.3478, 2085.43, 0.3658),
    ),
)
SMALLEST_FITTED = 44e6  # parameters of the smallest model that the laws were fitted to


def model_of_about(config: ModelConfig, parameters: float) -> ModelConfig:
    """A model of the same family as `config` with about this many parameters: the heads keep their size, and
    depth grows in proportion to width."""
    step = config.head_dim * config.n_heads // config.kv_heads

    def at(steps: int) -> ModelConfig:
        width = steps * step
        return replace(
            at_width(config, width), n_layers=max(1, round(config.n_layers * width / config.emb_dim))
        )

    low, high = 1, 2
    while parameters_of(at(high)) < parameters:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if parameters_of(at(middle)) < parameters else (low, middle)
    return min(at(low), at(high), key=lambda model: abs(math.log(parameters_of(model) / parameters)))
