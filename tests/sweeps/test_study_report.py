"""The page, the table and the picture of a study, read back as what they are."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from pages import HOSTILE, data_of, in_browser, needs_browser

from llm.sweeps.jobs import read_jobs
from llm.sweeps.report import study_report
from llm.sweeps.study import METRICS


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


def report(folder: Path) -> dict[str, Any]:
    """What the page shows."""
    return data_of(study_report(read_jobs([folder]), [folder], folder).page)


Cell = tuple[int, str]


def heatmaps(page: dict[str, Any], metric: str = "perplexity") -> list[list[Cell]]:
    """For each heatmap of a metric its cells, row by row: the job and what is shown."""
    cells = page["metrics"][list(METRICS).index(metric)]["cells"]
    return [
        [(job, cells[job][1]) for row in grid["cells"] for job in row if job is not None]
        for grid in page["grids"]
    ]


def test_two_swept_keys_make_a_map_of_each_metric(tmp_path: Path) -> None:
    settings = [
        (t, k) for t in ("10", "0.5") for k in ("100", "5")
    ]  # neither as written nor as text in order
    for number, (temperature, top_k) in enumerate(settings):
        write_job(tmp_path, number, {"sampling.temperature": temperature, "sampling.top_k": top_k}, step=7)
    page = report(tmp_path)
    assert len(page["metrics"]) == len(METRICS)
    # numbers in order, down and across
    assert heatmaps(page) == [[(3, "3.0"), (2, "2.0"), (1, "1.0"), (0, "0.0")]]
    assert [shade for shade, _ in page["metrics"][0]["cells"]] == [0, 1 / 3, 2 / 3, 1]
    assert page["subject"] == "run/last, step 7"
    assert page["jobs"][0]["title"] == "temperature=10 top_k=100"
    assert page["jobs"][0]["samples"] == [
        {
            "prompt": "To <be>",
            "text": HOSTILE,
            "note": "sample 0 · perplexity 2.7 · 3 tokens, ended by length · "
            "50% copied, at most 9 tokens in a row",
        }
    ]
    assert page["jobs"][3]["again"] == (
        "python experiments/generate.py checkpoint=run/last sampling.temperature=0.5 sampling.top_k=5 "
        "study=true"
    )
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
    assert [job["error"] for job in page["jobs"]] == [
        None,
        "top_k=<0>: no",
        "killed, or its machine went down",
    ]
    assert heatmaps(page) == [[(0, "0.0"), (2, "–"), (1, "–")]]
    assert heatmaps(page, "copied")[0][0] == (0, "–")
    assert page["jobs"][0]["samples"][0]["note"].endswith("3 tokens, ended by length")
    assert page["jobs"][2]["samples"] == []
    with (tmp_path / "report.csv").open(encoding="utf-8", newline="") as file:
        assert [row["perplexity"] for row in csv.DictReader(file)] == ["0.0", "", ""]


def test_the_longest_copy_is_quoted(tmp_path: Path) -> None:
    copy = {"longest_copy": 12, "longest_copy_text": HOSTILE, "longest_copy_token": 12345}
    write_job(tmp_path, 0, {}, **copy)
    (job,) = report(tmp_path)["jobs"]
    assert job["copy"] == f"Longest copy, 12 tokens, from training token 12,345 on: {HOSTILE}"


def test_keys_with_the_most_values_are_the_axes_and_temperature_is_down(tmp_path: Path) -> None:
    settings = [(p, k, t) for p in ("0.9", "null") for k in ("5", "25", "100") for t in ("0.5", "1", "1.4")]
    for number, (top_p, top_k, temperature) in enumerate(settings):
        setting = {
            "sampling.top_p": top_p,
            "sampling.top_k": top_k,
            "sampling.temperature": temperature,
        }
        write_job(tmp_path, number, setting, step=7)
    page = report(tmp_path)
    cells = [job for cells in heatmaps(page) for job, _ in cells]
    assert [grid["caption"] for grid in page["grids"]] == ["top_p 0.9", "top_p null"]
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
    assert sorted(job for cells in heatmaps(page) for job, _ in cells) == list(range(2**keys))
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


INJECTED = """
<b id=injected onclick="hit = 1">x</b><script>hit = 1</script><style>p { color: red }</style>
<img src="data:image/png;base64,AA" onerror="hit = 1"><iframe src="data:text/html,x"></iframe>
"""
TRY_ALL = """
byId("injected").click();
found.handler = hit;
found.done = [
  () => byId("about").innerHTML = "<b>x</b>",
  () => eval("hit = 1"),
  () => new Function("hit = 1")(),
  () => byId("problems").setAttribute("onclick", "hit = 1"),
].map(act => { try { act(); return true; } catch { return false; } });
byId("problems").click();
found.red = getComputedStyle(document.querySelector("p")).color == "rgb(255, 0, 0)";
"""


@needs_browser
def test_a_page_runs_and_loads_nothing_but_its_own(tmp_path: Path) -> None:
    folder = tmp_path / ("<img src=x onerror=hit=1><script>hit=1<!--\u2028'\"")
    write_job(folder, 0, {"prompt": HOSTILE}, step=7)
    report(folder)
    found = in_browser(folder / "report.html", "found.title = document.title;")
    assert (found["errors"], found["hit"]) == ([], 0)
    assert found["title"] == f"Sampling study {folder}"
    page = folder / "report.html"
    text = page.read_text("utf-8")
    page.write_text(text.replace("<main>", f"{INJECTED}<main>"), encoding="utf-8")
    found = in_browser(page, TRY_ALL)
    assert (found["hit"], found["handler"], found["done"], found["red"]) == (0, 0, 4 * [False], False)
    refused = {error.split()[0] for error in found["errors"]}
    assert refused >= {"script-src-elem", "style-src-elem", "img-src"}, found["errors"]


READ = """
found.problems = texts("#problems p");
found.captions = texts("figcaption b");
found.heat = table(".heat");
found.settings = table("#settings table");
found.first = byId("samples").textContent;
document.querySelectorAll(".heat button")[1].click();
found.pressed = texts(".heat [aria-pressed=true]").length;
found.second = byId("samples").textContent;
const heads = [...document.querySelectorAll("#settings th")];
heads[2].firstChild.click();
found.rising = texts("#settings td:nth-child(3)");
heads[2].firstChild.click();
found.falling = texts("#settings td:nth-child(3)");
found.commands = texts("#commands li");
found.bold = texts("#problems b, #samples b, td b, th b, li b");  // none but from a text taken for HTML
"""


@needs_browser
def test_in_a_browser(tmp_path: Path) -> None:
    copy = {"longest_copy": 12, "longest_copy_text": HOSTILE, "longest_copy_token": 12345}
    write_job(tmp_path, 0, {"prompt": HOSTILE}, step=7)
    write_job(tmp_path, 1, {"prompt": "a"}, **copy)
    write_job(tmp_path, 2, {"prompt": "b"}, status="failed", error=f"{HOSTILE}\ud800", perplexity=None)
    report(tmp_path)
    found = in_browser(tmp_path / "report.html", READ, "--window-size=1200,900")
    assert (found["errors"], found["hit"], found["bold"]) == ([], 0, [])
    assert found["problems"] == [f"Job 2 (prompt=b) failed: {HOSTILE}\ud800"]
    assert found["captions"] == [title for title, _, _ in METRICS.values()]
    assert found["heat"] == [["prompt →", HOSTILE[:20] + "…", "a", "b"], ["", "0.0", "1.0", "–"]]
    note = "sample 0 · perplexity 2.7 · 3 tokens, ended by length · 50% copied, at most 9 tokens in a row"
    assert found["first"] == f"Job 0: prompt={HOSTILE}To <be>{HOSTILE}{note}"
    assert found["second"] == (
        "Job 1: prompt=aLongest copy, 12 tokens, from training token 12,345 on: "
        f"{HOSTILE}To <be>{HOSTILE}{note}"
    )
    assert found["pressed"] == len(METRICS)
    assert [row[:4] for row in found["settings"]] == [
        ["job", "prompt", "Perplexity", "Log-probability"],
        ["0", HOSTILE[:40] + "…", "0.0", "0.01"],
        ["1", "a", "1.0", "1.01"],
        ["2", "b", "–", "2.01"],
    ]
    assert (found["rising"], found["falling"]) == (["0.0", "1.0", "–"], ["1.0", "0.0", "–"])
    assert found["commands"][1] == (
        "Job 1: prompt=apython experiments/generate.py checkpoint=run/last prompt=a study=true"
    )
