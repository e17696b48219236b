"""What all tests share: no network, one cache for the session, and the scripts as a user runs them."""

import functools
import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scripts import (
    ROOT,
    Result,
    ScriptProcess,
    compose_quickly,
    fork_processes,
    make_brief,
    run_here,
    run_python,
    script_path,
)

from llm.files import read_json_lines

os.environ["OMP_NUM_THREADS"] = "1"  # the tests run side by side; before torch is imported
os.environ["PYTHONPATH"] = str(ROOT)  # processes test this code, wherever `llm` is installed from
# Each test worker and each process of a test would compile all modules anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# A proxy that nobody listens at stands for a machine with no network; some clients read it once, so it is set
# for all tests, and so is that servers of tests are reached without it.
os.environ["http_proxy"] = os.environ["https_proxy"] = "http://127.0.0.1:9"
os.environ["no_proxy"] = "127.0.0.1"

gc.set_threshold(100_000)  # as experiments/launch.py does, and from the first import on

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

# Tests that take several seconds: they begin first, so that no process is left alone with one at the end.
SLOWEST = (
    "test_sweep_commands",
    "test_two_processes",
    "test_drill",
    "test_book",
    "test_damage",
    "test_tracking",
)

ON_GPUS = "gpu"  # the mark expression with which the tests of GPUs run, and nothing else does

Begin = Callable[..., ScriptProcess]
Script = Callable[..., Result]


@pytest.hookimpl(tryfirst=True)  # before xdist starts its processes
def pytest_cmdline_main(config: pytest.Config) -> None:
    """`pytest -m gpu` runs the tests of GPUs, one after the other: one of them takes all of a GPU's memory.
    All other tests are of CPUs, and see no GPU."""
    if config.option.markexpr == ON_GPUS:
        config.option.numprocesses = 0
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # see start_runtime; read once
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Under `pytest -m gpu`, all but tests/gpu/: importing the other tests takes longer than running many."""
    others = collection_path.name.startswith("test_") and collection_path.parent.name != "gpu"
    return True if others and config.option.markexpr == ON_GPUS else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not any(name in item.nodeid for name in SLOWEST))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # what is imported by now need not be looked through for garbage again


def pytest_runtest_setup(item: pytest.Item) -> None:
    if marker := item.get_closest_marker("gpu"):
        import torch  # not above: its threads are limited first

        kind, count = marker.kwargs.get("kind", "cuda"), marker.kwargs.get("count", 1)
        found = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
        if item.config.option.markexpr != ON_GPUS or found < count:
            pytest.skip(f"runs under pytest -m gpu, with {count} of {kind}; there are {found}")


@pytest.fixture(scope="session", autouse=True)
def _brief() -> None:
    make_brief()
    compose_quickly()
    fork_processes()


@pytest.fixture(scope="module")
def no_pictures() -> Iterator[pytest.MonkeyPatch]:
    """For files that look at no picture: to draw one takes most of the time of a run of few updates."""
    with pytest.MonkeyPatch.context() as patch:
        _draw_nothing(patch)
        yield patch


@pytest.fixture
def pictures(no_pictures: pytest.MonkeyPatch) -> Iterator[None]:
    """For a test that looks at one, in a file whose others do not."""
    no_pictures.undo()
    yield
    _draw_nothing(no_pictures)


def _draw_nothing(patch: pytest.MonkeyPatch) -> None:
    for name in ("training.plots.plot_losses", "sweeps.report.draw_sweep", "sweeps.report.draw_study"):
        patch.setattr(f"llm.{name}", lambda *arguments: None)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def environment(cache_dir: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return {**kept, "XDG_CACHE_HOME": str(cache_dir)}


@pytest.fixture
def script(environment: dict[str, str], tmp_path: Path) -> Script:
    """Run `experiments/NAME.py ARGUMENTS…` in an empty folder, in this process."""
    return functools.partial(run_here, tmp_path, environment)


@pytest.fixture
def process(environment: dict[str, str], tmp_path: Path) -> Script:
    """Like `script`, in a process of its own: for the interpreter's status, and for what starts children."""

    def run(name: str, *arguments: str, stdin: str = "") -> Result:
        return run_python(tmp_path, environment, script_path(name), *arguments, stdin=stdin)

    return run


@pytest.fixture
def begin(environment: dict[str, str], tmp_path: Path) -> Iterator[Begin]:
    """Start pretrain.py in a process of its own, and do not wait for it."""
    begun: list[ScriptProcess] = []

    def run(*arguments: str) -> ScriptProcess:
        begun.append(ScriptProcess(tmp_path, environment, "pretrain", *arguments))
        return begun[-1]

    yield run
    for process in begun:
        if process.is_alive():  # its test has failed
            process.send_signal(signal.SIGKILL, group=True)


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
