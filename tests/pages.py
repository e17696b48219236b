"""The pages of reports: the JSON that they hold, and what a browser makes of it."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

# What means something in HTML, to a terminal, to a shell, and in a template.
HOSTILE = (
    "</script><script>hit = 1</script><b>\"quoted\" & 'so'</b> <!-- $HOME \x1b[31mred \ufffd {{common.js}}"
)

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")


def data_of(page: Path) -> dict[str, Any]:
    """What the page's scripts draw."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"))
    assert found
    return json.loads(found[1])


def in_browser(page: Path, script: str, *flags: str) -> dict[str, Any]:
    """What `script` leaves in `found` after it ran in a copy of the page; as `errors` what the console would
    show of them, as `hit` whether a HOSTILE text was run. It may use `texts` and `table` of a selector."""
    assert BROWSER
    watch = (
        "<script>const errors = []; addEventListener('error', event => errors.push(event.message));"
        "console.error = (...what) => errors.push(what.join(' ')); var hit = 0;</script>"
    )
    reading = (
        "const texts = selector => [...document.querySelectorAll(selector)].map(each => each.textContent);"
        "const table = selector => [...document.querySelector(selector).rows].map("
        "row => [...row.cells].map(cell => cell.textContent));"
    )
    ending = (
        "document.body.innerHTML = '<pre id=found></pre>';"
        "document.getElementById('found').textContent = JSON.stringify(found);"
    )
    text = page.read_text("utf-8").replace("<style>", watch + "<style>", 1)
    script = f"const found = {{ errors }};\n{reading}\n{script}\nfound.hit = hit;\n{ending}"
    copy = page.with_name("clicks.html")
    copy.write_text(text.replace("</html>", f"<script>{script}</script></html>"), encoding="utf-8")
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={page.parent / 'browser'}",
            *flags,
            "--dump-dom",
            copy.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    result = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert result, done.stderr
    return json.loads(html.unescape(result[1]))
