"""A run's record in its folder: the composed config, the overrides and the log.

Hydra would write these before it is known whether the folder is free, so that is turned off, and they are
written here once the folder is claimed. `.hydra/` is for people: a run is resumed from its checkpoints.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from hydra_versions import as_yaml
from omegaconf import DictConfig
from sweeping.job import Place, composed_config

from llm.errors import UserError
from llm.files import write_text
from llm.progress import LineFormatter

error_log = logging.getLogger("error")  # for the error that ended a run, which goes to its log file only
error_log.propagate = False
error_log.addHandler(logging.NullHandler())  # without one, logging would print it


def write_record(config: DictConfig, place: Place) -> None:
    """Write `.hydra/` as Hydra would: with interpolations as they were typed."""
    hydra_config = composed_config()
    folder = place.run_dir / ".hydra"
    write_text(folder / "config.yaml", as_yaml(config))
    write_text(folder / "hydra.yaml", as_yaml(hydra_config))
    write_text(folder / "overrides.yaml", as_yaml(hydra_config.hydra.overrides.task))


@contextmanager
def logged(place: Place, script: str | None) -> Iterator[None]:
    """Log to a file in the run's folder; a job of a sweep logs only there, as the terminal shows the sweep.

    Raises:
        UserError: the file cannot be written.
    """
    path = place.run_dir / f"{script}.log"
    if path.is_symlink() or path.is_fifo():  # never write through it
        path.unlink()
    try:
        file = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    file.setFormatter(LineFormatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    root = logging.getLogger()
    shown = list(root.handlers)
    if place.sweep:
        root.handlers.clear()
    error_log.disabled = False  # hydra/job_logging=disabled disables all loggers
    for logger in (root, error_log):
        logger.addHandler(file)
    try:
        yield
    finally:
        for logger in (root, error_log):
            logger.removeHandler(file)
        file.close()
        root.handlers[:] = shown
