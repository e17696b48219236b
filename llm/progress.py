"""Progress of long work: a live bar on a terminal, otherwise a plain log line every few seconds."""

import logging
import shutil
import sys
import time
from contextlib import suppress

from llm.errors import shown

log = logging.getLogger(__name__)

PLAIN_LINE_SECONDS = 10.0
LIVE_LINE_SECONDS = 0.1
BAR_WIDTH = 24


class Progress:
    """Shows how much of some work is done, its status, and the time left.

    The time left is estimated from the fraction done and the time since the start, so that runs limited by
    steps, epochs or minutes are shown alike.
    """

    def __init__(self, what: str, start: float = 0.0) -> None:
        """`start` is the fraction already done, as in a resumed run."""
        self.what = what
        # A job of a sweep does not log to the terminal, where the sweep shows all of its jobs.
        self.live = sys.stderr.isatty() and any(
            type(handler) is logging.StreamHandler for handler in logging.getLogger().handlers
        )
        self._started = self._shown = time.monotonic()
        self._start = start

    def update(self, fraction: float | None, status: str) -> None:
        """Show `fraction` (0 to 1) and a status such as "step 40 · loss 3.2", unless just shown. None: how
        much is done is not known, and the time that it has taken is shown."""
        now = time.monotonic()
        if now - self._shown < (LIVE_LINE_SECONDS if self.live else PLAIN_LINE_SECONDS):
            return
        self._shown, seconds = now, now - self._started
        if fraction is None:
            bar, share, clock = "", "", format_seconds(seconds)
        else:
            left = seconds * (1 - fraction) / max(fraction - self._start, 1e-9)
            bar, share, clock = (
                f" {format_bar(fraction)}",
                f" {fraction:4.0%}",
                f"{format_seconds(left)} left",
            )
        if self.live:
            width = shutil.get_terminal_size().columns - 1  # a wrapped line could not be erased whole
            self._show(f"{self.what}{bar}{share} {status} · {clock}"[:width])
        else:
            log.info("%s%s · %s · %s", self.what, share, status, clock)

    def clear(self) -> None:
        """Erase the live bar, so that a line can be printed."""
        if self.live:
            self._show("")

    def _show(self, line: str) -> None:
        with suppress(OSError):  # a terminal that was closed, while the run saves
            print(f"\r\x1b[K{line}", end="", file=sys.stderr)
            sys.stderr.flush()


class LineFormatter(logging.Formatter):
    """Of logs that a terminal may show: they quote names, texts and errors, which may be anybody's."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


def format_bar(fraction: float) -> str:
    """A fraction (0 to 1) as a bar."""
    filled = round(min(fraction, 1.0) * BAR_WIDTH)
    return "━" * filled + "╌" * (BAR_WIDTH - filled)


def format_figure(value: float | None, form: str, missing: str = "–") -> str:
    """A number in a form such as `{:.3f}`, or a placeholder where there is none."""
    return missing if value is None else form.format(value)


def format_value(value: float) -> str:
    """A number as an override takes it: `2.5`, `400`, and for a whole one never `1e+06`."""
    return str(value) if isinstance(value, int) else f"{value:g}"


def format_seconds(seconds: float) -> str:
    """Seconds as `42s`, `3m07s` or `2h05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def format_count(count: float) -> str:
    """A large count as `812`, `45.2k`, `16.1M` or `1.25G`."""
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * scale:  # what rounds to 1000 of one unit is 1 of the next
            return f"{count / scale:.3g}{unit}"
    return f"{count:.3g}"


def format_table(cells: list[list[str]], left: set[int]) -> str:
    """Rows of cells as lines, the first row being the heading; columns in `left` are aligned left, the others
    right."""
    cells = [[shown(cell, keep="") for cell in row] for row in cells]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )
