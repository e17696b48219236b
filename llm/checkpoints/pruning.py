"""Which checkpoints of a run are deleted, kept or set aside, and the links to them."""

import logging
import shutil
from pathlib import Path

from llm.checkpoints.checkpoint import best_of
from llm.files import as_typed, flush, remove, replacing, write_text
from llm.overrides import as_command, as_override
from llm.run_folder import CHECKPOINT_NAME, CHECKPOINTS, GOING_BACK, step_folders, steps_of

ABANDONED = "abandoned-"  # before the name of a checkpoint that was set aside

log = logging.getLogger(__name__)


def point(link: Path, name: str) -> None:
    with replacing(link) as temporary:
        try:
            temporary.symlink_to(name)
        except OSError:  # a file system without links, such as vfat
            temporary.write_text(name, encoding="utf-8")


def prune(run_dir: Path, steps: int, keep: int) -> None:
    """Delete all step checkpoints except the last `keep`, and all best ones except theirs. Those that were
    set aside are deleted once the run has come as far again."""
    kept = step_folders(run_dir)[:keep]
    names = {folder.name for folder in kept} | {best_of(folder) for folder in kept}
    folders = list((run_dir / CHECKPOINTS).iterdir())
    old = [each for each in folders if CHECKPOINT_NAME.fullmatch(each.name) and each.name not in names]
    aside = [each for each in old if each.name.startswith(ABANDONED)]
    keeps_aside = any(steps_of(each) > steps for each in aside)
    for folder in old:
        if not (keeps_aside and folder in aside):
            shutil.rmtree(folder, ignore_errors=True)


def go_back(run_dir: Path, checkpoint: Path | None) -> Path | None:
    """Set aside a run's checkpoints after the one it continues from, or all of them if there is none. Returns
    the one it continues from, which may have been set aside itself and is moved back.

    If this is killed at any point, the run still continues from the given checkpoint: until the mark is
    written, nothing has happened; from then on nobody sees the later checkpoints, and the next resume sets
    aside the rest.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = run_dir / CHECKPOINTS
    if checkpoint and checkpoint.name.startswith(ABANDONED):
        if best := best_of(checkpoint):
            _move(folder / f"{ABANDONED}{best}", folder / best)
        checkpoint = _move(checkpoint, checkpoint.with_name(checkpoint.name.removeprefix(ABANDONED)))
    steps = steps_of(checkpoint) if checkpoint else 0
    later = [
        each
        for each in sorted([*folder.glob("step-*"), *folder.glob("best-*")])
        if CHECKPOINT_NAME.fullmatch(each.name) and steps_of(each) > steps
    ]
    if not later and not (folder / GOING_BACK).exists():
        return checkpoint
    write_text(folder / GOING_BACK, f"{steps}\n")
    best = best_of(checkpoint) if checkpoint else None
    for link, name in (("last", checkpoint and checkpoint.name), ("best", best)):
        if name and (folder / name).exists():
            point(folder / link, name)
        else:
            remove(folder / link)
    for each in later:
        aside = _move(each, folder / f"{ABANDONED}{each.name}")
        if each.name.startswith("step"):
            log.info(
                "%s is set aside until the run has come as far again; to return to it: %s",
                as_typed(aside),
                as_command("pretrain", as_override("resume", as_typed(aside))),
            )
    remove(folder / GOING_BACK)
    return checkpoint


def _move(folder: Path, target: Path) -> Path:
    if folder.exists():
        remove(target)
        folder.replace(target)
        flush(target.parent)
    return target
