"""The work of `experiments/compare.py`: is one setting better than another, or is it the noise of seeds?"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from llm.checkpoints.checkpoint import recorded_config
from llm.config import CompareConfig, PretrainConfig
from llm.config_rules import validate
from llm.config_values import leaf_keys, value_of
from llm.errors import UserError, shown
from llm.files import as_typed, write_json
from llm.outcome import Outcome
from llm.overrides import as_command, as_override, compact, short_key, title_of
from llm.records import Record
from llm.sweeps.comparing import BITS_PER_BYTE, LOSS, Measure, comparisons
from llm.sweeps.jobs import (
    NEVER_VARIED,
    RECORD,
    Job,
    as_text,
    find_sweep,
    none_begun,
    read_jobs,
    read_record,
    repetitions,
)
from llm.sweeps.tracked import log_findings, tracking_for, verdict_findings
from llm.sweeps.verdict import Difference, Figures, difference, figures_by_seed
from llm.sweeps.verdict_picture import draw_difference
from llm.tables import fitted, format_table, terminal_width
from llm.wandb_client import sync_command

# By how much budgets may differ, as two batch sizes seldom divide a budget evenly.
SAME_TOKENS = 0.01
RACE = "hydra/sweeper=race"
MOST_SEEDS = 30  # that a command is offered for
# Keys that do not affect how good a setting is.
BESIDES = (*NEVER_VARIED, "seed", "data.cache_dir", "samples.", "checkpoint.", "early_stopping.", "init_from")


@dataclass(frozen=True)
class Side:
    """One of the two settings."""

    name: str  # a or b
    title: str  # what sets it apart from the other
    jobs: list[Job]  # those that finished
    unfinished: int

    def figures(self, measure: Measure) -> Figures:
        return figures_by_seed((job.seed, job.summary[measure.name]) for job in self.jobs)

    @property
    def seeds(self) -> set[int]:
        return {job.seed for job in self.jobs}


def compare(config: CompareConfig, run_dir: Path) -> Outcome:
    """Print a verdict on two settings in a sentence, followed by the figures behind it; write `verdict.json`
    and `verdict.png` into `run_dir`. If the runs were tracked, log it to W&B too, see `tracking_for`.

    Raises:
        UserError: they cannot be compared, or there are too few seeds to estimate their noise.
    """
    validate(config)
    a, b = sides(config)
    measure = _measure(a, b)
    _same_budget(a, b)
    figures = a.figures(measure), b.figures(measure)
    found = difference(*figures)
    if found is None:
        raise UserError(_too_few(a, b))
    said = sentence(a, b, found, measure)
    about = [*_not_counted(a, b, found), *differences(a, b)]
    width = terminal_width()
    print(fitted(said, width), _table(*figures, found), "", sep="\n\n", end="")
    print(*(fitted(line, width) for line in about), sep="\n")
    record = {"verdict": said, "decided": found.decided, "measure": measure.name, **asdict(found)}
    record["seeds_needed"] = found.seeds_needed
    of_sides = {
        side.name: {
            "setting": side.title,
            "runs": [str(as_typed(job.folder)) for job in side.jobs],
            "seeds": each,
        }
        for side, each in zip((a, b), figures, strict=True)
    }
    record |= of_sides
    write_json(run_dir / "verdict.json", record)
    titles, picture, jobs = (a.title, b.title), run_dir / "verdict.png", [*a.jobs, *b.jobs]
    draw_difference(titles, figures, found, measure, picture)
    print(shown(f"{'picture':<11} {as_typed(picture)}", keep=""))
    outcome = Outcome(record, {"verdict": run_dir / "verdict.json", "picture": picture})
    if command := _more_seeds(a, b, found):
        outcome.next["more seeds"] = command
        print(shown(f"{'more seeds':<11} {command}", keep=""))
    findings = verdict_findings(said, titles, figures, found, measure.name, picture)
    if unsynced := log_findings(findings, run_dir, jobs, tracking_for(config.tracking, jobs)):
        outcome.next["sync"] = sync_command(unsynced)
        print(shown(f"{'W&B':<11} {outcome.next['sync']}", keep=""))
    return outcome


# What is compared


def sides(config: CompareConfig) -> tuple[Side, Side]:
    """The two settings that were asked for.

    Raises:
        UserError: there are not two, or a folder holds neither a sweep nor a run.
    """
    folders = [_jobs_of(given) for given in (config.a, config.b) if given is not None]
    if len(folders) == 2 and (both := {*folders[0]} & {*folders[1]}):
        raise UserError(f"a and b are the same: both hold {as_typed(min(both))}")
    jobs = read_jobs(dict.fromkeys(folder for each in folders for folder in each))
    by_folder = {job.folder: job for job in jobs}
    held = [repetitions(map(by_folder.__getitem__, each), lambda job: job.seedless) for each in folders]
    if len(folders) == 1:
        if len(held[0]) != 2:
            raise UserError(
                f"a holds {_listed(held[0])}: give two of them as a and b, each by the folder of one of its "
                f"jobs (experiments/report.py ranks them all)"
            )
        held = [held[0][:1], held[0][1:]]
    for name, settings in zip("ab", held, strict=True):
        if len(settings) != 1:
            raise UserError(f"{name} holds {_listed(settings)}: give one, by the folder of one of its jobs")
    (one,), (other,) = held
    return _side("a", one), _side("b", other)


def _jobs_of(given: Any) -> list[Path]:
    """The folders of runs that a or b means: a sweep; a run, which as a job of a sweep stands for its setting
    with all seeds; or a list of sweeps and runs, in which a run stands for itself.

    Raises:
        UserError: there are none, or none has started.
    """
    folders = [find_sweep(str(name), "pretrain") for name in (given if isinstance(given, list) else [given])]
    jobs = [job for folder in folders for job in read_jobs([folder])]
    if not isinstance(given, list) and (folders[0].parent / RECORD).exists():
        siblings = read_jobs([folders[0].parent])
        own = [job.seedless for job in siblings if job.folder.name == folders[0].name]
        jobs = [job for job in siblings if [job.seedless] == own]
    found = dict.fromkeys(job.folder for job in jobs if job.state != "waiting")
    if not found:
        raise none_begun(folders)
    return [*found]


def _listed(settings: list[list[Job]]) -> str:
    if len(settings) == 1:
        return "one setting"
    titles = [title_of(jobs[0].seedless) for jobs in settings]
    more = f", … {len(titles) - 3} more" if len(titles) > 3 else ""
    return f"{len(titles)} settings ({', '.join(titles[:3])}{more})"


def _side(name: str, jobs: list[Job]) -> Side:
    finished = [job for job in jobs if job.final(LOSS.name) is not None]
    if not finished:
        states = ", ".join(dict.fromkeys(job.state for job in jobs))
        raise UserError(f"{name}: none of its {len(jobs)} runs has a final loss ({states})")
    title = title_of(jobs[0].seedless) or str(as_typed(jobs[0].folder))
    return Side(name, title, finished, len(jobs) - len(finished))


def _measure(a: Side, b: Side) -> Measure:
    """The measure for the comparison: bits per byte, or the loss if older runs recorded only that.

    Raises:
        UserError: they were evaluated on different texts, or their tokenizers' losses are not comparable.
    """
    jobs = [*a.jobs, *b.jobs]
    texts = comparisons(jobs)
    if len(texts) > 1:
        titles = " and ".join(each.title.partition(" (")[2].rstrip(")") or each.title for each in texts[:2])
        raise UserError(
            f"a and b were evaluated on different texts ({titles}): compare runs of one text, of which as "
            f"much was evaluated (training.final_eval)"
        )
    if all(job.final(BITS_PER_BYTE.name) is not None for job in jobs):
        return BITS_PER_BYTE
    if texts[0].measure != LOSS:
        raise UserError(
            "a and b have different tokenizers, and no bits per byte: their losses do not compare"
        )
    return LOSS


def _same_budget(a: Side, b: Side) -> None:
    """Check that both sides had the same budget.

    Raises:
        UserError: one was trained longer than the other.
    """
    tokens = [mean(job.summary.get("tokens_seen", 0) for job in side.jobs) for side in (a, b)]
    if abs(tokens[0] - tokens[1]) <= SAME_TOKENS * max(tokens):
        return
    minutes = {_recorded(job, "training.max_minutes") for side in (a, b) for job in side.jobs}
    if len(minutes) == 1 and minutes != {None}:
        return
    raise UserError(
        f"a and b had different budgets: {tokens[0]:,.0f} and {tokens[1]:,.0f} tokens; compare runs of as "
        f"many tokens, or of one training.max_minutes"
    )


def _recorded(job: Job, key: str) -> Any:
    config = recorded_config(job.folder)
    return value_of(config, key) if config else None


# What is said


def sentence(a: Side, b: Side, found: Difference, measure: Measure) -> str:
    size, unit = abs(found.mean), measure.unit
    low, high = sorted((abs(found.low), abs(found.high)))
    method = "paired t-test" if found.paired else "Welch's t-test"
    if found.decided:
        better, worse = (b, a) if found.mean < 0 else (a, b)
        return (
            f"{better.name} ({better.title}) is better than {worse.name} ({worse.title}) by {size:.4f} "
            f"{unit}, 95 % interval {low:.4f} to {high:.4f}: seeds alone differ as much in "
            f"{_percent(found.p)} of comparisons ({method}, {found.seeds} seeds each)."
        )
    needed = found.seeds_needed
    more = f"about {needed - found.seeds}" if needed else "more than 1,000"
    return (
        f"a ({a.title}) and b ({b.title}) cannot be told apart: b - a is {found.mean:+.4f} {unit}, 95 % "
        f"interval {found.low:+.4f} to {found.high:+.4f}, and seeds alone differ as much in "
        f"{_percent(found.p)} of comparisons ({method}, {found.seeds} seeds each). If the difference is as "
        f"large as it looks, {more} more seeds each would show it, four times in five."
    )


def _more_seeds(a: Side, b: Side, found: Difference) -> str | None:
    """The command that trains enough further seeds to settle the matter. None if it is settled already, if
    that would take more than `MOST_SEEDS`, or if the two are not all the settings of a grid."""
    folders = {job.folder.parent for side in (a, b) for job in side.jobs}
    more = (found.seeds_needed or found.seeds) - found.seeds
    sweep = min(folders)
    if found.decided or not 0 < more <= MOST_SEEDS or len(folders) > 1 or not (sweep / RECORD).exists():
        return None
    if any("hydra/sweeper" in each for each in read_record(sweep)["arguments"]):
        return None
    jobs = read_jobs([sweep])
    if len(repetitions(jobs, lambda job: job.seedless)) != 2:
        return None
    first = max(job.seed for job in jobs) + 1
    seeds = ",".join(map(str, range(first, first + more)))
    return as_command("pretrain", as_override("sweep.extend", as_typed(sweep)), f"seed={seeds}")


def _percent(p: float) -> str:
    return f"{100 * p:.0f} %" if p >= 0.0995 else f"{100 * p:.2g} %" if p >= 0.0001 else "less than 0.01 %"


def _too_few(a: Side, b: Side) -> str:
    have = " and ".join(f"{side.name} has {len(side.seeds)}" for side in (a, b))
    return (
        f"one seed says nothing of the noise between seeds ({have}): train each setting with three or more, "
        f"best with the same ones, as seed=1,2,3 in a sweep does"
    )


def _table(a: Figures, b: Figures, found: Difference) -> str:
    rows = [["seed", "a", "b", "b - a"]]
    for seed in sorted(a.keys() | b.keys()):
        both = f"{b[seed] - a[seed]:+.4f}" if seed in a and seed in b else "–"
        rows.append([str(seed), *(f"{each[seed]:.4f}" if seed in each else "–" for each in (a, b)), both])
    # Over the same seeds as the difference, so that it equals the difference of the two means.
    counted = [
        mean(figure for seed, figure in each.items() if not found.paired or seed in a.keys() & b.keys())
        for each in (a, b)
    ]
    rows.append(["mean", *(f"{each:.4f}" for each in counted), f"{found.mean:+.4f}"])
    return format_table(rows, left=())


def _not_counted(a: Side, b: Side, found: Difference) -> Iterator[str]:
    """Lines about runs that do not count for the verdict."""
    for side in (a, b):
        if side.unfinished:
            yield f"{side.name}: {side.unfinished} of {side.unfinished + len(side.jobs)} runs did not finish"
    folders = {job.folder.parent for side in (a, b) for job in side.jobs}
    if any(RACE in read_record(folder)["arguments"] for folder in folders if (folder / RECORD).exists()):
        yield "a race ended when these differed, so that share is too low: the race's own verdict holds"
    alone = a.seeds ^ b.seeds
    if found.paired and alone:
        yield f"not counted, as only one of both has them: seeds {', '.join(map(str, sorted(alone)))}"


def differences(a: Side, b: Side) -> Iterator[str]:
    """What differs between two settings in config, code and machine, one line each."""
    configs = [recorded_config(side.jobs[0].folder) for side in (a, b)]
    if configs[0] and configs[1]:
        changed = []
        for key in leaf_keys(PretrainConfig):
            one, other = (as_text(value_of(config, key)) for config in configs)
            if one != other and not key.startswith(BESIDES):
                changed.append(f"{short_key(key)} {compact(one)} → {compact(other)}")
        yield f"{'config':<11} {', '.join(changed) or 'the same'}"
    for name, fact in (("code", _code), ("versions", _versions), ("machine", _machine)):
        one, other = (" and ".join(dict.fromkeys(fact(job.summary) for job in side.jobs)) for side in (a, b))
        yield f"{name:<11} {'the same' if one == other else f'{one} → {other}'}"


def _code(summary: Record) -> str:
    commit = summary.get("git_commit") or "unknown"
    return commit[:10] + (" with changes" if summary.get("git_clean") is False else "")


def _versions(summary: Record) -> str:
    return ", ".join(f"{name} {version}" for name, version in (summary.get("versions") or {}).items())


def _machine(summary: Record) -> str:
    return ", ".join(summary.get(name) or "unknown" for name in ("machine", "device", "precision"))
