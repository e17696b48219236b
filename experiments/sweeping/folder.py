"""Claiming the folder of a sweep, for the one process that runs it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra_versions import as_yaml
from omegaconf import DictConfig, open_dict, read_write
from sweeping.job import names_by_clock

from llm.errors import UserError
from llm.files import held, write_text
from llm.overrides import as_argument
from llm.run_folder import SWEEP_LOCK, folders_beside, holds_run, refuse_links


@contextmanager
def claimed(config: DictConfig, resume: bool) -> Iterator[Path]:
    """Claim the folder that `hydra.sweep.dir` names. Of two sweeps started in the same second, the second
    gets a folder beside it, which `hydra.sweep.dir` then names.

    Raises:
        UserError: the folder that was asked for holds a sweep, or the one to resume is being run.
    """
    was_named = not names_by_clock(config.hydra.sweep)
    for folder in folders_beside(Path(config.hydra.sweep.dir)):
        refuse_links(folder)
        with held(folder / SWEEP_LOCK) as ours:
            if resume and not ours:
                raise UserError(f"{folder} is being run by another process: wait for it, or stop it")
            if ours and (resume or not holds_run(folder)):
                with read_write(config.hydra), open_dict(config.hydra):
                    config.hydra.sweep.dir = str(folder)
                write_text(folder / "multirun.yaml", as_yaml(config))  # where users of Hydra expect it
                yield folder
                return
        if was_named:
            raise UserError(
                f"{folder} holds a sweep already: continue it with -m {as_argument('sweep.resume', folder)}, "
                f"or write to another folder (hydra.sweep.dir=FOLDER)"
            )
