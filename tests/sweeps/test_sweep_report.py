"""A sweep's page, table and picture, from folders as jobs leave them, whole or not; the page in a browser."""

import csv
import json
import math
import random
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Script
from pages import HOSTILE, data_of, in_browser, needs_browser

from llm.checkpoints.writing import write_start
from llm.commands.report import write_report
from llm.config import PretrainConfig, ReportConfig
from llm.errors import UserError
from llm.run_folder import claimed
from llm.sweeps.commands import command_again
from llm.sweeps.jobs import Job, write_record
from llm.sweeps.results import read_metrics, smoothed, thinned


def write_job(
    sweep: Path,
    number: int,
    setting: dict[str, str],
    val_loss: float | None = None,
    steps: int = 40,
    **summary: Any,
) -> Path:
    """A job that finished with `val_loss`, or as `summary` says."""
    job = sweep / str(number)
    (job / ".hydra").mkdir(parents=True)
    overrides = ["model=tiny", *(f"{key}={value}" for key, value in setting.items())]
    (job / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides), encoding="utf-8")
    (job / ".hydra" / "config.yaml").write_text("seed: 123\n", encoding="utf-8")
    lines: list[dict[str, Any]] = []
    for step in range(steps):
        position = {"step": step, "tokens_seen": 64 * (step + 1), "epoch": step / 100, "seconds": step / 8}
        lines.append({**position, "train/loss": 3 + 2 / (step + 1) + number / 10, "lr": 0.1})
        if step % 10 == 0:
            lines.append({**position, "eval/train_loss": 4.0, "val/loss": 3.5 + 1 / (step + 1)})
    (job / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    figures = {
        "run_dir": str(job),
        "status": "finished",
        "steps": steps,
        "tokens_seen": 64 * steps,
        "seconds": steps / 8,
        "val_loss": val_loss,
        "val_bits_per_byte": val_loss and val_loss / math.log(2),
        "tokens_per_second": 512.0,
        "parameters": 1000,
        "seed": int(setting.get("seed", 123)),
        "git_clean": True,
        "error": None,
    }
    (job / "summary.json").write_text(json.dumps({**figures, **summary}), encoding="utf-8")
    sample = {"prompt": "To be", "text": f"To be sample of {number} {HOSTILE}"}
    (job / "samples.jsonl").write_text(json.dumps({"prompt": "", "text": "old"}) + "\n", encoding="utf-8")
    with (job / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(sample) + '\n{"prompt": "cut o')
    return job


def report(folder: Path | list[Path], **config: Any) -> dict[str, Any]:
    """What the page shows."""
    sweep = [str(each) for each in folder] if isinstance(folder, list) else str(folder)
    return data_of(write_report(ReportConfig(sweep, **config), Path("unused")).files["report"])


def csv_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "report.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Three learning rates, two with two seeds."""
    losses = {
        ("1e-3", "0"): 3.0,
        ("1e-3", "1"): 3.2,
        ("1e-2", "0"): 2.0,
        ("1e-2", "1"): 2.3,
        ("1e-1", "0"): 2.5,
    }
    for number, ((lr, seed), loss) in enumerate(losses.items()):
        write_job(tmp_path, number, {"optimizer.lr": lr, "seed": seed}, loss)
    return tmp_path


def test_settings_are_ranked_over_their_seeds(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = report(sweep)
    assert [(group["title"], group["cell"]) for group in page["groups"]] == [
        ("lr=1e-2", [1, "2.150 ★"]),
        ("lr=1e-1", [0.5, "2.500"]),
        ("lr=1e-3", [0, "3.100"]),
    ]
    # lr=1e-3 is worse by 1.0 and 0.9: a mean of 0.95, a standard error of 0.05. t is 19, one-sided p 0.0167.
    assert [group["possibly_best"] for group in page["groups"]] == [True, None, False]
    assert [row["possibly_best"] for row in csv_of(sweep)] == ["false", "false", "true", "true", ""]
    assert page["texts"][0]["noise"] == pytest.approx(0.3 / 2**0.5)  # of 2.0 and 2.3
    assert [job["group"] for job in page["jobs"]] == [2, 2, 0, 0, 1]
    assert [job["name"] for job in page["jobs"]] == list("01234")
    assert page["jobs"][3]["setting"] == {"optimizer.lr": "1e-2", "seed": "1"}
    assert page["jobs"][3]["figures"]["val_loss"] == 2.3
    assert "5 jobs: 5 finished" in page["about"]
    assert page["varied"] == [["optimizer.lr", "1e-3, 1e-2, 1e-1"], ["seed", "0, 1"]]  # in order
    assert page["common"][:2] == [["overrides", "model=tiny"], ["parameters", "1k"]]
    assert f"report      {sweep}/report.html" in capsys.readouterr().out
    assert (sweep / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_needs_nothing_but_itself(sweep: Path) -> None:
    report(sweep)
    text = re.sub(r'id="data">.*?</script>', "", (sweep / "report.html").read_text("utf-8"))
    assert not re.findall(r"(?:src|href)=|url\(|@import|https?://", text)
    assert "{{" not in text  # all that the template leaves open is filled in


def test_best_and_worst_samples_and_commands(sweep: Path) -> None:
    printable = HOSTILE.replace("\x1b", "")
    write_job(sweep, 5, {"optimizer.lr": printable, "seed": "0"}, None, status="interrupted")
    page = report(sweep)
    assert page["samples"] == [
        {"place": "The best", "job": 2, "prompt": "To be", "text": f" sample of 2 {HOSTILE}"},
        {"place": "The worst", "job": 1, "prompt": "To be", "text": f" sample of 1 {HOSTILE}"},
    ]
    first, *_, last = page["jobs"]
    assert first["again"] == "python experiments/pretrain.py model=tiny optimizer.lr=1e-3 seed=0"
    assert first["resume"] == f"python experiments/pretrain.py resume={sweep}/0"
    again = subprocess.run(["sh", "-c", f"printf '%s\\n' {last['again']}"], capture_output=True, text=True)
    assert again.stdout.splitlines()[3] == f"optimizer.lr={printable}"  # as the shell reads it


@pytest.mark.parametrize(
    ("override", "printed"),
    [
        ("hydra.job.env_set.GIT_SSH=x", "seed=1"),  # how a job is run is omitted: it changes no number
        ("+hydra.job.env_set.GIT_SSH=x", "seed=1"),
        ("hydra/launcher=joblib", "seed=1"),
        ("resume='run'", "seed=1"),
        ("+optimizer.lr=0.1", "seed=1 optimizer.lr=0.1"),
        ("data.stride=${model.context_length}", "seed=1 'data.stride=${model.context_length}'"),
        ("data.path='a b'", "seed=1 'data.path=a b'"),
        ("data.path='a,b'", """seed=1 'data.path='"'"'a,b'"'"''"""),
        ("model/part=[rotary,qk_norm]", "seed=1 'model/part=[rotary,qk_norm]'"),
        ("experiment=sweep_lr", "seed=1 experiment=sweep_lr hydra.mode=RUN"),
        ("experiment=[a,b]", "seed=1 'experiment=[a,b]' hydra.mode=RUN"),
        ("model=tiny", "seed=1 model=tiny"),
        ("model=../../tmp/theirs", None),  # a config from elsewhere
        ("model=/tmp/theirs", None),
        ("experiment=[a,../b]", None),
        ("data.path=${oc.env:WANDB_API_KEY}", None),
        ("data.path=${a.${oc.env:KEY}}", None),
        ("new.key=1", None),
        ("--config-dir=/tmp/theirs", None),
        ("model@optimizer=tiny", None),
        ("data.path='\x1b[201~touch pwned\n'", None),  # ends what a terminal takes for pasted
        ("data.path='\u202eabc'", None),
    ],
)
def test_a_command_to_paste_holds_keys_and_options_alone(override: str, printed: str | None) -> None:
    job = Job(Path("run"), "run", ["seed=1", override])
    command = command_again("pretrain", PretrainConfig, job)
    assert command == (printed and f"python experiments/pretrain.py {printed}")


def test_table_of_figures(sweep: Path) -> None:
    write_job(sweep, 5, {"optimizer.lr": "-1", "seed": "0"}, None, 0, status="failed", error=HOSTILE)
    report(sweep)
    rows = csv_of(sweep)
    assert list(rows[0])[:4] == ["job", "optimizer.lr", "seed", "state"]
    assert list(rows[0])[-2:] == ["error", "folder"]
    assert [row["val_loss"] for row in rows] == ["3.0", "3.2", "2.0", "2.3", "2.5", ""]
    assert (rows[5]["state"], rows[5]["error"]) == ("failed", HOSTILE)
    assert rows[0]["tokens_per_second"] == "512.0"
    assert "git_clean" not in rows[0]


def test_half_written_jobs(tmp_path: Path) -> None:
    """Of each kind one; all are shown, and only the first has a final loss."""
    lrs = ["0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7"]
    write_job(tmp_path, 0, {"optimizer.lr": lrs[0]}, 2.5)
    running = write_job(tmp_path, 1, {"optimizer.lr": lrs[1]}, status="running", steps=15)
    summary = json.loads((running / "summary.json").read_text()) | {
        "steps": 0,
        "tokens_seen": 0,
        "seconds": 0,
    }
    (running / "summary.json").write_text(json.dumps(summary))
    with (running / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "train/lo')
    killed = write_job(tmp_path, 2, {"optimizer.lr": lrs[2]})
    (killed / "summary.json").unlink()
    (killed / "metrics.jsonl").unlink()
    early = write_job(tmp_path, 3, {"optimizer.lr": lrs[3]}, status="interrupted", stopped_early="worse half")
    text = re.sub(
        r'"train/loss": [^,]*', '"train/loss": null', (early / "metrics.jsonl").read_text(), count=1
    )
    lines = text.splitlines(keepends=True)
    (early / "metrics.jsonl").write_text("".join([*lines[:5], "\0\0\0\n", *lines[5:]]))
    write_job(tmp_path, 4, {"optimizer.lr": lrs[4]}, status="failed", steps=0, error=f"no: {HOSTILE}\ud800")
    diverged = write_job(tmp_path, 5, {"optimizer.lr": lrs[5]}, math.nan)
    (diverged / "samples.jsonl").unlink()
    jobs = [["model=tiny", f"optimizer.lr={lr}"] for lr in lrs]
    write_record(tmp_path, "pretrain", [], ["optimizer.lr"], jobs)
    with claimed(running, old=True):
        page = report(tmp_path)
    states = [job["state"] for job in page["jobs"]]
    assert states == ["finished", "running", "killed", "stopped", "failed", "finished", "waiting"]
    assert [job["loss"] for job in page["jobs"]] == [2.5] + 6 * [None]
    assert [job["last"] for job in page["jobs"]][1:] == [
        pytest.approx(value) if value else None
        for value in (3.5 + 1 / 11, None, 3.5 + 1 / 31, None, 3.5 + 1 / 31, None)
    ]
    running_figures = page["jobs"][1]["figures"]  # its summary says nothing of them yet
    assert (running_figures["steps"], running_figures["tokens_seen"]) == (15, 960)
    assert page["jobs"][1]["training"][0] == list(range(15))
    assert page["jobs"][3]["training"][0] == list(range(40))
    assert page["jobs"][3]["training"][3][:2] == [None, 4.3]
    assert [job["reason"] for job in page["jobs"]] == [
        "",
        "15 updates",
        "killed, or its machine went down",
        "worse half",
        f"no: {HOSTILE}\ud800",
        "",
        "",
    ]
    assert csv_of(tmp_path)[4]["error"] == f"no: {HOSTILE}?"
    assert page["resume"] == [f"python experiments/pretrain.py -m sweep.resume={tmp_path}"]
    assert page["jobs"][6]["resume"] is None  # it never began
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_has_finished(tmp_path: Path) -> None:
    write_job(tmp_path, 0, {"optimizer.lr": "0.1"}, status="failed", steps=0, error="no")
    write_job(tmp_path, 1, {"optimizer.lr": "x"}, status="failed", steps=0, error="no")
    page = report(tmp_path)
    assert [group["cell"] for group in page["groups"]] == [[None, "–"], [None, "–"]]
    assert page["samples"] == []
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_two_keys_make_a_heatmap(tmp_path: Path) -> None:
    settings = [(lr, n, seed) for lr in ("0.1", "0.01", "1") for n in ("4", "2") for seed in ("0", "1")]
    for number, (lr, n, seed) in enumerate(settings[:-2]):
        setting = {"optimizer.lr": lr, "model.n_layers": n, "seed": seed}
        write_job(tmp_path, number, setting, number + 1.0, steps=3)
    page = report(tmp_path)
    grid, cells = page["texts"][0]["grid"], [group["cell"] for group in page["groups"]]
    assert (grid["down"], grid["rows"]) == ("n_layers", ["2", "4"])
    assert (grid["along"], grid["columns"]) == ("lr", ["0.01", "0.1", "1"])
    assert [[None if n is None else cells[n] for n in row] for row in grid["cells"]] == [
        [[0.25, "7.500"], [0.75, "3.500"], None],
        [[0.5, "5.500"], [1, "1.500 ★"], [0, "9.500"]],
    ]
    [lr, layers] = page["keys"]
    assert (lr["name"], lr["values"], lr["numeric"], lr["log"]) == ("lr", [0.01, 0.1, 1], True, True)
    assert lr["means"] == [[[0.01, 6.5], [0.1, 2.5], [1, 9.5]]]
    assert (layers["values"], layers["log"]) == ([2, 4], False)
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_drawn_at_random_make_no_heatmap(tmp_path: Path) -> None:
    for number in range(5):
        write_job(
            tmp_path, number, {"optimizer.lr": f"0.{number}1", "data.stride": f"{number}"}, 1.0, steps=0
        )
    assert report(tmp_path)["texts"][0]["grid"] is None  # of 5 places in 25


def test_numbers_drawn_at_random_have_means_of_parts(tmp_path: Path) -> None:
    for number in range(50):
        write_job(tmp_path, number, {"optimizer.lr": f"{(number + 1) / 1000}"}, float(number), steps=0)
    [key] = report(tmp_path)["keys"]
    [means] = key["means"]
    assert means[:2] == [[pytest.approx(0.002), 1], [pytest.approx(0.005), 4]]  # of three each
    assert len(means) == 17


@pytest.mark.parametrize("keys", [0, 1, 3, 4])
def test_any_number_of_swept_keys(tmp_path: Path, keys: int) -> None:
    names = ["optimizer.name", "data.path", "model.n_layers", "optimizer.lr"][:keys]
    for number in range(2**keys):
        setting = {name: [r"$\no", "2"][number >> place & 1] for place, name in enumerate(names)}
        write_job(tmp_path, number, setting, 2 + number / 10, steps=3)
    page = report(tmp_path)
    assert [len(job["values"]) for job in page["jobs"]] == 2**keys * [keys]
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_only_the_seed_varies(tmp_path: Path) -> None:
    for number in range(3):
        write_job(tmp_path, number, {"seed": str(number)}, 2 + number / 10, steps=3)
    page = report(tmp_path)
    assert page["groups"] == [
        {"title": "the one setting", "cell": [1, "2.100"], "text": 0, "possibly_best": None}
    ]
    assert [key["name"] for key in page["keys"]] == ["seed"]


def test_one_run_and_several_sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = write_job(Path("a"), 0, {"optimizer.lr": "0.1"}, 2.0)
    write_job(Path("b"), 0, {"optimizer.lr": "0.2"}, 1.5)
    write_job(Path("b"), 1, {"optimizer.lr": "0.3"}, 1.8)
    page = report(run)
    assert (page["kind"], page["folders"], page["varied"]) == ("Run", "a/0", [])
    assert (run / "report.png").exists()
    page = report([Path("a"), Path("b")], to="both")
    assert [row["job"] for row in csv_of(Path("both"))] == ["a/0", "b/0", "b/1"]
    assert page["groups"][0] == {
        "title": "lr=0.2",
        "cell": [1, "1.500"],
        "text": 0,
        "possibly_best": None,
    }
    with pytest.raises(UserError, match="nowhere holds neither a sweep nor a run"):
        report(Path("nowhere"))


def test_a_study_has_its_own_report(tmp_path: Path) -> None:
    job = tmp_path / "0"
    (job / ".hydra").mkdir(parents=True)
    (job / ".hydra" / "overrides.yaml").write_text("[checkpoint=run, sampling.top_k=5]")
    about = {"status": "finished", "sampling": {}, "precision": "fp32", "seed": 1, "new_tokens": 3}
    (job / "summary.json").write_text(json.dumps(about | {"checkpoint": "run", "step": 7}))
    text = write_report(ReportConfig(str(tmp_path)), tmp_path / "unused").files["report"].read_text("utf-8")
    assert "Sampling study" in text
    (job / "summary.json").unlink()
    write_record(tmp_path, "generate", [], [], [["checkpoint=run"]])
    assert "Sampling study" in write_report(ReportConfig(str(tmp_path)), tmp_path).files["report"].read_text(
        "utf-8"
    )


def test_the_script_leaves_no_empty_folder(script: Script, sweep: Path) -> None:
    done = script("report", f"sweep={sweep}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{name:<11} {sweep}/report.{ending}"
        for name, ending in (("report", "html"), ("table", "csv"), ("picture", "png"))
    ]
    missing = script("report", "sweep=nowhere")
    assert (missing.returncode, missing.stderr) == (1, "error: nowhere holds neither a sweep nor a run\n")
    assert not (sweep / "outputs").exists()
    both = script("report", f"sweep=[{sweep},{sweep}/0]")
    assert both.returncode == 0, both.stderr
    assert len(list(sweep.glob("outputs/report/*/*/report.html"))) == 1


def test_a_report_resolves_nothing_and_reads_what_a_run_was_trained_with(
    script: Script, sweep: Path, environment: dict[str, str]
) -> None:
    """A stranger's record asks for the environment wherever a report reads a text."""
    secret, asked = "s3cret", "${oc.env:MARKER}"
    environment["MARKER"] = secret
    write_job(sweep, 5, {"data.path": asked, "seed": "7"}, 2.0, error=asked, machine=asked)
    (sweep / "5" / ".hydra" / "config.yaml").write_text(f"optimizer: {{lr: '{asked}'}}\nseed: 7\n")
    done = script("report", f"sweep={sweep}")
    assert done.returncode == 0, done.stderr
    for file in sweep.glob("report.*"):
        assert secret.encode() not in file.read_bytes()
    assert secret not in done.stdout + done.stderr
    job = data_of(sweep / "report.html")["jobs"][5]
    assert job["setting"] == {"data.path": asked, "optimizer.lr": asked, "seed": "7"}
    assert job["again"] is None
    config = PretrainConfig()
    config.optimizer.lr, config.seed = 0.25, 7
    write_start(sweep / "5", 0, config)
    assert report(sweep)["jobs"][5]["setting"]["optimizer.lr"] == "0.25"


# Curves


def test_metrics_are_read_as_json_reads_them(tmp_path: Path) -> None:
    write_job(tmp_path, 0, {}, 1.0, steps=25)
    file = tmp_path / "0" / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    training, evaluations = read_metrics(file)
    for rows, loss in ((training, "train/loss"), (evaluations, "val/loss")):
        names = ("step", "tokens_seen", "seconds", loss)
        assert rows.T.tolist() == [[line[name] for name in names] for line in lines if loss in line]


def test_thinning_keeps_the_lowest_and_the_highest_of_every_part() -> None:
    rng = random.Random(1)
    for count in (0, 1, 2, 21, 22, 23, 100, 101, 999):
        values = np.array([rng.gauss(0, 1) if rng.random() < 0.95 else math.nan for _ in range(count)])
        values[30:60] = math.nan  # some parts have nothing else
        kept = thinned(values, 10).tolist()
        assert kept == sorted(set(kept))
        assert len(kept) <= 2 * 10 + 2
        if count:
            assert (kept[0], kept[-1]) == (0, count - 1)
        length = math.ceil(count / 10) or 1
        for start in range(0, count, length):
            part = [each for each in range(start, min(start + length, count)) if not math.isnan(values[each])]
            if part:
                assert min(part, key=lambda each: values[each]) in kept
                assert max(part, key=lambda each: values[each]) in kept
            else:
                assert any(start <= each < start + length for each in kept)


def test_smoothing_is_a_weighted_mean_of_all_values_so_far() -> None:
    values = np.array([math.nan, 4.0, 2.0, math.nan, 7.0, 1.0])
    keep = 1 - 2 / (5 + 1)
    expected = [math.nan, 4.0]
    for seen in ([4.0, 2.0], [4.0, 2.0], [4.0, 2.0, 7.0], [4.0, 2.0, 7.0, 1.0]):
        weights = [keep**age for age in range(len(seen))][::-1]
        expected.append(sum(map(float.__mul__, weights, seen)) / sum(weights))
    np.testing.assert_allclose(smoothed(values, 5), expected)


def test_curves_are_thinned_and_keep_their_spike(tmp_path: Path) -> None:
    job = write_job(tmp_path, 0, {}, 1.0, steps=5000)
    lines = (job / "metrics.jsonl").read_text().splitlines()
    spike = json.loads(lines[3000]) | {"train/loss": 77.0}
    (job / "metrics.jsonl").write_text("\n".join([*lines[:3000], json.dumps(spike), *lines[3001:]]) + "\n")
    [job_data] = report(job)["jobs"]
    steps, *_, losses, averages = job_data["training"]
    assert len(steps) <= 2002
    assert losses[steps.index(spike["step"])] == 77.0
    assert max(averages) < 10


def test_several_processes_read_what_one_reads(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = report(sweep)
    monkeypatch.setattr("llm.sweeps.results.MUCH", 0)
    assert report(sweep)["jobs"] == alone["jobs"]
    monkeypatch.setattr(ProcessPoolExecutor, "map", killed)
    with pytest.raises(UserError, match=r"a process that read the metrics .* was killed"):
        report(sweep)


def killed(*_: object, **more: object) -> Iterator[None]:
    raise BrokenProcessPool
    yield


# The page in a browser

CLICKS = """
const column = (name, number, kind = "") =>
  [...document.querySelectorAll("#" + name + " tbody tr" + kind)].map(row => row.cells[number].textContent);
found.best = byId("best").textContent;
found.ranked = table("#ranked table");
found.jobs = table("#jobs table");
found.dots = [...document.querySelectorAll(".dots [title]")].map(each => each.title);
const pixels = () => document.querySelector("#curves canvas:nth-child(2)").toDataURL();
found.before = column("jobs", 4);
const head = document.querySelector("#jobs th:nth-child(5)");
head.querySelector("button").click();
found.rising = column("jobs", 4);
found.sorted = head.getAttribute("aria-sort");
head.querySelector("button").click();
found.falling = column("jobs", 4);
const overTokens = pixels();
document.querySelector("[name=x][value=seconds]").click();
found.overTime = view.x;
found.redrawn = pixels() != overTokens;
const chart = document.getElementById("curves");
for (const key of ["ArrowDown", "ArrowDown", "ArrowRight"])
  chart.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
found.readout = document.querySelector(".readout").textContent;
found.chosen = column("jobs", 0, ".chosen");
chart.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
const box = chart.getBoundingClientRect();
chart.dispatchEvent(new PointerEvent("pointermove", { clientX: box.right - 60, clientY: box.bottom - 60 }));
found.pointedAt = chosen.length;
document.querySelector("#ranked td button").click();
found.group = column("jobs", 0, ".chosen").sort();
document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
const axes = document.getElementById("parallel"), across = axes.getBoundingClientRect();
axes.setPointerCapture = () => {};  // there is no pointer
for (const [type, share] of [["pointerdown", 0.85], ["pointermove", 0.55], ["pointerup", 0.55]])
  axes.dispatchEvent(new PointerEvent(type, {
    clientX: across.right - 48, clientY: across.top + share * across.height, pointerType: "mouse" }));
found.brushed = byId("all").textContent;
byId("all").click();
found.released = [byId("all").hidden, jobs.filter((_, number) => isSelected(number)).length];
document.body.style.maxWidth = "360px";  // a window cannot be so narrow
redraw();
found.width = document.body.scrollWidth;
"""

READ = """
for (const name of ["best", "problems", "varied", "common"]) found[name] = byId(name).textContent;
found.heads = texts("#jobs th");
found.acts = texts("#jobs tbody td:nth-child(3)");
found.whole = [...document.querySelectorAll("#jobs tbody td:nth-child(3)")].map(cell => cell.title);
found.heat = table(".heat");
found.shades = [...document.querySelectorAll(".heat button")].map(c => c.style.getPropertyValue("--heat"));
document.querySelectorAll(".heat button")[1].click();
found.pressed = texts(".heat [aria-pressed=true]");
found.chosen = texts("#jobs .chosen td:first-child");
found.samples = texts("#samples article");
found.unfinished = texts("#all-unfinished code");
found.commands = texts("#commands li");
found.bold = texts("#problems b, #samples b, td b, th b, li b");  // none but from a text taken for HTML
"""


@needs_browser
def test_charts_and_tables_in_a_browser(sweep: Path) -> None:
    write_job(sweep, 5, {"optimizer.lr": HOSTILE, "seed": "0"}, None, 0, status="failed", error=HOSTILE)
    figures = {"train_loss": 1.5, "val_next_word": 0.25, "val_perplexity": 10.0}
    summary = json.loads((sweep / "2" / "summary.json").read_text("utf-8")) | figures
    (sweep / "2" / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    report(sweep)
    found = in_browser(sweep / "report.html", CLICKS, "--window-size=1200,900")
    assert (found["errors"], found["hit"]) == ([], 0)
    assert found["best"] == "Lowest validation loss: 2.150 ± 0.212 with lr=1e-2, n = 2"
    # every metric has its column but the perplexity, which follows from the loss; |2.0 - 2.3| / √2 = 0.212
    # is the sample standard deviation, and of one seed there is none
    heads = "rank,lr,n,may be best,seeds,val loss,bits/byte,val next word,train loss,last evaluated,"
    heads += "train time,tokens/s"
    last = "3.532 ± 0.000"
    assert found["ranked"] == [
        heads.split(","),
        ["1", "1e-2", "2", "yes", "", "2.150 ± 0.212", "3.102 ± 0.306", "0.250", "1.500", last, "5s", "512"],
        ["2", "1e-1", "1", "–", "", "2.500", "3.607", "–", "–", "3.532", "5s", "512"],
        ["3", "1e-3", "2", "no", "", "3.100 ± 0.141", "4.472 ± 0.204", "–", "–", last, "5s", "512"],
        ["–", HOSTILE[:40] + "…", "0 of 1", "–", "", *6 * ["–"], "512"],
    ]
    assert [row[0] for row in found["jobs"]] == ["job", *"012345"]
    assert found["jobs"][0][7:] == [*heads.split(",")[8:10], "steps", "tokens", "train time", "tokens/s"]
    assert found["jobs"][3][1:] == (
        ["1e-2", "0", "finished", "2.000", "2.885", "0.250", "1.500", "3.532", "40", "2,560", "5s", "512"]
    )
    assert found["before"] == ["3.000", "3.200", "2.000", "2.300", "2.500", "–"]
    assert found["rising"] == ["2.000", "2.300", "2.500", "3.000", "3.200", "–"]
    assert found["sorted"] == "ascending"
    assert found["falling"] == ["3.200", "3.000", "2.500", "2.300", "2.000", "–"]
    assert (found["overTime"], found["redrawn"]) == ("seconds", True)
    assert found["readout"].startswith(
        "job 3: lr=1e-2 seed=1 · finished, final validation loss 2.300 · near step 0 (64 tokens"
    )
    assert found["chosen"] == ["3"]
    assert found["pointedAt"] == 1
    assert found["group"] == ["2", "3"]
    assert found["brushed"] == "2 of 6 jobs are shown; show all"  # the losses 2.3 and 2.5
    assert found["released"] == [True, 6]
    assert found["width"] == 360
    dots = ("2.0000", 0), ("2.3000", 1), ("2.5000", 0), ("3.0000", 0), ("3.2000", 1)
    assert found["dots"] == [f"{loss} with seed {seed}" for loss, seed in dots]


@needs_browser
def test_texts_and_the_heatmap_in_a_browser(tmp_path: Path) -> None:
    for number, (lr, act) in enumerate((lr, act) for lr in ("0.1", "0.01") for act in ("gelu", HOSTILE)):
        setting = {"optimizer.lr": lr, "model.activation": act}
        if number < 3:
            write_job(tmp_path, number, setting, 2.0 + number)
        else:
            write_job(tmp_path, number, setting, status="failed", error=f"{HOSTILE}\ud800")
    overrides = [json.loads((tmp_path / str(n) / ".hydra/overrides.yaml").read_text()) for n in range(4)]
    write_record(tmp_path, "pretrain", [], ["optimizer.lr", "model.activation"], overrides)
    report(tmp_path)
    found = in_browser(tmp_path / "report.html", READ, "--window-size=1200,900")
    assert (found["errors"], found["hit"], found["bold"]) == ([], 0, [])
    assert found["best"] == "Lowest validation loss: 2.000 with lr=0.1 activation=gelu"
    assert found["problems"] == f"1 failedJob 3 (lr=0.01 activation={HOSTILE}): {HOSTILE}\ud800"
    assert found["varied"] == f"optimizer.lr0.01, 0.1model.activation{HOSTILE}, gelu"
    assert found["common"] == "overridesmodel=tinyparameters1k"
    assert found["heads"][:5] == ["job", "lr", "activation", "state", "val loss"]
    assert found["acts"] == ["gelu", HOSTILE[:40] + "…", "gelu", HOSTILE[:40] + "…"]
    assert found["whole"] == ["", HOSTILE, "", HOSTILE]
    assert found["heat"] == [
        ["lr ↓activation →", HOSTILE[:20] + "…", "gelu"],
        ["0.01", "–", "4.000"],
        ["0.1", "3.000", "2.000"],
    ]
    assert found["shades"] == ["0%", "0%", "50%", "100%"]
    assert (found["pressed"], found["chosen"]) == (["4.000"], ["2"])
    assert found["samples"] == [
        f"{place}: lr={lr} activation=gelu validation loss {loss}To be sample of {number} {HOSTILE}"
        for place, lr, loss, number in (
            ("The best, job 0", "0.1", "2.000", 0),
            ("The worst, job 2", "0.01", "4.000", 2),
        )
    ]
    resume = "python experiments/pretrain.py resume="
    assert found["unfinished"] == [f"python experiments/pretrain.py -m sweep.resume={tmp_path}"]
    assert found["commands"][0] == (
        "Job 0: lr=0.1 activation=gelu (finished)"
        "python experiments/pretrain.py model=tiny optimizer.lr=0.1 model.activation=gelu"
        f"{resume}{tmp_path}/0it is finished: add a higher limit, as training.max_steps=…"
    )
    assert found["commands"][3].endswith(f"{resume}{tmp_path}/3")
    assert len(found["commands"]) == 4
