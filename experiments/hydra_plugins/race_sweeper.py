"""The sweeper that races settings: `hydra/sweeper=race`."""

from collections.abc import Iterator, Mapping
from typing import Any

from hydra.core.override_parser.types import Override
from hydra_plugins.sweepers import Planned, RecordedSweeper, chunks
from sweeping.planning import key_of
from sweeping.running import Sweep

from llm.errors import UserError
from llm.files import write_json
from llm.overrides import split_override, title_of
from llm.sweeps.comparing import TEXT_KEYS, comparisons
from llm.sweeps.jobs import SweepRecord, read_jobs, setting_of

FIRST_SEEDS = 3  # with fewer, no difference is large enough to decide


class RaceSweeper(RecordedSweeper):
    """Runs settings with more and more seeds, until all but one are ruled out; see llm/sweeps/race.py.

    What runs next is a function of the results so far, which are read from the jobs' folders. So a race that
    was interrupted continues as if it had not been.
    """

    def __init__(
        self,
        params: Mapping[str, Any] | None = None,
        resume: bool = False,
        max_seeds: int = 20,
        level: float = 0.05,
        n_jobs: int = 1,
        zip: Any = None,
        table: str | None = None,
    ) -> None:
        """
        Args:
            max_seeds: seeds of each setting, after which the race ends undecided.
            level: upper bound of the probability that the truly best setting is ruled out.
            n_jobs: jobs launched side by side.
            zip, table: where settings come from, besides the command line, as in a grid.
        """
        super().__init__(params, resume)
        self.zip, self.table = zip, table
        self.max_seeds, self.level, self.at_once = max_seeds, level, n_jobs

    def plan(self, overrides: dict[str, Override], record: SweepRecord | None) -> Planned:
        if self.config.hydra.job.name != "pretrain":
            raise UserError("hydra/sweeper=race compares final losses: it is for pretrain.py")
        if self.max_seeds < FIRST_SEEDS or not 0 < self.level < 1:
            raise UserError(
                f"hydra.sweeper.max_seeds={self.max_seeds} hydra.sweeper.level={self.level}: a race needs "
                f"{FIRST_SEEDS} seeds or more, and a level between 0 and 1"
            )
        if record and record["jobs"]:
            self.varied_keys = [key for key in record["varied"] if key != "seed"]
            self.settings = [[*each] for each in dict.fromkeys(tuple(job[:-1]) for job in record["jobs"])]
            self.first_seed = seed_of(record["jobs"][0])
            return record["jobs"], record["varied"]
        swept = [key for key, each in overrides.items() if each.is_sweep_override()]
        seed = overrides.get("seed")
        plan = self.planned({key: each for key, each in overrides.items() if key != "seed"})
        in_table = [key_of(each) for job in plan.jobs for each in job if key_of(each) not in overrides]
        if decisive := [key for key in dict.fromkeys([*swept, *in_table]) if key in ("seed", *TEXT_KEYS)]:
            raise UserError(
                f"hydra/sweeper=race adds the seeds itself, and compares losses on one text: give one value "
                f"of {', '.join(decisive)}"
            )
        self.settings, self.varied_keys = plan.jobs, plan.varied
        if len(self.settings) < 2:
            raise UserError(
                "hydra/sweeper=race needs two settings or more: give a key several values, as in a=1,2"
            )
        for setting in self.settings:
            if refusal := self.refused(setting):
                raise refusal
        self.first_seed = int(seed.get_value_element_as_str()) if seed else self.config.seed
        jobs = [
            self._job(number, place) for place in range(FIRST_SEEDS) for number in range(len(self.settings))
        ]
        return jobs, [*self.varied_keys, "seed"]

    def _job(self, number: int, place: int) -> list[str]:
        return [*self.settings[number], f"seed={self.first_seed + place}"]

    def batches(self, sweep: Sweep) -> Iterator[list[int]]:
        from llm.sweeps.race import OUTCOME, ruled_out  # imports numpy, which no other sweep waits for

        yield from chunks(sweep.without_result(), self.at_once)
        while True:
            seeds = self._seeds(sweep)
            left = ruled_out(self._figures(sweep), seeds, self.level)
            racing = [number for number, at in enumerate(left) if at is None]
            outcome = self._outcome(left, seeds, len(sweep.jobs))
            write_json(sweep.folder / OUTCOME, outcome)
            self.closing = f"race        {outcome['verdict']}"
            if len(racing) < 2 or seeds >= self.max_seeds:
                return
            begun = len(sweep.jobs)
            sweep.jobs += [self._job(number, seeds) for number in racing]
            sweep.write_record()
            yield from chunks([*range(begun, len(sweep.jobs))], self.at_once)

    def _seeds(self, sweep: Sweep) -> int:
        """How many seeds the remaining settings have been run with."""
        return 1 + max(map(seed_of, sweep.jobs)) - self.first_seed

    def _figures(self, sweep: Sweep) -> list[list[float]]:
        """The final figures of each setting, in order of seeds, up to the first missing one."""
        jobs = read_jobs([sweep.folder])
        measure = comparisons(jobs)[0].measure
        final = {
            tuple(overrides): job.final(measure.name) for overrides, job in zip(sweep.jobs, jobs, strict=True)
        }
        found: list[list[float]] = [[] for _ in self.settings]
        for number, figures in enumerate(found):
            while (figure := final.get(tuple(self._job(number, len(figures))))) is not None:
                figures.append(figure)
        return found

    def _outcome(self, left: list[int | None], seeds: int, jobs: int) -> dict[str, Any]:
        """The state of the race, in a sentence and as figures; see `read_race`."""
        titles = [title_of(setting_of(setting, self.varied_keys)) for setting in self.settings]
        racing = [title for title, at in zip(titles, left, strict=True) if at is None]
        out = [f"{title} after {at}" for title, at in zip(titles, left, strict=True) if at is not None]
        ended = f"after {seeds} seeds, in {jobs} jobs"
        best = racing[0] if len(racing) == 1 else None
        if not racing:
            verdict = f"no setting is left {ended}: ruled out {', '.join(out)}"
        elif best is None:
            ruled = f"; ruled out: {', '.join(out)}" if out else ""
            verdict = f"not decided {ended}: {', '.join(racing)} cannot be told apart{ruled}"
        else:
            verdict = (
                f"{best} is the best, {ended} (ruled out: {', '.join(out)}; a better one with a probability "
                f"of {self.level:g} at most)"
            )
        figures = {"seeds": seeds, "jobs": jobs, "level": self.level}
        return {"verdict": verdict, "decided": best is not None, "best": best, **figures}


def seed_of(job: list[str]) -> int:
    """The seed of a race's job, which comes last."""
    key, value = split_override(job[-1]) if job else ("", "")
    if key != "seed" or not value.isdecimal():
        raise UserError(f"the jobs of this race are damaged: {' '.join(job)} does not end in a seed")
    return int(value)
