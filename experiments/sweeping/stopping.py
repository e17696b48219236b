"""How a sweep is stopped: by a signal to its process, of which jobs side by side learn by a file."""

import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from pathlib import Path
from types import FrameType

from llm.files import remove
from llm.sweeps.jobs import STOP

SECONDS_TO_SAVE = 60


@contextmanager
def stoppable(folder: Path, side_by_side: bool) -> Iterator[None]:
    """Let SIGTERM end a sweep as Ctrl-C does. Jobs side by side get the signal too, save, and are waited for;
    a second signal ends all at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        (folder / STOP).touch()
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.default_int_handler)
        if number == signal.SIGTERM:  # the terminal itself sends Ctrl-C to all processes
            for child in active_children():
                os.kill(child.pid or 0, signal.SIGTERM)

    handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]]
    if side_by_side:
        handlers = {signal.SIGTERM: stop, signal.SIGINT: stop}
    else:
        handlers = {signal.SIGTERM: signal.default_int_handler}
    remove(folder / STOP)
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        remove(folder / STOP)


def asked_to_stop(folder: Path) -> bool:
    """Whether the sweep in this folder, whose jobs run side by side, was asked to stop."""
    return (folder / STOP).exists()


@functools.cache  # once a process, which may run several jobs
def watched_sweep() -> threading.Event:
    """Called in a worker process: an event that is set when the sweep's process has been killed.

    Its jobs then save and end. Else they would train on, in folders that `sweep.resume` wants, and then wait
    for work for ever with a GPU's memory.
    """
    sweep, gone = os.getppid(), threading.Event()

    def watch() -> None:
        while os.getppid() == sweep:
            time.sleep(1)
        gone.set()
        os.kill(os.getpid(), signal.SIGTERM)  # a run saves; a process without one ends
        time.sleep(SECONDS_TO_SAVE)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    return gone
