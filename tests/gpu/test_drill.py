"""The fault drill on a GPU, a short version of drill.py: bit for bit, as `runtime.deterministic` promises."""

from pathlib import Path

import pytest
from drill import Drill, drill

EXACT = ("runtime.device=cuda", "runtime.deterministic=true")


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [0, 1])  # Muon in bf16, AdamW in fp32; both with dropout
def test_faults_leave_no_trace_in_a_run(tmp_path: Path, environment: dict[str, str], seed: int) -> None:
    drill(Drill(tmp_path, environment, EXACT), seed)
