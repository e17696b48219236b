"""Which jobs are ranked as one, by what, and how tables show it; commands that give a job's numbers again."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, Script, numbers

from llm.files import write_json
from llm.run_folder import read_summary
from llm.sweeps.commands import train_again
from llm.sweeps.comparing import BITS_PER_BYTE, LOSS, comparisons
from llm.sweeps.jobs import Job, read_jobs
from llm.sweeps.watch import sweep_table
from llm.tables import format_table

pytestmark = pytest.mark.usefixtures("no_pictures")


def job(number: int, loss: float | None, bits: float | None = None, setting: str = "", **summary: Any) -> Job:
    figures = {"status": "finished", "val_loss": loss, "val_bits_per_byte": bits}
    key, _, value = setting.partition("=")
    about = {"tokenizer": "bytes-1", "validation_text": "text", **figures, **summary}
    return Job(Path(str(number)), str(number), [], {key: value} if key else {}, about)


def test_between_tokenizers_bits_per_byte_decide() -> None:
    jobs = [job(0, 2.0, 2.9), job(1, 4.0, 2.1, tokenizer="gpt2-1"), job(2, 1.0, 9.0, status="interrupted")]
    [compared] = comparisons(jobs)
    assert (compared.measure, compared.title) == (BITS_PER_BYTE, "")
    assert compared.best is jobs[1]  # not the third, which was interrupted after its figures were written
    [alike] = comparisons([jobs[0], jobs[2]])
    assert (alike.measure, alike.best) == (LOSS, jobs[0])


def test_what_was_evaluated_on_different_texts_is_ranked_apart() -> None:
    jobs = [
        job(0, 2.0, setting="data.train_ratio=0.8"),
        job(1, 1.0, setting="data.train_ratio=0.9", validation_text="shorter"),
        job(2, 1.5, setting="data.train_ratio=0.9", validation_text="shorter"),
        Job(Path("3"), "3", [], {"data.train_ratio": "0.9"}),  # waits, and will be of the second text
        job(4, None, setting="data.train_ratio=0.8", status="running"),
    ]
    found = [(each.title, [job.name for job in each.jobs], each.best) for each in comparisons(jobs)]
    assert found == [
        ("text A (train_ratio=0.8)", ["0", "4"], jobs[0]),
        ("text B (train_ratio=0.9)", ["1", "2", "3"], jobs[1]),
    ]
    first, second, note = sweep_table(jobs, 80).split("\n\n")
    assert first.splitlines()[0] == "text A (train_ratio=0.8):"
    assert [line for line in (first + second).splitlines() if "★" in line] == [
        "0    train_ratio=0.8  finished ★     2.000",
        "1    train_ratio=0.9  finished ★     1.000",
    ]
    assert note.startswith("What was evaluated on different texts")


def test_a_part_of_the_validation_split_is_a_text_of_its_own() -> None:
    some: dict[str, Any] = {"evaluated_windows": 50, "validation_windows": 100}
    fewer: dict[str, Any] = {"evaluated_windows": 25, "validation_windows": 100}
    jobs = [
        job(0, 2.0, **some),
        job(1, 1.0, **fewer),
        job(2, 3.0, **some),
        job(3, 1.0, tokenizer="b-1", **some),
    ]
    assert [(each.title, len(each.jobs), each.measure) for each in comparisons(jobs)] == [
        ("text A (50 of 100 windows)", 2, LOSS),
        ("text B (25 of 100 windows)", 1, LOSS),
        ("text C (50 of 100 windows)", 1, LOSS),
    ]
    assert len(comparisons([job(0, 2.0, evaluated_windows=100, validation_windows=100), job(1, 1.0)])) == 1


@pytest.mark.parametrize("width", [80, 40])
def test_a_table_is_no_wider_than_the_terminal(width: int) -> None:
    setting = {f"model.some_long_name_{number}": f"value_{number}" for number in range(8)}
    about = {
        "status": "finished",
        "val_loss": 2.0,
        "val_bits_per_byte": 3.0,
        "train_loss": 2.0,
        "seconds": 9.0,
    }
    error = "no such file: " + "a long reason " * 20
    jobs = [
        Job(Path("0"), "0", [], setting, {**about, "tokens_seen": 10**9}),
        Job(Path("1"), "1", [], setting, {"status": "failed", "error": error}),
    ]
    table = sweep_table(jobs, width)
    assert max(map(len, table.splitlines())) <= width
    unbroken = table.replace("\n", "").replace(" ", "")
    assert "2.000" in table
    assert error.replace(" ", "") in unbroken
    column = "".join(line[5:].split("  ")[0] for line in table.splitlines()[1:])
    assert all(f"some_long_name_{number}=value_{number}" in column.replace(" ", "") for number in range(8))


def test_columns_are_omitted_in_their_order() -> None:
    cells = [["job", "set", "a", "b"], ["0", "one two three", "1" * 6, "2" * 6]]
    assert format_table(cells, {0, 1}, 1, (3, 2), width=40).split() == [
        *cells[0],
        "0",
        *cells[1][1].split(),
        *cells[1][2:],
    ]
    assert "222222" not in format_table(cells, {0, 1}, 1, (3, 2), width=25)
    assert "111111" in format_table(cells, {0, 1}, 1, (3, 2), width=25)


def test_groups_are_named_as_they_were_chosen(tmp_path: Path) -> None:
    choices = {"model": "gpt124m", "model/part": None, "optimizer": "adamw", "tokenizer": "bytes"}
    for name, overrides in (
        ("a", ["model=tiny", "model/part=[rotary,qk_norm]", "data.path='x y'", "optimizer.betas=[0.8,0.9]"]),
        ("b", ["data.path=x y"]),
    ):
        folder = tmp_path / name / ".hydra"
        write_json(folder / "overrides.yaml", overrides)
        write_json(folder / "hydra.yaml", {"hydra": {"runtime": {"choices": choices}}})
        write_json(folder / "config.yaml", {"optimizer": {"betas": [0.9, 0.95]}, "model": {"emb_dim": 64}})
        write_json(tmp_path / name / "summary.json", {"status": "finished"})
    assert [job.setting for job in read_jobs([tmp_path / "a", tmp_path / "b"])] == [
        {"model": "tiny", "model/part": "[rotary,qk_norm]", "optimizer.betas": "[0.8,0.9]"},
        {"model": "gpt124m", "model/part": "null", "optimizer.betas": "[0.9,0.95]"},
    ]


def test_a_run_that_was_resumed_with_other_keys_is_run_again_to_the_same_numbers(
    script: Script, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    script("pretrain", *TINY, text, "training.max_steps=3", "hydra.run.dir=first", "model/part=rotary")
    script("pretrain", "resume=first", "training.max_steps=5", "schedule=cosine")
    [resumed] = read_jobs([Path("first")])
    again = train_again(resumed)
    assert again.again
    assert "model/part=rotary" in again.again
    for command in again.again.split(" && "):
        assert script("pretrain", *shlex.split(command)[2:]).returncode == 0
    assert numbers(tmp_path / "first-again") == numbers(tmp_path / "first")
    assert read_summary(Path("first-again"))["val_loss"] == read_summary(Path("first"))["val_loss"]
    script(
        "pretrain",
        "init_from=first",
        "training.max_steps=1",
        "training.max_minutes=null",
        text,
        "hydra.run.dir=new",
    )
    [new] = read_jobs([Path("new")])
    assert "init_from=first/checkpoints/step-00000005" in (train_again(new).again or "")


def test_a_run_that_was_changed_on_its_way_or_limited_by_the_clock(
    script: Script, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    script("pretrain", *TINY, text, "training.max_steps=2", "training.max_minutes=9", "hydra.run.dir=run")
    [run] = read_jobs([Path("run")])
    assert train_again(run).again == "python experiments/pretrain.py rerun=run"
    changed = {"steps": 1, "changed": {"optimizer.lr": [0.1, 0.2]}}
    summary = json.loads(Path("run/summary.json").read_text("utf-8"))
    write_json(Path("run/summary.json"), {**summary, "resumed": [changed]})
    [run] = read_jobs([Path("run")])
    assert train_again(run).again is None
    assert "optimizer.lr=0.2 after 1 updates" in train_again(run).about
