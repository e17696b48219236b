"""What a run knows of the sweep that it is a job of."""

from dataclasses import dataclass
from multiprocessing import current_process
from pathlib import Path

from hydra.conf import HydraConf
from hydra.types import RunMode
from omegaconf import DictConfig

from llm.files import as_typed, remove
from llm.run_folder import holds_run
from llm.sweeps.jobs import RECORD, read_record, setting_of, settings_of, title_of
from sweeping.launchers import traits_of
from sweeping.stopping import asked_to_stop, watched_sweep


@dataclass(frozen=True)
class Place:
    """Where a run stands."""

    run_dir: Path
    sweep: Path | None  # the folder of the sweep that it is a job of
    in_worker: bool  # in a process beside those of other jobs, which it must not take down


def place_of(hydra: HydraConf) -> Place:
    """Where the run stands that Hydra has composed."""
    run_dir = Path(hydra.runtime.output_dir)
    if hydra.mode != RunMode.MULTIRUN:
        return Place(run_dir, None, False)
    # With one job at once, joblib needs no worker.
    in_worker = traits_of(hydra.launcher).side_by_side and current_process().name != "MainProcess"
    return Place(run_dir, run_dir.parent, in_worker)


def is_called_off(place: Place) -> bool:
    """Whether a job in a worker need not begin, because its sweep was asked to stop."""
    if not place.in_worker:
        return False
    watched_sweep()
    called_off = asked_to_stop(place.run_dir.parent)
    if called_off and not holds_run(place.run_dir):
        remove(place.run_dir)
    return called_off


def complete(config: DictConfig, place: Place, overrides: list[str]) -> None:
    """Fill in what follows from whether this is a job of a sweep, and of which."""
    if place.sweep and "resume" in config and holds_run(place.run_dir):
        config.resume = str(place.run_dir)  # the sweep is being resumed
    if "study" in config and config.study is None:
        config.study = place.sweep is not None
    if "tracking" in config:
        if config.tracking.name is None:
            config.tracking.name = _title(place.sweep, overrides).replace("${", r"\${") or "default"
        if config.tracking.group is None and place.sweep:
            config.tracking.group = str(as_typed(place.sweep))


def _title(sweep: Path | None, overrides: list[str]) -> str:
    """A run's name: what varies in its sweep, or what was overridden."""
    if sweep and (sweep / RECORD).exists():  # Hydra's own sweeper, hydra/sweeper=basic, keeps no record
        return title_of(setting_of(overrides, read_record(sweep)["varied"]))
    [setting, _] = settings_of([overrides, []])
    return title_of(setting)
