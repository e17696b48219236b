"""Which parameters each optimizer steps, and AdamW and Muon against formulas worked out here."""

import pytest
import torch
from parts import CPU

from llm.config import ModelConfig, OptimizerConfig
from llm.model.gpt import GPTModel
from llm.training.optimizers import build_optimizers

CONFIG = ModelConfig(vocab_size=31, context_length=8, emb_dim=16, n_heads=2, n_layers=1)


@pytest.mark.parametrize("decay_all", [False, True])
def test_adamw_takes_one_step_of_its_formula(decay_all: bool) -> None:
    torch.manual_seed(0)
    model = GPTModel(CONFIG)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    idx = torch.randint(31, (2, 8))
    model(idx, idx).backward()
    config = OptimizerConfig("adamw", lr=0.01, weight_decay=0.1, betas=[0.9, 0.99], decay_all=decay_all)
    build_optimizers(model, config, CPU).step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        # both averages, corrected for their start, are the gradient and its square after one step
        decayed = before[name] * (1 - 0.01 * 0.1) if decay_all or parameter.dim() == 2 else before[name]
        expected = decayed - 0.01 * parameter.grad / (parameter.grad.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-6, rtol=1e-5)


def test_muon_orthogonalises_the_blocks_matrices_alone() -> None:
    torch.manual_seed(0)
    model = GPTModel(CONFIG)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    idx = torch.randint(31, (4, 8))
    model(idx, idx).backward()
    optimizers = build_optimizers(model, OptimizerConfig("muon", lr=0.01, weight_decay=0.0), CPU)
    optimizers.step()
    in_blocks = {name for name in before if name.startswith("trf_blocks") and before[name].dim() == 2}
    assert len(in_blocks) == 6
    muon = {id(parameter) for group in optimizers.parts[0].param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in muon) == (name in in_blocks)
        if name in in_blocks:
            step = (before[name] - parameter.detach()) / 0.01
            singular_values = torch.linalg.svdvals(step)
            # Newton–Schulz brings singular values near 1, and AdamW's size is 0.2 · root of the longer side
            size = 0.2 * max(parameter.shape) ** 0.5
            assert singular_values.max() < 1.4 * size
            assert singular_values.median() > 0.5 * size
