"""What all tests share: no network, one cache for the session, and the scripts as a user runs them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm.files import read_json_lines

os.environ["OMP_NUM_THREADS"] = "1"  # the tests run in two processes; before torch is imported

ROOT = Path(__file__).parents[1]

TINY = (
    "model=tiny",
    "tokenizer=bytes",
    "tracking=disabled",
    "training.max_minutes=null",
    "training.eval_freq=5",
    "samples.max_new_tokens=5",
    "data.batch_size=2",
    "model.drop_rate=0.1",
)

Begin = Callable[..., "subprocess.Popen[str]"]
Script = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def environment(cache_dir: Path) -> dict[str, str]:
    # A proxy that nobody listens at stands for a machine with no network.
    nowhere = "http://127.0.0.1:9"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return {**kept, "XDG_CACHE_HOME": str(cache_dir), "http_proxy": nowhere, "https_proxy": nowhere}


def python_in(
    folder: Path, environment: dict[str, str], *arguments: str, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder to its end."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture
def script(environment: dict[str, str], tmp_path: Path) -> Script:
    """Run `experiments/NAME.py ARGUMENTS…` in an empty folder."""

    def run(name: str, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        path = str(ROOT / "experiments" / f"{name}.py")
        return python_in(tmp_path, environment, path, *arguments, stdin=stdin)

    return run


@pytest.fixture
def begin(environment: dict[str, str], tmp_path: Path) -> Begin:
    """Start pretrain.py, in a process group of its own, and do not wait for it."""

    def run(*arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, str(ROOT / "experiments" / "pretrain.py"), *arguments],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return run


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(
        "".join(f"{number} bottles of beer on the wall\n" for number in range(60)), encoding="utf-8"
    )
    return f"data.path={path}"


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock decides."""
    timed = {"seconds", "tokens_per_second"}
    return [
        {key: value for key, value in line.items() if key not in timed}
        for line in read_json_lines(run_dir / "metrics.jsonl")
    ]
