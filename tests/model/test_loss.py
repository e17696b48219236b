"""The chunked loss against torch's cross-entropy over all logits at once."""

import pytest
import torch
import torch.nn.functional as F

from llm.model import loss as module
from llm.model.loss import CHUNK_TOKENS, chunk_tokens, linear_cross_entropy


@pytest.mark.parametrize("tokens", [1, 130, CHUNK_TOKENS + 77])
def test_fp32_equals_cross_entropy(tokens: int) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, 16, requires_grad=True), torch.randn(300, 16, requires_grad=True)
    targets = torch.randint(300, (tokens,))
    expected = F.cross_entropy(hidden @ weight.T, targets)
    expected_gradients = torch.autograd.grad(3 * expected, (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(loss, expected)
    for gradient, wanted in zip(
        torch.autograd.grad(3 * loss, (hidden, weight)), expected_gradients, strict=True
    ):
        torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-4)


def test_bf16_is_within_its_rounding() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(500, 64, requires_grad=True), torch.randn(1000, 64, requires_grad=True)
    targets = torch.randint(1000, (500,))
    expected = F.cross_entropy(hidden @ weight.T, targets)
    expected_gradients = torch.autograd.grad(expected, (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert ((gradient - wanted).norm() / wanted.norm()).item() < 0.01


def test_a_certain_mistake_has_a_finite_loss() -> None:
    """Where the wanted probability underflows to 0, the loss is the largest there is, the gradient right."""
    hidden = torch.tensor([[200.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1]))
    loss.backward()
    assert 80 < loss.item() < 400
    assert hidden.grad is not None
    assert hidden.grad.item() == pytest.approx(2.0)  # softmax minus one hot is (1, -1), over weights (1, -1)


@pytest.mark.parametrize(
    ("gibibytes", "vocab_size", "dtype", "tokens"),
    [
        (80, 50257, torch.bfloat16, 16_384),  # 2.5 GiB, a 32nd, would hold 26,709
        (80, 50257, torch.float32, 8_192),
        (24, 50257, torch.bfloat16, 4_096),
        (24, 4_096, torch.bfloat16, 16_384),
        (4, 128_000, torch.bfloat16, 1_024),
    ],
)
def test_a_gpu_holds_the_logits_of_as_many_tokens_as_its_memory_allows(
    monkeypatch: pytest.MonkeyPatch, gibibytes: int, vocab_size: int, dtype: torch.dtype, tokens: int
) -> None:
    monkeypatch.setattr(module, "gpu_memory_bytes", lambda device: gibibytes << 30)
    assert chunk_tokens(torch.device("cuda"), vocab_size, dtype) == tokens
    assert chunk_tokens(torch.device("cpu"), vocab_size, dtype) == CHUNK_TOKENS
