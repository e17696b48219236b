"""Suggestions for a mistyped key or choice: the existing ones that are spelled most alike."""

from collections.abc import Collection
from dataclasses import fields, is_dataclass
from difflib import SequenceMatcher
from typing import Any

from hydra.conf import HydraConf
from sweeping.recorded import NUMBERS, SWEEP_KEYS, config_groups

from llm.config_values import leaf_keys

ALIKE = 0.65  # least similarity of a suggestion, as measured by difflib
AS_GOOD = 0.1  # by how much the others may be less similar than the best
SHOWN = 4
GROUPS = ("hydra/launcher", "hydra/sweeper")


def did_you_mean(key: str, schema: Any) -> str:
    """The end of an error message about an unknown key; empty if no key is similar."""
    nodes = {item.name for item in fields(schema) if is_dataclass(item.type)}
    takes = {each for each in config_groups() if each.partition("/")[0] in {*nodes, "experiment"}}
    ours = [*leaf_keys(schema), *sorted(nodes | takes), *SWEEP_KEYS]
    hydras = [f"hydra.{each}" for each in leaf_keys(HydraConf) if f"hydra/{each}" not in GROUPS]
    hydras += [*NUMBERS, *GROUPS]
    key = key.lower()
    lacking = _lacking_a_group(key, ours) or _lacking_a_group(key, hydras)
    return _question(lacking or _alike_keys(key, ours) or _alike_keys(key, hydras))


def choice_meant(name: str, options: Collection[str]) -> str:
    """The end of an error message about an unknown option of a group."""
    return _question(_most_alike({each: _likeness(name, each) for each in options}))


def _question(names: list[str]) -> str:
    if not names:
        return ""
    *others, last = names[:SHOWN]
    return f"; did you mean {', '.join(others)}{' or ' if others else ''}{last}?"


def _lacking_a_group(key: str, known: list[str]) -> list[str]:
    """`optimizer.lr` of `lr`."""
    return [each for each in known if each.endswith((f".{key}", f"/{key}"))]


def _alike_keys(key: str, known: list[str]) -> list[str]:
    """`optimizer.lr` of `optimzer.lrr`, or else of `model.lr`: a key that another group has."""
    group, _, name = key.rpartition(".")
    parts = {each: each.rpartition(".") for each in known}
    likeness = {}
    for each, (theirs, _, last) in parts.items():
        likeness[each] = min(_likeness(name, last), _likeness(group, theirs) if group else 1)
    return _most_alike(likeness) or [each for each, (_, _, last) in parts.items() if last == name]


def _most_alike(likeness: dict[str, float]) -> list[str]:
    least = max(ALIKE, max(likeness.values(), default=0) - AS_GOOD)
    return sorted((each for each in likeness if likeness[each] >= least), key=lambda each: -likeness[each])


def _likeness(one: str, other: str) -> float:
    """Similarity from 0 to 1. A word of a name, such as `steps` of `max_steps`, or its start, such as `temp`,
    counts as similar."""
    whole = SequenceMatcher(None, one, other).ratio()
    is_part = one in other.split("_") or (len(one) > 2 and other.startswith(one))
    return max(whole, 0.9) if is_part else whole
