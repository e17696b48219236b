"""Models made ready for inference against the plain ones."""

from dataclasses import replace

import pytest
import torch

from llm.config import ModelConfig, RuntimeConfig
from llm.generation.inference import INT8_KERNEL_ROWS, InferenceLinear, for_inference, padded, quantise
from llm.model.gpt import GPTModel
from llm.model.loss import token_loss
from llm.runtime import Runtime, start_runtime

CONFIG = ModelConfig(
    vocab_size=501, context_length=16, emb_dim=48, n_heads=3, n_layers=2, drop_rate=0.3, qkv_bias=True
)


def cpu(precision: str) -> Runtime:
    return start_runtime(RuntimeConfig(device="cpu", precision=precision))


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.float() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("tie_weights", [False, True])
@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("bf16", 0.01), ("int8", 0.02)])
def test_logits_and_losses_are_those_of_the_model(
    tie_weights: bool, qkv_bias: bool, precision: str, tolerance: float
) -> None:
    torch.manual_seed(0)
    model = GPTModel(replace(CONFIG, tie_weights=tie_weights, qkv_bias=qkv_bias)).train()
    with torch.no_grad():  # GPT-2's own start has no biases that a copy could lose
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    ready = for_inference(model, cpu(precision))
    idx, targets = torch.randint(501, (3, 16)), torch.randint(501, (3, 16))
    with torch.no_grad():
        found = ready(idx)  # without dropout
        expected = model.eval()(idx)
    assert relative_error(found, expected) < tolerance
    [losses], [again] = (each.score_tokens(idx, targets, token_loss) for each in (model, ready))
    assert relative_error(again, losses) < tolerance


@pytest.mark.parametrize("tie_weights", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_the_model_itself_stays_as_it_was(tie_weights: bool, precision: str) -> None:
    model = GPTModel(replace(CONFIG, tie_weights=tie_weights)).train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    layers = [type(module) for module in model.modules()]
    ready = for_inference(model, cpu(precision))
    assert [type(module) for module in model.modules()] == layers
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not ready.training
    assert not any(isinstance(module, torch.nn.Linear) for module in ready.modules())  # not one forgotten
    theirs = dict(ready.named_parameters())
    shared = {name for name, parameter in model.named_parameters() if parameter is theirs.get(name)}
    assert shared >= {name for name in before if "emb" in name or "norm" in name}  # which need not change
    idx = torch.randint(501, (3, 16))
    model(idx, idx).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_bf16_is_as_near_to_the_model_as_autocast_is() -> None:
    torch.manual_seed(0)
    model = GPTModel(CONFIG).eval()
    idx = torch.randint(501, (3, 16))
    with torch.no_grad():
        exact, found = model(idx), for_inference(model, cpu("bf16"))(idx)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = model(idx)
    assert relative_error(found, autocast.float()) < 0.005
    assert relative_error(found, exact) < 1.1 * relative_error(autocast, exact)


def test_int8_is_the_nearest_of_255_steps() -> None:
    torch.manual_seed(1)
    weight = torch.randn(40, 64) * torch.logspace(-3, 3, 40)[:, None]
    weight[7] = 0
    quantised, scales = quantise(weight)
    assert (quantised.dtype, scales.dtype) == (torch.int8, torch.bfloat16)
    assert (scales > 0).all()  # nothing is divided by 0, a row of zeros included
    torch.testing.assert_close(scales.float(), weight.abs().amax(dim=1) / 127, atol=1e-30, rtol=2**-8)
    steps = torch.arange(-127, 128)
    for row, found, scale in zip(weight, quantised, scales.float(), strict=True):
        errors = (row[:, None] - steps * scale).abs()  # of every step there is
        error = (row - found * scale).abs()
        assert (error <= errors.amin(dim=1) + 1e-5 * scale).all()
        assert (error <= 0.5001 * scale).all()
    assert not quantised[7].any()


def int8_layer(inputs: int, outputs: int) -> tuple[InferenceLinear, torch.Tensor, torch.Tensor]:
    """A layer, its weight as the layer rounds it, and its bias."""
    torch.manual_seed(2)
    weight, bias = torch.randn(outputs, inputs), torch.randn(outputs)
    quantised, scales = quantise(weight)
    return InferenceLinear(weight, bias, cpu("int8")), quantised.float() * scales.float()[:, None], bias


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (48, 501), (16, 1), (33, 7), (7, 32)])
@pytest.mark.parametrize("rows", [1, 3, INT8_KERNEL_ROWS, INT8_KERNEL_ROWS + 1])
def test_int8_products_are_those_of_the_widened_weight(inputs: int, outputs: int, rows: int) -> None:
    layer, widened, bias = int8_layer(inputs, outputs)
    x = torch.randn(2, rows, inputs)[1:]
    found = layer(x)
    assert found.dtype == torch.bfloat16
    assert found.shape == (1, rows, outputs)
    assert relative_error(found, x.bfloat16().float() @ widened.T + bias) < 0.01


def test_int8_rows_do_not_depend_on_how_many_there_are() -> None:
    """The kernel for a few rows and the widened weight for many."""
    layer, _, _ = int8_layer(64, 96)
    x = torch.randn(INT8_KERNEL_ROWS + 1, 64)
    many = layer(x)
    assert relative_error(layer(x[:INT8_KERNEL_ROWS]), many[:INT8_KERNEL_ROWS].float()) < 0.01


@pytest.mark.parametrize("outputs", [1, 64, 65])
@pytest.mark.parametrize("has_bias", [False, True])
def test_outputs_that_a_gpu_pads_are_cut_off(
    outputs: int, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(5)
    weight, bias, x = (
        torch.randn(outputs, 24),
        torch.randn(outputs) if has_bias else None,
        torch.randn(2, 3, 24),
    )
    monkeypatch.setattr("llm.generation.inference._packs", lambda runtime: False)
    layer = InferenceLinear(weight, bias, cpu("fp32"))
    layer.weight, layer.bias = padded(layer.weight, layer.bias)
    assert len(layer.weight) == (64 if outputs <= 64 else 128)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_inputs_need_not_lie_in_one_piece(precision: str) -> None:
    torch.manual_seed(4)
    layer = InferenceLinear(torch.randn(96, 64), torch.randn(96), cpu(precision))
    for x in (torch.randn(64, 3).T, torch.randn(64, 3).bfloat16().T, torch.randn(3, 5, 64)[:, -1]):
        assert relative_error(layer(x), layer(x.contiguous()).float()) < 1e-6
