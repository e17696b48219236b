"""What the pages of sweeps and studies share: a template with its styles and scripts, and one JSON that these
draw, so that a page needs nothing but itself."""

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from llm.files import replacing


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
