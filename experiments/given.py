"""Which keys were asked for, as opposed to left at their defaults."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf


def given_keys(overrides: Iterable[str], folders: Iterable[Path]) -> frozenset[str]:
    """The dotted keys that overrides set, among them those of the experiments that they choose.

    Where an option of a group was chosen, as by `model=tiny`, or by `override /model: tiny` in an experiment,
    the group's name is given. It stands for all keys below it.

    Args:
        overrides: of the command line, or of a job of a sweep; none of them a sweep.
        folders: where Hydra looks for configs.
    """
    folders = list(folders)
    given = set()
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        given.add(override.key_or_group)
        if override.key_or_group == "experiment":
            value = override.value()
            for name in value if isinstance(value, list) else [value]:
                given.update(_keys_of_experiment(Path("experiment", str(name)), folders))
    return frozenset(given)


def _keys_of_experiment(config: Path, folders: list[Path]) -> Iterator[str]:
    """The groups and keys that an experiment sets, and those that it builds on."""
    found = next((file for folder in folders if (file := folder / f"{config}.yaml").exists()), None)
    content: Any = OmegaConf.to_container(OmegaConf.load(found)) if found else {}  # ~experiment
    for entry in content.pop("defaults", []):
        if not isinstance(entry, str):
            [group] = entry
            yield str(group).split()[-1].lstrip("/")  # of `override /model`
        elif entry != "_self_":
            yield from _keys_of_experiment(config.parent / entry, folders)
    content.pop("hydra", None)
    yield from _leaves(content)


def _leaves(content: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
