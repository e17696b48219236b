"""The command line as Hydra is to read it: folders to resume are found, and texts and paths are quoted."""

import ast
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Sweep
from hydra.errors import HydraException
from suggestions import did_you_mean
from sweeping.recorded import CONF, check_jobs, harmless

from llm.config import leaf_keys
from llm.errors import UserError
from llm.overrides import quoted
from llm.runs import BEST, LATEST, find_run, path_of
from llm.sweeps.jobs import find_sweep, read_record

TEXTS = ("prompt", "text", "samples.prompt")  # for people: in these, ${…} means nothing
FOLDERS = ("hydra.run.dir", "hydra.sweep.dir", "sweep.resume")
SWEEP_FLAGS = {"-m", "--multirun"}
ONE_CONFIG_FLAGS = {"-c", "--cfg", "-i", "--info"}
# With these Hydra prints something and runs nothing.
SHOWING_FLAGS = ONE_CONFIG_FLAGS | {"-h", "--help", "--hydra-help", "--version", "-sc", "--shell-completion"}
ESCAPED = r"\${"
REFERENCE = re.compile(r"(?<!\\)(\\\\)*\$\{")  # ${…}, unless a backslash makes it text
FREE_ON_RERUN = ("rerun", "resume", "tracking", "hydra", "data.path", "data.cache_dir")


def rewritten(arguments: list[str], script: str, schema: type) -> list[str]:
    """
    Raises:
        UserError: what is to be resumed is not there, or cannot be changed like this.
        HydraException: an override does not parse.
    """
    sweeps = bool(SWEEP_FLAGS & set(arguments))
    if sweeps and ONE_CONFIG_FLAGS & _flag_names(arguments):
        raise UserError("--cfg and --info show one config, not a sweep: remove -m")
    if "WANDB_SWEEP_ID" in os.environ:
        arguments = [each for argument in arguments for each in _from_agent(argument)]
    texts = _text_keys(schema) | {*FOLDERS}
    arguments = [_with_quotes(each, texts, sweeps) if _is_override(each) else each for each in arguments]
    flags, overrides = _flags(arguments), _by_key(arguments)
    _refuse_what_hydra_would_not_say_in_a_line(flags, overrides, schema)
    if "hydra.output_subdir" in overrides:
        raise UserError("hydra.output_subdir: the record of a run is always in its folder .hydra; remove it")
    if "sweep.resume" in overrides:
        return _resumed_sweep(flags, overrides, script, schema)
    if "rerun" in overrides:
        _check_rerun(overrides)
    if "resume" in overrides and script == "pretrain":
        if sweeps:
            raise UserError(
                "resume continues a single run: remove -m; to continue a sweep, use sweep.resume=FOLDER"
            )
        overrides |= _resumed_run(flags, overrides)
    return [*flags, *overrides.values()]  # argparse, which Hydra uses, wants them in this order


def _refuse_what_hydra_would_not_say_in_a_line(
    flags: list[str], overrides: dict[str, str], schema: type
) -> None:
    """
    Raises:
        UserError: a flag is unknown, a key has no value, or a group gets something else than the name of an
            option.
    """
    parser = get_args_parser()
    try:
        with redirect_stderr(StringIO()) as said:
            given = parser.parse_args([*flags, *overrides.values()])
    except SystemExit as ended:
        if ended.code:
            reason = said.getvalue().strip().rpartition("error: ")[2]
            typed = re.search(r"unrecognized arguments: -+(\w[\w.]*)", reason)
            meant = did_you_mean(typed[1], schema) if typed else ""
            raise UserError(f"{reason}; --help shows what can be given{meant}") from None
        return  # --version, say
    if bare := [each for each in given.overrides if not _is_override(each)]:
        raise UserError(f"{bare[0]}: give KEY=VALUE{did_you_mean(bare[0], schema)}")
    for key, override in overrides.items():
        if not key:
            raise UserError(f"{override}: give KEY=VALUE")
        if (CONF / key).is_dir():
            value = OverridesParser.create().parse_override(override).value()
            if not isinstance(value, str | list | Sweep) and override[0] != "~":
                options = ", ".join(sorted(file.stem for file in (CONF / key).glob("*.yaml")))
                raise UserError(f"{override}: choose one of {options}")


def only_shows(arguments: list[str]) -> bool:
    """Whether Hydra prints help, a config or the like, in place of a run."""
    return bool(SHOWING_FLAGS & _flag_names(arguments))


def _from_agent(argument: str) -> list[str]:
    """An argument from an agent of a W&B sweep, which spells values as Python does: None, and nested
    parameters as a dict."""
    name, _, text = argument.partition("=")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):  # a text
        return [argument]
    return list(_overrides_of(name, value)) if value is None or isinstance(value, dict | list) else [argument]


def _overrides_of(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _overrides_of(f"{name}.{key}", each)
    else:
        yield f"{name}={_spelled(value)}"


def _spelled(value: Any) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, list):
        return f"[{','.join(map(_spelled, value))}]"
    if isinstance(value, str):
        return quoted(value)
    return "null" if value is None else str(value)


def _flag_names(arguments: list[str]) -> set[str]:
    return {argument.partition("=")[0] for argument in arguments}


def _is_override(argument: str) -> bool:
    return argument[:1] == "~" or ("=" in argument and argument[0] != "-")


def _flags(arguments: list[str]) -> list[str]:
    """Hydra's own flags, and their values."""
    return [argument for argument in arguments if not _is_override(argument)]


def _by_key(arguments: Iterable[str]) -> dict[str, str]:
    """The overrides among arguments, by the keys that they set: `optimizer.lr` of `+optimizer.lr=1`."""
    parser = OverridesParser.create()
    overrides = filter(_is_override, arguments)
    return {parser.parse_override(override).key_or_group: override for override in overrides}


def _value(override: str) -> str:
    """The text of an override's value, as a path."""
    parsed = OverridesParser.create().parse_override(override)
    value = parsed.value()
    return value if isinstance(value, str) else parsed.get_value_string()


# Quotes


def _text_keys(schema: type) -> set[str]:
    """The keys of a schema that take any text."""
    return {
        key
        for key, item in leaf_keys(schema).items()
        if item.type in (str, str | None) and not (item.metadata["choices"] or item.metadata["table"])
    }


def _with_quotes(argument: str, texts: set[str], sweeps: bool) -> str:
    """Quote a text or a path, whose commas, brackets and letters would trip Hydra. Where it is quoted
    already, refers to something by `${…}`, or is one of several in a sweep, it keeps its meaning."""
    name, _, value = argument.partition("=")
    key = name.lstrip("+")
    if key not in texts or value == "null" or _is_quoted(argument):
        return argument
    if sweeps and key not in FOLDERS:
        if _parses(argument):
            return argument
        values = [each if _parses(f"{key}={each}") else quoted(each) for each in value.split(",")]
        return f"{name}={','.join(values)}"
    as_text = quoted(value)
    return f"{name}={as_text if key in TEXTS else as_text.replace(ESCAPED, '${')}"


def _is_quoted(argument: str) -> bool:
    return argument.partition("=")[2][:1] in ("'", '"') and _parses(argument)


def _parses(argument: str) -> bool:
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return False
    return True


# What is resumed or repeated


def _check_rerun(overrides: dict[str, str]) -> None:
    """With `rerun=`, the config is that of that run, whatever today's defaults, and takes no changes."""
    if others := [each for key, each in overrides.items() if not key.startswith(FREE_ON_RERUN)]:
        raise UserError(
            f"rerun repeats a run as it was: remove {' '.join(others)}, or begin a new run with it"
        )


def _resumed_run(flags: list[str], overrides: dict[str, str]) -> dict[str, str]:
    """Overrides with which Hydra uses the folder of the run that is resumed. The run's config is not
    composed again: what is given now replaces values of its record, see llm/training/start.py."""
    for key, override in overrides.items():
        if REFERENCE.search(override) and not key.startswith("hydra"):  # which a text for people has not
            raise UserError(f"{override}: with resume, give a value; ${{…}} would refer to today's defaults")
    name = _value(overrides["resume"])
    run_dir = find_run(name, with_checkpoint=False)
    if ONE_CONFIG_FLAGS & _flag_names(flags):
        raise UserError(
            f"resume={name}: its config is not composed; it is in {run_dir}/checkpoints/last/config.json"
        )
    return {
        "resume": f"resume={quoted(str(path_of(name)) if name in (LATEST, BEST) else name)}",
        "hydra.run.dir": f"hydra.run.dir={quoted(str(run_dir))}",
        "hydra.mode": "hydra.mode=RUN",  # an experiment that is given may ask for a sweep
    }


def _resumed_sweep(flags: list[str], overrides: dict[str, str], script: str, schema: type) -> list[str]:
    """The command line that began a sweep, as far as its record may decide it. Its jobs cannot change, but
    the way they are launched and tracked can."""
    folder = find_sweep(_value(overrides.pop("sweep.resume")), script)
    record = read_record(folder)
    if record["script"] != script:
        raise UserError(
            f"{folder} was begun by experiments/{record['script']}.py: resume it with that script"
        )
    recorded, ignored = harmless(record["arguments"], schema, folder)
    left_open = {*ignored, *check_jobs(record["jobs"], schema, folder)}
    if others := [
        each for key, each in overrides.items() if not key.startswith(("hydra", "tracking", *left_open))
    ]:
        raise UserError(f"sweep.resume continues a sweep as it was begun: remove {' '.join(others)}")
    missing = sorted(left_open - set(overrides))
    if own := [key for key in missing if not key.startswith("hydra")]:
        raise UserError(
            f"{folder} was begun with {own[0]} from outside its config: give {own[0]}=VALUE again"
        )
    if missing:
        print(f"{', '.join(missing)}: not taken from the sweep's record; give it again if it is still wanted")
    if not only_shows(flags):
        flags = ["--multirun", *(flag for flag in flags if flag not in SWEEP_FLAGS)]
    merged = {
        **_by_key(recorded),
        **overrides,
        "hydra.sweep.dir": f"hydra.sweep.dir={quoted(str(folder))}",
    }
    return [*flags, *merged.values(), "hydra.sweeper.resume=true"]
