"""The fault drill, a short version: see drill.py."""

from pathlib import Path

import pytest
from drill import Drill, drill

# 0: killed inside a write, at an update, and after a return to an older checkpoint; 1: killed, and a bit
# flipped; 2: a full disk for a while
SEEDS = (0, 1, 2)


@pytest.mark.parametrize("seed", SEEDS)
def test_faults_leave_no_trace_in_a_run(tmp_path: Path, environment: dict[str, str], seed: int) -> None:
    drill(Drill(tmp_path, environment), seed)
