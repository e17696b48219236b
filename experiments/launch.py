"""What the scripts share: schemas for Hydra, one-line errors, resuming, and the end of a sweep."""

import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llm.config import UserError
from llm.files import as_typed, write_text
from llm.progress import format_table

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
    ConfigStore.instance().store(name=f"{config_name}_schema", node=schema)
    # Hydra would print its own errors on several lines; with this it raises them instead.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    logging.raiseExceptions = False  # a full disk takes the log's lines; no traceback for each
    failed = False
    record: dict[Path, str] = {}  # Hydra's, of the run that is resumed

    def job(config: DictConfig) -> float | None:
        nonlocal failed
        try:
            run_dir = Path(HydraConfig.get().runtime.output_dir)
            if "tracking" in config:
                _name_in_tracker(config)
            if "study" in config and config.study is None:
                config.study = HydraConfig.get().mode == RunMode.MULTIRUN
            return work(OmegaConf.to_object(config), as_typed(run_dir))
        except UserError as error:
            error_log.error("error: %s", error)
            for file, content in record.items():  # else a change that was refused would come back for ever
                write_text(file, content)
            if HydraConfig.get().mode == RunMode.RUN:
                sys.exit(1)
            failed = True
            return math.nan
        except Interrupted:
            sys.exit(0 if HydraConfig.get().mode == RunMode.RUN else 130)  # the jobs to come are off
        except KeyboardInterrupt:
            sys.exit(130)

    try:
        sys.argv[1:] = _with_recorded_overrides([_quoted(argument) for argument in sys.argv[1:]], record)
        main = hydra.main(version_base="1.3", config_path="../conf", config_name=config_name)
        job.__module__ = "__main__"
        main(job)()
    except (HydraException, OmegaConfBaseException, UserError, OSError) as error:
        if not isinstance(error, HydraException) and getattr(error, "filename", "") is None:
            raise  # an OSError that is not about a file: a bug, not the user's
        print(f"error: {_one_line(error, schema)}", file=sys.stderr)
        sys.exit(1)
    if failed:  # a job of a sweep; the others have run
        sys.exit(1)


def _one_line(error: BaseException, schema: type) -> str:
    """An error as one line that names the key and what was expected."""
    if unknown := re.match(r"Could not override '([\w.]+)'", str(error)):
        parent = unknown[1].rpartition(".")[0]
        keys = _keys_of(schema, parent)
        return f"{unknown[1]}: there is no such key; {parent or 'the config'} has {', '.join(keys)}"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
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


def _name_in_tracker(config: DictConfig) -> None:
    """Name the run after what was overridden, and its group after the sweep's folder."""
    hydra_config = HydraConfig.get()
    if config.tracking.name is None:
        overridden = [
            f"{key.rsplit('.', 1)[-1]}={value}"
            for key, _, value in (override.partition("=") for override in hydra_config.overrides.task)
            if not key.startswith(("tracking", "resume"))
        ]
        config.tracking.name = " ".join(overridden).replace("${", r"\${") or "default"
    if config.tracking.group is None and hydra_config.mode == RunMode.MULTIRUN:
        config.tracking.group = str(as_typed(Path(hydra_config.sweep.dir)))


def _quoted(argument: str) -> str:
    """An override whose value is a text of people, as a string for Hydra, which would trip over commas and
    brackets. In a sweep, and where it is quoted already, commas mean what they mean to Hydra."""
    name, equals, value = argument.partition("=")
    sweeping = {"-m", "--multirun"} & set(sys.argv)
    if name not in TEXT_KEYS or not equals or sweeping or value[:1] in ("'", '"') or value == "null":
        return argument
    # A backslash is special to Hydra at the end and before a quote alone.
    escaped = re.sub(r"(\\*)('|$)", lambda match: 2 * match[1] + (match[2] and "\\'"), value)
    return f"{name}='{escaped}'".replace("${", r"\${")


def _with_recorded_overrides(arguments: list[str], record: dict[Path, str]) -> list[str]:
    """With `resume=RUN_FOLDER`, the command line that began that run, changed by what is given now.

    Hydra then writes to that folder, and its record of the config there stays true; `record` gets the old.
    With `rerun=`, the config is the run's own, whatever the defaults are by now, and takes no changes.
    """
    given = {_key(argument): argument for argument in arguments if "=" in argument and argument[0] != "-"}
    if "rerun" in given:
        free = ("rerun", "resume", "tracking", "hydra", "data.path", "data.cache_dir")
        if others := [argument for key, argument in given.items() if not key.startswith(free)]:
            raise UserError(
                f"rerun repeats a run as it was: leave out {' '.join(others)}, or begin a new run with it"
            )
    if "resume" not in given:
        return arguments
    from llm.checkpoint import find_run

    name = given["resume"].partition("=")[2].strip("'\"")
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
    }
    return flags + list(merged.values())


def _key(override: str) -> str:
    """The key that an override sets: `optimizer.lr` of `+optimizer.lr=1`."""
    return OverridesParser.create().parse_override(override).key_or_group


class SweepTable(Callback):
    """Ends a sweep with a table of its jobs."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        jobs = sorted(
            Path(config.hydra.sweep.dir).glob("*/.hydra/overrides.yaml"), key=lambda path: _number(path)
        )
        overrides = [list(OmegaConf.load(path)) for path in jobs]
        rows = []
        for path, override in zip(jobs, overrides, strict=True):
            summary_file = path.parents[1] / "summary.json"
            summary = json.loads(summary_file.read_text("utf-8")) if summary_file.exists() else {}
            varied = [each for each in override if not all(each in other for other in overrides)]
            rows.append((path.parents[1].name, " ".join(varied), summary))
        print("\n" + _table(rows))
        print(f"\nsweep folder {as_typed(Path(config.hydra.sweep.dir))}")


class StudyReport(Callback):
    """Ends a sweep of sampling settings with a report."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from llm.generation_run import conclude_study

        conclude_study(as_typed(Path(config.hydra.sweep.dir)))


def _number(path: Path) -> int:
    name = path.parents[1].name
    return int(name) if name.isdigit() else -1


def _table(rows: list[tuple[str, str, dict[str, Any]]]) -> str:
    """Jobs with what was set in each, their losses and times; the best validation loss is marked."""
    losses = [summary.get("val_loss") for _, _, summary in rows]
    best = min((loss for loss in losses if loss is not None), default=None)
    cells = [["job", "set", "status", "train loss", "val loss", "bits/byte", "tokens", "time", ""]]
    for name, overrides, summary in rows:
        loss = summary.get("val_loss")
        cells.append(
            [
                name,
                overrides,
                summary.get("status", "failed"),
                _figure(summary.get("train_loss"), "{:.3f}"),
                _figure(loss, "{:.3f}"),
                _figure(summary.get("val_bits_per_byte"), "{:.3f}"),
                _figure(summary.get("tokens_seen"), "{:,}"),
                _figure(summary.get("seconds"), "{:.0f}s"),
                "best" if loss is not None and loss == best else summary.get("error") or "",
            ]
        )
    return format_table(cells, left={0, 1, 2, 8})


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
