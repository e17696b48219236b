"""The Verdict's download, against a server on this machine."""

import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm import corpus
from llm.config import DataConfig, UserError
from llm.corpus import load_text

TEXT = b"I HAD always thought Jack Gisburn rather a cheap genius"


class _Handler(http.server.BaseHTTPRequestHandler):
    requests = 0

    def do_GET(self) -> None:
        type(self).requests += 1
        self.send_response(200)
        self.end_headers()
        self.wfile.write(TEXT)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    _Handler.requests = 0
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(corpus, "VERDICT_URL", f"http://127.0.0.1:{server.server_port}/the-verdict.txt")
    yield corpus.VERDICT_URL
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("address")
def test_downloaded_once_if_it_is_the_books(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "VERDICT_BYTES", len(TEXT))
    monkeypatch.setattr(corpus, "VERDICT_SHA256", hashlib.sha256(TEXT).hexdigest())
    config = DataConfig(source="the_verdict", cache_dir=str(tmp_path))
    assert load_text(config) == load_text(config) == TEXT.decode()
    assert _Handler.requests == 1
    (tmp_path / "the-verdict.txt").write_bytes(TEXT[:-1])  # damaged: fetched again
    assert load_text(config) == TEXT.decode()
    assert _Handler.requests == 2


@pytest.mark.usefixtures("address")
def test_another_text_is_refused_and_not_kept(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not the book's text .* data\.path=FILE"):
        load_text(DataConfig(source="the_verdict", cache_dir=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []
