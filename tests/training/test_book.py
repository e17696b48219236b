"""The book's chapter 5 code, run on a small model, gave the fixture's figures; ours must be the same."""

import json
from pathlib import Path

import pytest
import torch

from llm.checkpoints.opening import open_weights
from llm.checkpoints.weights import build_model
from llm.commands.pretrain import pretrain
from llm.config import DataConfig, ModelConfig, PretrainConfig, TokenizerConfig
from llm.data.corpus import find_corpus
from llm.files import read_json_lines
from llm.model.gpt import GPTModel

pytestmark = pytest.mark.usefixtures("no_pictures")

FIXTURE = json.loads((Path(__file__).parents[1] / "fixtures" / "book_small.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path, no_pictures: None) -> Path:
    folder = tmp_path_factory.mktemp("book")
    text = folder / "text.txt"
    text.write_text(
        "".join(find_corpus(DataConfig()).pieces())[:20_000], encoding="utf-8"
    )  # the first play, cut off
    model = ModelConfig(**FIXTURE["model"], tie_weights=False, init="torch")
    config = PretrainConfig(model=model, tokenizer=TokenizerConfig("gpt2"))
    config.seed = FIXTURE["seed"]
    config.data = DataConfig(
        source="text",
        path=str(text),
        batch_size=FIXTURE["batch_size"],
        stride=FIXTURE["stride"],
        order="book",
        cache_dir=str(cache_dir),
    )
    config.optimizer.name, config.optimizer.lr = "adamw", FIXTURE["lr"]
    config.optimizer.betas, config.optimizer.decay_all = [0.9, 0.999], True
    config.optimizer.weight_decay = FIXTURE["weight_decay"]
    config.schedule.name, config.schedule.warmup = "constant", 0.0
    config.training.max_epochs, config.training.max_minutes = FIXTURE["epochs"], None
    config.training.eval_freq, config.training.eval_iter = FIXTURE["eval_freq"], FIXTURE["eval_iter"]
    config.training.grad_clip = None
    config.sampling.temperature, config.sampling.top_k = 0.0, None
    config.samples.prompt, config.samples.max_new_tokens = "Every effort moves you", 5
    config.samples.every_epoch = True
    config.runtime.device, config.runtime.precision = "cpu", "fp32"
    config.tracking.mode = "disabled"
    pretrain(config, folder / "run")
    return folder / "run"


def test_initial_parameters_are_the_books() -> None:
    torch.manual_seed(FIXTURE["seed"])
    parameters = dict(
        GPTModel(ModelConfig(**FIXTURE["model"], tie_weights=False, init="torch")).named_parameters()
    )
    for name, expected in FIXTURE["initial_parameter_sums"].items():
        # A processor's instructions decide how torch rounds each number that it draws.
        rounding = 1e-8 * parameters[name].numel()
        assert parameters[name].double().sum().item() == pytest.approx(expected, abs=1e-6 + rounding), name


def test_every_step_and_evaluation_is_the_books(run_dir: Path) -> None:
    lines = read_json_lines(run_dir / "metrics.jsonl")
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    evaluated = [line for line in lines if "val/loss" in line]
    assert evaluated.pop()["step"] == len(losses) - 1  # after the last update, where the book does not
    evaluations = [(line["eval/train_loss"], line["val/loss"]) for line in evaluated]
    tokens = [line["tokens_seen"] for line in evaluated]
    assert losses == pytest.approx(FIXTURE["train_loss_each_step"], abs=2e-5)
    assert [train for train, _ in evaluations] == pytest.approx(
        [train for train, _ in FIXTURE["evaluations_train_val"]], abs=2e-5
    )
    assert [validation for _, validation in evaluations] == pytest.approx(
        [validation for _, validation in FIXTURE["evaluations_train_val"]], abs=2e-5
    )
    assert tokens == FIXTURE["tokens_seen"]


def test_final_weights_are_the_books(run_dir: Path) -> None:
    model = build_model(open_weights(str(run_dir)))
    total = sum(parameter.double().square().sum().item() for parameter in model.parameters())
    assert total == pytest.approx(FIXTURE["final_parameter_sum_of_squares"], rel=1e-7)
