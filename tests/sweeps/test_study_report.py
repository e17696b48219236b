"""The page, the table and the picture of a study, read back as what they are."""

import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from llm.sweeps.study_report import METRICS, as_study, study_report

from llm.sweeps.jobs import read_jobs

HOSTILE = "</script><b>\"quoted\" & 'so'</b> <!-- \ufffd"


class Page(HTMLParser):
    """The cells of each figure, the text of each element that matters, the data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures: list[list[tuple[int, str]]] = []
        self.data = self.text = self.code = ""
        self.tables: list[list[str]] = []
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "figure":
            self.figures.append([])
        if tag not in ("meta", "!doctype"):
            self._open.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        tag, attributes = self._open[-1] if self._open else ("", {})
        if tag == "script" and attributes.get("id") == "data":
            self.data += data
        elif tag == "button" and "data-job" in attributes:
            self.figures[-1].append((int(attributes["data-job"] or ""), data))
        elif tag == "code":
            self.code += data + "\n"
        elif tag not in ("script", "style"):
            self.text += data


def write_job(folder: Path, number: int, setting: dict[str, str], **summary: Any) -> None:
    job = folder / str(number)
    (job / ".hydra").mkdir(parents=True)
    overrides = ["checkpoint=run", *(f"{key}={value}" for key, value in setting.items())]
    (job / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides), encoding="utf-8")
    if not summary:
        return
    figures = {metric: number + place / 100 for place, metric in enumerate(METRICS)}
    about = {
        "checkpoint": "run/last",
        "step": 1874,
        "precision": "fp32",
        "seed": 1,
        "new_tokens": 3,
        "status": "finished",
    }
    (job / "summary.json").write_text(json.dumps({**about, **figures, **summary}), encoding="utf-8")
    sample = {
        "prompt": "To <be>",
        "text": "To <be>" + HOSTILE,
        "sample": 0,
        "token_ids": [1, 2, 3],
        "log_probability": -3.0,
        "stop_reason": "length",
        "copied": 0.5,
        "longest_copy": 9,
    }
    (job / "samples.jsonl").write_text(json.dumps(sample) + "\n", encoding="utf-8")


def report(folder: Path) -> Page:
    return Page(study_report(as_study(read_jobs([folder])), folder).read_text("utf-8"))


def test_two_swept_keys_make_a_map_of_each_metric(tmp_path: Path) -> None:
    settings = [
        (t, k) for t in ("10", "0.5") for k in ("100", "5")
    ]  # neither as written nor as text in order
    for number, (temperature, top_k) in enumerate(settings):
        write_job(tmp_path, number, {"sampling.temperature": temperature, "sampling.top_k": top_k}, step=7)
    page = report(tmp_path)
    assert len(page.figures) == len(METRICS)
    for cells in page.figures:
        assert [job for job, _ in cells] == [3, 2, 1, 0]  # numbers in order, down and across
    assert [text for _, text in page.figures[0]] == ["3.0", "2.0", "1.0", "0.0"]
    data = json.loads(page.data)
    assert "run/last, step 7" in page.text
    assert data[0]["title"] == "Job 0: temperature=10 top_k=100"
    assert data[0]["samples"] == [
        {
            "prompt": "To <be>",
            "text": HOSTILE,
            "about": "sample 0 · perplexity 2.7 · 3 tokens, ended by length · "
            "50% copied, at most 9 tokens in a row",
        }
    ]
    assert "experiments/generate.py checkpoint=run sampling.temperature=0.5 sampling.top_k=5" in page.code
    with (tmp_path / "report.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["sampling.temperature"], row["sampling.top_k"]) for row in rows] == settings
    assert [float(row["perplexity"]) for row in rows] == [0.0, 1.0, 2.0, 3.0]
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_failed_jobs_are_named_and_what_is_missing_is_a_dash(tmp_path: Path) -> None:
    write_job(tmp_path, 0, {"sampling.top_k": "5"}, copied=None, longest_copy=None)
    samples = tmp_path / "0" / "samples.jsonl"
    line = json.loads(samples.read_text("utf-8")) | {"copied": None, "longest_copy": None}
    samples.write_text(json.dumps(line) + "\n", encoding="utf-8")
    write_job(tmp_path, 1, {"sampling.top_k": "<0>"}, status="failed", error="top_k=<0>: no", perplexity=None)
    write_job(tmp_path, 2, {"sampling.top_k": "7"})  # was killed before it wrote anything
    page = report(tmp_path)
    assert "Job 1 (top_k=<0>) failed: top_k=<0>: no" in page.text
    assert "Job 2 (top_k=7) failed: killed, or its machine went down" in page.text
    assert [text for _, text in page.figures[0]] == ["0.0", "–", "–"]
    copied = list(METRICS).index("copied")
    assert page.figures[copied][0] == (0, "–")
    data = json.loads(page.data)
    assert data[0]["samples"][0]["about"].endswith("3 tokens, ended by length")
    assert data[2] == {
        "title": "Job 2: top_k=7",
        "error": "killed, or its machine went down",
        "copy": None,
        "samples": [],
    }
    with (tmp_path / "report.csv").open(encoding="utf-8", newline="") as file:
        assert [row["perplexity"] for row in csv.DictReader(file)] == ["0.0", "", ""]


def test_the_longest_copy_is_quoted(tmp_path: Path) -> None:
    copy = {"longest_copy": 12, "longest_copy_text": HOSTILE, "longest_copy_token": 12345}
    write_job(tmp_path, 0, {}, **copy)
    (data,) = json.loads(report(tmp_path).data)
    assert data["copy"] == f"Longest copy, 12 tokens, from training token 12,345 on: {HOSTILE}"


def test_keys_with_the_most_values_are_the_axes_and_temperature_is_down(tmp_path: Path) -> None:
    settings = [(p, k, t) for p in ("0.9", "null") for k in ("5", "25", "100") for t in ("0.5", "1", "1.4")]
    for number, (top_p, top_k, temperature) in enumerate(settings):
        setting = {
            "sampling.top_p": top_p,
            "sampling.top_k": top_k,
            "sampling.temperature": temperature,
        }
        write_job(tmp_path, number, setting, step=7)
    cells = [job for job, _ in report(tmp_path).figures[0]]
    ordered = [(p, k, t) for p in ("0.9", "null") for t in ("0.5", "1", "1.4") for k in ("5", "25", "100")]
    assert cells == [settings.index(each) for each in ordered]


def test_values_that_matplotlib_would_take_for_mathematics(tmp_path: Path) -> None:
    for number, prompt in enumerate((r"'$\no$'", "'" + 100 * "long " + "'")):
        write_job(tmp_path, number, {"prompt": prompt}, step=7)
    report(tmp_path)
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("keys", [0, 1, 3])
def test_any_number_of_swept_keys(tmp_path: Path, keys: int) -> None:
    names = ["sampling.temperature", "sampling.top_k", "prompt"][:keys]
    for number in range(2**keys):
        setting = {name: "ab"[number >> place & 1] for place, name in enumerate(names)}
        write_job(tmp_path, number, setting, step=7)
    page = report(tmp_path)
    for cells in page.figures:
        assert sorted(job for job, _ in cells) == list(range(2**keys))
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
