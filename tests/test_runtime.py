"""The precision of products, the choice of kernels, and processes that share a run, without a run."""

import os
import queue
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scripts import run_python

from llm.config import RuntimeConfig
from llm.device import _limits, exactness_in_words, memory_bytes
from llm.errors import UserError
from llm.processes import _ended_by_loss_of, _wait_for, processes
from llm.runtime import Runtime, any_kernels, set_product_precision, start_runtime, use_deterministic_kernels

TWO = RuntimeConfig(device="cpu", precision="fp32", processes=2)


def ranks(runtime: Runtime) -> list[int]:
    return runtime.gather(runtime.rank)


def test_after_processes_that_failed_the_next_ones_meet_anew() -> None:
    with pytest.raises(UserError, match="no such text"), processes(TWO, ranks):
        raise UserError("no such text")  # while the other one waits for this one's rank
    with processes(TWO, ranks) as runtime:
        assert ranks(runtime) == [0, 1]


def test_the_others_end_where_there_is_nothing_to_do() -> None:
    with processes(TWO, None) as runtime:
        assert runtime.is_main


def lost(runtime: Runtime, how: str) -> None:
    if runtime.rank == 1 and how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if runtime.rank == 1:
        raise UserError("out of memory: lower something")
    runtime.gather(runtime.rank)


@pytest.mark.parametrize(
    ("how", "why"), [("killed", "process 1 of 2 was killed by SIGKILL"), ("error", "^out of memory: lower")]
)
def test_the_loss_of_a_process_is_known_to_the_first(how: str, why: str) -> None:
    with pytest.raises(UserError, match=why), processes(TWO, partial(lost, how=how)) as runtime:
        lost(runtime, how)


@pytest.mark.parametrize("moment", ["before they meet", "as they meet"])
def test_a_process_that_is_killed_while_it_starts_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Torch would wait for it for half an hour."""
    others: Any = [SimpleNamespace(exitcode=None), SimpleNamespace(exitcode=-signal.SIGKILL)]
    ends: queue.Queue[str] = queue.Queue()
    if moment == "as they meet":
        monkeypatch.setattr("llm.processes._end", ends.put)
        with _ended_by_loss_of(others):
            said = ends.get(timeout=60)
    else:
        with pytest.raises(UserError) as error:
            _wait_for(others, tmp_path)
        said = str(error.value)
    assert said.startswith("process 2 of 3 was killed by SIGKILL, ")


def test_a_script_that_each_process_would_run_again_is_told_so(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from llm.config import RuntimeConfig\n"
        "from llm.processes import processes\n"
        "with processes(RuntimeConfig(device='cpu', processes=2), print):\n"
        "    pass\n"
    )
    result = run_python(tmp_path, environment, str(script))
    assert "UserError: runtime.processes: another process could not begin" in result.stderr


@pytest.fixture
def _flags() -> Iterator[None]:
    yield
    set_product_precision("fp32")
    use_deterministic_kernels(False)


def test_memory_is_what_a_containers_groups_allow(tmp_path: Path) -> None:
    """Files as cgroups(7) describes them: version 2 has one tree, version 1 one for memory; `max` and absent
    files are no limit, and that of a parent holds too."""
    groups, root = tmp_path / "cgroup", tmp_path / "fs"
    groups.write_text("9:cpu,memory:/job/step\n8:cpu:/other\n0::/user/run\n")
    for name, limit in {
        "memory.max": "max\n",
        "user/memory.max": "8000\n",
        "user/run/memory.max": "max\n",
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
        "memory/job/step/memory.limit_in_bytes": "6000\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(limit)
    (tmp_path / "memory.max").write_text("1\n")  # above the tree
    assert sorted(_limits(groups, root)) == [6000, 8000, 9223372036854771712]
    assert not list(_limits(tmp_path / "none", root))
    assert 1 << 28 < memory_bytes() < 1 << 50


def test_tf32_needs_a_gpu_that_has_it() -> None:
    with pytest.raises(UserError, match=r"^runtime.precision=tf32 is for NVIDIA's GPUs .*this is cpu: use"):
        start_runtime(RuntimeConfig(device="cpu", precision="tf32"))


@pytest.mark.usefixtures("_flags")
def test_fp32_is_strict_whatever_was_set_before() -> None:
    set_product_precision("tf32")
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.get_float32_matmul_precision() == "high"  # an error if the two disagree
    start_runtime(RuntimeConfig(device="cpu", precision="fp32"))
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32
    assert Runtime(torch.device("cpu"), "tf32").dtype == torch.float32


def test_a_cpu_says_that_it_repeats_its_numbers_anyway() -> None:
    cpu = Runtime(torch.device("cpu"), "fp32")
    assert exactness_in_words(cpu, deterministic=False) == ""
    assert exactness_in_words(cpu, deterministic=True).startswith(
        "runtime.deterministic=true changes nothing"
    )


@pytest.mark.usefixtures("_flags")
def test_drawing_tokens_is_free_of_the_choice_of_kernels() -> None:
    start_runtime(RuntimeConfig(device="cpu", deterministic=True))
    assert not torch.are_deterministic_algorithms_enabled()  # CPUs need no such choice, and pay for it
    use_deterministic_kernels(True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()  # attention would not obey
    with any_kernels():
        assert not torch.are_deterministic_algorithms_enabled()
    assert torch.are_deterministic_algorithms_enabled()
