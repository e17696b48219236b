"""On which windows a run is validated at its end; what it says of its time, its precision and its speed."""

import logging
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from settings import changed, settings

from llm.commands.pretrain import pretrain
from llm.config import RuntimeConfig
from llm.device import precision_in_words
from llm.files import read_json_lines, write_json
from llm.records import read_record
from llm.run_folder import SUMMARY
from llm.runtime import start_runtime
from llm.training import validation

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_the_last_validation_takes_a_tenth_of_the_work_on_the_same_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(
        settings(tmp_path), data__train_ratio=0.1, optimizer__name="adamw", training__eval_freq=None
    )
    evaluated: list[list[Any]] = []

    def noted(model: Any, batches: Any, *others: Any) -> dict[str, float]:
        batches = [*batches]
        evaluated.append(np.concatenate([inputs for inputs, _ in batches]).tolist())
        return evaluate(model, batches, *others)

    evaluate = validation.evaluate
    monkeypatch.setattr(validation, "evaluate", noted)

    def run(name: str, **values: Any) -> tuple[Any, list[Any]]:
        summary = pretrain(changed(config, **values), tmp_path / name)
        assert len(evaluated[-1]) == summary.evaluated_windows
        return summary, evaluated[-1]

    full, windows = run("full", training__max_steps=8, training__final_eval="full")
    assert len(windows) == full.validation_windows
    few, some = run("few", training__max_steps=8)
    # a forward pass is at most 0.4 of the work of an update
    window_tokens = config.model.context_length
    assert 0.05 < 0.4 * len(some) * window_tokens / few.tokens_seen <= 0.1
    more, others = run("more", training__max_steps=16)
    assert len(some) < len(others) <= 2 * len(some)
    assert all(window in windows for window in others)
    assert all(window in others for window in some)
    assert run("seed", training__max_steps=8, seed=7)[1] == some
    run("stopped", training__max_steps=4)
    resumed = pretrain(
        changed(config, resume=str(tmp_path / "stopped"), training__max_steps=8), given={"training.max_steps"}
    )
    assert (resumed.evaluated_windows, evaluated[-1]) == (few.evaluated_windows, some)
    assert more.best_step == 15  # the evaluation at the last update counts


def test_samples_by_the_minute_are_repeated_and_resumed(tmp_path: Path) -> None:
    config = settings(tmp_path)
    config.training.max_steps, config.training.max_minutes = None, 0.005
    config.samples.every_minutes = 0.001
    pretrain(config, tmp_path / "run")
    longer = {"resume": str(tmp_path / "run"), "training__max_minutes": 0.01, "schedule__name": "constant"}
    pretrain(changed(config, **longer), given={"training.max_minutes"})
    steps = [line["step"] for line in read_json_lines(tmp_path / "run" / "samples.jsonl")]
    assert len(steps) == len(set(steps)) >= 2
    again = pretrain(changed(config, rerun=str(tmp_path / "run")), tmp_path / "again")  # compares all samples
    assert again.status == "finished"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux forgets a peak")
def test_peak_memory_is_not_that_of_an_earlier_job(tmp_path: Path) -> None:
    large = 1 << 29
    ballast = bytearray(b"1") * large  # what an earlier job of this process held
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    del ballast
    found = pretrain(settings(tmp_path), tmp_path / "run").peak_memory_bytes
    assert found is not None
    assert 0 < found < peak - large // 2


def test_more_is_always_more_than_is_done(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = changed(settings(tmp_path), training__max_steps=8)
    pretrain(config, tmp_path / "run")
    summary = read_record(tmp_path / "run" / SUMMARY)
    write_json(tmp_path / "run" / SUMMARY, {**summary, "status": "interrupted"})
    caplog.clear()
    lower = changed(config, resume=str(tmp_path / "run"), training__max_steps=2)
    assert pretrain(lower, given={"training.max_steps"}).steps == 8
    assert "; more: training.max_steps=32\n" in f"{caplog.text}\n"
    assert caplog.text.count("training.max_steps=32") == 2  # in the command that ends it, too


def test_a_resumed_run_tells_what_is_left_and_that_its_rate_rises(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("llm.training.lifecycle.measure_matmul_flops", lambda runtime: 1e3)  # a busy machine
    config = changed(settings(tmp_path), training__max_steps=8)
    assert pretrain(config, tmp_path / "run").mfu is None
    assert "utilisation" not in caplog.text
    assert "lr         rises" not in caplog.text
    caplog.clear()
    pretrain(
        changed(config, resume=str(tmp_path / "run"), training__max_steps=16), given={"training.max_steps"}
    )
    tokens = 8 * config.data.batch_size * config.model.context_length
    assert f"budget     what is left of training.max_steps=16: about {tokens} tokens" in caplog.text
    assert (
        "lr         rises from 0 to 0.015: schedule.name=wsd now ends at training.max_steps=16" in caplog.text
    )


@pytest.mark.parametrize(
    ("precision", "native", "words"),
    [
        ("auto", False, "fp32: this processor has no bf16 instructions"),
        ("fp32", False, "fp32: this processor has no bf16 instructions"),
        ("fp32", True, "fp32, as runtime.precision=fp32 says (bf16 is faster here)"),
        ("auto", True, "bf16"),
        ("bf16", False, "bf16, emulated: this processor has no bf16 instructions (runtime.precision=fp32 is"),
    ],
)
def test_a_slower_precision_has_its_reason(
    precision: str, native: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("runtime", "device"):
        monkeypatch.setattr(f"llm.{module}.computes_in_bf16", lambda device: native)
    runtime = start_runtime(RuntimeConfig(device="cpu", precision=precision))
    assert precision_in_words(precision, runtime).startswith(words)
    assert torch.device("cpu") == runtime.device
