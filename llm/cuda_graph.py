"""CUDA graphs: a function's kernels, captured once and then launched all at once."""

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch

from llm.errors import UserError, first_line

WARM_UPS = 3  # calls before the capture, which choose kernels and initialise state and libraries

Result = TypeVar("Result")


def captured(work: Callable[[], Result], what: str) -> Callable[[], Result]:
    """Capture `work` as one CUDA graph, and return a function that replays it. A replay overwrites the
    results of the one before.

    Args:
        work: reads and writes the same memory at every call. It is called a few times here, and not kept.
        what: a name for it, for errors.

    Raises:
        UserError: it cannot be captured.
    """
    stream = _side_stream()  # for the warm-up too, as torch's notes on CUDA graphs demand
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads, such as the one that writes checkpoints, may keep using the GPU.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = work()
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise
        raise UserError(
            f"{what} cannot be captured as a CUDA graph here ({first_line(error)}); run with "
            f"runtime.graph=off"
        ) from error

    def replay() -> Result:
        graph.replay()
        return result

    return replay


@cache
def _side_stream() -> torch.cuda.Stream:
    """A stream for captures, as torch's default stream cannot be captured; one for all, as cuBLAS allocates
    memory for each stream."""
    return torch.cuda.Stream()
