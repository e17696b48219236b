"""Models made ready for inference against the plain ones."""

from dataclasses import replace

import pytest
import torch

from llm.config import ModelConfig, RuntimeConfig
from llm.inference import INT8_KERNEL_ROWS, InferenceLinear, for_inference, quantise
from llm.model import GPTModel
from llm.runtime import Runtime, start_runtime

CONFIG = ModelConfig(
    vocab_size=501, context_length=16, emb_dim=48, n_heads=3, n_layers=2, drop_rate=0.3, qkv_bias=True
)


def cpu(precision: str) -> Runtime:
    return start_runtime(RuntimeConfig(device="cpu", precision=precision))


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.float() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("tie_weights", [False, True])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("bf16", 0.01), ("int8", 0.02)])
def test_logits_are_those_of_the_model(tie_weights: bool, precision: str, tolerance: float) -> None:
    torch.manual_seed(0)
    model = GPTModel(replace(CONFIG, tie_weights=tie_weights)).train()
    ready = for_inference(model, cpu(precision))
    assert model.training
    assert not ready.training  # no dropout
    assert ready.tok_emb.weight is model.tok_emb.weight  # what need not change is not copied
    idx = torch.randint(501, (3, 16))
    with torch.no_grad():
        expected, found = model.eval()(idx), ready(idx)
    assert relative_error(found, expected) < tolerance
    model(idx, idx).backward()  # the model itself still trains
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_int8_is_the_nearest_of_255_steps() -> None:
    torch.manual_seed(1)
    weight = torch.randn(40, 64) * torch.logspace(-3, 3, 40)[:, None]
    weight[7] = 0
    quantised, scales = quantise(weight)
    assert quantised.dtype == torch.int8
    steps = torch.arange(-127, 128)
    for row, found, scale in zip(weight, quantised, scales.float(), strict=True):
        nearest = steps[(row[:, None] - steps * scale).abs().argmin(dim=1)]
        worst = (row - found * scale).abs().max()
        assert worst <= (row - nearest * scale).abs().max() * 1.0001
        assert worst <= row.abs().max() / 127 * 0.51 + (row.abs().max() - 127 * scale).clamp_min(0)
    assert not quantised[7].any()


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (48, 501), (33, 7)])
@pytest.mark.parametrize("rows", [1, INT8_KERNEL_ROWS, INT8_KERNEL_ROWS + 1])
def test_int8_products_are_those_of_the_widened_weight(inputs: int, outputs: int, rows: int) -> None:
    torch.manual_seed(2)
    weight, bias, x = torch.randn(outputs, inputs), torch.randn(outputs), torch.randn(rows, inputs)
    quantised, scales = quantise(weight)
    wanted = x.bfloat16().float() @ (quantised.float() * scales.float()[:, None]).T + bias
    found = InferenceLinear(weight, bias, cpu("int8"))(x)
    assert found.dtype == torch.bfloat16
    assert relative_error(found, wanted) < 0.01
