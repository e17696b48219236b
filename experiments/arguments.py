"""The command line as Hydra is to read it: `resume=` and `sweep.resume=` become what began the run or sweep,
and texts for people are quoted."""

from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from llm.errors import UserError
from llm.overrides import quoted
from llm.run_folder import find_run, refuse_to_overwrite
from llm.sweeps.jobs import find_sweep, read_record

TEXT_KEYS = ("prompt", "text", "samples.prompt")
SWEEP_FLAGS = {"-m", "--multirun"}
ONE_CONFIG_FLAGS = {"-c", "--cfg", "-i", "--info"}
# With these Hydra prints something and runs nothing.
SHOWING_FLAGS = ONE_CONFIG_FLAGS | {"-h", "--help", "--hydra-help", "--version", "-sc", "--shell-completion"}
FREE_ON_RERUN = ("rerun", "resume", "tracking", "hydra", "data.path", "data.cache_dir")
FREE_ON_SWEEP_RESUME = ("hydra", "tracking")


@dataclass(frozen=True)
class CommandLine:
    """What Hydra gets, and what the files were that it will overwrite."""

    arguments: list[str]
    overwritten: dict[Path, str] = field(default_factory=dict)  # .hydra/*.yaml of the run that is resumed


def rewritten(arguments: list[str], script: str) -> CommandLine:
    """
    Raises:
        UserError: what is to be resumed is not there, or cannot be changed like this; or the folder for a new
            run already holds one.
        HydraException: an override does not parse.
    """
    if SWEEP_FLAGS & set(arguments) and ONE_CONFIG_FLAGS & _flag_names(arguments):
        raise UserError("--cfg and --info show one config, not a sweep: remove -m")
    arguments = with_recorded_sweep(_with_quoted_texts(arguments), script)
    overrides = _by_key(arguments)
    if "rerun" in overrides:
        _check_rerun(overrides)
    if "resume" in overrides:
        return _with_recorded_run(arguments)
    if script == "pretrain" and "hydra.run.dir" in overrides:  # before Hydra writes its record there
        refuse_to_overwrite(Path(_value(overrides["hydra.run.dir"])))
    return CommandLine(arguments)


def only_shows(arguments: list[str]) -> bool:
    """Whether Hydra prints help, a config or the like, in place of a run."""
    return bool(SHOWING_FLAGS & _flag_names(arguments))


def _flag_names(arguments: list[str]) -> set[str]:
    return {argument.partition("=")[0] for argument in arguments}


def _with_quoted_texts(arguments: list[str]) -> list[str]:
    """Quote texts for people, whose commas and brackets would trip Hydra. In a sweep, and where a text is
    quoted already, they keep their meaning."""
    if SWEEP_FLAGS & set(arguments):
        return arguments
    return [_with_quoted_text(argument) for argument in arguments]


def _with_quoted_text(argument: str) -> str:
    name, equals, value = argument.partition("=")
    if name not in TEXT_KEYS or not equals or value[:1] in ("'", '"') or value == "null":
        return argument
    return f"{name}={quoted(value)}"


def with_recorded_sweep(arguments: list[str], script: str) -> list[str]:
    """With `sweep.resume=SWEEP_FOLDER`, the command line that began that sweep. Its jobs cannot change, but
    the way they are launched and tracked can."""
    overrides = _by_key(arguments)
    if "sweep.resume" not in overrides:
        return arguments
    flags = _flags(arguments)
    folder = find_sweep(_value(overrides.pop("sweep.resume")))
    if others := [each for key, each in overrides.items() if not key.startswith(FREE_ON_SWEEP_RESUME)]:
        raise UserError(f"sweep.resume continues a sweep as it was begun: remove {' '.join(others)}")
    sweep = read_record(folder)
    if sweep["script"] != script:
        raise UserError(f"{folder} was begun by experiments/{sweep['script']}.py: resume it with that script")
    merged = {
        **_by_key(sweep["arguments"]),
        **overrides,
        "hydra.sweep.dir": f"hydra.sweep.dir={quoted(str(folder))}",
    }
    if not only_shows(arguments):
        flags = ["--multirun", *(flag for flag in flags if flag not in SWEEP_FLAGS)]
    return [*flags, *merged.values(), "hydra.sweeper.resume=true"]


def _check_rerun(overrides: dict[str, str]) -> None:
    """With `rerun=`, the config is that of that run, whatever today's defaults, and takes no changes."""
    if others := [each for key, each in overrides.items() if not key.startswith(FREE_ON_RERUN)]:
        raise UserError(
            f"rerun repeats a run as it was: remove {' '.join(others)}, or begin a new run with it"
        )


def _with_recorded_run(arguments: list[str]) -> CommandLine:
    """With `resume=RUN_FOLDER`, the command line that began that run, changed by what is given now. Hydra
    writes to that folder, so its record of the config there stays true."""
    if SWEEP_FLAGS & set(arguments):
        raise UserError(
            "resume continues a single run: remove -m; to continue a sweep, use sweep.resume=FOLDER"
        )
    overrides = _by_key(arguments)
    name = _value(overrides["resume"])
    run_dir = find_run(name, with_checkpoint=False)
    record = run_dir / ".hydra" / "overrides.yaml"
    if not record.exists():
        raise UserError(
            f"{record} is missing: a run begun from Python is resumed there, with PretrainConfig(resume=…)"
        )
    merged = {
        **_by_key([str(override) for override in OmegaConf.load(record)]),
        **overrides,
        "resume": f"resume={quoted(str(run_dir) if name == 'latest' else name)}",
        "hydra.run.dir": f"hydra.run.dir={quoted(str(run_dir))}",
        "hydra.mode": "hydra.mode=RUN",  # it may be a sweep's job, whose experiment asks for a sweep
    }
    overwritten = {file: file.read_text("utf-8") for file in record.parent.glob("*.yaml")}
    return CommandLine([*_flags(arguments), *merged.values()], overwritten)


def _is_override(argument: str) -> bool:
    return "=" in argument and argument[0] != "-"


def _flags(arguments: list[str]) -> list[str]:
    """Hydra's own flags, and their values."""
    return [argument for argument in arguments if not _is_override(argument)]


def _by_key(arguments: list[str]) -> dict[str, str]:
    """The overrides among arguments, by the keys that they set: `optimizer.lr` of `+optimizer.lr=1`."""
    parser = OverridesParser.create()
    overrides = filter(_is_override, arguments)
    return {parser.parse_override(override).key_or_group: override for override in overrides}


def _value(override: str) -> str:
    """The text of an override's value, as a path."""
    parsed = OverridesParser.create().parse_override(override)
    value = parsed.value()
    return value if isinstance(value, str) else parsed.get_value_string()
