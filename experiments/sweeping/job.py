"""A run's place: its folder, the sweep that it may be a job of, and the process that it runs in."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import current_process
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, read_write
from sweeping.launchers import traits_of
from sweeping.stopping import asked_to_stop, watched_sweep

from llm.config import GenerateConfig, PretrainConfig
from llm.files import as_typed, remove
from llm.overrides import title_of
from llm.run_folder import claimed, holds_run
from llm.runs import has_begun
from llm.sweeps.jobs import RECORD, read_record, setting_of, settings_of


@dataclass(frozen=True)
class Place:
    """Where a run is executed."""

    run_dir: Path
    sweep: Path | None = None  # the folder of the sweep that it is a job of
    in_worker: bool = False  # in a worker process beside others, which it must not take down
    is_submitted: bool = False  # by submitit, in a process of its own
    is_made_up: bool = False  # the folder's name comes from the clock, not from the user

    def remove_if_empty(self) -> None:
        """Delete the folder and its parents (of the day, and so on) if they are empty: the run was refused,
        or reused one that was done already."""
        if self.is_made_up:
            with suppress(OSError):  # not empty
                for folder in (self.run_dir, *as_typed(self.run_dir).parents[:-1]):
                    with suppress(FileNotFoundError):
                        folder.rmdir()


def place_of(hydra: HydraConf) -> Place:
    """The place of the run that Hydra has composed."""
    run_dir = Path(hydra.runtime.output_dir)
    if hydra.mode != RunMode.MULTIRUN:
        return Place(run_dir, is_made_up=names_by_clock(composed_config().hydra.run))
    # With one job at a time, joblib uses no worker.
    in_worker = traits_of(hydra.launcher).side_by_side and current_process().name != "MainProcess"
    return Place(run_dir, run_dir.parent, in_worker, traits_of(hydra.launcher).submits)


def composed_config() -> DictConfig:
    """Hydra's own config, with interpolations unresolved."""
    config: Any = HydraConfig.instance().cfg
    return config


def unresolved(config: DictConfig | ListConfig) -> Any:
    """A part of a config as it was typed, with interpolations unresolved."""
    return OmegaConf.to_container(config, resolve=False)


def names_by_clock(folder: DictConfig) -> bool:
    """Whether `hydra.run.dir` or `hydra.sweep.dir` is named by the time, as it is by default."""
    return "${now:" in unresolved(folder)["dir"]


@contextmanager
def claimed_place(place: Place, resumes: bool) -> Iterator[Place]:
    """Claim the run's folder, or one beside it; see `claimed`. A job's folder may hold what an earlier start
    of the job left."""
    old = resumes or place.sweep is not None
    with claimed(place.run_dir, old, beside=place.is_made_up and not old) as run_dir:
        config = composed_config()
        with read_write(config.hydra.runtime):
            config.hydra.runtime.output_dir = str(run_dir)
        yield replace(place, run_dir=run_dir)


def is_called_off(place: Place) -> bool:
    """Whether a job in a worker should not start, because its sweep was asked to stop."""
    if not place.in_worker:
        return False
    watched_sweep()
    called_off = asked_to_stop(place.run_dir.parent)
    if called_off and not holds_run(place.run_dir):
        remove(place.run_dir)
    return called_off


def complete(config: Any, place: Place, overrides: list[str]) -> Any:
    """Fill in what depends on whether this is a job of a sweep, and of which."""
    if isinstance(config, PretrainConfig) and place.sweep and has_begun(place.run_dir):
        config.resume = str(place.run_dir)  # the sweep is being resumed
    if isinstance(config, GenerateConfig) and config.study is None:
        config.study = place.sweep is not None
    if place.sweep:  # or all its jobs would be the same W&B run
        os.environ.pop("WANDB_RUN_ID", None)
    if isinstance(config, PretrainConfig | GenerateConfig):  # W&B's variables set keys that are null
        if config.tracking.name is None and not os.environ.get("WANDB_NAME"):
            config.tracking.name = _title(place.sweep, overrides) or "default"
        if config.tracking.group is None and place.sweep and not os.environ.get("WANDB_RUN_GROUP"):
            config.tracking.group = str(as_typed(place.sweep))
    return config


def _title(sweep: Path | None, overrides: list[str]) -> str:
    """A run's name: what varies in its sweep, or what was overridden."""
    if sweep and (sweep / RECORD).exists():  # Hydra's own sweeper, hydra/sweeper=basic, keeps no record
        return title_of(setting_of(overrides, read_record(sweep)["varied"]))
    [setting, _] = settings_of([overrides, []])
    return title_of(setting)
