"""Progress of long work: a live bar on a terminal, otherwise a log line every few seconds. Also how numbers
are formatted for people."""

import logging
import math
import shutil
import sys
import time
from contextlib import suppress

from llm.errors import shown

log = logging.getLogger(__name__)

PLAIN_LINE_SECONDS = 10.0
LIVE_LINE_SECONDS = 0.1
BAR_WIDTH = 24
# The time left is not estimated before this share of the work is done, or this time has passed.
TELLING_SHARE, TELLING_SECONDS = 0.02, 10.0
LONGEST_LEFT = 100 * 24 * 3600.0  # seconds; longer estimates are not shown


class Progress:
    """Shows how much of some work is done, its status, and the time left.

    The time left is estimated from the fraction done since the first update, and the time since then. So runs
    limited by steps, epochs or minutes, and resumed ones, are treated alike, and work before the first
    update, such as compiling, does not count.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        # Jobs of a sweep do not log to the terminal, where the sweep shows all its jobs.
        self.live = sys.stderr.isatty() and any(
            type(handler) is logging.StreamHandler for handler in logging.getLogger().handlers
        )
        self._started = self._shown = time.monotonic()
        self._first: tuple[float, float] | None = None  # when something was done first, and what fraction

    def update(self, fraction: float | None, *parts: str) -> None:
        """Show how much is done, unless that was just shown.

        Args:
            fraction: 0 to 1; None: unknown.
            parts: a status, such as "loss 3.2" and "step 40", the most important first.
        """
        now = time.monotonic()
        if self._first is None and fraction is not None:
            self._first = now, fraction
        if now - self._shown < (LIVE_LINE_SECONDS if self.live else PLAIN_LINE_SECONDS):
            return
        self._shown = now
        share, clock = self._share_and_clock(fraction, now)
        if self.live:
            width = shutil.get_terminal_size().columns - 1  # a wrapped line could not be erased whole
            bar = format_bar(fraction) if fraction is not None and share else ""
            self._show(fitted(self.what, bar, share, [*parts], clock, width))
        else:
            log.info("%s", _line(self.what, "", share, [*parts], clock))

    def _share_and_clock(self, fraction: float | None, now: float) -> tuple[str, str]:
        """The share done, and the time left; or the time taken, if the time left cannot be estimated yet."""
        taken = format_seconds(now - self._started)
        if fraction is None or math.isnan(fraction) or self._first is None:
            return "", taken
        done = min(max(fraction, 0.0), 1.0)
        begin, before = self._first
        advanced, seconds = done - before, now - begin
        if advanced <= 0 or (advanced < TELLING_SHARE and seconds < TELLING_SECONDS):
            return f"{done:4.0%}", taken
        left = seconds * (1 - done) / advanced
        return f"{done:4.0%}", f"{format_seconds(left)} left" if left < LONGEST_LEFT else taken

    def clear(self) -> None:
        """Erase the live bar, so that a line can be printed."""
        if self.live:
            self._show("")

    def _show(self, line: str) -> None:
        with suppress(OSError):  # a terminal that was closed, while the run saves
            print(f"\r\x1b[K{line}", end="", file=sys.stderr)
            sys.stderr.flush()


def fitted(what: str, bar: str, share: str, parts: list[str], clock: str, width: int) -> str:
    """A live line of at most `width` characters. If there is not enough room, it omits first the bar and then
    parts, from the last one on; the first part is kept as long as half of the name can be."""
    while (excess := len(line := _line(what, bar, share, parts, clock)) - width) > 0:
        if bar:
            bar = ""
        elif len(parts) > 1 or (parts and excess >= len(what) // 2):
            parts = parts[:-1]
        else:
            short = f"{what[: max(0, len(what) - excess - 1)]}…"
            return _line(short, bar, share, parts, clock)[:width]
    return line


def _line(what: str, bar: str, share: str, parts: list[str], clock: str) -> str:
    return " · ".join([" ".join(filter(None, [what, bar, share])), *parts, clock])


class LineFormatter(logging.Formatter):
    """Makes log lines safe for a terminal, as they quote untrusted names, texts and errors."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


def format_bar(fraction: float) -> str:
    """A fraction (0 to 1) as a bar."""
    filled = round(min(max(fraction, 0.0), 1.0) * BAR_WIDTH)
    return "━" * filled + "╌" * (BAR_WIDTH - filled)


def format_figure(value: float | None, form: str, missing: str = "–") -> str:
    """A number in a form such as `{:.3f}`, or a placeholder where there is none."""
    return missing if value is None else form.format(value)


def format_value(value: float) -> str:
    """A number for an override, such as `2.5` or `400`; an int is never written like `1e+06`."""
    return str(value) if isinstance(value, int) else f"{value:g}"


def format_seconds(seconds: float) -> str:
    """Seconds as `42s`, `3m07s` or `2h05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def format_windows(count: int, total: int) -> str:
    """Windows of a split: `all 1,475 windows` or `369 of 1,475 windows`."""
    return f"all {total:,} windows" if count == total else f"{count:,} of {total:,} windows"


def format_times(times: float) -> str:
    """A number of times, such as `0.038`, `4.5` or `312`."""
    if times >= 99.5:
        return format_count(times)
    if 0 < times < 1e-4:  # which `g` would write as a power of ten
        return f"{times:.{1 - math.floor(math.log10(times))}f}"
    return f"{times:.2g}"


def format_count(count: float) -> str:
    """A large count as `812`, `45.2k`, `16.1M` or `1.25G`."""
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * scale:  # what rounds to 1000 of one unit is 1 of the next
            return f"{count / scale:.3g}{unit}"
    return f"{count:.3g}"
