"""One of each kind of thing that can be added, added at run time: a function or class, its line in a table
and a YAML file are all that it takes to train, resume, sweep, report, sample, and export or refuse."""

import csv
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch
import torch.nn.functional as F
import transformers
from conftest import TINY, Script, numbers
from scripts import ROOT
from torch import Tensor, nn

from llm.config import DataConfig, ModelConfig, OptimizerConfig, ScheduleConfig
from llm.data.corpus import SOURCES, Corpus
from llm.data.tokenizer import END_OF_TEXT, TOKENIZERS
from llm.generation.decoding import Decoding
from llm.model import parts
from llm.model.gpt import GPTModel, training_flops_per_token
from llm.model.parts import ACTIVATIONS, NORMS, POSITIONS, Activation, Position
from llm.runtime import Runtime
from llm.training.evaluation import METRICS, Metric
from llm.training.optimizers import OPTIMIZERS, OptimizerEntry
from llm.training.schedules import SCHEDULES

pytestmark = pytest.mark.usefixtures("no_pictures")


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, with a count of its steps that is a number of Python's."""

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                kept = self.state[parameter]
                average = kept.setdefault("average", torch.zeros_like(parameter))
                kept["calls"] = kept.get("calls", 0) + 1
                parameter.sub_(group["lr"] / kept["calls"] * average.lerp(parameter.grad, 0.1).sign())
                average.lerp_(parameter.grad, 0.01)


def lion(model: nn.Module, config: OptimizerConfig, runtime: Runtime) -> list[torch.optim.Optimizer]:
    return [Lion(list(model.parameters()), config.lr)]


def linear(progress: float, config: ScheduleConfig) -> float:
    return 1 - progress


def letters() -> tiktoken.Encoding:
    """Bytes, and tokens for the commonest pairs of letters."""
    pairs = {pair.encode(): 256 + number for number, pair in enumerate(("th", "he", "bo", "tt", "le"))}
    ranks = {**{bytes([byte]): byte for byte in range(256)}, **pairs}
    return tiktoken.Encoding(
        "letters", pat_str=r"\S+|\s", mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 261}
    )


class Turned(nn.Module):
    """Rotary codes of a small base. Its frequencies are a buffer that checkpoints do not hold."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        half = config.emb_dim // config.n_heads // 2
        frequencies = 100.0 ** (-torch.arange(half) / half)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        return positions[..., None] * self.get_buffer("frequencies")


class ReGLU(nn.Module):
    """Shazeer 2020."""

    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return F.relu(gate) * value


def is_likeliest(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.argmax(dim=-1) == targets


def example(language: str) -> str:
    """A block of code in CONTRIBUTING.md's section on adding things."""
    section = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("## Adding things")[2]
    found = re.search(rf"```{language}\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)
    assert found
    return found[1]


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """One of each kind in its table, and the YAML files of a folder that Hydra searches too."""
    (tmp_path / "counted.txt").write_text("".join(f"{number} the bottle\n" for number in range(300)))

    def counting(config: DataConfig) -> Corpus:
        return Corpus([tmp_path / "counted.txt"])

    added: dict[str, Any] = {}
    exec(example("python"), {**vars(parts), "NORMS": added})
    for table, name, entry in (
        (NORMS, "scalenorm", added["scalenorm"]),
        (OPTIMIZERS, "lion", OptimizerEntry(lion)),
        (SCHEDULES, "linear", linear),
        (SOURCES, "counting", counting),
        (TOKENIZERS, "letters", letters),
        (POSITIONS, "turned", Position(rotation=Turned)),
        (ACTIVATIONS, "reglu", Activation(ReGLU, inputs=2)),
        (
            METRICS,
            "accuracy",
            Metric(lambda sums: sums.scores["accuracy"] / sums.tokens, "accuracy", "{:.1%}", is_likeliest),
        ),
    ):
        monkeypatch.setitem(table, name, entry)
    files = {
        "model/tiny_scalenorm": example("yaml").replace("small", "tiny"),
        "model/modern": "defaults: [tiny]\nnorm: scalenorm\nposition: turned\nactivation: reglu\n",
        "optimizer/lion": "name: lion\nlr: 0.003\n",
        "schedule/linear": "name: linear\nwarmup: 0.0\n",
        "data/counting": "source: counting\n",
        "tokenizer/letters": "# @package _global_\ntokenizer:\n  name: letters\nmodel:\n  vocab_size: 262\n",
    }
    for name, content in files.items():
        path = tmp_path / "conf" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return f"--config-dir={tmp_path / 'conf'}"


def ran(script: Script) -> Callable[..., str]:
    """Run a script that has to succeed; what it printed."""

    def run(name: str, *arguments: str) -> str:
        result = script(name, *arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


COMMON = (
    *(setting for setting in TINY if not setting.startswith(("model=", "tokenizer="))),
    "data=counting",
    "tokenizer=letters",
    "optimizer=lion",
    "schedule=linear",
    "training.max_steps=12",
    "checkpoint.every_steps=6",
)


def test_one_of_each_trains_resumes_samples_and_refuses_to_export(
    conf: str, script: Script, tmp_path: Path
) -> None:
    run = ran(script)
    printed = run("pretrain", conf, "model=modern", *COMMON, "hydra.run.dir=run")
    assert "validation accuracy" in printed
    whole = numbers(tmp_path / "run")
    losses = [line["train/loss"] for line in whole if "train/loss" in line]
    assert losses[0] - losses[-1] > 0.2  # it learns
    assert [line["lr"] for line in whole if "lr" in line] == pytest.approx(
        [0.003 * (1 - step / 12) for step in range(12)]
    )
    assert all(0 <= line["val/accuracy"] <= 1 for line in whole if "val/loss" in line)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["val_accuracy"] > 0

    run("pretrain", conf, "resume=run/checkpoints/step-00000006")
    assert numbers(tmp_path / "run") == whole
    evaluated = run("evaluate", conf, "checkpoint=run", "hydra.run.dir=evaluated")
    [percent] = re.findall(r"\naccuracy +([0-9.]+)%", evaluated)
    assert float(percent) == pytest.approx(100 * summary["val_accuracy"], abs=3)  # bf16 rounds otherwise here
    run("pretrain", conf, *COMMON, "init_from=run", "training.max_steps=2", "hydra.run.dir=tuned")
    assert (
        json.loads((tmp_path / "tuned" / "summary.json").read_text())["parameters"] == summary["parameters"]
    )
    assert "9 the" in run("generate", conf, "checkpoint=run", "prompt=9 the", "max_new_tokens=90")

    for form, said in (
        ("huggingface", ": no model that can be written for transformers has model.norm=scalenorm, "),
        (
            "book",
            " can describe only GPT-2, and this model has model.norm=scalenorm: it cannot be exported so\n",
        ),
    ):
        refused = script("export", conf, "checkpoint=run", f"format={form}", "to=exported")
        assert refused.returncode == 1
        assert refused.stderr.startswith(f"error: format={form}{said}")
        assert refused.stderr.count("\n") == 1
        assert not (tmp_path / "exported").exists()


def test_one_of_each_sweeps_and_reports(conf: str, script: Script, tmp_path: Path) -> None:
    run = ran(script)
    grid = ("model=tiny,modern", "optimizer=lion,adamw", "model.n_layers=1", "training.max_steps=4")
    printed = run("pretrain", conf, "-m", *COMMON, *grid, "hydra.sweep.dir=sweep")
    assert "accuracy" in printed
    with (tmp_path / "sweep" / "report.csv").open() as file:
        jobs = list(csv.DictReader(file))
    assert {(job["model"], job["optimizer"]) for job in jobs} == {
        ("tiny", "lion"),
        ("tiny", "adamw"),
        ("modern", "lion"),
        ("modern", "adamw"),
    }
    assert {job["state"] for job in jobs} == {"finished"}
    assert all(0 <= float(job["val_accuracy"]) <= 1 for job in jobs)
    assert "accuracy" in (tmp_path / "sweep" / "report.html").read_text("utf-8")


def test_what_the_formats_can_describe_is_exported(conf: str, script: Script, tmp_path: Path) -> None:
    run = ran(script)
    run("pretrain", conf, "model=tiny", *COMMON, "training.max_steps=2", "hydra.run.dir=run")
    run("export", conf, "checkpoint=run", "to=theirs")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    text = "the bottle\n9 the bottle"
    assert tokenizer(text)["input_ids"] == letters().encode(text)
    assert theirs.config.vocab_size == 262


def test_the_example_of_contributing_trains(conf: str, script: Script, tmp_path: Path) -> None:
    run = ran(script)
    run("pretrain", conf, "model=tiny_scalenorm", *COMMON, "training.max_steps=2", "hydra.run.dir=run")
    config = json.loads((tmp_path / "run" / "checkpoints" / "last" / "config.json").read_text())
    assert (config["model"]["norm"], config["model"]["emb_dim"]) == ("scalenorm", 64)


def test_parts_that_were_added_count_and_decode_as_any(conf: str) -> None:
    config = ModelConfig(40, 12, 16, 2, 2, norm="scalenorm", position="turned", activation="reglu")
    torch.manual_seed(0)
    model = GPTModel(config).eval()
    plain = replace(config, norm="layernorm", position="learned", activation="gelu")
    # A gated activation has three matrices, two thirds as wide (42⅔) up to a multiple of 16, in place of two.
    more = 2 * (3 * 16 * 48 - 2 * 16 * 64)
    assert training_flops_per_token(model) - training_flops_per_token(GPTModel(plain)) == 6 * more
    prompt = [3, 1, 4, 1, 5]
    decoding = Decoding(model, [prompt], max_new_tokens=15, context_size=12)
    for token in range(15):  # past the context too
        with torch.no_grad():
            expected = model(torch.tensor([decoding.token_ids[0][-12:]]))[0, -1]
        torch.testing.assert_close(decoding.logits()[0], expected, atol=1e-5, rtol=1e-5)
        decoding.append([token])
