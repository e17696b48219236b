"""Muon against torch's own, and shared by two processes."""

from typing import Any

import pytest
import torch
from parts import CPU
from torch import nn

from llm.config import RuntimeConfig
from llm.processes import processes
from llm.runtime import Runtime
from llm.training import muon as module
from llm.training.muon import Muon, orthogonalised, orthogonalising_flops

SHAPES = [(16, 16), (16, 64), (64, 16), (16, 16), (8, 24), (16, 16)]


def matrices() -> list[nn.Parameter]:
    torch.manual_seed(1)
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def stepped(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    """The parameters after three steps, on the same gradients each time."""
    torch.manual_seed(2)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def ours(runtime: Runtime) -> tuple[Muon, list[torch.Tensor]]:
    parameters = matrices()
    optimizer = Muon(parameters, lr=0.01, weight_decay=0.1, momentum=0.9, runtime=runtime)
    return optimizer, stepped(optimizer, parameters)


@pytest.mark.parametrize(("fast", "tolerance"), [(False, 0.02), (True, 0.004)])
@pytest.mark.parametrize("stacked", [1 << 25, 600])  # all that are alike, or two of the square ones
def test_it_steps_as_torchs_own(
    monkeypatch: pytest.MonkeyPatch, fast: bool, tolerance: float, stacked: int
) -> None:
    monkeypatch.setattr(module, "computes_in_bf16", lambda device: fast)
    monkeypatch.setattr(module, "STACKED_NUMBERS", stacked)
    optimizer, found = ours(CPU)
    assert len(optimizer.stacks) == (3 if stacked > 600 else 5)
    parameters = matrices()
    torchs = torch.optim.Muon(
        parameters, lr=0.01, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    for before, after, expected in zip(matrices(), found, stepped(torchs, parameters), strict=True):
        # torch's computes in bf16, which has 8 bits; of stacked products, the last one may round otherwise
        moved = (expected - before.detach()).norm()
        assert (after - expected).norm() < tolerance * moved


def test_it_steps_by_tensors_and_leaves_out_a_step_that_is_not_finite() -> None:
    """As when a GPU decides it: `found_inf` and the learning rate are tensors."""
    parameters = matrices()
    by_tensors = Muon(parameters, lr=0.01, weight_decay=0.1, momentum=0.9, runtime=CPU)
    by_tensors.param_groups[0]["lr"] = torch.tensor(0.01)
    by_tensors.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
    stepped(by_tensors, parameters)
    for before, after, expected in zip(matrices(), parameters, ours(CPU)[1], strict=True):
        assert (after - expected).norm() < 1e-3 * (expected - before.detach()).norm()
    kept = [parameter.detach().clone() for parameter in parameters]
    momenta = [momentum.clone() for momentum in in_order(by_tensors)]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, torch.nan)
    by_tensors.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    by_tensors.step()
    assert all(map(torch.equal, parameters, kept))
    assert all(map(torch.equal, in_order(by_tensors), momenta))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("columns", [12, 20, 40])  # in fp32, long matrices go another way
def test_singular_values_come_near_1_and_singular_vectors_stay(dtype: torch.dtype, columns: int) -> None:
    torch.manual_seed(3)
    batch = torch.randn(3, 12, columns, dtype=dtype)
    u, values, vh = torch.linalg.svd(batch, full_matrices=False)
    values = values / values.norm(dim=1, keepdim=True)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    found, expected = orthogonalised(batch), u @ torch.diag_embed(values) @ vh
    torch.testing.assert_close(found, expected, atol=1e-4 if dtype == torch.float32 else 1e-9, rtol=0)
    assert values.median() > 0.7
    assert values.max() < 1.3


def test_its_operations_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        orthogonalised(torch.randn(1, 16, 64, dtype=torch.bfloat16))
    assert counter.get_total_flops() == orthogonalising_flops(torch.empty(64, 16))


def share(runtime: Runtime) -> list[tuple[Any, Any, int]]:
    """What each process ends with: weights, the whole state, and how many momenta it keeps itself; the same
    again once it has taken over that state."""
    optimizer, found = ours(runtime)
    kept = len(optimizer.state)
    whole = [state["momentum_buffer"] for state in optimizer.gathered_state().values()]
    assert all(momentum.is_contiguous() for momentum in whole)  # as a checkpoint needs it
    again = Muon(matrices(), lr=0.01, weight_decay=0.1, momentum=0.9, runtime=runtime)
    numbered = {number: {"momentum_buffer": momentum} for number, momentum in enumerate(in_order(optimizer))}
    again.load_state_dict({"state": numbered, "param_groups": again.state_dict()["param_groups"]})
    assert {len(again.state)} == {kept}
    return runtime.gather(([each.tolist() for each in found], [each.tolist() for each in whole], kept))


def in_order(optimizer: Muon) -> list[torch.Tensor]:
    state = optimizer.gathered_state()
    return [state[matrix]["momentum_buffer"] for matrix in optimizer.param_groups[0]["params"]]


def test_processes_share_work_and_state() -> None:
    optimizer, found = ours(CPU)
    whole = [state["momentum_buffer"].tolist() for state in optimizer.gathered_state().values()]
    with processes(RuntimeConfig(device="cpu", precision="fp32", processes=2), share) as runtime:
        first, second = share(runtime)
    assert first[:2] == second[:2]
    assert first[1] == whole
    assert first[2] + second[2] == len(SHAPES)
    for ours_alone, shared in zip(found, first[0], strict=True):
        torch.testing.assert_close(torch.tensor(shared), ours_alone, atol=1e-4, rtol=0)  # stacked otherwise
