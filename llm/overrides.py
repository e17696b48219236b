"""Overrides of the command line as text: `key=value`, in Hydra's grammar."""

import re
import shlex
from decimal import Decimal, InvalidOperation
from functools import cache

from llm.config import GenerateConfig, PretrainConfig
from llm.config_values import leaf_keys

PLAIN = re.compile(r"[A-Za-z_./][\w./-]*( +[\w./-]+)*", re.ASCII)  # needs no quotes


def split_override(override: str) -> tuple[str, str]:
    """`+optimizer.lr=1` as its key and value."""
    key, _, value = override.partition("=")
    return key.lstrip("+"), value


def as_override(key: str, value: object) -> str:
    """An override that sets a key to a text or a path, quoted if Hydra would misread it."""
    text = str(value)
    return f"{key}={text if PLAIN.fullmatch(text) else quoted(text)}"


def quoted(text: str) -> str:
    """A text as a string of Hydra's grammar, in which a backslash is special only before a quote and at the
    end."""
    escaped = re.sub(r"(\\*)('|$)", lambda match: 2 * match[1] + (match[2] and "\\'"), text)
    return f"'{escaped}'".replace("${", r"\${")


def unquoted(value: str) -> str:
    """The text that a quoted string of Hydra's grammar stands for; anything else as it is."""
    found = re.fullmatch(r"'(.*)'|\"(.*)\"", value, re.DOTALL)
    return value if found is None else (found[1] or found[2] or "").replace("\\'", "'")


def unquoted_where_plain(override: str) -> str:
    """An override without Hydra's quotes, if they make no difference."""
    key, _, value = override.partition("=")
    return f"{key}={text}" if PLAIN.fullmatch(text := unquoted(value)) else override


def as_argument(key: str, value: object) -> str:
    """`as_override`, quoted for a shell."""
    return shlex.quote(as_override(key, value))


def as_command(script: str, *arguments: str) -> str:
    """A shell command that runs `experiments/SCRIPT.py`."""
    return shlex.join(["python", f"experiments/{script}.py", *arguments])


def title_of(setting: dict[str, str]) -> str:
    """A short title for a setting: `lr=4e-4 seed=1`."""
    return " ".join(f"{short_key(key)}={compact(value)}" for key, value in setting.items())


def short_key(key: str) -> str:
    """`lr` for `optimizer.lr`; the whole key if several groups have one of that name, as `optimizer.name`."""
    last = key.rpartition(".")[2]
    return key if last in _names_of_several_groups() else last


@cache
def _names_of_several_groups() -> set[str]:
    schemas = (
        [key.rpartition(".")[2] for key in leaf_keys(each)] for each in (PretrainConfig, GenerateConfig)
    )
    return {name for names in schemas for name in names if names.count(name) > 1}


def compact(value: str) -> str:
    """A small number as `4e-4`; anything else as it is."""
    try:
        number = Decimal(value)
    except InvalidOperation:
        return value
    if not number.is_finite() or not 0 < abs(number) < 0.001:
        return value
    return min(value, f"{number.normalize():e}", key=len)
