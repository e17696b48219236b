"""generate.py and evaluate.py as a user runs them, on one small model trained here."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import Script

from llm.checkpoints.opening import open_weights
from llm.checkpoints.weights import build_model
from llm.commands.pretrain import pretrain
from llm.config import ModelConfig, PretrainConfig
from llm.files import read_json_lines
from llm.model.gpt import GPTModel

pytestmark = pytest.mark.usefixtures("no_pictures")

TEXT = "".join(f"{number} bottles of beer on the wall, {number} bottles\n" for number in range(120))
FP32 = ("runtime.precision=fp32", "runtime.device=cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """A run folder: a model of bytes that knows the song a little."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    config = PretrainConfig(
        model=ModelConfig(vocab_size=257, context_length=32, emb_dim=32, n_heads=2, n_layers=2)
    )
    config.data.source, config.data.path = "text", str(folder / "text.txt")
    config.data.cache_dir = str(cache_dir)
    config.tokenizer.name = "bytes"
    config.training.max_minutes, config.training.max_steps = None, 60
    config.training.eval_freq = None
    config.samples.max_new_tokens = 5
    config.tracking.mode = "disabled"
    config.runtime.device, config.runtime.precision = "cpu", "fp32"
    pretrain(config, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def model(run: Path) -> GPTModel:
    return build_model(open_weights(str(run)))


def test_prompts_come_from_files_and_standard_input(script: Script, tmp_path: Path, run: Path) -> None:
    (tmp_path / "prompts").mkdir()
    for name, text in (("a.txt", "7 bottles\n"), ("b.txt", "on the wall, 10")):
        (tmp_path / "prompts" / name).write_text(text, encoding="utf-8")
    common = [f"checkpoint={run}", "max_new_tokens=12", *FP32]
    files = script("generate", *common, "prompt_file=prompts/*.txt", "num_samples=2", "hydra.run.dir=files")
    assert files.returncode == 0, files.stderr
    lines = read_json_lines(tmp_path / "files" / "samples.jsonl")
    assert [(line["prompt"], line["prompt_index"], line["sample"]) for line in lines] == [
        ("7 bottles", 0, 0),
        ("7 bottles", 0, 1),
        ("on the wall, 10", 1, 0),
        ("on the wall, 10", 1, 1),
    ]
    for line in lines:
        assert line["text"] in files.stdout
        assert line["text"] == line["prompt"] + bytes(line["token_ids"]).decode(errors="ignore")
    piped = script("generate", *common, "prompt_file=-", "hydra.run.dir=piped", stdin="7 bottles\n")
    assert piped.returncode == 0, piped.stderr
    [line] = read_json_lines(tmp_path / "piped" / "samples.jsonl")
    assert line["token_ids"] == lines[0]["token_ids"]
    assert lines[0]["text"] in piped.stdout
    argument = script("generate", *common, "prompt=on the wall, 10", "hydra.run.dir=argument")
    assert argument.returncode == 0, argument.stderr
    [line] = read_json_lines(tmp_path / "argument" / "samples.jsonl")
    assert line["prompt"] == "on the wall, 10"  # a comma, which Hydra alone would take for a sweep


@pytest.mark.parametrize("batch_size", [1, 2])  # one by one they are printed as they come
def test_quiet_prints_the_texts_alone(script: Script, run: Path, tmp_path: Path, batch_size: int) -> None:
    arguments = [f"checkpoint={run}", *FP32, "max_new_tokens=7", "quiet=true", f"batch_size={batch_size}"]
    for count in (1, 3):
        result = script("generate", *arguments, f"num_samples={count}", f"hydra.run.dir={count}")
        assert (result.returncode, result.stderr) == (0, "")
        texts = [line["text"] for line in read_json_lines(tmp_path / str(count) / "samples.jsonl")]
        assert len(texts) == count
        assert result.stdout == "\n<|endoftext|>\n".join(texts) + "\n"
        assert f"saved to {count}" in (tmp_path / str(count) / "generate.log").read_text("utf-8")
    failed = script("generate", *arguments, "prompt=")
    assert (failed.returncode, failed.stdout, failed.stderr[:7]) == (1, "", "error: ")
    assert "quiet=true prints texts, and a study" in script("generate", *arguments, "study=true").stderr


@pytest.mark.parametrize(
    ("name", "argument", "line"),
    [
        ("generate", "prompt_file=missing", "prompt_file=missing: no such file"),
        ("generate", "prompt=", "prompt is empty"),
        ("generate", 'stop=["a",""]', "stop contains an empty text, which would end every sample"),
        ("generate", "sampling.top_p=2", "sampling.top_p=2.0: must be at least 0 and at most 1"),
        ("generate", "past_context=slide", "past_context=slide needs relative positions, as model.pos"),
        ("generate", "checkpoint=missing", "missing is no file or folder here, and Hugging Face"),
        ("evaluate", "path=missing", "path=missing: no such file"),
        ("evaluate", "text=a", "text is too short: give at least 2 tokens"),
        ("evaluate", "text=a<|endoftext|><|endoftext|>", "text holds no text to predict"),
        ("evaluate", "split=test", "split=test: must be one of training, validation"),
    ],
)
def test_errors_are_one_line(script: Script, run: Path, name: str, argument: str, line: str) -> None:
    checkpoint = [] if argument.startswith("checkpoint") else [f"checkpoint={run}"]
    result = script(name, *checkpoint, argument)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith(f"error: {line}")


def test_text_and_path_are_one_too_many(script: Script, run: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    result = script("evaluate", f"checkpoint={run}", "text=7 bottles", "path=text.txt")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith("error: text and path are both set")


def test_an_empty_prompt_file_is_named(script: Script, run: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    for name, content in (("a.txt", b"7 bottles"), ("b.txt", b"\xef\xbb\xbf\r\n"), ("c.txt", b"8")):
        (tmp_path / "prompts" / name).write_bytes(content)
    result = script("generate", f"checkpoint={run}", "prompt_file=prompts")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith("error: prompts/b.txt is empty: give some text to continue")
    piped = script("generate", f"checkpoint={run}", "prompt_file=-", stdin="\n")
    assert piped.stderr.startswith("error: standard input is empty")
    binary = script("generate", f"checkpoint={run}", "prompt_file=-", stdin="to be\0")
    assert binary.stderr.startswith("error: standard input is not text: a zero byte at offset 5")


def test_prompts_are_the_same_with_the_line_ends_of_any_system(
    script: Script, run: Path, tmp_path: Path
) -> None:
    text = "7 bottles\non the wall\n"
    dos = "\ufeff" + text.replace("\n", "\r\n")
    (tmp_path / "unix.txt").write_text(text, encoding="utf-8")
    (tmp_path / "dos.txt").write_bytes(dos.encode())
    for number, (source, stdin) in enumerate((("unix.txt", ""), ("dos.txt", ""), ("-", dos))):
        folder = f"hydra.run.dir={number}"
        arguments = [f"checkpoint={run}", *FP32, "max_new_tokens=3", f"prompt_file={source}", folder]
        assert script("generate", *arguments, stdin=stdin).returncode == 0
    lines = [read_json_lines(tmp_path / str(number) / "samples.jsonl") for number in range(3)]
    assert lines[0] == lines[1] == lines[2]
    assert lines[0][0]["prompt"] == text.removesuffix("\n")


def test_a_stop_text_may_be_a_newline(script: Script, run: Path, tmp_path: Path) -> None:
    for number, stop in enumerate(("[]", r'["\n"]', r"['\n']", '["\n"]', r'["\\n"]')):
        folder = tmp_path / str(number)
        arguments = [f"checkpoint={run}", *FP32, "sampling=greedy", "prompt=7 bottles", f"stop={stop}"]
        result = script("generate", *arguments, f"hydra.run.dir={folder}")
        assert result.returncode == 0, result.stderr
        [line] = read_json_lines(folder / "samples.jsonl")
        if stop in ("[]", r'["\\n"]'):  # the last is a backslash and an n, which no bottle has
            assert line["stop_reason"] == "length"
            whole = line["text"]
            assert "\n" in whole
        else:
            assert (line["stop_reason"], line["text"]) == ("stop", whole.partition("\n")[0])


@pytest.mark.usefixtures("pictures")
def test_a_sampling_sweep_is_a_study(script: Script, tmp_path: Path, run: Path) -> None:
    result = script(
        "generate",
        "-m",
        f"checkpoint={run}",
        *FP32,
        "prompt=1",
        "max_new_tokens=40",
        "num_samples=4",
        "sampling.temperature=0.5,1.5,-1",
        "sampling.top_k=2,50",
        "hydra.sweep.dir=sweep",
    )
    assert result.returncode == 1  # two of its jobs cannot run
    assert result.stderr.count("): sampling.temperature=-1.0: must be at least 0") == 2
    sweep = tmp_path / "sweep"
    training_text = TEXT[: int(0.9 * len(TEXT))]
    for job in "0123":
        summary = json.loads((sweep / job / "summary.json").read_text("utf-8"))
        lines = read_json_lines(sweep / job / "samples.jsonl")
        assert (summary["status"], summary["num_samples"], len(lines)) == ("finished", 4, 4)
        assert summary["new_tokens"] == sum(len(line["token_ids"]) for line in lines)
        total = sum(line["log_probability"] for line in lines)
        assert summary["perplexity"] == pytest.approx(math.exp(-total / summary["new_tokens"]))
        copied = 0
        for line in lines:
            text = bytes(line["token_ids"]).decode("latin-1")
            inside = {
                start + offset
                for start in range(len(text) - 7)
                if text[start : start + 8] in training_text
                for offset in range(8)
            }
            assert line["copied"] == pytest.approx(len(inside) / len(text))
            copied += len(inside)
        assert summary["copied"] == pytest.approx(copied / summary["new_tokens"])
        start = summary["longest_copy_token"]
        if start is not None:
            assert summary["longest_copy_text"] == training_text[start : start + summary["longest_copy"]]
            assert summary["longest_copy"] == max(line["longest_copy"] for line in lines)
        assert len(list((sweep / job / "wandb").glob("offline-run-*"))) == 1
    with (sweep / "report.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["job"] for row in rows] == list("012345")
    assert (sweep / "report.html").exists()
    assert (sweep / "report.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((sweep / "wandb").glob("offline-run-*"))) == 1
    assert "report.html" in result.stdout


def test_a_split_evaluates_to_the_figures_of_its_run(script: Script, tmp_path: Path, run: Path) -> None:
    result = script("evaluate", f"checkpoint={run}", *FP32, "batch_size=3", "hydra.run.dir=split")
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "split" / "evaluation.json").read_text("utf-8"))
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    assert figures["loss"] == pytest.approx(summary["val_loss"], abs=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(summary["val_bits_per_byte"], abs=1e-5)


def test_a_text_that_was_changed_is_not_taken_for_that_of_the_run(
    script: Script, tmp_path: Path, run: Path
) -> None:
    file = run.parent / "text.txt"
    file.write_text(TEXT.replace("beer", "wine"), encoding="utf-8")
    try:
        for checkpoint in (run, run / "checkpoints" / "best"):
            result = script("evaluate", f"checkpoint={checkpoint}", *FP32, "hydra.run.dir=changed")
            assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stdout
            assert f"was trained on another text than is at data.path={file} now" in result.stderr
        sampled = ("study=true", "max_new_tokens=9", "num_samples=2", "tracking=disabled")
        # Another name of it, as the index of a checkpoint is kept for further jobs.
        best = f"checkpoint={run}/checkpoints/best"
        assert script("generate", best, *FP32, *sampled, "hydra.run.dir=study").returncode == 0
        assert "copied" not in json.loads((tmp_path / "study" / "summary.json").read_text("utf-8"))
    finally:
        file.write_text(TEXT, encoding="utf-8")


def test_a_file_is_predicted_to_its_last_byte(
    script: Script, tmp_path: Path, run: Path, model: GPTModel
) -> None:
    text = "12 bottles of béer on the wall, and what then? " * 3
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    result = script("evaluate", f"checkpoint={run}", *FP32, "path=text.txt", "hydra.run.dir=file")
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "file" / "evaluation.json").read_text("utf-8"))
    ids = torch.tensor([*text.encode()])
    nats = 0.0
    for start in range(0, len(ids) - 1, 32):
        window = ids[start : start + 33]
        with torch.no_grad():
            nats += F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="sum").item()
    assert figures["tokens"] == len(ids) - 1
    assert figures["loss"] == pytest.approx(nats / (len(ids) - 1), abs=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(nats / (len(ids) - 1) / math.log(2), abs=1e-5)


def test_a_text_is_shown_token_by_token(script: Script, tmp_path: Path, run: Path, model: GPTModel) -> None:
    result = script(
        "evaluate",
        f"checkpoint={run}",
        *FP32,
        "text=7 bottles, é",
        "sampling.top_p=0.9",
        "hydra.run.dir=text",
    )
    assert result.returncode == 0, result.stderr
    table = json.loads((tmp_path / "text" / "evaluation.json").read_text("utf-8"))["token_table"]
    ids = torch.tensor([*"7 bottles, é".encode()])
    with torch.no_grad():
        probabilities = model(ids[None])[0].softmax(-1)
    assert [row["token_id"] for row in table] == ids[1:].tolist()
    for row, before in zip(table, probabilities[:-1], strict=True):
        assert row["probability"] == pytest.approx(before[row["token_id"]].item(), rel=1e-4, abs=1e-9)
        assert row["rank"] == 1 + sum(before > before[row["token_id"]])
    assert (tmp_path / "text" / "next_token.png").read_bytes().startswith(b"\x89PNG")
    assert result.stdout.count("' '") >= 1
