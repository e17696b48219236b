"""That a GPU is found and used, and in which precision."""

import pytest
import torch

from llm.config import RuntimeConfig
from llm.runtime import start_runtime


@pytest.mark.gpu
def test_auto_finds_the_gpu() -> None:
    runtime = start_runtime(RuntimeConfig())
    assert runtime.device == torch.device("cuda", 0)
    assert runtime.precision == ("bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp32")


@pytest.mark.gpu(kind="mps")
def test_auto_finds_apples_gpu() -> None:
    runtime = start_runtime(RuntimeConfig())
    assert (runtime.device.type, runtime.precision) == ("mps", "fp32")
