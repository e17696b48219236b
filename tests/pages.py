"""The pages of reports: the JSON that they hold, and what a browser makes of it."""

import html
import json
import re
import shutil
import subprocess
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

# What means something in HTML, to a terminal, to a shell, and in a template.
HOSTILE = (
    "</script><script>hit = 1</script><b>\"quoted\" & 'so'</b> <!-- $HOME \x1b[31mred \ufffd {{common.js}}"
)

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")


def data_of(page: Path, **options: Any) -> dict[str, Any]:
    """What the page's scripts draw."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"))
    assert found
    return json.loads(found[1], **options)


def in_browser(page: Path, script: str, *flags: str) -> dict[str, Any]:
    """What `script` leaves in `found` after it ran in a copy of the page; as `errors` what the console would
    show of them, as `hit` whether a HOSTILE text was run. It may use `texts` and `table` of a selector."""
    assert BROWSER
    watch = (
        "const errors = []; addEventListener('error', event => errors.push(event.message));"
        "addEventListener('securitypolicyviolation', event => errors.push(event.violatedDirective + ' ' + "
        "event.blockedURI + event.sample));"
        "console.error = (...what) => errors.push(what.join(' ')); var hit = 0;"
    )
    reading = (
        "const texts = selector => [...document.querySelectorAll(selector)].map(each => each.textContent);"
        "const table = selector => [...document.querySelector(selector).rows].map("
        "row => [...row.cells].map(cell => cell.textContent));"
    )
    ending = (
        "const pre = document.createElement('pre'); pre.id = 'found'; document.body.replaceChildren(pre);"
        "pre.textContent = JSON.stringify(found);"
    )
    script = f"const found = {{ errors }};\n{reading}\n{script}\nfound.hit = hit;\n{ending}"
    text = page.read_text("utf-8")
    hashes = [b64encode(sha256(each.encode()).digest()).decode() for each in (watch, script)]
    ours = " ".join(f"'sha256-{each}'" for each in hashes)
    text = text.replace("script-src ", f"script-src 'report-sample' {ours} ", 1)
    text = text.replace("<style>", f"<script>{watch}</script><style>", 1)
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
