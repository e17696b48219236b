"""What the scripts share: `launch` composes a config with Hydra and hands it to a script's work.

The command line is read in arguments.py and given.py; sweeps are run by hydra_plugins/sweepers.py.
"""

import gc
import logging
import math
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import hydra
from answer import answered, form_of, tell, tell_error
from arguments import flags_refused_in_a_line, only_shows, rewritten
from given import given_keys
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra_errors import is_users, one_line, refuse_unknown_keys
from hydra_versions import main_options, store
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from record import error_log, logged, write_record
from repeating import made_before, noted, show_again, take_over
from sweeping.job import (
    Place,
    claimed_place,
    complete,
    composed_config,
    is_called_off,
    place_of,
    unresolved,
)
from sweeping.launchers import configure_launchers
from sweeping.machine import give_back_memory
from sweeping.stopping import exit_status, interrupts_kept, watched_sweep
from sweeping.tasks import task_of_run

from llm.config_values import own_defaults
from llm.errors import UserError, shown
from llm.files import as_typed, modified
from llm.outcome import Outcome
from llm.run_folder import SUMMARY, mark_failed, write_summary

HERE = Path(__file__).parent

# A run's imports make 400,000 objects. Searching all of them for garbage whenever their number has grown by a
# quarter takes half a second.
gc.set_threshold(100_000)
# Hydra copies the whole store whenever it lists the options of a group, a hundred times for --help; and it
# copies again what it takes from that copy.
setattr(ConfigStore, "__deepcopy__", lambda stored, memo: stored)  # noqa: B010


class Interrupted(BaseException):
    """Raised by a script's work that was stopped by a signal (the argument), after it has saved its state."""


@dataclass(frozen=True)
class Invocation:
    """How a script was invoked, besides its config."""

    run_dir: Path
    given: frozenset[str]  # keys and groups that were set by the user; see given.py
    in_sweep: bool = False


Work = Callable[[Any, Invocation], Outcome]


def launch(
    config_name: str,
    schema: type,
    work: Work,
    recorded: bool = True,
    repeatable: bool = False,
    follow: Callable[[], int] | None = None,
) -> None:
    """Compose `conf/<config_name>.yaml` with the command line's overrides and hand it to `work`.

    `work` gets the config as a `schema` dataclass. A `UserError`, or an override that does not fit, is
    printed as one line, with exit status 1. In a sweep, a job that fails in this way does not stop the
    others. With `output=json` the outcome is printed as one object, see answer.py.

    Args:
        recorded: whether the work is a run, whose config and log are kept in its folder.
        repeatable: whether a run that is done already is reused; `llm.commands.<config_name>` then has
            `outcome_of` and `show_again`, see repeating.py.
        follow: what the other tasks of a Slurm job do, if all its tasks are one run; returns an exit status.
    """
    _prepare_process(schema)
    try:
        form, arguments = form_of(sys.argv[1:])
    except UserError as error:
        tell_error(str(error))
        sys.exit(1)
    sys.argv[1:] = arguments
    with answered(config_name) if form == "json" and not only_shows(arguments) else nullcontext():
        _launch(config_name, schema, work, recorded, repeatable, follow)


def _launch(
    config_name: str,
    schema: type,
    work: Work,
    recorded: bool,
    repeatable: bool,
    follow: Callable[[], int] | None,
) -> None:
    try:
        sys.argv = [sys.argv[0], *rewritten(sys.argv[1:], config_name, schema)]

        def run(config: DictConfig) -> float | None:
            if follow and task_of_run(HydraConfig.get()):  # not the first
                return follow()
            return run_once(config, work, recorded, repeatable)

        conf = str(HERE.parent / "conf")
        with flags_refused_in_a_line(schema):
            hydra.main(config_path=conf, config_name=config_name, **main_options())(run)()
        sys.stdout.flush()
    except BrokenPipeError:
        _end_unread()
    except KeyboardInterrupt as error:  # before a run has begun, or after it
        sys.exit(exit_status(error))
    except (HydraException, OmegaConfBaseException, UserError, OSError) as error:
        if not is_users(error):
            raise
        tell_error(shown(one_line(error, schema), keep=""))
        sys.exit(1)


def run_once(config: DictConfig, work: Work, recorded: bool, repeatable: bool) -> float | None:
    """Do the work for one config that Hydra has composed, for a single run or a job of a sweep; or reuse the
    outcome of the same run, if it was done before. Returns the figure that sweeps compare.

    Hydra itself writes nothing, as the folder has to be claimed first; see conf/common.yaml and record.py.
    """
    hydra_config = HydraConfig.get()
    place, overrides = place_of(hydra_config), unresolved(composed_config().hydra.overrides.task)
    if is_called_off(place):
        return math.nan
    script = str(hydra_config.job.config_name)
    folders = [Path(each.path) for each in hydra_config.runtime.config_sources if each.schema == "file"]
    resumes = bool(config.get("resume"))
    given = given_keys(overrides, folders, values=resumes)
    with interrupts_kept():
        made_with, done = made_before(script, config, given, place) if repeatable else (None, None)
    with ExitStack() as stack:
        try:
            stack.callback(place.remove_if_empty)
            if done and not place.sweep:
                show_again(script, OmegaConf.to_object(config), done)
                return None
            if place.sweep:
                stack.callback(give_back_memory)
            place = stack.enter_context(claimed_place(place, resumes))
            if recorded:
                stack.enter_context(logged(place, script))
            if recorded and not resumes:
                write_record(config, place)
            refuse_unknown_keys(config, OmegaConf.get_type(config))
            settings = complete(OmegaConf.to_object(config), place, overrides)
            if done:
                return take_over(script, done, place.run_dir)
            if repeatable:
                resumed_with = (given if resumes else ()) if getattr(settings, "resume", None) else None
                stack.enter_context(noted(place.run_dir, made_with, resumed_with))
            before = modified(place.run_dir / SUMMARY)
            outcome = work(settings, Invocation(as_typed(place.run_dir), given, in_sweep=bool(place.sweep)))
            if place.sweep and modified(place.run_dir / SUMMARY) == before:  # by which a sweep knows its jobs
                write_summary(place.run_dir, {"status": "finished", "result": outcome.result})
            tell(outcome, place.run_dir)
            return outcome.result
        except (Exception, Interrupted, KeyboardInterrupt) as error:
            return _end_without_result(error, place)


def _end_without_result(error: BaseException, place: Place) -> float:
    """Report why there is no result: in a line, by the exit status, or to the sweep."""
    if isinstance(error, OmegaConfBaseException | OSError) and is_users(error):  # Hydra would add lines
        error = UserError(one_line(error))
    match error:
        case UserError():
            error_log.error("error: %s", error)
            if not place.sweep:
                tell_error(str(error))
                sys.exit(1)
            mark_failed(place.run_dir, str(error))
            return math.nan
        case BrokenPipeError():
            _end_unread()
        case Interrupted() | KeyboardInterrupt():
            if place.in_worker:
                if watched_sweep().is_set():
                    os._exit(1)  # nobody is there to take a result
                return math.nan
            if place.sweep and not place.is_submitted:
                raise KeyboardInterrupt(*error.args) from None  # the jobs to come are called off
            sys.exit(exit_status(error))
        case _:
            if place.sweep:  # Hydra would not show it
                error_log.exception("error")
            raise error


def _end_unread() -> NoReturn:
    """End as other programs do when the reader of their output, such as `head`, has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at exit
    sys.exit(128 + signal.SIGPIPE)


def _prepare_process(schema: type) -> None:
    """Set up Hydra, and the environment of jobs' processes. May be called again."""
    # A script whose config extends another's, as PlanConfig does PretrainConfig, also uses that one's root
    # file.
    for each in schema.__mro__[:-1]:
        store(f"{each.__name__.removesuffix('Config').lower()}_schema", own_defaults(schema))
    configure_launchers()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # or Hydra would print its errors, not raise them
    logging.raiseExceptions = False  # on a full disk, lose lines of the log without a traceback for each
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(HERE) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), *paths]))
