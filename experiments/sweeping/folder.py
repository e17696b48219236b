"""The folder of a sweep, held by the one process that runs it."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from llm.errors import UserError
from llm.files import held
from llm.overrides import as_override
from llm.sweeps.jobs import LOCK, RECORD


@contextmanager
def claimed(config: DictConfig, resume: bool) -> Iterator[Path]:
    """Hold the folder that `hydra.sweep.dir` names. Of two sweeps begun in the same second, the second gets a
    folder beside, and `hydra.sweep.dir` then names that.

    Raises:
        UserError: the folder that was asked for holds a sweep, or the one to resume is being run.
    """
    wanted = Path(config.hydra.sweep.dir)
    was_named = any(each.startswith("hydra.sweep.dir=") for each in config.hydra.overrides.hydra)
    for number in count(1):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        with held(folder / LOCK) as ours:
            if resume and not ours:
                raise UserError(f"{folder} is being run by another process: wait for it, or stop it")
            if ours and (resume or not (folder / RECORD).exists()):
                with read_write(config.hydra), open_dict(config.hydra):
                    config.hydra.sweep.dir = str(folder)
                OmegaConf.save(config, folder / "multirun.yaml")  # where Hydra's users look for it
                yield folder
                return
        if was_named:
            raise UserError(
                f"{folder} holds a sweep already: continue it with -m {as_override('sweep.resume', folder)}, "
                f"or write to another folder (hydra.sweep.dir=FOLDER)"
            )
