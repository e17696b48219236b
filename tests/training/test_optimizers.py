"""Which parameters each optimizer steps, and AdamW and Muon against formulas worked out here."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from parts import CPU

from llm.config import ModelConfig, OptimizerConfig
from llm.model.gpt import GPTModel
from llm.training.optimizers import build_optimizers

CONFIG = ModelConfig(vocab_size=31, context_length=8, emb_dim=16, n_heads=2, n_layers=1)
IDX = torch.arange(16).view(2, 8)


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


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_at_the_base_width_transfer_changes_nothing(name: str) -> None:
    weights = []
    for base in (None, CONFIG.emb_dim):
        torch.manual_seed(0)
        model = GPTModel(replace(CONFIG, mup_base_width=base))
        optimizers = build_optimizers(model, OptimizerConfig(name), CPU)
        for _ in range(2):
            optimizers.set_lr(0.007)
            model(IDX, IDX).backward()
            optimizers.step()
        weights.append([parameter.detach() for parameter in model.parameters()])
    assert all(map(torch.equal, *weights))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_rates_and_decay_are_transferred_by_the_width(name: str) -> None:
    """Worked out by hand for four times the base: matrices, Muon's by the root, and the last norm."""
    base = replace(CONFIG, init="gpt2", mup_base_width=CONFIG.emb_dim)
    model = GPTModel(replace(base, emb_dim=4 * base.emb_dim))
    optimizers = build_optimizers(model, OptimizerConfig(name, lr=0.01, weight_decay=0.1), CPU)
    optimizers.set_lr(0.02)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {
        names[parameter]: (group["lr"], group["weight_decay"])
        for part in optimizers.parts
        for group in part.param_groups
        for parameter in group["params"]
    }
    matrix = (0.005, pytest.approx(0.4)) if name == "adamw" else (0.01, pytest.approx(0.2))
    assert found["trf_blocks.0.att.W_query.weight"] == found["trf_blocks.0.ff.layers.2.weight"] == matrix
    assert found["tok_emb.weight"] == (0.02, 0.1)
    assert found["trf_blocks.0.norm1.scale"] == (0.02, 0.0)
    assert found["final_norm.scale"] == (0.005, 0.0)


@pytest.mark.parametrize("init", ["gpt2", "torch"])
def test_initial_weights_are_transferred_by_the_width(init: str) -> None:
    wide = replace(CONFIG, emb_dim=64, init=init)
    torch.manual_seed(0)
    plain = dict(GPTModel(wide).named_parameters())
    torch.manual_seed(0)
    for name, parameter in GPTModel(replace(wide, mup_base_width=16)).named_parameters():
        in_block = name.startswith("trf_blocks") and parameter.dim() == 2
        factor = 0.25 if name.startswith("final_norm") else 0.5 if in_block and init == "gpt2" else 1.0
        torch.testing.assert_close(parameter, plain[name] * factor)


def test_dividing_the_last_norm_is_dividing_the_logits() -> None:
    """What Tensor Programs V has as a multiplier of the logits is here a smaller norm with a smaller rate."""
    with_rule = replace(CONFIG, emb_dim=64, mup_base_width=16)
    models = [GPTModel(with_rule), GPTModel(with_rule)]
    models[1].load_state_dict(models[0].state_dict())
    [scale, _] = models[1].final_norm.parameters()
    with torch.no_grad():
        scale.mul_(4)  # as it begins without the rule
    models[1].logits = lambda features: features @ models[1].head_weight.T / 4  # type: ignore[method-assign]
    logits = []
    for model in models:
        optimizers = build_optimizers(model, OptimizerConfig("muon", eps=1e-30, weight_decay=0.0), CPU)
        if model is models[1]:  # the last norm gets the rate of all others
            for group in optimizers.parts[-1].param_groups:
                if group["params"][0] is scale:
                    group["lr_share"] = 1.0
        for _ in range(3):
            optimizers.zero_grad()
            optimizers.set_lr(0.003)
            F.cross_entropy(model.logits(model.features(IDX)).flatten(0, 1), IDX.flatten()).backward()
            optimizers.step()
        logits.append(model.logits(model.features(IDX)).detach())
    torch.testing.assert_close(*logits, atol=2e-5, rtol=1e-3)
