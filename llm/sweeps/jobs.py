"""A sweep, read from its folder: which jobs there are, what varies between them, and what became of each.

Nothing here needs the process that runs the sweep.
"""

import math
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypedDict

from llm.config import leaf_keys, value_of
from llm.errors import UserError, shown
from llm.files import modified, parse_json, read_content, write_json
from llm.overrides import as_command, short_key, split_override, title_of
from llm.records import RECORD_BYTES, Record, list_of, read_config_text, read_overrides, text
from llm.run_folder import SUMMARY, SWEEP, read_summary
from llm.runs import LATEST, LISTED, OUTPUTS, folders_with, newest, newest_runs, state_of

RECORD = SWEEP  # see write_record
STOP = ".stop"  # there once a sweep whose jobs run side by side was asked to stop
NEVER_VARIED = ("hydra.", "tracking", "resume", "rerun")  # keys that do not change what a job does
DONE = ("finished", "stopped")  # states with a result, whose jobs are not run again
PLAIN_OPTION = re.compile(r"[\w-]+(/[\w-]+)*|\[[\w/, -]*\]", re.ASCII)  # no path to a file elsewhere
RESOLVER = re.compile(r"\$\{[^}]*:")
SCRIPT = re.compile("[a-z]+")


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
        """What sets it apart, as `lr=4e-4 seed=1`."""
        return title_of(self.setting) or "the one setting"

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
        usual = {"interrupted": "stopped by hand", "killed": "killed, or its machine went down"}
        return self.summary.get("error") or usual.get(state, "it did not finish")

    def reread(self) -> "Job":
        """The same job with the summary that is in its folder now."""
        return replace(self, summary=read_summary(self.folder))


def begun(job: Job) -> float:
    """When a job was last begun, in seconds since the epoch; 0 if it never was."""
    return modified(job.folder / ".hydra" / "overrides.yaml")


def state_since(job: Job, since: float) -> str:
    """A job's state for the process that has run its sweep since then. A job not begun since is waiting,
    unless it has a result from before; one begun since is running until its summary says how it ended."""
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
    if len(folders) == 1 and (folders[0] / RECORD).exists():
        varied = read_record(folders[0])["varied"]
        settings = [setting_of(overrides, varied) for _, _, overrides in found]
    else:
        settings = settings_of([overrides for _, _, overrides in found], [folder for folder, _, _ in found])
    return [
        Job(folder, name, overrides, setting, read_summary(folder))
        for (folder, name, overrides), setting in zip(found, settings, strict=True)
    ]


def _jobs_in(folder: Path) -> list[tuple[Path, list[str]]]:
    if (folder / RECORD).exists():
        jobs = read_record(folder)["jobs"]
        return [(folder / str(number), overrides) for number, overrides in enumerate(jobs)]
    folders = sorted(
        (path.parents[1] for path in folder.glob("*/.hydra/overrides.yaml")), key=lambda job: order(job.name)
    )
    return [(job, read_overrides(job)) for job in folders]


def settings_of(jobs: list[list[str]], folders: list[Path] | None = None) -> list[dict[str, str]]:
    """For each job's overrides, those whose value is not the same in all jobs. For a job that does not set
    such a key, the value is that which it was trained with, read from its folder, if `folders` is given."""
    given = [dict(split_override(each) for each in overrides) for overrides in jobs]
    every_key = dict.fromkeys(key for own in given for key in own)
    keys = [key for key in every_key if not key.startswith(NEVER_VARIED)]
    incomplete = {key for key in keys if any(key not in own for own in given)}
    for own, folder in zip(given, folders or [], strict=False):
        if absent := [key for key in incomplete if key not in own]:
            own |= _recorded_texts(folder, absent)
    varied = [key for key in keys if len({own.get(key) for own in given}) > 1]
    return [{key: own[key] for key in varied if key in own} for own in given]


def _recorded_texts(run_dir: Path, keys: list[str]) -> dict[str, str]:
    """What a run has for keys, as its newest checkpoint says, or else Hydra's record; without those that are
    null."""
    from llm.checkpoints.checkpoint import recorded_config  # imports torch, which most reports need not

    config = recorded_config(run_dir)
    if config is None:
        found = {key: read_config_text(run_dir, key) for key in keys}
    else:
        found = {key: _as_text(value_of(config, key)) for key in keys}
    return {key: value for key, value in found.items() if value is not None}


def _as_text(value: Any) -> str | None:
    """A value as an override spells it."""
    match value:
        case None:
            return None
        case bool():
            return str(value).lower()
        case list():
            return f"[{','.join(str(each) for each in value)}]"
    return str(value)


def setting_of(overrides: list[str], varied: list[str]) -> dict[str, str]:
    """The values that a job's overrides give to the varied keys."""
    given = dict(split_override(each) for each in overrides)
    return {key: given[key] for key in varied if key in given}


def order(value: str) -> tuple[bool, float, str]:
    """A sort key for the values of a setting: numbers first, by size, then texts."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    return (True, 0.0, value) if math.isnan(number) else (False, number, value)


# Commands to paste


def command_again(script: str, schema: type, job: Job, *further: str) -> str | None:
    """The command that runs a job again by itself, even if the experiment that it names is a sweep.

    What its folder says may be a stranger's. So the command sets keys of the schema, and chooses options of
    groups by plain names; Hydra's own settings are omitted, as they do not change what a job does. None if
    there is more to it: another key, a resolver such as `${oc.env:…}`, a terminal's control codes.
    """
    keys, groups = {*leaf_keys(schema)}, {item.name for item in fields(schema)} | {"experiment", "scale"}
    overrides: dict[str, str] = {}
    for override in job.overrides:
        key, value = split_override(override)
        if key.startswith(("hydra.", "hydra/")) or key == "resume":
            continue
        is_plain = bool(PLAIN_OPTION.fullmatch(value)) if key in groups - keys else not RESOLVER.search(value)
        if key not in keys | groups or not is_plain:
            return None
        overrides[key] = f"{key}={value}"
    alone = ["hydra.mode=RUN"] if "experiment" in overrides else []
    return printable(as_command(script, *overrides.values(), *further, *alone))


def printable(command: str) -> str | None:
    """A command, unless it holds characters that a terminal obeys when they are pasted."""
    return command if shown(command, keep="") == command else None


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
