"""Work on a GPU that is launched at once: a CUDA graph, captured from a function and replayed."""

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch

from llm.errors import UserError, first_line

WARM_UPS = 3  # calls before the capture, in which kernels are chosen, and state and libraries set up

Result = TypeVar("Result")


def captured(work: Callable[[], Result], what: str) -> Callable[[], Result]:
    """`work`, which reads and writes the same memory whenever it is called, as one CUDA graph. It is called a
    few times for that, and not kept. What it returns is overwritten by the next replay.

    Args:
        what: it is, for errors.

    Raises:
        UserError: it cannot be captured.
    """
    stream = _side_stream()  # as torch's notes on CUDA graphs want it, also for the warm-up
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads, such as the one that writes checkpoints, may go on using the GPU.
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
    """torch's default stream cannot be captured. One for all captures, as cuBLAS keeps memory for each."""
    return torch.cuda.Stream()
