"""Activations that are computed again, and weights that several processes share out among themselves."""

import pytest
import torch
from torch import Tensor

from llm.config import ModelConfig
from llm.model.gpt import GPTModel
from llm.runtime import Runtime

CPU = torch.device("cpu")
SMALL = ModelConfig(
    vocab_size=64,
    context_length=16,
    emb_dim=32,
    n_heads=4,
    n_layers=3,
    drop_rate=0.1,
    norm="rmsnorm",
    position="rotary",
    qk_norm=True,
    value_embeddings=True,
    residual_scalars=True,
)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_computed_again_give_the_same_gradients(precision: str) -> None:
    """To the bit, and with the same dropout; and what is kept for the backward pass is less."""

    def update(again: bool) -> tuple[float, list[Tensor], Tensor, int]:
        torch.manual_seed(1)
        model = GPTModel(SMALL)
        model.checkpoint_activations(again)
        kept = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        batch = torch.randint(64, (8, 16))
        with Runtime(CPU, precision).autocast():
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = model(batch, batch)
            loss.backward()
        gradients = [each.grad for each in model.parameters() if each.grad is not None]
        return loss.item(), gradients, torch.get_rng_state(), sum(kept.values())

    plain, again = update(False), update(True)
    assert again[0] == plain[0]
    assert all(map(torch.equal, again[1], plain[1]))
    assert torch.equal(again[2], plain[2])
    assert again[3] < plain[3] / 2
