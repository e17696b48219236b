"""Captures, where there is no GPU."""

from contextlib import nullcontext
from unittest.mock import MagicMock

import pytest
import torch

from llm import cuda_graph
from llm.errors import UserError


def test_what_cannot_be_captured_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for what torch without a GPU does not have."""
    failing = MagicMock()
    failing.__enter__.side_effect = RuntimeError("CUDA error: operation not permitted\nand more lines")
    monkeypatch.setattr(cuda_graph, "_side_stream", MagicMock())
    for name in ("CUDAGraph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **how: failing)
    line = r"^an update cannot be captured .*\(CUDA error: .*permitted\); run with runtime\.graph=off$"
    with pytest.raises(UserError, match=line):
        cuda_graph.captured(lambda: torch.zeros(2), "an update")
