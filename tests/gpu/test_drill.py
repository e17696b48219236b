"""The fault drill on a GPU, a short version of drill.py: bit for bit, as `runtime.deterministic` promises."""

from pathlib import Path

import pytest
from drill import Drill, drill

EXACT = ("runtime.device=cuda", "runtime.deterministic=true")


@pytest.mark.gpu
# Muon in bf16, each update one graph; AdamW in fp32; both with dropout
@pytest.mark.parametrize(("seed", "graph"), [(54, "on"), (1, "off")])
def test_faults_leave_no_trace_in_a_run(
    tmp_path: Path, environment: dict[str, str], seed: int, graph: str
) -> None:
    drill(Drill(tmp_path, environment, (*EXACT, f"runtime.graph={graph}")), seed)
