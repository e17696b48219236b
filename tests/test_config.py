"""The YAML files against the dataclasses, and bad values by the line they give."""

from dataclasses import asdict
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from llm.config import BenchmarkConfig, EvaluateConfig, GenerateConfig, PretrainConfig, from_dict, validate
from llm.data.corpus import SOURCES
from llm.data.tokenizer import TOKENIZERS
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
    ConfigStore.instance().store(name=f"{name}_schema", node=SCHEMAS[name])
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
    extra = ["data.path=x"] if path.stem == "text" else []
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
        ("sampling.repetition_penalty=0", r"sampling.repetition_penalty=0.0: must be above 0 \("),
        ("runtime.precision=int8", "runtime.precision=int8 is for generation"),
        ("runtime.processes=3", "data.batch_size=.* cannot be divided evenly among runtime.processes=3"),
    ],
)
def test_a_value_that_makes_no_sense_is_one_line(override: str, line: str) -> None:
    with pytest.raises(UserError, match=line) as error:
        validate(composed("pretrain", override))
    assert "\n" not in str(error.value)


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
    assert chosen == set(table)


def test_the_choices_of_a_key_are_the_names_in_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    for group, key, table in (("model", "norm", NORMS), ("optimizer", "name", OPTIMIZERS)):
        config = PretrainConfig()
        setattr(getattr(config, group), key, "mine")
        with pytest.raises(UserError, match=f"{group}.{key}=mine: must be one of {', '.join(table)} "):
            validate(config)
        monkeypatch.setitem(table, "mine", None)
        validate(config)
