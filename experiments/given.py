"""Which keys the user set, as opposed to those left at their defaults."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

PACKAGE = re.compile(r"\s*# @package (\S+)")  # where Hydra puts the keys of a file


def given_keys(overrides: Iterable[str], folders: Iterable[Path], values: bool = False) -> frozenset[str]:
    """The dotted keys that overrides set, including those of the experiments that they choose.

    If an option of a group was chosen, by `model=tiny` or by `override /model: tiny` in an experiment, the
    group's name is returned, and stands for all keys below it. For an option that sets keys of another group,
    as `model/part=rotary` does, these keys are returned.

    Args:
        overrides: those of the command line or of a job of a sweep, with single values.
        folders: where Hydra looks for configs.
        values: return the keys that an option sets, in place of the group's name.
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
            given.update(_keys_of_choice(key, value, folders, values))
    return frozenset(given)


def _keys_of_experiment(config: Path, folders: list[Path], values: bool) -> Iterator[str]:
    """The groups and keys that an experiment sets, and the experiments that it builds on."""
    content = _content(_find(config, folders))  # empty for ~experiment
    for entry in content.pop("defaults", []):
        if not isinstance(entry, str):
            [(group, option)] = entry.items()
            name = str(group).split()[-1].lstrip("/")  # of `override /model`
            yield from _keys_of_choice(name, option, folders, values)
        elif entry != "_self_":
            yield from _keys_of_experiment(config.parent / entry, folders, values)
    yield from _leaves(content)


def _keys_of_choice(group: str, option: object, folders: list[Path], values: bool) -> Iterator[str]:
    """The group, or the keys that its option sets; for a key that is no group, the key itself."""
    if not any((folder / group).is_dir() for folder in folders):
        yield group
        return
    for name in option if isinstance(option, list) else [option]:
        file = _find(Path(group, str(name)), folders)
        package = PACKAGE.match(file.read_text("utf-8")) if file else None
        if not values and (package is None or package[1] == "_global_"):
            yield group
            continue
        content = _content(file)
        for entry in content.pop("defaults", []):
            if isinstance(entry, str) and entry != "_self_":  # an option that it builds on
                yield from _keys_of_choice(group, entry, folders, values)
        place = package[1] if package else group
        yield from _leaves(content, "" if place == "_global_" else f"{place}.")


def _find(config: Path, folders: list[Path]) -> Path | None:
    """The first file of this name in the folders."""
    return next((file for folder in folders if (file := folder / f"{config}.yaml").exists()), None)


def _content(file: Path | None) -> dict[str, Any]:
    """The content of a config file, without Hydra's own settings; empty if there is no file."""
    content: Any = OmegaConf.to_container(OmegaConf.load(file)) if file else {}
    content.pop("hydra", None)
    return content


def _leaves(content: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
