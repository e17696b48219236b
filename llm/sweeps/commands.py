"""Commands that reproduce a job's numbers, or the reason why there is none."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from llm.config import GenerateConfig, PretrainConfig, TrainingConfig
from llm.config_values import leaf_keys, value_of
from llm.errors import shown
from llm.files import as_typed
from llm.overrides import as_command, as_override, split_override, unquoted_where_plain
from llm.records import figure, figure_in, read_lines, read_settings
from llm.run_folder import step_folders
from llm.sweeps.jobs import Job, as_text
from llm.training.schedules import spent

PLAIN_OPTION = re.compile(r"[\w-]+(/[\w-]+)*|\[[\w/, -]*\]", re.ASCII)  # no path to a file elsewhere
RESOLVER = re.compile(r"\$\{[^}]*:")
# Keys, by their beginnings, that a run may change on its way without another update being made.
NOT_OF_UPDATES = ("early_stopping.", "checkpoint.", "samples.", "sampling.")
LIMITS = ("max_steps", "max_epochs", "max_minutes")


@dataclass(frozen=True)
class Again:
    """How a job is run again."""

    again: str | None  # the command
    about: str = ""  # what there is to say of it, or why there is none


def train_again(job: Job) -> Again:
    """The command that reproduces a training run's numbers.

    A run limited by the clock is repeated by its record (`rerun`), as no two runs make the same number of
    updates in a minute. A run that was resumed with other keys is repeated in as many parts, if each part
    ended by its own limit, as the schedule depends on the limit from the first update on.
    """
    values = _recorded_values(job.folder)
    if values is None or values["rerun"]:
        return Again(command_again("pretrain", PretrainConfig, job))
    if any(split_override(override)[0] == "rerun" for override in job.overrides):
        return Again(None, "no command repeats it: it is a rerun that was continued")
    parts: list[tuple[int, dict[str, Any]]] = []  # after how many updates, and what was given there
    for each in reversed(job.summary.get("resumed") or []):
        changes = each["changed"].items()
        changed = {key: both for key, both in changes if key in values and not key.startswith(NOT_OF_UPDATES)}
        values |= {key: was for key, (was, _) in changed.items()}
        if changed:
            parts.insert(0, (each["steps"], {key: now for key, (_, now) in changed.items()}))
    if not parts and values["training.max_minutes"] is not None and step_folders(job.folder):
        command = as_command("pretrain", as_override("rerun", as_typed(job.folder)))
        return Again(printable(command), "by its recorded clock, as training.max_minutes limits it")
    begun = replace(job, overrides=[*job.overrides, *_unlike_hydras(job.folder, values)])
    if not parts:
        return Again(command_again("pretrain", PretrainConfig, begun))
    target = f"{as_typed(job.folder)}-again"
    commands = [command_again("pretrain", PretrainConfig, begun, as_override("hydra.run.dir", target))]
    reached = {line.get("step"): line for line in read_lines(job.folder / "metrics.jsonl") if "lr" in line}
    for steps, changed in parts:
        overrides = [_override(key, now) for key, now in changed.items()]
        if not _has_ended(values, steps, reached.get(steps - 1, {})):
            return Again(
                None, f"no command repeats it: {' '.join(overrides)} after {steps} updates, on its way"
            )
        resumed = replace(job, overrides=overrides)
        commands.append(command_again("pretrain", PretrainConfig, resumed, as_override("resume", target)))
        values |= changed
    whole = [command for command in commands if command]
    about = "in parts, as it was resumed with other keys"
    return Again(" && ".join(whole), about) if len(whole) == len(commands) else Again(None)


def _recorded_values(run_dir: Path) -> dict[str, Any] | None:
    """The values of all keys with which a run was last started or saved."""
    from llm.checkpoints.checkpoint import recorded_config  # imports torch

    config = recorded_config(run_dir)
    return {key: value_of(config, key) for key in leaf_keys(PretrainConfig)} if config else None


def _unlike_hydras(run_dir: Path, values: dict[str, Any]) -> Iterator[str]:
    """Overrides for values with which a run started that are not in Hydra's record: it was resumed before its
    first checkpoint, `latest` was a certain run, or it was started from Python."""
    has_record = (run_dir / ".hydra").exists()
    settings = read_settings(run_dir, values)
    for key, value in values.items():
        of_weights = values["init_from"] and key.startswith(("model.", "tokenizer."))
        if of_weights or key.startswith(("tracking.", "resume")):
            continue
        if not has_record:
            if value != value_of(PretrainConfig(), key):
                yield _override(key, value)
            continue
        recorded = settings.get(key)
        if recorded is None or "${" in recorded:
            continue
        alike = figure_in(recorded) == value if figure(value) is not None else recorded == as_text(value)
        if not alike:
            yield _override(key, value)


def _override(key: str, value: Any) -> str:
    return as_override(key, value) if isinstance(value, str) else f"{key}={as_text(value)}"


def _has_ended(values: dict[str, Any], steps: int, line: dict[str, Any]) -> bool:
    """Whether a run with these values ends after `steps` updates, whatever the clock says."""
    limits: dict[str, Any] = {name: figure(values[f"training.{name}"]) for name in LIMITS}
    epoch = line.get("epoch")
    if limits["max_minutes"] is not None or epoch is None:
        return False
    return max(spent(TrainingConfig(**limits), steps, epoch, 0.0).values(), default=0.0) >= 1


def generate_again(job: Job) -> Again:
    """The command that generates the samples of a study's setting again, from the checkpoint that was
    loaded."""
    loaded = job.summary.get("checkpoint")
    checkpoint = [as_override("checkpoint", loaded)] if loaded else []
    return Again(command_again("generate", GenerateConfig, job, *checkpoint, "study=true"))


def command_again(script: str, schema: type, job: Job, *further: str) -> str | None:
    """The command that runs a job again as a single run, even if the experiment that it names is a sweep.

    The job's folder may come from a stranger. So the command only sets keys of the schema and chooses options
    of groups by plain names; Hydra's own settings are omitted, as they do not change what a job does. None if
    that is not enough: there is another key, a resolver such as `${oc.env:…}`, or a terminal's control codes.

    Args:
        further: overrides that replace the job's.
    """
    keys, groups = {*leaf_keys(schema)}, {item.name for item in fields(schema)}
    groups |= {"experiment", "scale", "rate"}
    overrides: dict[str, str] = {}
    for override in job.overrides:
        key, value = split_override(override)
        if key.startswith(("hydra.", "hydra/")) or key == "resume":
            continue
        is_group = key not in keys and key.partition("/")[0] in groups
        is_plain = bool(PLAIN_OPTION.fullmatch(value)) if is_group else not RESOLVER.search(value)
        if not (key in keys or is_group) or not is_plain:
            return None
        overrides[key] = unquoted_where_plain(f"{key}={value}")
    overrides |= {split_override(override)[0]: override for override in further}
    alone = ["hydra.mode=RUN"] if "experiment" in overrides else []
    return printable(as_command(script, *overrides.values(), *alone))


def printable(command: str) -> str | None:
    """A command; None if it holds characters that a terminal would obey when it is pasted."""
    return command if shown(command, keep="") == command else None
