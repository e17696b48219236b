"""A sweep, read from its folder: its jobs, what varies between them, and their states.

Nothing here needs the process that runs the sweep.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from llm.config import PretrainConfig
from llm.config_values import leaf_keys, value_of
from llm.errors import UserError
from llm.files import modified, parse_json, read_content, write_json
from llm.overrides import short_key, split_override, title_of, unquoted
from llm.progress import format_windows
from llm.records import (
    RECORD_BYTES,
    Record,
    list_of,
    read_choices,
    read_overrides,
    read_settings,
    text,
    tokenizer_and_text,
)
from llm.run_folder import SUMMARY, SWEEP, read_summary, step_folders
from llm.runs import LATEST, LISTED, OUTPUTS, folders_with, newest, newest_runs, state_of

RECORD = SWEEP  # see write_record
STOP = ".stop"  # there once a sweep whose jobs run side by side was asked to stop
NEVER_VARIED = ("hydra.", "tracking", "resume", "rerun", "if_done")  # keys that do not change what a job does
DONE = ("finished", "stopped")  # states with a result, whose jobs are not run again
SCRIPT = re.compile("[a-z]+")

Item = TypeVar("Item")


@dataclass(frozen=True)
class Job:
    """One run of a sweep, read from its files."""

    folder: Path
    name: str  # its number; with several sweeps side by side, the sweep's folder too
    overrides: list[str]
    setting: dict[str, str] = field(default_factory=dict)  # values of the keys that vary between jobs
    summary: Record = field(default_factory=dict)  # empty until there is one

    @property
    def title(self) -> str:
        """What distinguishes it from other jobs, such as `lr=4e-4 seed=1`."""
        return title_of(self.setting) or "the one setting"

    @property
    def seedless(self) -> dict[str, str]:
        """What distinguishes it from other jobs, except for the seed."""
        return {key: value for key, value in self.setting.items() if key != "seed"}

    @property
    def seed(self) -> int:
        return self.summary.get("seed", 0)

    @property
    def state(self) -> str:
        """See `state_of`."""
        return state_of(self.folder, self.summary)

    @property
    def error(self) -> str | None:
        """Why it did not finish."""
        state = self.state
        if state in ("finished", "running", "waiting"):
            return None
        if state == "stopped":
            return f"stopped early: {self.summary['stopped_early']}"
        by = self.summary.get("stopped_by") or "hand"
        usual = {"interrupted": f"stopped by {by}", "killed": "killed, or its machine went down"}
        return self.summary.get("error") or usual.get(state, "it did not finish")

    def final(self, name: str) -> float | None:
        """A figure of the evaluation at the end, by its name in the summary. None for a job that has not
        finished, even if it was interrupted so late that its summary has one."""
        return self.summary.get(name) if self.summary.get("status") == "finished" else None

    @cached_property
    def evaluated_on(self) -> tuple[str, str] | None:
        """The fingerprints of its tokenizer and its validation text; None if it has not recorded them. Runs
        of older versions have them only in their checkpoints."""
        tokenizer, validation_text = (self.summary.get(name) for name in ("tokenizer", "validation_text"))
        if tokenizer and validation_text:
            return tokenizer, validation_text
        for folder in step_folders(self.folder)[:1]:
            state = parse_json(read_content(folder / "training_state.json", RECORD_BYTES))
            data = list_of(text)(state.get("data")) if isinstance(state, dict) else None
            if data:
                return tokenizer_and_text(data[-1])
        return None

    @property
    def part(self) -> str | None:
        """Which part of the validation split its final figures are on, in words; None for all of it."""
        evaluated, there = (self.summary.get(name) for name in ("evaluated_windows", "validation_windows"))
        if evaluated is None or there is None or evaluated >= there:
            return None
        return format_windows(evaluated, there)

    def reread(self) -> "Job":
        """The same job, with its current summary."""
        return replace(self, summary=read_summary(self.folder))


def repetitions(items: Iterable[Item], setting: Callable[[Item], dict[str, str]]) -> list[list[Item]]:
    """Items grouped by setting, in the order of each group's first item."""
    found: dict[str, list[Item]] = {}
    for item in items:
        found.setdefault(json.dumps(setting(item), sort_keys=True), []).append(item)
    return [*found.values()]


def none_begun(folders: Iterable[Path]) -> UserError:
    """The error for sweeps that have no job yet."""
    return UserError(f"{' '.join(map(str, folders))} has no job yet: wait until one has begun")


def begun(job: Job) -> float:
    """When a job was last started, in seconds since 1970; 0 if it never was."""
    return modified(job.folder / ".hydra" / "overrides.yaml")


def state_since(job: Job, since: float) -> str:
    """A job's state for the process that has been running its sweep since `since`. A job that was not started
    since then is waiting, unless it has an earlier result; one that was is running until its summary says how
    it ended."""
    written = modified(job.folder / SUMMARY)
    if written >= max(since, begun(job)):
        return "running" if job.summary.get("status") == "running" else job.state
    if begun(job) >= since:
        return "running"
    return job.state if job.state in DONE else "waiting"


def read_jobs(folders: Iterable[Path]) -> list[Job]:
    """The jobs of sweeps and of single runs, in order, each with what varies between all of them.

    Raises:
        UserError: a folder holds neither.
    """
    folders = list(folders)
    found: list[tuple[Path, str, list[str]]] = []
    for folder in folders:
        alike = sum(other.name == folder.name for other in folders) > 1
        prefix = f"{folder if alike else folder.name}/" if len(folders) > 1 else ""
        jobs = _jobs_in(folder)
        if jobs or (folder / RECORD).exists():  # a search begins without jobs
            found += [(job, prefix + job.name, overrides) for job, overrides in jobs]
        elif (folder / SUMMARY).exists() or (folder / "metrics.jsonl").exists():
            found.append((folder, folder.name, read_overrides(folder)))
        else:
            raise UserError(f"{folder} holds neither a sweep nor a run{newest_sweeps()}{newest_runs()}")
    is_sweep = len(folders) == 1 and (folders[0] / RECORD).exists()
    varied = read_record(folders[0])["varied"] if is_sweep else []
    summaries = [read_summary(folder) for folder, _, _ in found]
    effective = [
        [*overrides, *changes_of(summary)]
        for (_, _, overrides), summary in zip(found, summaries, strict=True)
    ]
    given = [{split_override(each)[0] for each in overrides} for overrides in effective]
    is_complete = all(key in own for own in given for key in varied)  # not so for a table with empty cells
    if varied and is_complete and not any(map(changes_of, summaries)):
        settings = [setting_of(overrides, varied) for overrides in effective]
    else:
        settings = settings_of(effective, [folder for folder, _, _ in found], varied)
    return [
        Job(folder, name, overrides, setting, summary)
        for (folder, name, overrides), setting, summary in zip(found, settings, summaries, strict=True)
    ]


def changes_of(summary: Record) -> list[str]:
    """Differences between a run and its command line, as overrides: those that it was resumed with, in order,
    and the checkpoint that `init_from` meant."""
    changes = [
        f"{key}={as_text(now)}"
        for resumed in summary.get("resumed") or []
        for key, (_, now) in resumed["changed"].items()
    ]
    origin = summary.get("init_from")
    return [*changes, f"init_from={origin}"] if origin else changes


def _jobs_in(folder: Path) -> list[tuple[Path, list[str]]]:
    if (folder / RECORD).exists():
        jobs = read_record(folder)["jobs"]
        return [(folder / str(number), overrides) for number, overrides in enumerate(jobs)]
    folders = sorted(
        (path.parents[1] for path in folder.glob("*/.hydra/overrides.yaml")), key=lambda job: order(job.name)
    )
    return [(job, read_overrides(job)) for job in folders]


def settings_of(
    jobs: list[list[str]], folders: list[Path] | None = None, varied: Collection[str] = ()
) -> list[dict[str, str]]:
    """For each job, the values of the keys that differ between jobs, or are known to vary. If a job does not
    set such a key and `folders` is given, the value with which it was trained (for a group, the chosen
    option) is read from its folder."""
    given = [_given(overrides) for overrides in jobs]
    every_key = dict.fromkeys(key for own in given for key in own)
    keys = [key for key in every_key if not key.startswith(NEVER_VARIED)]
    incomplete = {key for key in keys if any(key not in own for own in given)}
    for own, folder in zip(given, folders or [], strict=False):
        if absent := [key for key in incomplete if key not in own]:
            own |= recorded_texts(folder, absent)
    in_order = dict.fromkeys([*(key for key in varied if key in every_key), *keys])
    shown = [key for key in in_order if key in varied or len({own.get(key) for own in given}) > 1]
    return [{key: own[key] for key in shown if key in own} for own in given]


def recorded_texts(run_dir: Path, keys: list[str]) -> dict[str, str]:
    """A run's values of keys, from its newest checkpoint or else from Hydra's record, which alone has the
    options of groups."""
    from llm.checkpoints.checkpoint import recorded_config  # imports torch, which most reports need not

    choices, leaves, config = read_choices(run_dir), leaf_keys(PretrainConfig), recorded_config(run_dir)
    recorded = read_settings(run_dir, keys)
    found = {}
    for key in keys:
        if key in choices:
            of_weights = config and config.init_from and key.startswith(("model", "tokenizer"))
            if not (of_weights or (config and config.rerun)):  # else nobody has chosen it
                found[key] = choices[key]
        elif config and key in leaves:
            found[key] = as_text(value_of(config, key))
        elif key in recorded:
            found[key] = recorded[key]
    return found


def as_text(value: Any) -> str:
    """A value of a config as an override spells it."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case list():
            return f"[{','.join(map(as_text, value))}]"
    return str(value)


def setting_of(overrides: list[str], varied: list[str]) -> dict[str, str]:
    """The values that a job's overrides give to the varied keys."""
    given = _given(overrides)
    return {key: given[key] for key in varied if key in given}


def _given(overrides: list[str]) -> dict[str, str]:
    """The last value of each key, without the quotes of Hydra's grammar."""
    given = dict(split_override(override) for override in overrides)
    return {key: unquoted(value) for key, value in given.items()}


def order(value: str) -> tuple[bool, float, str]:
    """A sort key for the values of a setting: numbers first, by size, then texts."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    return (True, 0.0, value) if math.isnan(number) else (False, number, value)


# The record


def find_sweep(name: str, script: str | None = None, root: Path = OUTPUTS) -> Path:
    """The folder of a sweep, named by its path, or by `latest`: the one under `root` that was begun or
    resumed last.

    Args:
        script: that `latest` was begun by.

    Raises:
        UserError: there is none.
    """
    if name != LATEST:
        return Path(name)
    for folder in _newest_first(root):
        with suppress(UserError):
            if script in (None, read_record(folder)["script"]):
                return folder
    begun, instead = (f"by experiments/{script}.py ", "") if script else ("", newest_runs(root))
    raise UserError(f"latest: there is no sweep begun {begun}under {root}/; begin one with -m{instead}")


def _newest_first(root: Path) -> list[Path]:
    folders = folders_with(root, RECORD)
    return sorted(folders, key=lambda folder: modified(folder / RECORD), reverse=True)


def newest_sweeps(root: Path = OUTPUTS) -> str:
    """The end of an error that says which sweeps there are: the newest few, with what they are."""
    folders, listed = _newest_first(root), []
    for folder in folders[:LISTED]:
        with suppress(UserError):
            record = read_record(folder)
            jobs, varied = len(record["jobs"]), ", ".join(map(short_key, record["varied"]))
            listed.append((folder, f"{jobs} jobs over {varied}" if varied else f"{jobs} jobs"))
    return newest("sweeps", listed, len(folders))


class SweepRecord(TypedDict):
    """What a sweep is, see `write_record`."""

    script: str
    arguments: list[str]
    varied: list[str]
    jobs: list[list[str]]


def read_record(folder: Path) -> SweepRecord:
    """What `write_record` wrote.

    Raises:
        UserError: there is none, or it is damaged.
    """
    file, texts = folder / RECORD, list_of(text)
    if not file.exists():
        raise UserError(f"{folder} is not a sweep's folder: it has no {RECORD}{newest_sweeps()}")
    kinds = {"script": _script, "arguments": texts, "varied": texts, "jobs": list_of(texts)}
    values = parse_json(read_content(file, RECORD_BYTES))
    for name, kind in kinds.items():
        if not isinstance(values, dict) or kind(values.get(name)) is None:
            raise UserError(f"{file} is damaged: it does not say {name!r} as a sweep's record does")
    return SweepRecord(**{name: values[name] for name in kinds})  # type: ignore[typeddict-item]


def _script(value: Any) -> str | None:
    return value if isinstance(value, str) and SCRIPT.fullmatch(value) else None


def write_record(
    folder: Path, script: str, arguments: list[str], varied: list[str], jobs: list[list[str]]
) -> None:
    """Record what a sweep is.

    Args:
        script: name of the script that runs it, as `pretrain`.
        arguments: of the command line.
        varied: the keys that are swept over.
        jobs: the overrides of each job, by its number.
    """
    write_json(folder / RECORD, {"script": script, "arguments": arguments, "varied": varied, "jobs": jobs})
