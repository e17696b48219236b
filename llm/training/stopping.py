"""Ctrl-C and SIGTERM as a request to stop, so that a run finishes its update and saves."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger(__name__)


class StopRequest:
    """Whether a person or the system has asked the run to stop."""

    is_set = False


@contextmanager
def stop_requests(announce: bool) -> Iterator[StopRequest]:
    """Let SIGINT and SIGTERM ask for a stop. A second one then ends the process at once.

    Args:
        announce: whether to say so; one of the processes of a run does, and restores the handlers.
    """
    stop = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        stop.is_set = True
        if announce:
            log.info("\n%s: finishing this update, then saving", signal.Signals(number).name)
            for each, handler in previous.items():
                signal.signal(each, handler)

    previous = {each: signal.signal(each, handle) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
