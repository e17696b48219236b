"""Tables for a terminal: if one is too wide, a column is wrapped or cut, and others are omitted."""

import shutil
from collections.abc import Collection, Sequence
from textwrap import wrap

from llm.errors import shown

GAP = "  "
LEAST_WRAPPED, WRAPPED_SHARE = 10, 0.3  # characters, and share of the width, of a column that is wrapped


def terminal_width() -> int:
    """Columns of the terminal; 80 where there is none."""
    return shutil.get_terminal_size().columns


def format_table(
    cells: list[list[str]],
    left: Collection[int],
    wrapped: int | None = None,
    spare: Sequence[int] = (),
    width: int | None = None,
) -> str:
    """Rows of cells as lines, see `table_rows`."""
    return "\n".join(line for row in table_rows(cells, left, wrapped, spare, width) for line in row)


def table_rows(
    cells: list[list[str]],
    left: Collection[int],
    wrapped: int | None = None,
    spare: Sequence[int] = (),
    width: int | None = None,
    most_lines: int | None = None,
) -> list[list[str]]:
    """The lines of each row of a table. The first row is the heading.

    Args:
        left: columns that are aligned left; the others are aligned right.
        wrapped: the column whose cells are wrapped if the table is wider than `width`.
        spare: columns to omit if that is not enough, first ones first.
        width: columns of the terminal; None: no limit.
        most_lines: longest cell; the end of a longer one is cut off.
    """
    cells = [[shown(cell, keep="") for cell in row] for row in cells]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    columns, omitted = [*range(len(widths))], [*spare]
    if width is not None and wrapped is not None:
        least = min(widths[wrapped], max(LEAST_WRAPPED, int(WRAPPED_SHARE * width)))

        def room() -> int:
            """Characters left for the column that is wrapped."""
            others = sum(widths[column] for column in columns if column != wrapped)
            return width - others - len(GAP) * (len(columns) - 1)

        while room() < least and omitted:
            columns.remove(omitted.pop(0))
        widths[wrapped] = min(widths[wrapped], max(LEAST_WRAPPED, room()))
    rows = []
    for row in cells:
        parts = [
            _wrapped(row[column], widths[column], most_lines) if column == wrapped else [row[column]]
            for column in columns
        ]
        lines = []
        for number in range(max(map(len, parts))):
            texts = [part[number] if number < len(part) else "" for part in parts]
            aligned = (
                text.ljust(widths[column]) if column in left else text.rjust(widths[column])
                for column, text in zip(columns, texts, strict=True)
            )
            lines.append(GAP.join(aligned).rstrip())
        rows.append(lines)
    return rows


def _wrapped(text: str, width: int, most_lines: int | None) -> list[str]:
    if len(text) <= width:
        return [text]
    lines = wrap(text, width, break_on_hyphens=False)
    if most_lines is not None and len(lines) > most_lines:
        kept = " ".join(lines[most_lines - 1 :])
        lines = [*lines[: most_lines - 1], kept[: width - 1] + "…"]
    return lines


def fitted(text: str, width: int) -> str:
    """A sentence in lines of at most `width`, except for longer words; all lines but the first are
    indented."""
    text = shown(text, keep="")
    lines = wrap(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines) if len(text) > width else text
