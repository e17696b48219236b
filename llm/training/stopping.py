"""Ctrl-C, SIGTERM and SIGHUP as requests to stop, so that a run finishes its update and saves."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger(__name__)


class StopRequest:
    """Whether the run was asked to stop, and by which signal."""

    by: signal.Signals | None = None


@contextmanager
def stop_requests(announce: bool) -> Iterator[StopRequest]:
    """Treat SIGINT, SIGTERM and SIGHUP as requests to stop. A second SIGINT or SIGTERM ends the process.

    A terminal that is closed sends SIGHUP, and its shell often sends another, so a second SIGHUP is ignored.
    Under `nohup`, SIGHUP stays ignored altogether.

    Args:
        announce: whether to log the request, and let a second signal end the process; true in one process of
            a run.
    """
    stop = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        repeated, stop.by = stop.by is not None, stop.by or signal.Signals(number)
        if announce and not repeated:
            log.info("\n%s: finishing this update, then saving", stop.by.name)
            for each in (signal.SIGINT, signal.SIGTERM):
                signal.signal(each, previous[each])

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    previous = {each: signal.signal(each, handle) for each in numbers}
    try:
        yield stop
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
