"""Stopping a sweep: by a signal to its process, which tells jobs that run side by side through a file. And
stopping a script that is still starting, by Ctrl-C."""

import functools
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from pathlib import Path
from types import FrameType

from llm.files import remove
from llm.sweeps.jobs import STOP

SECONDS_TO_SAVE = 60


@contextmanager
def stoppable(folder: Path, side_by_side: bool) -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a sweep as Ctrl-C does. Jobs that run side by side get the signal too, and
    the sweep waits until they have saved. A second signal ends everything at once, except SIGHUP, which a
    closed terminal may send twice. Under `nohup`, SIGHUP stays ignored.

    Raises:
        KeyboardInterrupt: the sweep was asked to stop; its argument is the signal.
    """
    asked_by: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    def stop(number: int, frame: FrameType | None) -> None:
        asked_by.append(number)
        (folder / STOP).touch()
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, interrupt)
        if number != signal.SIGINT:  # the terminal itself sends Ctrl-C to all processes
            for child in active_children():
                os.kill(child.pid or 0, number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    remove(folder / STOP)
    handler = stop if side_by_side else interrupt
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(*(error.args or asked_by[:1])) from None
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
        remove(folder / STOP)


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """Let Ctrl-C end the script while modules are imported: numpy and torch may turn a KeyboardInterrupt into
    an ImportError, or lose it.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed meanwhile.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, or a sweep's
        yield
        return
    asked = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception as error:
        if asked:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked:
        raise KeyboardInterrupt


def exit_status(stopped: BaseException) -> int:
    """A shell's exit status for a process that a signal ended: 128 plus the signal's number, which is the
    exception's argument; Ctrl-C's has none."""
    return 128 + (stopped.args[0] if stopped.args else signal.SIGINT)


def asked_to_stop(folder: Path) -> bool:
    """Whether the sweep in this folder, whose jobs run side by side, was asked to stop."""
    return (folder / STOP).exists()


@functools.cache  # once per process, which may run several jobs
def watched_sweep() -> threading.Event:
    """In a worker process, an event that is set when the sweep's process has been killed.

    The worker's job then saves and ends. Otherwise it would train on in a folder that `sweep.resume` needs,
    and the worker would then wait for work for ever while it holds a GPU's memory.
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
