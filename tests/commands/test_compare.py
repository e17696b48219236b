"""compare.py: verdicts on runs whose figures are given, as their folders say them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Script
from scripts import ROOT

from llm.files import write_json
from llm.sweeps.jobs import write_record

FIXTURE = ROOT / "tests" / "fixtures" / "run_v2"
BETTER = {1: 1.90, 2: 1.95, 3: 1.93}
WORSE = {1: 1.921, 2: 1.972, 3: 1.95}
ALIKE = {1: 1.90, 2: 1.97, 3: 1.92}

Sweep = Callable[..., str]


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    """A sweep of runs with these figures: by the value of `optimizer.lr`, then by seed."""

    def make(name: str, figures: dict[str, dict[int, float]], **summary: object) -> str:
        jobs: list[list[str]] = []
        for lr, by_seed in figures.items():
            for seed, bits in by_seed.items():
                folder = tmp_path / name / str(len(jobs))
                shutil.copytree(FIXTURE, folder, symlinks=True)
                known = json.loads((folder / "summary.json").read_text("utf-8"))
                known |= {"seed": seed, "val_bits_per_byte": bits, "val_loss": bits / 2, **summary}
                write_json(folder / "summary.json", known)
                jobs.append([f"optimizer.lr={lr}", f"seed={seed}"])
                (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(jobs[-1]), encoding="utf-8")
        write_record(tmp_path / name, "pretrain", [], ["optimizer.lr", "seed"], jobs)
        return name

    return make


def test_a_difference_beyond_the_noise_is_decided(script: Script, sweep: Sweep, tmp_path: Path) -> None:
    sweep("sweep", {"4e-4": WORSE, "5e-4": BETTER})
    result = script("compare", "a=sweep", "hydra.run.dir=out")
    assert (result.returncode, result.stderr) == (0, "")
    said = " ".join(result.stdout.split("\n\n")[0].split())
    # The differences are -0.021, -0.022 and -0.020: mean -0.021, standard error 0.001 / √3; t is 4.3027.
    assert said.startswith(
        "b (lr=5e-4) is better than a (lr=4e-4) by 0.0210 bits per byte, 95 % interval 0.0185 to 0.0235: "
    )
    assert said.endswith("(paired t-test, 3 seeds each).")
    assert ["2", "1.9720", "1.9500", "-0.0220"] in [line.split() for line in result.stdout.splitlines()]
    record = json.loads((tmp_path / "out" / "verdict.json").read_text("utf-8"))
    assert (record["decided"], record["b"]["seeds"]) == (True, {"1": 1.9, "2": 1.95, "3": 1.93})
    assert (tmp_path / "out" / "verdict.png").stat().st_size > 10_000


def test_a_difference_within_the_noise_is_not(script: Script, sweep: Sweep, tmp_path: Path) -> None:
    sweep("sweep", {"4e-4": ALIKE, "5e-4": BETTER})
    record = json.loads((tmp_path / "sweep" / "sweep.json").read_text("utf-8"))
    write_json(tmp_path / "sweep" / "sweep.json", {**record, "arguments": ["hydra/sweeper=race"]})
    said = " ".join(script("compare", "a=sweep").stdout.split("\n\n")[0].split())
    assert said.startswith("a (lr=4e-4) and b (lr=5e-4) cannot be told apart: b - a is -0.0033 bits per byte")
    assert "more seeds each would show it" in said
    assert "the race's own verdict holds" in " ".join(script("compare", "a=sweep").stdout.split())


def test_more_seeds_are_offered_where_a_few_would_settle_it(script: Script, sweep: Sweep) -> None:
    sweep("close", {"4e-4": {1: 1.921, 2: 1.955, 3: 1.95}, "5e-4": BETTER})
    told = json.loads(script("compare", "a=close", "output=json").stdout)
    # The differences are -0.021, -0.005 and -0.02: Cohen's d is 1.71, and five pairs have a power of 0.8.
    assert (told["figures"]["decided"], told["figures"]["seeds_needed"]) == (False, 5)
    command = "python experiments/pretrain.py sweep.extend=close seed=4,5"
    assert told["next"] == {"more seeds": command}
    assert command in script("compare", "a=close").stdout
    sweep("alike", {"4e-4": ALIKE, "5e-4": BETTER})
    assert json.loads(script("compare", "a=alike", "output=json").stdout)["next"] == {}, "hundreds"


def test_a_job_stands_for_its_setting_with_all_seeds(script: Script, sweep: Sweep, tmp_path: Path) -> None:
    sweep("three", {"4e-4": WORSE, "5e-4": BETTER, "6e-4": ALIKE})
    result = script("compare", "a=three")
    assert result.stderr == (
        "error: a holds 3 settings (lr=4e-4, lr=5e-4, lr=6e-4): give two of them as a and b, each by the "
        "folder of one of its jobs (experiments/report.py ranks them all)\n"
    )
    assert script("compare", "a=three/1", "b=three/5").stdout.startswith("b (lr=5e-4) is better than a (lr=4")
    assert "both hold three/1\n" in script("compare", "a=three/0", "b=[three/1,three/6]").stderr
    # Seeds that only one has do not count, nor do runs without an end.
    shutil.rmtree(tmp_path / "three" / "8")
    left = {"status": "interrupted", "seed": 2}
    write_json(tmp_path / "three" / "7" / "summary.json", left)
    result = script("compare", "a=three/0", "b=[three/3,three/4]")
    assert "not counted, as only one of both has them: seeds 3\n" in result.stdout
    # (1.921 + 1.972) / 2 and (1.90 + 1.95) / 2: the means are of the seeds that count, too.
    assert ["mean", "1.9465", "1.9250", "-0.0215"] in [line.split() for line in result.stdout.splitlines()]
    assert script("compare", "a=three/0", "b=three/6").stderr.startswith(
        "error: one seed says nothing of the noise between seeds (a has 3 and b has 1): train each"
    )


def test_what_cannot_be_compared_is_one_line(script: Script, sweep: Sweep) -> None:
    sweep("one", {"4e-4": WORSE})
    sweep("text", {"5e-4": BETTER}, tokenizer="t", validation_text="another")
    sweep("part", {"5e-4": BETTER}, evaluated_windows=3, validation_windows=30)
    sweep("longer", {"5e-4": BETTER}, tokens_seen=512)
    sweep("unfinished", {"5e-4": BETTER}, status="failed")
    sweep("old", {"5e-4": BETTER}, val_bits_per_byte=None, tokenizer="t")
    for other, line in {
        "text": "a and b were evaluated on different texts",
        "part": "a and b were evaluated on different texts",
        "longer": "a and b had different budgets: 256 and 512 tokens; compare runs of as many tokens",
        "unfinished": "b: none of its 3 runs has a final loss (failed)",
        "nowhere": "nowhere holds neither a sweep nor a run",
    }.items():
        result = script("compare", "a=one", f"b={other}")
        assert (result.returncode, result.stderr.count("\n")) == (1, 1)
        assert result.stderr.startswith(f"error: {line}"), result.stderr
    assert script("compare").stderr.startswith(
        "error: latest: there is no sweep begun by experiments/pretrain"
    )
