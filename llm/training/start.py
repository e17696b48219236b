"""Where a run begins: anew, from given weights, at one of its checkpoints, or again from another's record."""

import logging
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from llm.checkpoints.checkpoint import STEP_FILES, damage, newest_whole, read_config, run_id
from llm.checkpoints.pretrained import open_weights
from llm.config import ModelConfig, PretrainConfig, TokenizerConfig, differences
from llm.errors import UserError
from llm.files import remove, remove_leftovers, replacing
from llm.run_folder import RECORDS, find_run, read_summary, refuse_to_overwrite, step_folders

log = logging.getLogger(__name__)

# What decides the numbers from the first update on. The text may lie elsewhere: a hash of it is compared.
FIXED = ("model.", "tokenizer.", "data.", "seed", "optimizer.name", "training.accumulate", "init_from")
FREE_DATA_KEYS = ("data.source", "data.path", "data.cache_dir")


@dataclass
class Start:
    """Where a run begins, and as what."""

    config: PretrainConfig  # as it will run: with the sizes of given weights, or as recorded
    run_dir: Path
    checkpoint: Path | None = None  # whole, and of this run
    was_finished: bool = False
    changes: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # since the checkpoint: (was, is)
    rerun_of: Path | None = None


def run_folder(config: PretrainConfig, run_dir: str | Path | None) -> Path:
    """The folder that a run writes to: that of the run to resume, or one that holds no run yet.

    Raises:
        UserError: there is no such run, or the folder holds one.
    """
    if config.resume:
        return find_run(config.resume, with_checkpoint=False)
    run_dir = Path(run_dir or f"outputs/pretrain/{datetime.now():%Y-%m-%d/%H-%M-%S}")
    refuse_to_overwrite(run_dir)
    return run_dir


def find_start(config: PretrainConfig, run_dir: Path) -> Start:
    """
    Raises:
        UserError: the run, checkpoint or weights that the config names are not there or not whole, or the
            config changes what cannot change.
    """
    if config.resume:
        return _resume(config, config.resume, run_dir)
    if config.rerun:
        rerun_of = find_run(config.rerun)
        return Start(recorded_config(config, rerun_of), run_dir, rerun_of=rerun_of)
    if config.init_from:
        source = open_weights(config.init_from)
        config = with_sizes(config, source.model, source.tokenizer, source.origin)
    return Start(config, run_dir)


def _resume(config: PretrainConfig, name: str, run_dir: Path) -> Start:
    checkpoint = None
    if Path(name).parent.name == "checkpoints":
        checkpoint = Path(name).resolve()
        if problem := damage(checkpoint, STEP_FILES):
            raise UserError(f"resume={name} cannot be gone on from: {problem}")
    elif step_folders(run_dir):
        checkpoint = newest_whole(run_dir, STEP_FILES, run_id(run_dir))
    if checkpoint is None:
        log.info("%s has no checkpoint yet: it starts again", run_dir)
        return find_start(replace(config, resume=None), run_dir)
    recorded = read_config(checkpoint)
    if config.rerun:
        config = replace(recorded, resume=config.resume, tracking=config.tracking)
    if config.init_from:  # the sizes came from the weights
        config = with_sizes(config, recorded.model, recorded.tokenizer.name, name)
    changes = differences(recorded, config)
    changes = {key: values for key, values in changes.items() if key not in ("resume", "rerun")}
    refused = [key for key in changes if key.startswith(FIXED) and key not in FREE_DATA_KEYS]
    if refused:
        listed = ", ".join(f"{key}={changes[key][1]} (it is {changes[key][0]})" for key in refused)
        raise UserError(
            f"resume={name}: {listed} cannot change within a run; leave it out, or begin a new run from its "
            f"weights with init_from={name}"
        )
    rerun_of = Path(config.rerun) if config.rerun else None
    return Start(
        config, run_dir, checkpoint, read_summary(run_dir).get("status") == "finished", changes, rerun_of
    )


def recorded_config(config: PretrainConfig, run_dir: Path) -> PretrainConfig:
    """The config that a run was trained with, to be trained with again. Tracking is as asked for now, and the
    text may lie elsewhere now."""
    recorded = read_config(newest_whole(run_dir, STEP_FILES))
    data = replace(
        recorded.data,
        path=config.data.path or recorded.data.path,
        cache_dir=config.data.cache_dir or recorded.data.cache_dir,
    )
    return replace(recorded, data=data, tracking=config.tracking, resume=None, rerun=str(run_dir))


def with_sizes(
    config: PretrainConfig, model: ModelConfig, tokenizer: str | None, origin: str
) -> PretrainConfig:
    """The config with the model that given weights make, and their tokenizer if it is known.

    Raises:
        UserError: the config asks for other sizes.
    """
    default = PretrainConfig()
    tokenizer = tokenizer or config.tokenizer.name
    asked = {
        "model.emb_dim": (config.model.emb_dim, default.model.emb_dim, model.emb_dim),
        "model.n_heads": (config.model.n_heads, default.model.n_heads, model.n_heads),
        "model.n_layers": (config.model.n_layers, default.model.n_layers, model.n_layers),
        "tokenizer.name": (config.tokenizer.name, default.tokenizer.name, tokenizer),
    }
    for name, (wanted, usual, found) in asked.items():
        if wanted not in (usual, found):
            raise UserError(f"{name}={wanted}: the weights of {origin} have {found}; leave it out")
    if config.model.context_length > model.context_length:
        raise UserError(
            f"model.context_length={config.model.context_length}: the weights of {origin} have positions for "
            f"{model.context_length}; ask for no more"
        )
    sizes = replace(
        model,
        context_length=config.model.context_length,
        drop_rate=config.model.drop_rate,
        init=config.model.init,
    )
    return replace(config, model=sizes, tokenizer=TokenizerConfig(tokenizer))


def rewind(start: Start) -> None:
    """Let a run folder hold what it held at the checkpoint to go on from, or nothing if there is none."""
    for folder in (start.run_dir, start.run_dir / "checkpoints"):
        remove_leftovers(folder)
    for name in RECORDS:
        path = start.run_dir / name
        if start.checkpoint and (content := (start.checkpoint / name).read_bytes()):
            with replacing(path) as temporary:
                temporary.write_bytes(content)
        else:
            remove(path)
