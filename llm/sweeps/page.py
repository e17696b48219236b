"""What the pages of sweeps and studies share: a template with its styles and scripts, and one JSON that these
draw, so that a page needs nothing but itself."""

import json
import re
from base64 import b64encode
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

from llm.files import replacing


def write_page(path: Path, name: str, data: dict[str, Any]) -> None:
    """Write the template `name`, in which `{{FILE}}` stands for the text of a file beside it, `{{data}}`
    for the data, which the page's scripts show as text and never as HTML, and `{{policy}}` for `_policy`."""
    folder = files("llm.sweeps") / "templates"
    # In a script element nothing but `<` could end it or begin a comment. Letters beyond ASCII are escaped.
    written = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c").encode()

    def part(place: re.Match[bytes]) -> bytes:
        return (folder / place[1].decode()).read_bytes().strip()

    # The data come last, for they may hold what looks like a place, a script or a style.
    page = re.sub(rb"\{\{(?!data|policy)(.+?)\}\}", part, (folder / f"{name}.html").read_bytes())
    policy = _policy(page)
    page = re.sub(rb"\{\{(.+?)\}\}", lambda place: policy if place[1] == b"policy" else written, page)
    with replacing(path) as temporary:
        temporary.write_bytes(page)


def _policy(page: bytes) -> bytes:
    """The content-security policy under which a page's own scripts and styles run, known by their hashes, and
    no others. It may load, frame, embed and submit nothing, and makes no HTML of a text."""

    def hashes(kind: bytes) -> str:
        found = re.findall(rb"<%s>(.*?)</%s>" % (kind, kind), page, re.DOTALL)
        return " ".join(f"'sha256-{b64encode(sha256(each).digest()).decode()}'" for each in found)

    return (
        f"default-src 'none'; script-src {hashes(b'script')}; style-src {hashes(b'style')}; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ).encode()


def writable(text: str) -> str:
    """Half a surrogate pair, which JSON and a file's name may hold, cannot be written as UTF-8."""
    return text.encode("utf-8", "replace").decode()
