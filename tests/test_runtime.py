"""Processes that share a run, without a run."""

from pathlib import Path

import pytest
from scripts import run_python

from llm.config import RuntimeConfig
from llm.errors import UserError
from llm.processes import processes
from llm.runtime import Runtime

TWO = RuntimeConfig(device="cpu", precision="fp32", processes=2)


def ranks(runtime: Runtime) -> list[int]:
    return runtime.gather(runtime.rank)


def test_after_processes_that_failed_the_next_ones_meet_anew() -> None:
    with pytest.raises(UserError, match="no such text"), processes(TWO, ranks):
        raise UserError("no such text")  # while the other one waits for this one's rank
    with processes(TWO, ranks) as runtime:
        assert ranks(runtime) == [0, 1]


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
