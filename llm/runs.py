"""Finding runs, by path or by the names `latest` and `best`.

`latest` is the run that was started or resumed last, of those below `outputs/` in the working directory:
single runs and jobs of sweeps, also behind links, with or without a checkpoint. Runs that `hydra.run.dir` put
elsewhere are not found. `best` is that run's checkpoint with the lowest validation loss during training. Both
can be used wherever a run, a checkpoint or weights are asked for.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from llm.errors import UserError
from llm.files import as_typed, is_held, modified
from llm.overrides import split_override, title_of, unquoted
from llm.records import Record, read_overrides
from llm.run_folder import (
    CHECKPOINT_NAME,
    CHECKPOINTS,
    RUN_ID,
    SWEEP_LOCK,
    checkpoint_folder,
    holds_run,
    is_claimed,
    read_summary,
    step_folders,
)

LATEST, BEST = "latest", "best"  # for folders of these names, write ./latest and ./best
OUTPUTS = Path("outputs")
LISTED = 3  # runs that an error lists
TITLE_WIDTH = 30  # of a run there


def find_run(name: str, root: Path = OUTPUTS, with_checkpoint: bool = True) -> Path:
    """The run folder that a name means: a path to it or to one of its checkpoints, `latest` or `best`.

    Raises:
        UserError: there is none, or it has no checkpoint yet and needs one.
    """
    folder = path_of(name, root)
    if folder.parent.name == CHECKPOINTS:
        folder = folder.parent.parent
    if not has_begun(folder):
        raise UserError(f"{name} is not a run folder{newest_runs(root)}")
    if with_checkpoint and not step_folders(folder):
        which = "" if Path(name) == folder else f"{name}: "
        raise UserError(f"{which}{as_typed(folder)} has no checkpoint yet{newest_runs(root, saved=True)}")
    return folder


def path_of(name: str, root: Path = OUTPUTS) -> Path:
    """The path of the run or checkpoint that a name means; for `latest` and `best`, at this moment.

    Raises:
        UserError: the name is empty, or there is no run yet.
    """
    if not name:
        raise UserError("an empty name is no run: give its folder, or latest")
    if name not in (LATEST, BEST):
        return Path(name)
    runs = [run for run in folders_with(root, CHECKPOINTS) if has_begun(run)]
    if not runs:
        raise UserError(f"{name}: there is no run under {root}/; run experiments/pretrain.py first")
    latest = max(runs, key=begun)
    return latest if name == LATEST else latest / CHECKPOINTS / BEST


def named_checkpoint(path: Path) -> Path | None:
    """The checkpoint that a path means; None if the path is not one like RUN/checkpoints/best.

    Raises:
        UserError: the run has none of this name.
    """
    if path.parent.name != CHECKPOINTS or not path.parent.is_dir():
        return None
    folder = checkpoint_folder(path)
    if not folder.is_dir():
        names = [each.name for each in path.parent.iterdir() if CHECKPOINT_NAME.fullmatch(each.name)]
        saved = sorted(each for each in names if "start" not in each)
        raise UserError(f"{path}: there is no such checkpoint; the run has {', '.join(saved) or 'none yet'}")
    return folder


def has_begun(run_dir: Path) -> bool:
    """Whether a folder holds a run that can be resumed, from a checkpoint or with its recorded config."""
    return bool(step_folders(run_dir) or step_folders(run_dir, "start"))


def begun(run_dir: Path) -> float:
    """When a run was started or last resumed, in seconds since 1970."""
    return modified(run_dir / RUN_ID) or modified(run_dir)


def state_of(run_dir: Path, summary: Record) -> str:
    """`waiting`, `running`, `finished`, `stopped` (by a rule, see llm/training/early_stopping.py),
    `interrupted`, `failed`, or `killed`: begun, not ended, and held by no process."""
    status = summary.get("status")
    if status == "interrupted" and summary.get("stopped_early"):
        return "stopped"
    if status in ("finished", "interrupted", "failed"):
        return str(status)
    if not (run_dir / ".hydra").exists() and not holds_run(run_dir):
        return "waiting"
    if is_claimed(run_dir) or is_held(run_dir.parent / SWEEP_LOCK):
        return "running"
    return "killed"


def run_title(run_dir: Path, summary: Record) -> str:
    """The overrides of a run, such as `model=tiny lr=4e-4`, including those changed when it was resumed."""
    given = dict(split_override(each) for each in read_overrides(run_dir))
    for resumed in summary.get("resumed") or []:
        given |= {
            key: "null" if value is None else str(value) for key, (_, value) in resumed["changed"].items()
        }
    ours = ("hydra.", "hydra/", "tracking", "resume", "if_done")
    plain = {key: unquoted(value) for key, value in given.items() if not key.startswith(ours)}
    return title_of(plain) or "default"


def newest_runs(root: Path = OUTPUTS, saved: bool = False) -> str:
    """The end of an error message that lists the newest runs.

    Args:
        saved: only those with a checkpoint.
    """
    kinds = ("step",) if saved else ("step", "start")
    runs = [run for run in folders_with(root, CHECKPOINTS) if any(step_folders(run, kind) for kind in kinds)]
    listed = []
    for run in sorted(runs, key=begun, reverse=True)[:LISTED]:
        summary = read_summary(run)
        title = run_title(run, summary)
        short = title if len(title) <= TITLE_WIDTH else f"{title[: TITLE_WIDTH - 1]}…"
        listed.append((run, f"{state_of(run, summary)}, {short}"))
    return newest("runs", listed, len(runs))


def newest(what: str, listed: list[tuple[Path, str]], count: int) -> str:
    """The end of an error message that lists the newest of `count` things; empty if there are none."""
    if not listed:
        return ""
    more = "; experiments/runs.py lists more" if count > len(listed) else ""
    texts = ", ".join(f"{as_typed(folder)} ({about})" for folder, about in listed)
    return f"; the newest {what}: {texts}{more}"


def folders_with(root: Path, *names: str) -> Iterator[Path]:
    """All folders below `root`, and `root` itself, that hold a file or folder of one of these names, also
    behind links. Folders below one that was found are not searched."""
    seen = set()
    for place, folders, files in os.walk(root, followlinks=True):
        if (here := os.path.realpath(place)) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(here)
        if not {*names}.isdisjoint([*folders, *files]):
            folders.clear()
            yield Path(place)
