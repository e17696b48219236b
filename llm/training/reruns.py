"""Comparison of a rerun with the run that it repeats: are all numbers the same?"""

import logging
from pathlib import Path
from typing import Any

import torch

from llm.checkpoints.checkpoint import STATE_TENSORS, WEIGHTS, damage, read_checksums, read_tensors
from llm.checkpoints.parts import part_names
from llm.errors import UserError
from llm.files import read_content, read_json_lines
from llm.records import figure
from llm.run_folder import RECORDS, read_summary, step_folders

log = logging.getLogger(__name__)

Lines = list[dict[str, Any]]

MEASURED = ("tokens_per_second",)  # differs between any two runs


def recorded_clock(run_dir: Path) -> list[tuple[float, float]]:
    """For each update of a run, the seconds of training after it, and its learning rate.

    Raises:
        UserError: the record is damaged.
    """
    file, clock = run_dir / "metrics.jsonl", []
    for line in _whole_lines(file):
        if "train/loss" in line:
            seconds, lr = figure(line.get("seconds")), figure(line.get("lr"))
            if seconds is None or lr is None:
                raise UserError(f"{file} is damaged: an update does not say when and at what rate")
            clock.append((seconds, lr))
    return clock


def compare_rerun(rerun: Path, original: Path) -> None:
    """Log that a rerun reproduced the numbers of the original run, and what else differs between the two.

    Raises:
        UserError: the numbers differ.
    """
    circumstances = "; ".join(other_circumstances(rerun, original))
    if difference := first_difference(rerun, original):
        raise UserError(
            f"the rerun of {original} gave other numbers, first at {difference}"
            + (f"; also different: {circumstances}" if circumstances else "")
        )
    log.info("\nrerun       the same numbers as %s, bit for bit", original)
    if circumstances:
        log.info("            despite: %s", circumstances)


def first_difference(rerun: Path, original: Path) -> str | None:
    """Where a rerun's numbers first differ from the original's, or None if they do not. Compared are all
    lines of metrics and samples, and the final weights and optimizer state; if the original did not finish,
    the lines as far as it got."""
    finished = read_summary(original).get("status") == "finished"
    for name in RECORDS:
        ours, theirs = _comparable(_lines(rerun / name), _lines(original / name))
        for one, other in zip(ours, theirs, strict=False):
            for key in {**one, **other}:
                if one.get(key) != other.get(key):
                    return f"step {one.get('step')}: {key} {one.get(key)} (originally {other.get(key)})"
        if finished and len(ours) != len(theirs):
            return f"{name} with {len(ours)} lines (originally {len(theirs)})"
    if not finished:
        return None
    [ours_newest], [theirs_newest] = (step_folders(run_dir)[:1] for run_dir in (rerun, original))
    if problem := damage(theirs_newest):
        raise UserError(f"the rerun cannot be compared with {theirs_newest}, which is damaged: {problem}")
    ours_sums, theirs_sums = (read_checksums(folder) for folder in (ours_newest, theirs_newest))
    for name in (WEIGHTS, STATE_TENSORS):
        one, other = (
            {part: sums.get(part) for part in part_names(folder, name, sums) or [name]}
            for folder, sums in ((ours_newest, ours_sums), (theirs_newest, theirs_sums))
        )
        # Divided into parts differently, they may still hold the same tensors.
        if one != other and (one.keys() == other.keys() or not _same(ours_newest, theirs_newest, name)):
            return f"the final {name}"
    return None


def _same(one: Path, other: Path, name: str) -> bool:
    """Whether two checkpoints hold the same tensors under `name`."""
    ours, theirs = read_tensors(one, name), read_tensors(other, name)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def _comparable(ours: Lines, theirs: Lines) -> tuple[Lines, Lines]:
    """The lines of two runs, without evaluations that only one of them made. An original that was resumed had
    ended there, with an extra evaluation; and runs of older versions made none after their last update."""
    both = {line.get("step") for line in ours if "val/loss" in line}
    both &= {line.get("step") for line in theirs if "val/loss" in line}
    one, other = (
        [line for line in lines if "val/loss" not in line or line.get("step") in both]
        for lines in (ours, theirs)
    )
    return one, other


def _lines(file: Path) -> Lines:
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in _whole_lines(file)]


def _whole_lines(file: Path) -> Lines:
    """The lines of a record, none of which may be missing, lest later ones be taken for those of other
    updates.

    Raises:
        UserError: a line is damaged.
    """
    lines = read_json_lines(file)
    if len(lines) != read_content(file).count(b"\n"):
        raise UserError(f"{file} is damaged: the run cannot be repeated or compared with")
    return lines


def other_circumstances(rerun: Path, original: Path) -> list[str]:
    """What differs between the summaries of two runs and may change their numbers, one line each."""
    ours, theirs = read_summary(rerun), read_summary(original)
    versions = theirs.get("versions") or {}
    lines = [
        f"{name} {ours.get(name)} (originally {theirs.get(name)})"
        for name in ("git_commit", "device", "precision", "machine")
        if ours.get(name) != theirs.get(name)
    ]
    lines += [
        f"{name} {found} (originally {versions.get(name)})"
        for name, found in (ours.get("versions") or {}).items()
        if found != versions.get(name)
    ]
    lines += [
        f"{whose} code had uncommitted changes"
        for whose, summary in (("this run's", ours), ("the original's", theirs))
        if summary.get("git_clean") is False
    ]
    return [*lines, *changes_on_the_way(original)]


def changes_on_the_way(original: Path) -> list[str]:
    """Changes of the config when a run was resumed, one line each. A rerun applies them from the start."""
    return [
        f"the original was changed after {resumed['steps']} updates: {key}={now} (it was {was})"
        for resumed in read_summary(original).get("resumed") or []
        for key, (was, now) in resumed["changed"].items()
    ]
