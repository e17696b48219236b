"""Which jobs a grid has: one list from what was typed, zipped and tabled, and from jobs that exist
already."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from llm.errors import UserError
from llm.overrides import split_override

Setting = list[str]  # overrides of a job
Value = Any  # the value of a key, for comparison


@dataclass(frozen=True)
class Plan:
    jobs: list[Setting]  # by number
    varied: list[str]  # keys whose values differ, or that were swept over
    repeated: int  # how many settings were dropped because they equal another job's


@dataclass(frozen=True)
class Old:
    """The jobs of a sweep that is extended. They keep their numbers."""

    jobs: list[Setting]
    varied: list[str]


def plan_jobs(
    overrides: Mapping[str, Override],
    zips: Sequence[Sequence[str]],
    rows: Sequence[Setting],
    old: Old | None,
    value: Callable[[str], Value],
    default: Callable[[int, Setting, str], str | None],
) -> Plan:
    """Plan a grid: each row of a table with each combination of the values of the other keys. The last key
    changes fastest, as in Hydra's own sweeps; a group of zipped keys counts as one key, in the place of its
    first.

    A sweep is extended by combining what was typed with each of its combinations of the other keys. Settings
    with equal values are one job, the first of them, and equal values are spelled alike.

    Args:
        overrides: those of the command line, by key.
        zips: groups of keys whose values go together.
        rows: the settings of a table.
        old: the jobs of the sweep that is extended.
        value: the value of an override; equal for equal values, however they are spelled.
        default: given a job's number, its setting, and a key that the setting lacks: the override for the
            value that the key has in that job.

    Raises:
        UserError: what was typed does not go together.
    """
    _refuse_keys_given_twice(overrides, rows)
    typed = [
        [*row, *chain.from_iterable(combination)]
        for row, *combination in product(rows or [[]], *_columns(overrides, zips, extends=old is not None))
    ]
    kept = old.jobs if old else []
    asked_for = _with_others(typed, kept) if old else typed
    jobs = list(kept)
    keys = list(dict.fromkeys(key_of(each) for job in [*kept, *rows, *asked_for] for each in job))
    spelling: dict[tuple[str, Value], str] = {}
    seen: dict[tuple[Value, ...], None] = {}
    for number, job in enumerate([*kept, *asked_for]):
        own = {key_of(each): each for each in job}
        complete = {key: own.get(key) or default(number, job, key) for key in keys}
        values = {key: None if each is None else value(each) for key, each in complete.items()}
        spelled = {
            key: spelling.setdefault((key, values[key]), each) for key, each in complete.items() if each
        }
        setting = tuple(values.values())
        if number >= len(kept) and setting not in seen:
            jobs.append([spelled[key] for key in own])
        seen.setdefault(setting)
    swept = [key_of(key) for key, each in overrides.items() if each.is_sweep_override()]
    differing = [key for key, *values in zip(keys, *seen, strict=True) if len(set(values)) > 1]
    ordered = dict.fromkeys([*(old.varied if old else []), *keys])
    varied = [key for key in ordered if key in {*(old.varied if old else []), *swept, *differing}]
    return Plan(jobs, varied, len(kept) + len(asked_for) - len(jobs))


def said_of(plan: Plan, old: Old | None) -> str:
    """A line about settings that were dropped, or jobs that are added; empty if there is neither."""
    if old:
        there = f"; asked for and there already: {plan.repeated}" if plan.repeated else ""
        return f"jobs: {len(plan.jobs) - len(old.jobs)} new, {len(old.jobs)} from before{there}\n"
    if plan.repeated:
        return f"jobs: {len(plan.jobs)}; settings that equal others, and are run once: {plan.repeated}\n"
    return ""


def in_order(numbers: Iterable[int], jobs: Sequence[Setting], order: str) -> list[int]:
    """Jobs in the order in which they run: by number (`given`), or every setting with its first seed, then
    with its second, and so on (`seeds_last`), so that a sweep that is cut off tells something about each
    setting."""
    if order == "given":
        return sorted(numbers)
    seeds: Counter[frozenset[str]] = Counter()  # of each setting so far
    turns = []
    for job in jobs:
        setting = frozenset(each for each in job if key_of(each) != "seed")
        turns.append(seeds[setting])
        seeds[setting] += 1
    return sorted(numbers, key=lambda number: (turns[number], number))


def groups_of_keys(zipped: Any) -> list[list[str]]:
    """The groups of keys in `sweep.zip`, which is a list of keys or a list of such lists.

    Raises:
        UserError: it is something else.
    """
    plain: Any = OmegaConf.to_container(zipped) if OmegaConf.is_config(zipped) else zipped
    groups = plain if isinstance(plain, list) and all(isinstance(each, list) for each in plain) else [plain]
    for group in groups if plain is not None else []:
        if not (isinstance(group, list) and all(isinstance(key, str) for key in group)):
            raise UserError(f"sweep.zip={plain}: give keys, as [KEY,KEY], or several lists of keys")
    return [[key.lstrip("+") for key in group] for group in groups if group]


def key_of(override: str) -> str:
    return split_override(override)[0]


def _refuse_keys_given_twice(overrides: Mapping[str, Override], rows: Sequence[Setting]) -> None:
    typed = set(map(key_of, overrides))
    if twice := next((key for row in rows for each in row if (key := key_of(each)) in typed), None):
        raise UserError(f"{twice} is in the table and on the command line: remove one")


def _with_others(typed: Sequence[Setting], jobs: Sequence[Setting]) -> list[Setting]:
    """Typed settings, each with every combination that jobs have of the other keys."""
    keys = {key_of(each) for setting in typed for each in setting}
    others = dict.fromkeys(tuple(each for each in job if key_of(each) not in keys) for job in jobs)
    return [[*other, *setting] for other in others for setting in typed]


def _columns(
    overrides: Mapping[str, Override], zips: Sequence[Sequence[str]], extends: bool
) -> list[list[Setting]]:
    """The settings of each key, or group of keys, which are combined with those of the others."""
    values = {key_of(key): [f"{key}={value}" for value in values_of(each)] for key, each in overrides.items()}
    if extends:  # with values of other keys
        zips = [group for group in zips if any(key in values for key in group)]
    _check_zips(zips, values)
    group_of = {key: group for group in zips for key in group}
    columns = {}  # by the keys
    for key in values:
        group = group_of.get(key, (key,))
        columns[tuple(group)] = [list(each) for each in zip(*(values[each] for each in group), strict=True)]
    return list(columns.values())


def _check_zips(zips: Sequence[Sequence[str]], values: Mapping[str, list[str]]) -> None:
    zipped = list(chain.from_iterable(zips))
    for key in zipped:
        if zipped.count(key) > 1:
            raise UserError(f"sweep.zip names {key} twice")
        if key not in values:
            raise UserError(f"sweep.zip: {key} has no values; given are {', '.join(values) or 'no keys'}")
    for group in zips:
        if len(group) < 2:
            raise UserError(f"sweep.zip: {group[0]} is alone; name the keys whose values go with it")
        if len({len(values[key]) for key in group}) > 1:
            counts = ", ".join(f"{key} has {len(values[key])}" for key in group)
            raise UserError(f"sweep.zip: zipped keys need the same number of values, but {counts}")


def values_of(override: Override) -> list[str]:
    """The values that an override gives to a grid.

    Raises:
        UserError: it gives an interval, whose values cannot be listed.
    """
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    if not override.is_discrete_sweep():
        raise UserError(
            f"{override.input_line}: a grid needs values, as in {override.key_or_group}=1,2; "
            f"hydra/sweeper=optuna searches an interval"
        )
    return list(override.sweep_string_iterator())
