"""What the scripts share: schemas for Hydra, one-line errors, resuming. Sweeps: hydra_plugins/sweepers.py."""

import functools
import logging
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from slurm import configure_slurm

from llm.errors import UserError
from llm.files import as_typed, modified, remove, write_json, write_text
from llm.run_folder import holds_run, read_summary, refuse_to_overwrite
from llm.sweeps.jobs import RECORD, STOP, find_sweep, read_record, setting_of, settings_of, title_of

TEXT_KEYS = ("prompt", "text", "samples.prompt")

error_log = logging.getLogger("error")  # to standard error and the run's log; see conf/common.yaml


class Interrupted(BaseException):
    """Raised by a script's work that was stopped by hand and has saved what there was."""


def launch(config_name: str, schema: type, work: Callable[[Any, Path], float | None]) -> None:
    """Compose `conf/<config_name>.yaml` with the command line's overrides and hand it to `work`.

    `work` gets the config as a `schema` dataclass and the run folder, and returns the figure that sweeps
    compare. A `UserError`, or an override that does not fit, is one line and exit status 1. In a sweep a
    job that fails so does not stop the others.
    """
    schema_name = schema.__name__.removesuffix("Config").lower()
    ConfigStore.instance().store(name=f"{schema_name}_schema", node=schema)
    configure_slurm()
    # Hydra would print its own errors on several lines; with this it raises them instead.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    logging.raiseExceptions = False  # a full disk takes the log's lines; no traceback for each
    record: dict[Path, str] = {}  # Hydra's, of the run that is resumed

    def job(config: DictConfig) -> float | None:
        run_dir = Path(HydraConfig.get().runtime.output_dir)
        sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
        # Side by side, one job must not take down the others, which are saving too.
        side_by_side = sweeping and "joblib" in HydraConfig.get().launcher._target_
        if side_by_side and (run_dir.parent / STOP).exists():
            if not holds_run(run_dir):
                remove(run_dir)
            return math.nan
        if side_by_side:
            _watched_sweep()
        before = modified(run_dir / "summary.json")
        try:
            _complete(config, run_dir, sweeping)
            result = work(OmegaConf.to_object(config), as_typed(run_dir))
            if sweeping and modified(run_dir / "summary.json") == before:  # by it a sweep knows its jobs
                write_json(run_dir / "summary.json", {"status": "finished", "result": result})
            return result
        except UserError as error:
            error_log.error("error: %s", error)
            for file, content in record.items():  # else a change that was refused would come back for ever
                write_text(file, content)
            if not sweeping:
                sys.exit(1)
            _say_failed(run_dir, str(error))
            return math.nan
        except (Interrupted, KeyboardInterrupt) as stopped:
            if side_by_side:
                if _watched_sweep().is_set():
                    os._exit(1)  # nobody is there to take a result
                return math.nan
            if sweeping:
                raise KeyboardInterrupt from None  # the jobs to come are off
            sys.exit(130 if isinstance(stopped, KeyboardInterrupt) else 0)
        except Exception:
            if sweeping:  # Hydra keeps it for itself
                error_log.exception("error")
            raise

    try:
        arguments = [_quoted(argument) for argument in sys.argv[1:]]
        sys.argv[1:] = _with_recorded_overrides(
            with_recorded_sweep(arguments, config_name), config_name, record
        )
        os.environ["PYTHONPATH"] = os.pathsep.join(  # for jobs in processes of their own
            filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
        )
        main = hydra.main(version_base="1.3", config_path="../conf", config_name=config_name)
        job.__module__ = "__main__"
        main(job)()
    except KeyboardInterrupt:  # before a run has begun, or after it
        sys.exit(130)
    except (HydraException, OmegaConfBaseException, UserError, OSError) as error:
        if not isinstance(error, HydraException) and getattr(error, "filename", "") is None:
            raise  # an OSError that is not about a file: a bug, not the user's
        print(f"error: {one_line(error, schema)}", file=sys.stderr)
        sys.exit(1)


def torchrun_rank() -> int | None:
    """This process's place among those that torchrun has launched, if it is one of them."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


@functools.cache  # once a process, which may run several jobs
def _watched_sweep() -> threading.Event:
    """Set when the process of a sweep side by side is killed. Its jobs then save and end; else they would
    train on, in folders that `sweep.resume` wants, and then wait for work for ever with a GPU's memory."""
    sweep, gone = os.getppid(), threading.Event()

    def watch() -> None:
        while os.getppid() == sweep:
            time.sleep(1)
        gone.set()
        os.kill(os.getpid(), signal.SIGTERM)  # a run saves; a process without one ends
        time.sleep(60)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    return gone


def _complete(config: DictConfig, run_dir: Path, sweeping: bool) -> None:
    """Fill in what follows from whether this is a job of a sweep, and of which."""
    if sweeping and torchrun_rank() is not None:
        raise UserError("torchrun begins one run, not a sweep: leave it out, and set runtime.processes")
    if sweeping and "resume" in config and holds_run(run_dir):
        config.resume = str(run_dir)  # begun before: the sweep is gone on with
    if "study" in config and config.study is None:
        config.study = sweeping
    if "tracking" in config:
        _name_in_tracker(config, run_dir.parent if sweeping else None)


def _name_in_tracker(config: DictConfig, sweep: Path | None) -> None:
    """Name the run after what varies in its sweep, or after what was overridden, and its group after the
    sweep's folder."""
    overrides = list(HydraConfig.get().overrides.task)
    if sweep and (sweep / RECORD).exists():  # another's sweeper, as hydra/sweeper=basic, keeps no record
        setting = setting_of(overrides, read_record(sweep)["varied"])
    else:
        [setting, _] = settings_of([overrides, []])
    if config.tracking.name is None:
        config.tracking.name = title_of(setting).replace("${", r"\${") or "default"
    if config.tracking.group is None and sweep:
        config.tracking.group = str(as_typed(sweep))


def _say_failed(run_dir: Path, reason: str) -> None:
    """Let a job's summary say that it failed, for a sweep knows its jobs by that."""
    write_json(run_dir / "summary.json", {**read_summary(run_dir), "status": "failed", "error": reason})


def one_line(error: BaseException, schema: type | None = None) -> str:
    """An error as one line that names the key and what was expected."""
    if isinstance(error, UserError):
        return str(error)
    if schema and (unknown := re.match(r"Could not override '([\w.]+)'", str(error))):
        parent = unknown[1].rpartition(".")[0]
        keys = _keys_of(schema, parent)
        return f"{unknown[1]}: there is no such key; {parent or 'the config'} has {', '.join(keys)}"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if missing := re.search(r"Could not find 'hydra/launcher/(joblib|submitit)", str(error)):
        return (
            f"hydra/launcher={missing[1]} needs a plugin: pip install -c constraints.txt -e '.[{missing[1]}]'"
        )
    messages: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause).partition("Config search path:")[0]
        messages += [
            line.strip()
            for line in text.splitlines()
            if not line.strip().startswith(("full_key:", "object_type=", "reference_type="))
        ]
        cause = cause.__cause__
    return " ".join(dict.fromkeys(message for message in messages if message and message != "None"))


def _keys_of(schema: type, path: str) -> list[str]:
    """Names of the keys under a dotted path of a schema."""
    place: Any = schema
    for name in filter(None, path.split(".")):
        place = next((item.type for item in fields(place) if item.name == name), place)
    return [item.name for item in fields(place)]


def _quoted(argument: str) -> str:
    """An override whose value is a text of people, as a string for Hydra, which would trip over commas and
    brackets. In a sweep, and where it is quoted already, commas mean what they mean to Hydra."""
    name, equals, value = argument.partition("=")
    sweeping = {"-m", "--multirun"} & set(sys.argv)
    if name not in TEXT_KEYS or not equals or sweeping or value[:1] in ("'", '"') or value == "null":
        return argument
    return f"{name}={quoted(value)}"


def quoted(text: str) -> str:
    """A text as a string of Hydra's grammar, where a backslash is special at the end and before a quote
    alone."""
    escaped = re.sub(r"(\\*)('|$)", lambda match: 2 * match[1] + (match[2] and "\\'"), text)
    return f"'{escaped}'".replace("${", r"\${")


def with_recorded_sweep(arguments: list[str], script: str) -> list[str]:
    """With `sweep.resume=SWEEP_FOLDER`, the command line that began that sweep. What a job is cannot change,
    but how jobs are launched and tracked can."""
    given = _by_key(arguments)
    if "sweep.resume" not in given:
        return arguments
    folder = find_sweep(_value(given.pop("sweep.resume")))
    if others := [argument for key, argument in given.items() if not key.startswith(("hydra", "tracking"))]:
        raise UserError(f"sweep.resume goes on with a sweep as it was begun: leave out {' '.join(others)}")
    sweep = read_record(folder)
    if sweep["script"] != script:
        raise UserError(f"{folder} was begun by experiments/{sweep['script']}.py: go on with that")
    begun = {_key(argument): argument for argument in sweep["arguments"]}
    place = {"hydra.sweep.dir": f"hydra.sweep.dir={quoted(str(folder))}"}
    return ["--multirun", *({**begun, **given, **place}).values(), "hydra.sweeper.resume=true"]


def _with_recorded_overrides(arguments: list[str], script: str, record: dict[Path, str]) -> list[str]:
    """With `resume=RUN_FOLDER`, the command line that began that run, changed by what is given now.

    Hydra then writes to that folder, and its record of the config there stays true; `record` gets the old.
    With `rerun=`, the config is the run's own, whatever the defaults are by now, and takes no changes.
    """
    given = _by_key(arguments)
    if "rerun" in given:
        free = ("rerun", "resume", "tracking", "hydra", "data.path", "data.cache_dir")
        if others := [argument for key, argument in given.items() if not key.startswith(free)]:
            raise UserError(
                f"rerun repeats a run as it was: leave out {' '.join(others)}, or begin a new run with it"
            )
    if "resume" not in given:
        if script == "pretrain" and "hydra.run.dir" in given:  # before Hydra writes its record there
            refuse_to_overwrite(Path(_value(given["hydra.run.dir"])))
        return arguments
    if {"-m", "--multirun"} & set(arguments):
        raise UserError("resume goes on with one run: leave out -m; a sweep goes on with sweep.resume=FOLDER")
    from llm.checkpoints.checkpoint import find_run

    name = _value(given["resume"])
    run_dir = find_run(name, with_checkpoint=False)
    overrides = run_dir / ".hydra" / "overrides.yaml"
    if not overrides.exists():
        raise UserError(
            f"{overrides} is missing: a run begun from Python is resumed there, with PretrainConfig(resume=…)"
        )
    begun = {_key(str(override)): str(override) for override in OmegaConf.load(overrides)}
    record |= {file: file.read_text("utf-8") for file in overrides.parent.glob("*.yaml")}
    flags = [argument for argument in arguments if argument not in given.values()]
    merged = {
        **begun,
        **given,
        "resume": f"resume='{run_dir if name == 'latest' else name}'",
        "hydra.run.dir": f"hydra.run.dir='{run_dir}'",
        "hydra.mode": "hydra.mode=RUN",  # of a sweep's job, whose experiment may be a sweep
    }
    return flags + list(merged.values())


def _by_key(arguments: list[str]) -> dict[str, str]:
    """The overrides among arguments, by the keys that they set."""
    return {_key(argument): argument for argument in arguments if "=" in argument and argument[0] != "-"}


def _key(override: str) -> str:
    """The key that an override sets: `optimizer.lr` of `+optimizer.lr=1`."""
    return OverridesParser.create().parse_override(override).key_or_group


def _value(override: str) -> str:
    """The plain text of an override's value, as a path."""
    return override.partition("=")[2].strip("'\"")
