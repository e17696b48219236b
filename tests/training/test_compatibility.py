"""The run folder of an older version still opens: it resumes, and is sampled, evaluated, reported, exported.

Each is 8 updates of a model of 3,048 parameters, with checkpoints after 5 and 8. `fixtures/run_v1` was
written by commit e22341d, before checkpoints named their format; `fixtures/run_v2` by e0311cd, before models
had other parts than GPT-2's; `fixtures/run_v3` by the first version
that wrote checkpoints in parts: it is sharded among two processes, with AdamW and without dropout.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Script, numbers
from drill import TEXT
from transformers import GPT2LMHeadModel

from llm.files import read_json_lines

pytestmark = pytest.mark.usefixtures("no_pictures")

FIXTURES = Path(__file__).parents[1] / "fixtures"
RUN_V1 = FIXTURES / "run_v1"


@pytest.fixture(params=["run_v1"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of the run, beside the text that it was trained on."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return shutil.copytree(FIXTURES / request.param, tmp_path / request.param, symlinks=True)


def recorded() -> dict[str, Any]:
    return json.loads((RUN_V1 / "summary.json").read_text("utf-8"))


def assert_recorded_numbers(lines: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Machines differ in the last bits, and Muon computes in fp32 where bf16, as it was then, is emulated."""
    assert len(lines) == len(expected) == 11
    for line, each in zip(lines, expected, strict=True):
        assert line == pytest.approx(each, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("run", ["run_v1", "run_v2", "run_v3"], indirect=True)
def test_it_is_resumed_from_an_earlier_checkpoint(script: Script, run: Path) -> None:
    whole = ("runtime.processes=1", "runtime.sharding=none") if run.name == "run_v3" else ()
    result = script("pretrain", f"resume={run.name}/checkpoints/step-00000005", *whole)
    assert result.returncode == 0, result.stderr
    *lines, last = numbers(run)
    assert_recorded_numbers(lines, numbers(FIXTURES / run.name)[:11])
    assert (last["step"], "val/loss" in last) == (7, True)  # which older versions did not evaluate
    assert (run / "checkpoints" / "last").readlink().name == "step-00000008"
    [sample], [expected] = (read_json_lines(each / "samples.jsonl") for each in (run, FIXTURES / run.name))
    assert sample["token_ids"] == expected["token_ids"]


def test_it_is_continued_beyond_its_end(script: Script, run: Path) -> None:
    result = script("pretrain", "resume=run_v1", "training.max_steps=12")
    assert result.returncode == 0, result.stderr
    lines = numbers(run)
    assert_recorded_numbers(lines[:11], numbers(RUN_V1))
    assert [line["step"] for line in lines[11:]] == [8, 9, 9, 10, 11, 11]
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    assert (summary["status"], summary["steps"]) == ("finished", 12)
    assert summary["val_loss"] < recorded()["val_loss"]


def test_it_is_sampled_as_it_was(script: Script, run: Path, tmp_path: Path) -> None:
    [expected] = read_json_lines(RUN_V1 / "samples.jsonl")
    arguments = ["checkpoint=run_v1", "prompt=9 bot", "max_new_tokens=5", "runtime.precision=fp32"]
    for name in ("one", "other"):
        result = script("generate", *arguments, f"hydra.run.dir={name}")
        assert result.returncode == 0, result.stderr
    [one], [other] = (read_json_lines(tmp_path / name / "samples.jsonl") for name in ("one", "other"))
    assert one == other
    assert [one[key] for key in ("text", "token_ids")] == [expected[key] for key in ("text", "token_ids")]
    assert one["sampling"].items() >= expected["sampling"].items()


def test_it_is_evaluated_as_it_was(script: Script, run: Path, tmp_path: Path) -> None:
    result = script("evaluate", "checkpoint=run_v1", "runtime.precision=fp32", "hydra.run.dir=evaluation")
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text("utf-8"))
    assert figures["loss"] == pytest.approx(recorded()["val_loss"], abs=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(recorded()["val_bits_per_byte"], abs=1e-5)


@pytest.mark.usefixtures("pictures")
def test_it_is_reported(script: Script, run: Path) -> None:
    result = script("report", "sweep=run_v1")
    assert result.returncode == 0, result.stderr
    page = (run / "report.html").read_text("utf-8")
    assert f"{recorded()['val_loss']:.3f}" in page
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")


def test_it_is_exported(script: Script, run: Path, tmp_path: Path) -> None:
    for kind in ("huggingface", "book"):
        result = script("export", "checkpoint=run_v1", f"format={kind}", f"to={kind}")
        assert result.returncode == 0, result.stderr
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "huggingface").eval()
    ids = torch.tensor([[*TEXT[-12:].encode()]])
    assert model(ids).logits.shape == (1, 12, 257)
    weights = torch.load(tmp_path / "book" / "model.pth", weights_only=True)
    torch.testing.assert_close(weights["tok_emb.weight"], model.transformer.wte.weight, atol=0, rtol=0)
