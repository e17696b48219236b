"""Differences between Hydra 1.3 and Hydra 1.4 with OmegaConf 2.4."""

from inspect import signature
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, ListConfig, OmegaConf

OUR_LOGGING = ["llm.progress.LineFormatter"]  # the class that conf/ names for Python's logging


def main_options() -> dict[str, Any]:
    """Arguments of `hydra.main`: 1.4 takes a list of classes that logging may use, 1.3 a version to behave
    like."""
    if "execution_whitelist" in signature(hydra.main).parameters:
        return {"execution_whitelist": OUR_LOGGING}
    return {"version_base": "1.3"}


def store(name: str, node: Any, group: str | None = None) -> None:
    """Store a config under a name that may be taken, which 1.4 has to be told."""
    is_told = "replace" in signature(ConfigStore.store).parameters
    replacing: dict[str, Any] = {"replace": True} if is_told else {}
    ConfigStore.instance().store(name=name, node=node, group=group, **replacing)


def as_yaml(config: DictConfig | ListConfig) -> str:
    """A config as YAML. Empty if OmegaConf 2.4 cannot write it, as it is not Unicode; such a value is refused
    later, when the config is checked."""
    try:
        return OmegaConf.to_yaml(config)
    except UnicodeEncodeError:
        return ""
