"""Generic operations on configs, which may be any tree of dataclasses: reading them from JSON, comparing
them, and access by dotted keys."""

from collections.abc import Collection
from dataclasses import Field, fields, is_dataclass, replace
from functools import reduce
from types import UnionType
from typing import Any, get_args, get_origin


def own_defaults(schema: type) -> Any:
    """A config with the default of every field, without the defaults that `schema` has for its groups."""
    groups = {item.name: item.type for item in fields(schema) if is_dataclass(item.type)}
    return schema(**{name: own_defaults(group) for name, group in groups.items()})  # type: ignore[arg-type]


def from_dict(schema: type, values: dict[str, Any]) -> Any:
    """The inverse of `dataclasses.asdict`: a `schema` dataclass from nested plain values.

    Raises:
        TypeError, KeyError: a value has the wrong type, or its key is unknown.
    """
    types: dict[str, Any] = {item.name: item.type for item in fields(schema)}
    read = {}
    for name, value in values.items():
        if is_dataclass(types[name]):
            read[name] = from_dict(types[name], value)
        elif type(value) in plain_types(types[name]):
            read[name] = value
        else:
            raise TypeError(f"{name}={value!r} is of the wrong type")
    return schema(**read)


def plain_types(annotation: Any) -> set[type]:
    """The Python types that a JSON value may have for a field of type `int | None`, `list[str]` or the
    like."""
    alternatives = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    found = {get_origin(each) or each for each in alternatives}
    return found | {int} if float in found else found


def with_given(recorded: Any, config: Any, given: Collection[str], prefix: str = "") -> Any:
    """A recorded config, with those values of `config` that were given: keys by their dotted names, and whole
    groups such as `model`."""
    values = {}
    for item in fields(recorded):
        ours, name = getattr(recorded, item.name), prefix + item.name
        if name in given:
            values[item.name] = getattr(config, item.name)
        elif is_dataclass(ours):
            values[item.name] = with_given(ours, getattr(config, item.name), given, f"{name}.")
    return replace(recorded, **values)


def leaf_keys(schema: Any) -> dict[str, Field]:
    """The fields of a schema that hold values, not groups, by their dotted keys."""
    found: dict[str, Field] = {}
    for item in fields(schema):
        if is_dataclass(item.type):
            found |= {f"{item.name}.{key}": below for key, below in leaf_keys(item.type).items()}
        else:
            found[item.name] = item
    return found


def value_of(config: Any, key: str) -> Any:
    """The value of a dotted key; None if there is no such key."""
    if key not in leaf_keys(type(config)):
        return None
    return reduce(getattr, key.split("."), config)


def differences(one: Any, other: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The dotted keys whose values differ between two configs: {key: (in one, in the other)}."""
    found: dict[str, tuple[Any, Any]] = {}
    for item in fields(one):
        ours, theirs = getattr(one, item.name), getattr(other, item.name)
        if is_dataclass(ours):
            found |= differences(ours, theirs, f"{prefix}{item.name}.")
        elif ours != theirs:
            found[prefix + item.name] = (ours, theirs)
    return found
