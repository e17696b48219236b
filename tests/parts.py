"""Models of all of today's parts, weights at which each of them matters, and where they compute."""

from typing import Any

import torch

from llm.config import ModelConfig
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
