"""Errors as one line, above all Hydra's."""

import errno
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig
from suggestions import choice_meant, did_you_mean
from sweeping.recorded import CONF

from llm.config import AUTO
from llm.config_values import leaf_keys
from llm.errors import UserError

UNKNOWN = re.compile(r"Could not (?:override|delete from config\.) '([\w./]+)'")
BARE = re.compile(r"Error parsing override '(.*)'\nmissing EQUAL at '<EOF>'")
NO_CHOICE = re.compile(r"Could not (?:find|load) '(\w[\w/]*)/([^/']+)'")
MISTYPED = re.compile(
    r"(?:Value '(?P<value>.*)' (?:of type|is not a valid).*\b(?P<kind>Integer|Float|bool|Union\[int, str\])"
    r"|field '\w+' is not Optional).*\n\s*full_key: (?P<key>\S+)"
)
KINDS = {
    "Integer": "a whole number",
    "Float": "a number",
    "bool": "true or false",
    "Union[int, str]": f"a whole number or {AUTO}",
    None: "a value, not null",
}
NOT_A_VALUE = re.compile(r"Error merging override (\w+)=.* Invalid type assigned: \w+ is not a subclass of")
# Errors of a disk that is full, read-only, broken or gone.
OF_DISKS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
OF_GRIDS = {  # settings of a grid that other sweepers do not have, and why
    "zip": "a search tries values by itself",
    "table": "a search tries values by itself",
    "order": "what another sweeper runs next depends on what came of its jobs",
    "extend": "a search or a race takes sweep.resume with more hydra.sweeper.n_trials or max_seeds",
}
NOISE = ("full_key:", "object_type=", "reference_type=")  # starts of OmegaConf's lines that help nobody


def is_users(error: Exception) -> bool:
    """Whether a user can fix an error. An OSError without a file is a bug, unless the disk has failed; except
    that some of Hydra's own errors are OSErrors too."""
    if isinstance(error, OSError) and not isinstance(error, HydraException):
        return bool(error.filename) or error.errno in OF_DISKS
    return True


def one_line(error: BaseException, schema: type | None = None) -> str:
    """An error as one line that names the key and what was expected.

    Args:
        schema: that of the config, to suggest existing keys in place of an unknown one.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in OF_DISKS:
        return f"cannot write ({error.strerror}): free some room, or write elsewhere (hydra.run.dir=FOLDER)"
    if schema and (bare := BARE.search(str(error))):
        return f"{bare[1]}: give KEY=VALUE{did_you_mean(bare[1], schema)}"
    if schema and (unknown := UNKNOWN.match(str(error))):
        return no_such_key(unknown[1], schema)
    if empty := re.match(
        r"While dereferencing interpolation '\$\{([\w.]+)\}': Incompatible value 'None'", str(error)
    ):
        return f"{empty[1]} is null, and other keys have its value: set it"
    if missing := re.search(r"Could not find 'hydra/launcher/(joblib|submitit)", str(error)):
        extra = missing[1]
        return f"hydra/launcher={extra} needs a plugin: pip install -c constraints.txt -e '.[{extra}]'"
    if (absent := NO_CHOICE.search(str(error))) and (options := _options(absent[1])):
        group, name = absent.groups()
        return (
            f"{group}={name}: there is no such choice; {group} has {', '.join(options)}"
            f"{choice_meant(name, options)}"
        )
    if mistyped := MISTYPED.search("\n".join(_messages(error))):
        value, kind, key = mistyped.group("value", "kind", "key")
        item = leaf_keys(schema).get(key) if schema else None
        meaning = f" ({item.metadata['meaning']})" if item else ""
        return f"{key}={value or 'null'}: must be {KINDS[kind]}{meaning}"
    line = " ".join(dict.fromkeys(_lines(error)))
    if schema and (group := NOT_A_VALUE.match(line)):
        keys = [key for key in leaf_keys(schema) if key.startswith(f"{group[1]}.")]
        return f"{group[1]} has keys of its own: set {', '.join(keys)}"
    return line


def _lines(error: BaseException) -> list[str]:
    """The lines of an error and its causes, without Hydra's search path."""
    lines = [
        line.strip()
        for message in _messages(error)
        for line in message.partition("Config search path:")[0].splitlines()
    ]
    return [line for line in lines if line not in ("", "None") and not line.startswith(NOISE)]


def _messages(error: BaseException | None) -> Iterator[str]:
    while error is not None:
        yield str(error)
        error = error.__cause__


def _options(group: str) -> list[str]:
    """The choices of a group in conf/; none for a group of Hydra's own."""
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def refuse_unknown_keys(config: Any, schema: Any) -> None:
    """Refuse keys that the schema does not have, which Hydra lets `+new.key=1` add.

    Raises:
        UserError: names the first such key.
    """
    if unknown := next(_unknown_keys(config, schema), None):
        raise UserError(no_such_key(unknown, schema))


def _unknown_keys(config: Any, schema: Any, prefix: str = "") -> Iterator[str]:
    known: dict[str, Any] = {item.name: item.type for item in fields(schema)}
    for name in map(str, config):
        if name not in known:
            below: Any = config._get_node(name)
            while isinstance(below, DictConfig) and below:
                first: Any = next(iter(below))
                name, below = f"{name}.{first}", below._get_node(first)
            yield f"{prefix}{name}"
        elif is_dataclass(known[name]):
            yield from _unknown_keys(config[name], known[name], f"{prefix}{name}.")


def no_such_key(key: str, schema: Any) -> str:
    """An error message about an unknown key, with the key that was probably meant, or those of its group."""
    if (sweeper := key.removeprefix("hydra.sweeper.")) in OF_GRIDS:
        return f"sweep.{sweeper} is for a grid ({OF_GRIDS[sweeper]}): remove it, or hydra/sweeper=NAME"
    if key in ("hydra.launcher.n_jobs", "hydra.launcher.jobs_per_device"):
        return f"{key}: this launcher has no such key; choose hydra/launcher=joblib"
    meant = did_you_mean(key, schema)
    if key.startswith("hydra."):
        return f"{key}: there is no such key; --cfg hydra shows Hydra's own; +{key}=VALUE adds one{meant}"
    group = ""
    for name in key.split("."):
        types: dict[str, Any] = {item.name: item.type for item in fields(schema)}
        if not is_dataclass(types.get(name)):
            break
        group, schema = f"{group}.{name}".lstrip("."), types[name]
    else:
        return f"{key}: this script has no choices of it; set its keys one by one, as {key}.KEY=VALUE"
    there_are = f"; {group or 'the config'} has {', '.join(types)}"
    return f"{key}: there is no such key{there_are if group or not meant else ''}{meant}"
