"""plan.py: what a run would take, beside the run; and the laws of compute-optimal sizes by brute force."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, Script, numbers

from llm.config import ModelConfig
from llm.model.gpt import parameters_of
from llm.run_folder import read_summary
from llm.training.compute_optimal import LAWS, model_of_about

pytestmark = pytest.mark.usefixtures("no_pictures")

RUN = (*TINY, "data=text", "model.context_length=16", "runtime.precision=fp32", "training.max_steps=12")


def planned(script: Script, tmp_path: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    result = script("plan", *arguments, "hydra.run.dir=plan")
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "plan" / "plan.json").read_text())
    for file in (tmp_path / "plan").iterdir():
        if file.is_file():
            file.unlink()
    return result.stdout, figures


def test_a_plan_says_what_the_run_is_and_fits_the_terminal(
    script: Script, environment: dict[str, str], text: str, tmp_path: Path
) -> None:
    environment["COLUMNS"] = "40"
    output, figures = planned(script, tmp_path, *RUN, text, "plan.device=h100", "plan.price=2")
    assert max(map(len, output.splitlines())) <= 40
    assert not (tmp_path / "plan" / "checkpoints").exists()
    assert figures["cost"] == pytest.approx(2 * figures["seconds"] / 3600)
    # Two layers of at least 0.4 ms, as their kernels do next to nothing.
    assert figures["tokens_per_second"] == pytest.approx(2 * 16 / (2 * 0.4e-3))
    assert figures["updates"] == 12
    assert figures["memory"]["fits"]
    assert "data.batch_size=4096" in output  # as many as are looked for


def test_a_sharded_run_is_planned_for_as_many_processes_as_it_is_to_have(
    script: Script, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm.commands.plan._largest", lambda *_: 1)  # takes seconds
    output, figures = planned(script, tmp_path, *RUN, text, "runtime.processes=2", "runtime.sharding=fsdp")
    assert "2 processes on " in output
    assert "sharded over 2 processes, as all of this is told" in " ".join(output.split())
    assert figures["memory"]["gradients"] < 4 * figures["parameters"]


def test_a_probe_measures_updates_of_the_run(
    script: Script, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm.training.probe.SECONDS", 0.2)
    monkeypatch.setattr("llm.commands.plan._largest", lambda *_: 1)  # takes seconds
    arguments = [*RUN, text, "data.batch_size=auto", "training.update_tokens=128"]
    output, figures = planned(script, tmp_path, *arguments, "plan.probe=true")
    assert f"measured, over {figures['probe']['updates']} updates" in " ".join(output.split())
    assert figures["chosen"] == {"data.batch_size": 8}
    run = script("pretrain", *arguments, "hydra.run.dir=run")
    assert run.returncode == 0, run.stderr
    summary = read_summary(tmp_path / "run")
    assert (summary["steps"], summary["tokens_seen"]) == (figures["updates"], figures["tokens"])
    assert summary["parameters"] == figures["parameters"]
    evaluations = [line for line in numbers(tmp_path / "run") if "val/loss" in line]
    assert f"{len(evaluations)} in" in output
    assert 0.1 < figures["tokens_per_second"] / summary["tokens_per_second"] < 10  # of a busy machine too


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["resume=latest"], "resume=latest: a run that is to begin is planned; remove it"),
        (["plan.device=h100", "plan.probe=true"], "plan.device=h100: plan.probe=true measures this machine"),
        (["plan.device=h1000"], "plan.device=h1000: must be one of rtx3090, rtx4090, l4"),
        (["plan.budget=3"], "plan.budget buys hours: give what one costs, as plan.price"),
        (["data.path=missing.txt"], "missing.txt"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_line(script: Script, arguments: list[str], said: str) -> None:
    result = script("plan", *RUN, "data.path=text.txt", *arguments)
    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
    assert said in result.stderr


@pytest.mark.parametrize("flops", [1e18, 5.76e23])
def test_the_laws_are_lowest_where_they_say(flops: float) -> None:
    def best(a: float, alpha: float, b: float, beta: float) -> float:
        """The lowest of losses of a fine grid of sizes, which all take this compute."""
        sizes = [10 ** (6 + step / 2000) for step in range(12_000)]
        return min(sizes, key=lambda n: a / n**alpha + b / (flops / (6 * n)) ** beta)

    twenty, hoffmann, besiroglu = (law.parameters(flops) for law in LAWS)
    assert twenty * 20 * twenty * 6 == pytest.approx(flops)
    assert hoffmann == pytest.approx(best(406.4, 0.34, 410.7, 0.28), rel=0.002)
    assert besiroglu == pytest.approx(best(482.01, 0.3478, 2085.43, 0.3658), rel=0.002)
    if flops == 5.76e23:  # Chinchilla's, of 70B parameters: both say so but the first fit, which says 32B
        assert twenty == pytest.approx(70e9, rel=0.02)
        assert besiroglu == pytest.approx(70e9, rel=0.1)


def test_a_model_is_found_for_a_size() -> None:
    family = ModelConfig(1000, 64, 64, 4, 2, n_kv_heads=2)
    assert asdict(model_of_about(family, parameters_of(family))) == asdict(family)
    larger = replace(family, emb_dim=256, n_heads=16, n_kv_heads=8, n_layers=8)
    found = model_of_about(family, 1.02 * parameters_of(larger))
    assert asdict(found) == asdict(larger)
    assert math.isclose(parameters_of(model_of_about(family, 20e6)), 20e6, rel_tol=0.2)
