"""Rewrites the command line for Hydra: finds the folders to resume, and quotes texts and paths."""

import argparse
import ast
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Sweep
from hydra.errors import HydraException
from suggestions import did_you_mean
from sweeping.recorded import CONF, PLANNED, SHORT_KEYS, check_jobs, harmless

from llm.config_values import leaf_keys
from llm.errors import UserError
from llm.overrides import quoted, split_override
from llm.runs import BEST, LATEST, find_run, path_of
from llm.sweeps.jobs import find_sweep, read_record

TEXTS = ("prompt", "text", "samples.prompt")  # keys in whose values ${…} is plain text
PATHS = ("hydra.run.dir", "hydra.sweep.dir", "sweep.resume", "sweep.extend", "sweep.table")
SWEEP_FLAGS = {"-m", "--multirun"}
ONE_CONFIG_FLAGS = {"-c", "--cfg", "-i", "--info"}
# With these Hydra prints something and runs nothing.
SHOWING_FLAGS = ONE_CONFIG_FLAGS | {"-h", "--help", "--hydra-help", "--version", "-sc", "--shell-completion"}
PLANS_SWEEP = re.compile(r"\+*sweep\.(?!resume=)\w+=")  # implies -m
ESCAPED = r"\${"
REFERENCE = re.compile(r"(?<!\\)(\\\\)*\$\{")  # ${…}, unless a backslash makes it text
FREE_ON_RERUN = ("rerun", "if_done", "tracking", "hydra", "data.path", "data.cache_dir")


def rewritten(arguments: list[str], script: str, schema: type) -> list[str]:
    """The command line as Hydra should read it.

    Raises:
        UserError: what is to be resumed does not exist, or cannot be changed like this.
        HydraException: an override does not parse.
    """
    plans = any(map(PLANS_SWEEP.match, arguments))
    sweeps = plans or bool(SWEEP_FLAGS & set(arguments))
    if sweeps and ONE_CONFIG_FLAGS & _flag_names(arguments):
        raise UserError("--cfg and --info show one config, not a sweep: remove -m and sweep.KEY=…")
    if "WANDB_SWEEP_ID" in os.environ:
        arguments = [each for argument in arguments for each in _from_agent(argument)]
    texts = _text_keys(schema) | {*PATHS}
    arguments = [_with_quotes(each, texts, sweeps) if _is_override(each) else each for each in arguments]
    flags, overrides = _flags(arguments), _by_key(arguments)
    _refuse_what_hydra_would_not_say_in_a_line(overrides)
    if "hydra.output_subdir" in overrides:
        raise UserError("hydra.output_subdir: the record of a run is always in its folder .hydra; remove it")
    if plans or "sweep.resume" in overrides:
        flags = _sweeping(flags)
    for key, ours in SHORT_KEYS.items():
        if override := overrides.pop(key, None):
            overrides[ours] = f"{ours}={override.partition('=')[2]}"
    if "sweep.resume" in overrides or "sweep.extend" in overrides:
        return _continued_sweep(flags, overrides, script, schema)
    if "rerun" in overrides:
        _check_rerun(overrides)
    if "resume" in overrides and script == "pretrain":
        if sweeps:
            raise UserError(
                "resume continues a single run: remove -m; to continue a sweep, use sweep.resume=FOLDER"
            )
        overrides |= _resumed_run(flags, overrides)
    return [*flags, *overrides.values()]  # argparse, which Hydra uses, needs this order


def _refuse_what_hydra_would_not_say_in_a_line(overrides: dict[str, str]) -> None:
    """Refuse mistakes for which Hydra's own errors would not be one line.

    Raises:
        UserError: an override has no key, or gives a group something other than the name of an option.
    """
    for key, override in overrides.items():
        if not key:
            raise UserError(f"{override}: give KEY=VALUE")
        if (CONF / key).is_dir():
            value = OverridesParser.create().parse_override(override).value()
            if not isinstance(value, str | list | Sweep) and override[0] != "~":
                options = ", ".join(sorted(file.stem for file in (CONF / key).glob("*.yaml")))
                raise UserError(f"{override}: choose one of {options}")


@contextmanager
def flags_refused_in_a_line(schema: type) -> Iterator[None]:
    """Turn errors about unknown flags into one line; Hydra's parser would print a page of usage."""

    def refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
        typed = re.search(r"unrecognized arguments: -+(\w[\w.]*)", message)
        meant = did_you_mean(typed[1], schema) if typed else ""
        raise UserError(f"{message}; --help shows what can be given{meant}")

    printed = argparse.ArgumentParser.error
    setattr(argparse.ArgumentParser, "error", refuse)  # noqa: B010
    try:
        yield
    finally:
        setattr(argparse.ArgumentParser, "error", printed)  # noqa: B010


def only_shows(arguments: list[str]) -> bool:
    """Whether Hydra only prints help, a config or the like, and runs nothing."""
    return bool(SHOWING_FLAGS & _flag_names(arguments))


def _from_agent(argument: str) -> list[str]:
    """Overrides for an argument from an agent of a W&B sweep, which spells values as Python does: None, and
    nested parameters as a dict."""
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
    """The overrides among arguments, by the keys that they set, such as `optimizer.lr` for
    `+optimizer.lr=1`."""
    parser = OverridesParser.create()
    overrides = filter(_is_override, arguments)
    return {parser.parse_override(override).key_or_group: override for override in overrides}


def _value(override: str) -> str:
    """The value of an override as text, such as a path."""
    parsed = OverridesParser.create().parse_override(override)
    value = parsed.value()
    return value if isinstance(value, str) else parsed.get_value_string()


# Quotes


def _text_keys(schema: type) -> set[str]:
    """The keys of a schema whose value may be any text."""
    return {
        key
        for key, item in leaf_keys(schema).items()
        if item.type in (str, str | None) and not (item.metadata["choices"] or item.metadata["table"])
    }


def _with_quotes(argument: str, texts: set[str], sweeps: bool) -> str:
    """Quote a text or a path whose commas, brackets or letters would confuse Hydra. One that is quoted
    already, has an interpolation `${…}`, or is one of several in a sweep, keeps its meaning."""
    name, _, value = argument.partition("=")
    key = name.lstrip("+")
    if key not in texts or value == "null" or _is_quoted(argument):
        return argument
    if sweeps and key not in PATHS:
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


# Resuming and repeating


def _check_rerun(overrides: dict[str, str]) -> None:
    """Refuse changes to a rerun, whose config is that of the run that it repeats."""
    if "resume" in overrides:
        raise UserError("rerun repeats a run in a new folder, and resume continues one: remove one of them")
    if others := [each for key, each in overrides.items() if not key.startswith(FREE_ON_RERUN)]:
        raise UserError(
            f"rerun repeats a run as it was: remove {' '.join(others)}, or begin a new run with it"
        )


def _resumed_run(flags: list[str], overrides: dict[str, str]) -> dict[str, str]:
    """Overrides with which Hydra uses the folder of the run that is resumed. The run's config is not composed
    again: what is given now replaces values of its record, see llm/training/start.py."""
    for key, override in overrides.items():
        if REFERENCE.search(override) and not key.startswith("hydra"):
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
        "hydra.mode": "hydra.mode=RUN",  # even if a given experiment is a sweep
    }


def _sweeping(flags: list[str]) -> list[str]:
    if only_shows(flags):
        return flags
    return ["--multirun", *(flag for flag in flags if flag not in SWEEP_FLAGS)]


def _continued_sweep(flags: list[str], overrides: dict[str, str], script: str, schema: type) -> list[str]:
    """The command line with which a sweep was started, as far as its record may decide it. Existing jobs
    cannot change, but the way they are launched and tracked can, and a sweep can get more jobs."""
    if "sweep.resume" in overrides and "sweep.extend" in overrides:
        raise UserError("sweep.extend resumes what has not ended as well: remove sweep.resume")
    extends = "sweep.extend" in overrides
    folder = find_sweep(_value(overrides.pop("sweep.extend" if extends else "sweep.resume")), script)
    record = read_record(folder)
    if record["script"] != script:
        verb = "extend" if extends else "resume"
        raise UserError(
            f"{folder} was begun by experiments/{record['script']}.py: {verb} it with that script"
        )
    recorded, ignored = harmless(record["arguments"], schema, folder)
    if "hydra/launcher" in overrides:  # the recorded settings are another launcher's
        recorded = [each for each in recorded if not each.startswith("hydra.launcher.")]
    left_open = {*ignored, *check_jobs(record["jobs"], schema, folder)}
    free = ("hydra", "tracking", *left_open)
    others = [each for key, each in overrides.items() if not key.startswith(free) or key in PLANNED]
    if extends:
        if not others:
            raise UserError(f"sweep.extend={folder}: give what to add, as in seed=3,4")
        # Each job's overrides are in its record; Hydra has to know those that all jobs share.
        alike = set(record["jobs"][0]).intersection(*record["jobs"]) if record["jobs"] else set()
        recorded = [each for each in recorded if each.startswith("hydra")]
        recorded += sorted(each for each in alike if split_override(each)[0] not in left_open)
    elif others:
        named = " ".join(others).replace("hydra.sweeper.", "sweep.")
        raise UserError(f"sweep.resume continues a sweep as it was begun: remove {named}")
    missing = sorted(left_open - set(overrides))
    if own := [key for key in missing if not key.startswith("hydra")]:
        raise UserError(
            f"{folder} was begun with {own[0]} from outside its config: give {own[0]}=VALUE again"
        )
    if missing:
        print(f"{', '.join(missing)}: not taken from the sweep's record; give it again if it is still wanted")
    merged = {
        **_by_key(recorded),
        **overrides,
        "hydra.sweep.dir": f"hydra.sweep.dir={quoted(str(folder))}",
    }
    extension = ["hydra.sweeper.extend=true"] if extends else []
    return [*flags, *merged.values(), "hydra.sweeper.resume=true", *extension]
