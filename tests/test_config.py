"""The YAML files against the dataclasses, and bad values by the line they give."""

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
from conftest import TINY, Script
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from llm.config import BenchmarkConfig, EvaluateConfig, GenerateConfig, PretrainConfig
from llm.config_rules import validate
from llm.config_values import from_dict, own_defaults
from llm.data.corpus import SOURCES
from llm.data.tokenizer import LEARNT, TOKENIZERS
from llm.errors import UserError
from llm.model.parts import NORMS
from llm.training.optimizers import OPTIMIZERS
from llm.training.schedules import SCHEDULES

CONF = Path(__file__).parents[1] / "conf"
SCHEMAS = {
    "pretrain": PretrainConfig,
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
    "benchmark": BenchmarkConfig,
}


def composed(name: str, *overrides: str) -> PretrainConfig:
    ConfigStore.instance().store(name=f"{name}_schema", node=own_defaults(SCHEMAS[name]))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_object(compose(name, list(overrides)))
    assert isinstance(config, SCHEMAS[name])
    return config  # type: ignore[return-value]


@pytest.mark.parametrize("name", SCHEMAS)
def test_python_and_yaml_have_the_same_defaults(name: str) -> None:
    assert asdict(composed(name)) == asdict(SCHEMAS[name]())


@pytest.mark.parametrize(
    "path", sorted(CONF.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}={path.stem}"
)
def test_every_choice_composes_and_is_valid(path: Path) -> None:
    extra = ["data.path=x"] if path.stem in ("text", "shards", "huggingface") else []
    script = "generate" if path.stem == "sweep_sampling" else "pretrain"
    config = composed(script, f"{path.parent.name}={path.stem}", *extra)
    validate(config)
    assert from_dict(type(config), asdict(config)) == config


def test_an_experiment_for_another_script_is_refused() -> None:
    with pytest.raises(ConfigCompositionException, match="Key 'study' not in 'PretrainConfig'"):
        composed("pretrain", "experiment=sweep_sampling")


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("gpt124m", (768, 12, 12)),
        ("gpt355m", (1024, 24, 16)),
        ("gpt774m", (1280, 36, 20)),
        ("gpt1558m", (1600, 48, 25)),
    ],
)
def test_gpt2_sizes_are_the_papers(name: str, sizes: tuple[int, int, int]) -> None:
    model = composed("pretrain", f"model={name}").model
    assert (model.emb_dim, model.n_layers, model.n_heads) == sizes  # Radford et al. 2019, table 2
    assert (model.vocab_size, model.context_length, model.drop_rate) == (50257, 256, 0.1)
    assert not model.qkv_bias


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.n_heads=7", "model.emb_dim=.* cannot be divided evenly among model.n_heads=7 heads"),
        ("data.train_ratio=1.5", r"data.train_ratio=1.5: must be above 0 and below 1 \("),
        ("data.train_ratio=nan", r"data.train_ratio=nan: must be above 0 and below 1 \("),
        ("sampling.temperature=-1", r"sampling.temperature=-1.0: must be at least 0 \("),
        ("sampling.top_k=0", r"sampling.top_k=0: must be at least 1 \("),
        ("sampling.top_p=1.1", r"sampling.top_p=1.1: must be at least 0 and at most 1 \("),
        ("optimizer.name=sgd", r"optimizer.name=sgd: must be one of adamw, muon \("),
        ("optimizer.betas=[0.9]", r"optimizer.betas=\[0.9\]: two numbers are needed"),
        ("optimizer.betas=[0.9,1.0]", r"optimizer.betas=1.0: must be at least 0 and below 1"),
        ("training.max_minutes=null", "max_epochs, max_steps and max_minutes are all null"),
        ("data=text", r"data.path is not set: data=text needs data.path="),
        ("sampling.repetition_penalty=0", r"sampling.repetition_penalty=0.0: must be at least 0.001 and at"),
        ("optimizer.lr=1e308", r"optimizer.lr=1e\+308: must be at most 1e\+30 and above 0 \("),
        (
            "seed=1000000000000000000000",
            r"seed=1000000000000000000000: must be at most 9.22337e\+18 and at le",
        ),
        ("runtime.precision=int8", "runtime.precision=int8 is for generation"),
    ],
)
def test_a_value_that_makes_no_sense_is_one_line(override: str, line: str) -> None:
    with pytest.raises(UserError, match=line) as error:
        validate(composed("pretrain", override))
    assert "\n" not in str(error.value)


def numeric_keys(config: Any) -> Iterator[tuple[Any, str, bool]]:
    """Each number of a config: where it stands, its name, and whether it is one of a list."""
    for item in fields(config):
        if is_dataclass(value := getattr(config, item.name)):
            yield from numeric_keys(value)
        elif {int, float} & {item.type, *get_args(item.type)}:
            yield config, item.name, isinstance(value, list)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, 10**30, True, "1"])
@pytest.mark.parametrize("schema", SCHEMAS.values())
def test_no_number_may_be_anything_else(schema: type, value: Any) -> None:
    config = schema()
    found = list(numeric_keys(config))
    assert len(found) > 4
    for place, name, in_list in found:
        before = getattr(place, name)
        setattr(place, name, [value, 0.5] if in_list else value)
        with pytest.raises(UserError, match=f"{name}=.*must be") as error:
            validate(config)
        assert "\n" not in str(error.value)
        setattr(place, name, before)
    validate(config)


def test_a_number_that_is_none_is_one_line_before_anything_is_named_after_it(
    script: Script, tmp_path: Path
) -> None:
    for arguments in (["optimizer.lr=nan"], ["training.max_minutes=inf"], ["-m", "optimizer.lr=nan,-1"]):
        result = script("pretrain", *arguments, "hydra.run.dir=run", "hydra.sweep.dir=sweep")
        assert result.returncode == 1
        for line in result.stderr.splitlines():
            assert "must be" in line, result.stderr


@pytest.mark.parametrize(
    ("prompt", "line"),
    [
        ("''", "samples.prompt is empty: give a value, or null"),
        ("<|endoftext|>", "samples.prompt contains token id 256, but the model knows 256 tokens"),
        ("\udcff", r"samples.prompt='\\udcff': must be UTF-8 text"),  # a byte that is not UTF-8
    ],
)
def test_a_prompt_that_cannot_be_used_is_found_before_the_budget_is_spent(
    script: Script, tmp_path: Path, text: str, prompt: str, line: str
) -> None:
    arguments = [
        *TINY,
        "data=text",
        text,
        "model.vocab_size=256",
        "training.max_steps=2",
        "hydra.run.dir=run",
    ]
    result = script("pretrain", *arguments, f"samples.prompt={prompt}")
    assert result.returncode == 1
    assert re.fullmatch(f"error: {line}.*\n", result.stderr), result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", ["model.n_layers=10000", "model.emb_dim=1000000"])
def test_a_model_that_no_memory_holds_is_refused_before_it_is_made(
    script: Script, text: str, size: str
) -> None:
    sizes = ["model=gpt1558m", "model.n_heads=1", size, "training.max_steps=2"]
    result = script("pretrain", *TINY, "data=text", text, *sizes)
    assert result.returncode == 1
    assert re.fullmatch(r"error: out of memory: .* parameters take about .*\n", result.stderr), result.stderr


@pytest.mark.parametrize(
    ("group", "key", "table"),
    [
        ("optimizer", "name", OPTIMIZERS),
        ("schedule", "name", SCHEDULES),
        ("data", "source", SOURCES),
        ("tokenizer", "name", TOKENIZERS),
    ],
)
def test_each_entry_of_a_table_has_its_choice(group: str, key: str, table: dict[str, object]) -> None:
    options = [path.stem for path in (CONF / group).glob("*.yaml")]
    chosen = {getattr(getattr(composed("pretrain", f"{group}={each}"), group), key) for each in options}
    assert chosen == {*table, *([LEARNT] if table is TOKENIZERS else [])}


def test_the_choices_of_a_key_are_the_names_in_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    for group, key, table in (("model", "norm", NORMS), ("optimizer", "name", OPTIMIZERS)):
        config = PretrainConfig()
        setattr(getattr(config, group), key, "mine")
        with pytest.raises(UserError, match=f"{group}.{key}=mine: must be one of {', '.join(table)} "):
            validate(config)
        monkeypatch.setitem(table, "mine", None)
        validate(config)
