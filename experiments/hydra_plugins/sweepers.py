"""The sweepers: a grid of settings, and a search by Optuna. They choose jobs; `sweeping` runs them.

Hydra finds sweepers only in the package `hydra_plugins`, and imports all of it at every start.
"""

import sys
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from answer import tell
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra_errors import refuse_unknown_keys
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from sweeping.folder import claimed
from sweeping.job import unresolved
from sweeping.launchers import made_launcher, traits_of
from sweeping.machine import divide_machine
from sweeping.planning import Old, Plan, groups_of_keys, in_order, plan_jobs, said_of
from sweeping.recorded import ORDERS, check_jobs
from sweeping.running import Runner, Sweep, reason_of
from sweeping.stopping import exit_status, stoppable
from sweeping.table import read_table
from sweeping.tasks import divide_job
from sweeping.values import Values

from llm.errors import UserError, shown
from llm.launched import PROCESSES, launched_rank
from llm.sweeps.comparing import TEXT_KEYS
from llm.sweeps.jobs import SweepRecord, read_jobs, read_record

Planned = tuple[list[list[str]], list[str]]  # jobs, and the keys that vary between them
SET_BY_US = ("hydra.sweep.dir=", "hydra.mode=")


class RecordedSweeper(Sweeper):
    """What all our sweepers share: a sweep is recorded, shown as it runs, can be resumed, and ends with a
    report.

    A sweeper implements `plan` and `batches`. Its settings are the arguments of `__init__`, see also
    sweeping/recorded.py.
    """

    total = 0  # number of jobs, at least
    at_once: int  # the most jobs that the launcher is given at once
    n_jobs = 1  # jobs that run at once in processes on this machine
    gpus: Sequence[str] = ()  # handed out to these in turn
    nodes = 1  # of each job
    tasks = 1  # of each job, per node
    closing = ""  # printed at the end, besides what every sweep prints
    zip: Any = None  # the value of sweep.zip: keys whose values go together, or several lists of them
    table: str | None = None  # a file of settings

    def __init__(self, params: Mapping[str, Any] | None = None, resume: bool = False) -> None:
        """
        Args:
            params: overrides for all jobs; the command line takes precedence.
            resume: continue the sweep in `hydra.sweep.dir`.
        """
        self.params = dict(params or {})
        self.resume = resume

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context: HydraContext = hydra_context
        self.task_function: TaskFunction = task_function
        self.config: DictConfig = config

    @abstractmethod
    def plan(self, overrides: dict[str, Override], record: SweepRecord | None) -> Planned:
        """Decide what to sweep over, before anything is written.

        Args:
            overrides: those of the command line, by key.
            record: that of the sweep that is continued, if one is.

        Returns:
            The overrides of each job that is known from the start, and the keys that vary.
        """

    @abstractmethod
    def batches(self, sweep: Sweep) -> Iterator[list[int]]:
        """Yield lists of jobs, by number, to be launched together. Each list is requested after the jobs of
        the last one have ended, and may depend on their results."""

    def sweep(self, arguments: list[str]) -> None:
        """Run all jobs that have no result yet, and conclude.

        Exits with status 1 if a job failed, and after a signal with a shell's status, such as 130 after
        Ctrl-C.

        Raises:
            UserError: the folder is taken, or holds no such sweep.
            HydraException: no job's overrides fit.
        """
        if launched_rank() is not None:
            raise UserError("torchrun begins one run, not a sweep: run without it, and set runtime.processes")
        overrides = self._parsed(arguments)
        if self.resume:
            with claimed(self.config, resume=True) as folder:
                self._run_to_end(self._recorded(folder, overrides, arguments))
            return
        jobs, varied = self._prepared(overrides, None)
        hydra_overrides = unresolved(self.config.hydra.overrides.hydra)
        with claimed(self.config, resume=False) as folder:
            sweep = Sweep(
                folder,
                script=self.config.hydra.job.config_name,
                arguments=[each for each in hydra_overrides if not each.startswith(SET_BY_US)] + arguments,
                varied=varied,
                jobs=jobs,
            )
            self._run_to_end(sweep)

    def _prepared(self, overrides: dict[str, Override], record: SweepRecord | None) -> Planned:
        """Plan the sweep and divide the machine among its jobs; whatever is wrong is found here."""
        jobs, varied = self.plan(overrides, record)
        self.total = max(self.total, len(jobs))
        self.traits = traits_of(self.config.hydra.launcher)
        if self.traits.side_by_side:
            self.n_jobs, self.gpus = divide_machine(self.config, self.at_once)
        if self.traits.submits:
            self.nodes, self.tasks = divide_job(self.config, jobs)
        return jobs, varied

    def _recorded(self, folder: Path, overrides: dict[str, Override], arguments: list[str]) -> Sweep:
        """The sweep in a folder, with the changes that may be given for jobs that start from now on."""
        record = read_record(folder)
        given_again = check_jobs(record["jobs"], OmegaConf.get_type(self.config), folder)
        record["jobs"], record["varied"] = self._prepared(overrides, record)
        free = ("tracking", *given_again)
        return Sweep(folder, **record, changes=[each for each in arguments if each.startswith(free)])

    def _run_to_end(self, sweep: Sweep) -> None:
        from llm.commands.conclude import conclude  # not needed by Hydra's scan for plugins

        try:
            self._run(sweep)
            status = 0
        except KeyboardInterrupt as error:
            status = exit_status(error)
        outcome = conclude(sweep.folder)
        tell(outcome, sweep.folder)
        if outcome.failed and not status:
            status = 1
        if self.closing:
            print(shown(self.closing))
        if status:
            sys.exit(status)

    def _parsed(self, arguments: list[str]) -> dict[str, Override]:
        """The overrides for all jobs by key; of two for the same key, the last counts."""
        params = [f"{key}={value}" for key, value in self.params.items()]
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        return {each.get_key_element(): each for each in parser.parse_overrides([*params, *arguments])}

    def _run(self, sweep: Sweep) -> None:
        """Run the jobs that have no result yet.

        Raises:
            KeyboardInterrupt: the sweep was stopped.
        """
        from llm.sweeps.watch import SweepProgress, watching

        if self.nodes * self.tasks > 1:
            sweep.changes.append(f"{PROCESSES}={self.nodes * self.tasks}")
        launcher = made_launcher(self.hydra_context, self.task_function, self.config, self.n_jobs, self.tasks)
        runner = Runner(sweep, launcher, self.traits, self.gpus)
        progress = SweepProgress(sweep.folder, sweep.since, self.total)
        with stoppable(sweep.folder, self.n_jobs > 1), watching(progress):
            for numbers in self.batches(sweep):
                runner.run(numbers)

    def planned(self, overrides: dict[str, Override], old: Old | None = None) -> Plan:
        """The distinct settings that were typed, zipped and tabled, after those of the old jobs."""
        schema = OmegaConf.get_type(self.config)
        rows = [] if self.table is None else read_table(Path(self.table), schema)
        folder = Path(self.config.hydra.sweep.dir) if old else None
        values = Values(schema, self._composed_or_none, folder)
        plan = plan_jobs(overrides, groups_of_keys(self.zip), rows, old, values.of, values.default)
        print(said_of(plan, old), end="")
        return plan

    def _composed_or_none(self, overrides: list[str]) -> DictConfig | None:
        return None if self.refused(overrides) else self.composed(overrides)

    def composed(self, overrides: list[str]) -> DictConfig:
        return self.hydra_context.config_loader.load_sweep_config(self.config, overrides)

    def refused(self, overrides: list[str]) -> Exception | None:
        """The error with which Hydra refuses a job's overrides; None if it accepts them."""
        try:
            config = self.composed(overrides)
            with open_dict(config):
                del config["hydra"]
            refuse_unknown_keys(config, OmegaConf.get_type(config))
        except (HydraException, OmegaConfBaseException, UserError, ValueError) as error:
            return error  # of model=null, a ValueError
        return None


class GridSweeper(RecordedSweeper):
    """Every combination of the values given for each key, as Hydra's own sweeper has them, with keys whose
    values go together, and settings from a file; see sweeping/planning.py."""

    def __init__(
        self,
        params: Mapping[str, Any] | None = None,
        resume: bool = False,
        max_batch_size: int | None = None,
        zip: Any = None,
        table: str | None = None,
        order: str = ORDERS[0],
        extend: bool = False,
    ) -> None:
        """
        Args:
            max_batch_size: jobs handed to the launcher at once; None: all.
            zip: a list of keys whose values go together, or several such lists.
            table: a file of settings, see sweeping/table.py.
            order: the order in which jobs run, one of `ORDERS`.
            extend: add what is typed to the sweep that is continued.
        """
        super().__init__({} if extend else params, resume)
        self.max_batch_size, self.order, self.extend = max_batch_size, order, extend
        self.zip, self.table = zip, table

    def plan(self, overrides: dict[str, Override], record: SweepRecord | None) -> Planned:
        if self.order not in ORDERS:
            raise UserError(f"sweep.order={self.order}: must be one of {', '.join(ORDERS)}")
        jobs, varied = self._jobs(overrides, record)
        values = dict.fromkeys(each for job in jobs for each in job)
        # Composing a config takes a tenth of a second, and there may be a thousand jobs. So the first job is
        # tried as a whole, and then each value that is not in it once.
        fitting = set() if self.refused(jobs[0]) else set(jobs[0])
        errors = {value: self.refused([value]) for value in values if value not in fitting}
        self.misfits = {value: error for value, error in errors.items() if error}
        asked_for = jobs[len(record["jobs"]) :] if record and self.extend else jobs
        if asked_for and all(self._misfit(job) for job in asked_for):
            raise next(iter(self.misfits.values()))
        self.at_once = self.max_batch_size or len(jobs)
        return jobs, varied

    def _jobs(self, overrides: dict[str, Override], record: SweepRecord | None) -> Planned:
        """The jobs of the record, and those that were asked for."""
        if record and not self.extend:
            return record["jobs"], record["varied"]
        old = None
        if record:
            overrides = {key: each for key, each in overrides.items() if not key.startswith("tracking")}
            old = Old(record["jobs"], record["varied"])
        plan = self.planned(overrides, old)
        return plan.jobs, plan.varied

    def _misfit(self, overrides: list[str]) -> Exception | None:
        """Why a job cannot be composed, if it cannot."""
        return next((self.misfits[each] for each in overrides if each in self.misfits), None)

    def batches(self, sweep: Sweep) -> Iterator[list[int]]:
        numbers = []
        for number in in_order(sweep.without_result(), sweep.jobs, self.order):
            if misfit := self._misfit(sweep.jobs[number]):
                sweep.fail(number, reason_of(misfit))
            else:
                numbers.append(number)
        yield from chunks(numbers, self.at_once)


class OptunaSweeper(RecordedSweeper):
    """A search for the lowest validation loss. Keys with a sweep are searched, all others are fixed.

    What is tried next is a function of the seed and the results so far, which are read from the jobs'
    folders. So a search that was interrupted continues as if it had not been. Hydra's own plugin pins an
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
            seed: the search's seed; that of the runs is the key `seed`.
        """
        super().__init__(params, resume)
        self.total, self.at_once = n_trials, n_jobs
        self.n_startup_trials, self.seed = n_startup_trials, seed

    def plan(self, overrides: dict[str, Override], record: SweepRecord | None) -> Planned:
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
        return (record["jobs"], record["varied"]) if record else ([], list(searched))

    def batches(self, sweep: Sweep) -> Iterator[list[int]]:
        yield from chunks(sweep.without_result(), self.at_once)
        while (begun := len(sweep.jobs)) < self.total:
            count = min(self.at_once, self.total - begun)
            suggested = self.search.suggest(read_jobs([sweep.folder]), count)
            sweep.jobs += [[*self.fixed, *overrides] for overrides in suggested]
            sweep.write_record()
            yield list(range(begun, begun + count))


def chunks(numbers: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]
