"""Records are read by their kinds; texts that may be anybody's are printed so that no terminal obeys them."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from llm.errors import UserError, shown
from llm.files import read_json_lines
from llm.progress import LineFormatter
from llm.records import count, figure, read_config_text, read_lines, read_overrides, read_record, read_samples
from llm.tables import format_table

# A red text, a link, a write to the clipboard, a bell, a carriage return, a control of C1, a reversal, a
# space of no width, and half a surrogate pair, which cannot be printed.
OBEYED = "\x1b[31m\x1b]8;;http://a.b\x1b\\\x1b]52;c;eA==\x07\r\x9b2J\u202e\u200b\ud800"


@pytest.mark.parametrize(
    ("value", "is_figure", "is_count"),
    [
        (0, True, True),
        (3, True, True),
        (2.5, True, False),
        (-1, True, False),
        (-0.5, True, False),
        (10**400, False, False),
        (2**63, True, True),
        (1e308, False, False),
        (math.nan, False, False),
        (math.inf, False, False),
        (True, False, False),
        ("3", False, False),
        (None, False, False),
        ([3], False, False),
        ({"a": 3}, False, False),
    ],
)
def test_figures_and_counts(value: Any, is_figure: bool, is_count: bool) -> None:
    assert figure(value) == (value if is_figure else None)
    assert count(value) == (value if is_count else None)


def test_a_summary_holds_what_is_of_its_kind(tmp_path: Path) -> None:
    right = {
        "status": "finished",
        "error": None,
        "val_loss": 2.5,
        "val_of_an_extension": 3,
        "steps": 40,
        "git_clean": False,
        "versions": {"torch": "2.13"},
        "resumed": [{"steps": 4, "changed": {"training.max_steps": [4, 5]}}],
    }
    wrong = {
        "status": ["finished"],
        "error": 3,
        "val_loss": "2.5",
        "val_of_an_extension": {},
        "steps": 40.5,
        "git_clean": 1,
        "versions": {"torch": 2},
        "resumed": [{"steps": 4, "changed": {"training.max_steps": 4}}],
    }
    file = tmp_path / "summary.json"
    file.write_text(json.dumps(right), encoding="utf-8")
    assert read_record(file) == right
    for name, value in wrong.items():
        file.write_text(json.dumps({**right, name: value}), encoding="utf-8")
        assert read_record(file) == {key: each for key, each in right.items() if key != name}
    file.write_text('{"val_loss": NaN, "train_loss": -Infinity, "steps": 1, "steps": 2}', encoding="utf-8")
    assert read_record(file) == {"val_loss": None, "train_loss": None, "steps": 2}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b"\xff\xfe",
        b"\0" * 100,
        b"[" * 100_000,
        b'{"steps": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_record_is_an_empty_one(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    file.write_bytes(content)
    assert read_record(file) == {}
    whole = b'{"step": 1, "prompt": "a", "text": "ab"}\n'
    file.write_bytes(whole + content + b"\n" + whole + b'{"step": 2')
    assert [line["step"] for line in read_lines(file)] == [1, 1]
    assert len(read_samples(file)) == len(read_json_lines(file)) == 2


def test_what_is_no_file_is_an_empty_record(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "below").write_text("{}")
    for name in ("nothing", "folder", "loop", "device", "below/it"):
        assert read_record(tmp_path / name) == {}
        assert read_lines(tmp_path / name) == []


def test_hydras_record_is_read_as_plain_texts(tmp_path: Path) -> None:
    """No resolver, no tag, no alias means anything, however many they are."""
    record = tmp_path / ".hydra"
    record.mkdir()
    (record / "overrides.yaml").write_text("- seed=1\n- a=${oc.env:HOME}\n- 3\n- [b=1]\n- !!set {c=1}\n")
    assert read_overrides(tmp_path) == ["seed=1", "a=${oc.env:HOME}", "3"]
    (record / "config.yaml").write_text(
        "training: {max_steps: 1e3, max_minutes: null, on: !!python/name:os.system x}\nseed: ${oc.env:HOME}\n"
    )
    found = [
        read_config_text(tmp_path, key)
        for key in ("training.max_steps", "training.max_minutes", "training.on", "training", "seed", "seed.a")
    ]
    assert found == ["1e3", None, "x", None, "${oc.env:HOME}", None]
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(
        f"{new}: &{new} [{', '.join(9 * [f'*{old}'])}]\n"
        for old, new in zip("abcdefghi", "bcdefghij", strict=True)
    )
    for content in (bomb, "[" * 5000, "- " * 5000, "a: *a", "\0", "{[a]: 1}", "- x\n- *a"):
        for name in ("overrides", "config"):
            (record / f"{name}.yaml").write_text(content)
        assert read_overrides(tmp_path) == []
        assert read_config_text(tmp_path, "a") is None


# On a terminal


def test_what_a_terminal_obeys_is_shown_as_escapes() -> None:
    text = f"a{OBEYED}\tb\nc d"
    assert shown(text).isprintable() is False  # a tab and a newline are left
    assert shown(text, keep="").isprintable()
    assert shown("\x1b[1m\r\u202e\ud800", keep="") == r"\x1b[1m\r\u202e\ud800"
    plain = "Zoë\u00a0写 ☃ e\u0301 \U0001f642 \\x1b"
    assert shown(plain) == plain


def test_logs_tables_and_errors_are_shown_so(caplog: pytest.LogCaptureFixture) -> None:
    record = logging.LogRecord("a", logging.INFO, "", 0, "job %s", (OBEYED,), None)
    assert LineFormatter("%(message)s").format(record) == f"job {shown(OBEYED)}"
    error = UserError(f"no\nsuch {OBEYED}")
    assert str(error) == f"no\\nsuch {shown(OBEYED, keep='')}"
    assert format_table([["a", "b"], ["\x1b", "c\nd"]], {0, 1}).splitlines() == ["a     b", r"\x1b  c\nd"]
