"""The sweepers: a grid of settings, and a search by Optuna. They choose jobs; `sweeping` runs them.

Hydra finds sweepers only in the package `hydra_plugins`, and imports all of it at every start.
"""

import sys
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from itertools import chain, product
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra_errors import refuse_unknown_keys
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from sweeping.folder import claimed
from sweeping.job import unresolved
from sweeping.launchers import traits_of
from sweeping.machine import divide_machine
from sweeping.recorded import check_jobs
from sweeping.running import Runner, Sweep, reason_of
from sweeping.stopping import exit_status, stoppable

from llm.errors import UserError, shown
from llm.sweeps.comparing import TEXT_KEYS
from llm.sweeps.jobs import read_jobs, read_record

SET_BY_US = ("hydra.sweep.dir=", "hydra.mode=")


class RecordedSweeper(Sweeper):
    """What both sweepers share: a sweep that is recorded, watched, can be resumed, and ends with a report."""

    total: int  # jobs that there will be; known once they are planned
    at_once: int  # jobs that the launcher is given at once, at most
    closing = ""  # what is said at the end, besides what every sweep says

    def __init__(self, params: Mapping[str, Any] | None = None, resume: bool = False) -> None:
        """
        Args:
            params: overrides of all jobs, which the command line's come after.
            resume: continue the sweep in `hydra.sweep.dir`.
        """
        self.params = dict(params or {})
        self.resume = resume

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context: HydraContext = hydra_context
        self.task_function: TaskFunction = task_function
        self.config: DictConfig = config

    @abstractmethod
    def plan(self, overrides: dict[str, Override]) -> list[list[str]]:
        """Understand what is swept over, before anything is written.

        Args:
            overrides: by their keys.

        Returns:
            The overrides of each job that is known from the start.
        """

    def varied(self, overrides: dict[str, Override]) -> list[str]:
        """The keys whose values set jobs apart."""
        return [key.lstrip("+") for key, each in overrides.items() if each.is_sweep_override()]

    @abstractmethod
    def batches(self, sweep: Sweep) -> Iterator[list[int]]:
        """Lists of jobs, by number, to be launched together. Each list is asked for once the jobs of the last
        have ended, and may depend on what came of them."""

    def sweep(self, arguments: list[str]) -> None:
        """Run all jobs that have no result yet, and conclude.

        Exits with status 1 if one failed, and after a signal with that of a shell: 130 after Ctrl-C.

        Raises:
            UserError: the folder is taken, or holds no such sweep.
            HydraException: no job's overrides fit.
        """
        from llm.commands.conclude import conclude  # not needed by Hydra's scan for plugins

        overrides = self._parsed(arguments)
        jobs = self.plan(overrides)
        with claimed(self.config, self.resume) as folder:
            if self.resume:
                sweep = self._recorded(folder, arguments)
            else:
                hydra_overrides = unresolved(self.config.hydra.overrides.hydra)
                sweep = Sweep(
                    folder,
                    script=self.config.hydra.job.config_name,
                    arguments=[each for each in hydra_overrides if not each.startswith(SET_BY_US)]
                    + arguments,
                    varied=self.varied(overrides),
                    jobs=jobs,
                )
            self.total = max(self.total, len(sweep.jobs))
            try:
                self._run(sweep)
                status = 0
            except KeyboardInterrupt as error:
                status = exit_status(error)
            if conclude(folder) and not status:
                status = 1
            if self.closing:
                print(shown(self.closing))
        if status:
            sys.exit(status)

    def _recorded(self, folder: Path, arguments: list[str]) -> Sweep:
        """The sweep in a folder, whose jobs get from here on what may be given again."""
        record = read_record(folder)
        given_again = check_jobs(record["jobs"], OmegaConf.get_type(self.config), folder)
        free = ("tracking", *given_again)
        return Sweep(folder, **record, changes=[each for each in arguments if each.startswith(free)])

    def _parsed(self, arguments: list[str]) -> dict[str, Override]:
        """The overrides of all jobs by their keys; of two for a key the last counts."""
        params = [f"{key}={value}" for key, value in self.params.items()]
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        return {each.get_key_element(): each for each in parser.parse_overrides([*params, *arguments])}

    def _run(self, sweep: Sweep) -> None:
        """Run what has no result yet.

        Raises:
            KeyboardInterrupt: the sweep was stopped.
        """
        from llm.sweeps.watch import SweepProgress, watching

        config, traits = self.config, traits_of(self.config.hydra.launcher)
        gpus = divide_machine(config, self.at_once) if traits.side_by_side else []
        side_by_side = traits.side_by_side and config.hydra.launcher.n_jobs > 1
        launcher = Plugins.instance().instantiate_launcher(self.hydra_context, self.task_function, config)
        runner = Runner(sweep, launcher, traits, gpus)
        progress = SweepProgress(sweep.folder, sweep.since, self.total)
        with stoppable(sweep.folder, side_by_side), watching(progress):
            for numbers in self.batches(sweep):
                runner.run(numbers)

    def refused(self, overrides: list[str]) -> Exception | None:
        """Why Hydra does not take a job's overrides, if it does not."""
        try:
            config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
            with open_dict(config):
                del config["hydra"]
            refuse_unknown_keys(config, OmegaConf.get_type(config))
        except (HydraException, OmegaConfBaseException, UserError, ValueError) as error:
            return error  # of model=null, a ValueError
        return None


class GridSweeper(RecordedSweeper):
    """Every combination of the values given for each key, as Hydra's own sweeper has them."""

    def __init__(
        self, params: Mapping[str, Any] | None = None, resume: bool = False, max_batch_size: int | None = None
    ) -> None:
        """
        Args:
            max_batch_size: jobs handed to the launcher at once; None: all.
        """
        super().__init__(params, resume)
        self.max_batch_size = max_batch_size

    def plan(self, overrides: dict[str, Override]) -> list[list[str]]:
        values = [[f"{key}={value}" for value in values_of(each)] for key, each in overrides.items()]
        jobs = [list(job) for job in product(*values)]
        # Composing a config takes a tenth of a second, and there may be a thousand jobs: the first is tried
        # as a whole, and each value that this did not show to fit is tried once.
        fitting = set() if self.refused(jobs[0]) else set(jobs[0])
        errors = {
            value: self.refused([value]) for value in chain.from_iterable(values) if value not in fitting
        }
        self.misfits = {value: error for value, error in errors.items() if error}
        if all(self._misfit(job) for job in jobs):
            raise next(iter(self.misfits.values()))
        self.total, self.at_once = len(jobs), self.max_batch_size or len(jobs)
        return jobs

    def _misfit(self, overrides: list[str]) -> Exception | None:
        """Why a job cannot be composed, if it cannot."""
        return next((self.misfits[each] for each in overrides if each in self.misfits), None)

    def batches(self, sweep: Sweep) -> Iterator[list[int]]:
        numbers = []
        for number in sweep.without_result():
            if misfit := self._misfit(sweep.jobs[number]):
                sweep.fail(number, reason_of(misfit))
            else:
                numbers.append(number)
        yield from chunks(numbers, self.at_once)


class OptunaSweeper(RecordedSweeper):
    """A search for the lowest validation loss. Keys with a sweep are searched, all others are fixed.

    What is tried next is a function of the seed and of what came of the jobs so far, which is read from their
    folders, so that a search that was cut off continues as if it had not been. Hydra's own plugin pins an
    Optuna of 2022, and can neither stop jobs early nor resume.
    """

    def __init__(
        self,
        params: Mapping[str, Any] | None = None,
        resume: bool = False,
        n_trials: int = 20,
        n_jobs: int = 1,
        n_startup_trials: int = 10,
        seed: int = 123,
    ) -> None:
        """
        Args:
            n_trials: jobs in all.
            n_jobs: jobs launched side by side, chosen together.
            n_startup_trials: jobs drawn at random before the estimator chooses.
            seed: of the search; that of the runs is the key `seed`.
        """
        super().__init__(params, resume)
        self.total, self.at_once = n_trials, n_jobs
        self.n_startup_trials, self.seed = n_startup_trials, seed

    def plan(self, overrides: dict[str, Override]) -> list[list[str]]:
        try:
            from sweeping.search import Search, as_distribution
        except ModuleNotFoundError as error:
            raise UserError(
                "hydra/sweeper=optuna needs Optuna: pip install -c constraints.txt -e '.[optuna]'"
            ) from error

        if self.config.hydra.job.name != "pretrain":
            raise UserError("hydra/sweeper=optuna searches for the lowest val_loss: it is for pretrain.py")
        searched = {key: each for key, each in overrides.items() if each.is_sweep_override()}
        if not searched:
            raise UserError(
                "hydra/sweeper=optuna has nothing to search: give a key as interval(…) or choice(…)"
            )
        if decisive := [key for key in searched if key in TEXT_KEYS]:
            raise UserError(
                f"hydra/sweeper=optuna searches for the lowest loss on one text, which {', '.join(decisive)} "
                f"would change: give one value, or a grid, which ranks each text by itself"
            )
        distributions = {key: as_distribution(each) for key, each in searched.items()}
        self.search = Search(distributions, self.seed, self.n_startup_trials)
        self.fixed = [
            f"{key}={each.get_value_element_as_str()}"
            for key, each in overrides.items()
            if key not in searched
        ]
        if refusal := self.refused([*self.fixed, *self.search.example()]):
            raise refusal
        return []

    def batches(self, sweep: Sweep) -> Iterator[list[int]]:
        yield from chunks(sweep.without_result(), self.at_once)
        while (begun := len(sweep.jobs)) < self.total:
            count = min(self.at_once, self.total - begun)
            suggested = self.search.suggest(read_jobs([sweep.folder]), count)
            sweep.jobs += [[*self.fixed, *overrides] for overrides in suggested]
            sweep.write_record()
            yield list(range(begun, begun + count))


def values_of(override: Override) -> list[str]:
    """The values of a grid for a key, one or several.

    Raises:
        UserError: the override gives an interval, which has no values to list.
    """
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    if not override.is_discrete_sweep():
        raise UserError(
            f"{override.input_line}: a grid needs values, as in {override.key_or_group}=1,2; "
            f"hydra/sweeper=optuna searches an interval"
        )
    return list(override.sweep_string_iterator())


def chunks(numbers: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]
