"""Running the jobs of a sweep in batches, running them again if the launcher breaks, and marking those that
failed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra_errors import one_line
from omegaconf.errors import OmegaConfBaseException
from sweeping.launchers import Traits, deaths_as_results
from sweeping.stopping import asked_to_stop

from llm.errors import UserError, first_line
from llm.files import modified
from llm.overrides import quoted, split_override
from llm.run_folder import mark_failed
from llm.sweeps.jobs import DONE, RECORD, Job, state_since, write_record


@dataclass
class Sweep:
    """A sweep that this process runs. The outcome of a job is read from the job's own files, so any process
    that has the folder can continue the sweep."""

    folder: Path
    script: str  # its name, such as `pretrain`
    arguments: list[str]  # with which it was started
    varied: list[str]  # keys that vary between jobs
    jobs: list[list[str]]  # the overrides of each job, by its number; a search adds to them
    changes: list[str] = field(default_factory=list)  # further overrides for jobs that start from now on
    since: float = field(init=False)  # when this process started, in seconds since 1970

    def __post_init__(self) -> None:
        self.write_record()
        self.since = modified(self.folder / RECORD)

    def write_record(self) -> None:
        write_record(self.folder, self.script, self.arguments, self.varied, self.jobs)

    def job(self, number: int) -> Job:
        return Job(self.folder / str(number), str(number), self.jobs[number]).reread()

    def without_result(self) -> list[int]:
        return [number for number in range(len(self.jobs)) if self.job(number).state not in DONE]

    def state(self, number: int) -> str:
        return state_since(self.job(number), self.since)

    def fail(self, number: int, reason: str) -> None:
        """Mark a job as failed that could not do so itself."""
        mark_failed(self.job(number).folder, reason)


@dataclass(frozen=True)
class Runner:
    """Hands jobs to Hydra's launcher."""

    sweep: Sweep
    launcher: Launcher
    traits: Traits
    gpus: Sequence[str]  # to be handed out

    def run(self, numbers: list[int]) -> None:
        """Launch jobs together.

        A launcher may break, as joblib does when one of its processes is killed. The jobs that had started
        are then run again one at a time; one that breaks the launcher again has failed.

        Raises:
            KeyboardInterrupt: the sweep was asked to stop.
        """
        try:
            with deaths_as_results(self.traits):
                overrides = [self._overrides(number, place) for place, number in enumerate(numbers)]
                results: Sequence[Any] = self.launcher.launch(overrides, numbers[0])
        except Exception as error:
            self._raise_if_stopped()
            if len(numbers) == 1:
                self.sweep.fail(numbers[0], self._reason(error))
            else:
                self._run_again(numbers)
            return
        self._raise_if_stopped()
        for number, result in zip(numbers, results, strict=True):
            if self._has_not_ended(number):
                outcome = result if isinstance(result, Exception) else result._return_value
                self.sweep.fail(number, self._reason(outcome))

    def _run_again(self, numbers: list[int]) -> None:
        left = [number for number in numbers if self._has_not_ended(number)]
        begun = [number for number in left if self.sweep.state(number) == "running"] or left[:1]
        for number in begun:
            self.run([number])
        if rest := [number for number in left if number not in begun]:
            self.run(rest)

    def _raise_if_stopped(self) -> None:
        if asked_to_stop(self.sweep.folder):
            raise KeyboardInterrupt

    def _has_not_ended(self, number: int) -> bool:
        return self.sweep.state(number) in ("running", "waiting")

    def _overrides(self, number: int, place: int) -> list[str]:
        """All overrides of a job.

        Args:
            place: the job's place among those that are launched together.
        """
        given = [*self.sweep.jobs[number], *self.sweep.changes]
        last_of_each_key = {split_override(override)[0]: override for override in given}
        folder = [f"hydra.sweep.dir={quoted(str(self.sweep.folder))}", f"hydra.sweep.subdir={number}"]
        gpu = []
        if len(self.gpus) > 1:
            # A process keeps the GPU of its first job, as CUDA reads this only once.
            name = quoted(self.gpus[place % len(self.gpus)])
            gpu = [f"+hydra.job.env_set.CUDA_VISIBLE_DEVICES={name}"]
        return [*last_of_each_key.values(), *folder, *gpu]

    def _reason(self, outcome: Any) -> str:
        """Why a job has no result, in one line.

        Args:
            outcome: what its process raised or returned.
        """
        if type(outcome).__name__ == self.traits.death:
            return "its process was killed; it may have run out of memory"
        return reason_of(outcome) if isinstance(outcome, Exception) else "it wrote no summary"


def reason_of(error: Exception) -> str:
    if isinstance(error, HydraException | OmegaConfBaseException | UserError):
        return one_line(error)
    return f"{type(error).__name__}: {first_line(error)}"
