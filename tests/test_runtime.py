"""Processes that share a run, without a run."""

import pytest

from llm.config import RuntimeConfig, UserError
from llm.runtime import Runtime, processes

TWO = RuntimeConfig(device="cpu", precision="fp32", processes=2)


def ranks(runtime: Runtime) -> list[int]:
    return runtime.gather(runtime.rank)


def test_after_processes_that_failed_the_next_ones_meet_anew() -> None:
    with pytest.raises(UserError, match="no such text"), processes(TWO, ranks):
        raise UserError("no such text")  # while the other one waits for this one's rank
    with processes(TWO, ranks) as runtime:
        assert ranks(runtime) == [0, 1]
