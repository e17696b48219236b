"""Which keys were asked for, as opposed to left at their defaults."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf


def given_keys(overrides: Iterable[str], folders: Iterable[Path], values: bool = False) -> frozenset[str]:
    """The dotted keys that overrides set, among them those of the experiments that they choose.

    Where an option of a group was chosen, as by `model=tiny`, or by `override /model: tiny` in an experiment,
    the group's name is given. It stands for all keys below it.

    Args:
        overrides: of the command line, or of a job of a sweep; none of them a sweep.
        folders: where Hydra looks for configs.
        values: in place of a group's name, give the keys that the option sets.
    """
    folders = list(folders)
    given: set[str] = set()
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key, value = override.key_or_group, override.value()
        if key == "experiment":
            given.add(key)
            for name in value if isinstance(value, list) else [value]:
                given.update(_keys_of_experiment(Path(key, str(name)), folders, values))
        else:
            given.update(_keys_of_choice(key, value, folders) if values else [key])
    return frozenset(given)


def _keys_of_experiment(config: Path, folders: list[Path], values: bool) -> Iterator[str]:
    """The groups and keys that an experiment sets, and those that it builds on."""
    content = _content(config, folders)  # none of ~experiment
    for entry in content.pop("defaults", []):
        if not isinstance(entry, str):
            [(group, option)] = entry.items()
            name = str(group).split()[-1].lstrip("/")  # of `override /model`
            yield from _keys_of_choice(name, option, folders) if values else [name]
        elif entry != "_self_":
            yield from _keys_of_experiment(config.parent / entry, folders, values)
    yield from _leaves(content)


def _keys_of_choice(group: str, option: object, folders: list[Path]) -> Iterator[str]:
    """The keys that an option of a group sets; of a key that is no group, the key itself."""
    if not any((folder / group).is_dir() for folder in folders):
        yield group
        return
    content = _content(Path(group, str(option)), folders)
    content.pop("defaults", None)
    yield from _leaves(content, f"{group}.")


def _content(config: Path, folders: list[Path]) -> dict[str, Any]:
    """What the first file of this name in the folders says, without Hydra's own settings."""
    found = next((file for folder in folders if (file := folder / f"{config}.yaml").exists()), None)
    content: Any = OmegaConf.to_container(OmegaConf.load(found)) if found else {}
    content.pop("hydra", None)
    return content


def _leaves(content: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
