"""What the pages of sweeps and studies share: a template with its styles and scripts, and one JSON that these
draw, so that a page needs nothing but itself."""

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from llm.files import replacing
from llm.sweeps.jobs import compact, short_key
from llm.sweeps.ranking import Setting, is_numeric, swept_keys, values_of

Cell = tuple[float | str | None, str]  # what a table is sorted by, and what it shows
Column = dict[str, Any]  # see `column`


def write_page(path: Path, name: str, data: dict[str, Any]) -> None:
    """Write the template `name`, in which `{{FILE}}` stands for the text of a file beside it and `{{data}}`
    for the data, which the page's scripts show as text and never as HTML."""
    folder = files("llm.sweeps") / "templates"
    # In a script element nothing but `<` could end it or begin a comment.
    written = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c").encode()

    def part(place: re.Match[bytes]) -> bytes:
        file = place[1].decode()
        return written if file == "data" else (folder / file).read_bytes().strip()

    page = re.sub(rb"\{\{(.+?)\}\}", part, (folder / f"{name}.html").read_bytes())
    with replacing(path) as temporary:
        temporary.write_bytes(page)


def writable(text: str) -> str:
    """Half a surrogate pair, which JSON and a file's name may hold, cannot be written as UTF-8."""
    return text.encode("utf-8", "replace").decode()


def column(name: str, cells: list[Cell], text: bool = False) -> Column:
    """A column of a table, which begins at the left if it holds texts."""
    return {"name": name, "cells": cells, "text": text}


def setting_columns(settings: list[Setting]) -> list[Column]:
    """What varies, and a row's value of it."""
    return [
        column(
            short_key(key),
            [(setting.get(key), compact(setting.get(key, "–"))) for setting in settings],
            text=not is_numeric(values_of(settings, key)),
        )
        for key in swept_keys(settings)
    ]
