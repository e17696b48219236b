"""Reusing a run that was made before: a job of a sweep takes over its results, a single run shows them again.

The module in `llm.commands` that does a script's work returns a run's outcome from `outcome_of`, and prints
with `show_again` what the run itself had printed.
"""

import logging
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from answer import tell
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from sweeping.job import Place

from llm.errors import UserError, shown
from llm.files import as_typed
from llm.run_folder import holds_run, refuse_links
from llm.runs import OUTPUTS
from llm.sweeps.jobs import NEVER_VARIED

# Modules that log what they skip or load.
FINDING = ("data.text_files", "data.corpus", "checkpoints.checkpoint")


def made_before(
    script: str, config: DictConfig, given: Collection[str], place: Place
) -> tuple[str | None, Path | None]:
    """The fingerprint of a run, and the folder of a finished run with the same one, if that is to be reused.

    A run that is resumed, or a rerun, has no fingerprint; nor has one whose config is wrong, which the run
    itself will report.
    """
    with suppress(UserError, OmegaConfBaseException, OSError), _said_once():
        settings: Any = OmegaConf.to_object(config)
        if any(getattr(settings, key, None) for key in ("resume", "rerun")):
            return None, None
        if place.sweep and holds_run(place.run_dir):  # a job that goes on
            return None, None
        from llm.commands.done import find_done, fingerprint  # imports torch

        made_with = fingerprint(settings, given)
        if not made_with or settings.if_done == "again":
            return made_with, None
        found = find_done(made_with, _root(place))
        return made_with, found if found and _is_whole(script, found) else None
    return None, None


@contextmanager
def _said_once() -> Iterator[None]:
    """Silence what the run itself will log when it finds its text and its checkpoint."""
    loggers = [logging.getLogger(f"llm.{name}") for name in FINDING]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger in loggers:
            logger.disabled = False


def _is_whole(script: str, folder: Path) -> bool:
    with suppress(UserError):
        refuse_links(folder)
        return bool(_command(script).outcome_of(folder).figures)
    return False


def _command(script: str) -> Any:
    return import_module(f"llm.commands.{script}")


def _root(place: Place) -> Path:
    """Where to look for a finished run: in the folder that the user named for it, or in a sweep outside of
    outputs/; otherwise in outputs/."""
    if place.sweep:
        return OUTPUTS if as_typed(place.sweep).is_relative_to(OUTPUTS) else place.sweep
    return OUTPUTS if place.is_made_up else place.run_dir


def show_again(script: str, config: Any, folder: Path) -> None:
    why = "done already, with the same config, code and data; if_done=again does it again"
    print(f"{shown(str(as_typed(folder)))}: {why}", file=sys.stderr)
    _command(script).show_again(config, folder)
    tell(_command(script).outcome_of(folder), folder, reused=True)


def take_over(script: str, folder: Path, run_dir: Path) -> float | None:
    """Copy a finished run into a job's folder; returns the figure that sweeps compare."""
    from llm.commands.done import copy_run

    copy_run(folder, run_dir)
    result: float | None = _command(script).outcome_of(run_dir).result
    return result


@contextmanager
def noted(run_dir: Path, made_with: str | None, resumed_with: Collection[str] | None) -> Iterator[None]:
    """Record a run's fingerprint, and that the run is done once its work has succeeded.

    Args:
        resumed_with: the keys that were given to a run that is resumed; None for a new run.
    """
    from llm.commands import done

    if resumed_with is not None:
        changed = [key for key in resumed_with if not key.startswith(NEVER_VARIED)]
        done.resume(run_dir, bool(changed))
    elif made_with:
        done.begin(run_dir, made_with)
    yield
    done.end(run_dir)
