"""Where a run begins: anew, from given weights, at one of its checkpoints, or as a rerun of another run."""

import logging
from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from llm.checkpoints.checkpoint import (
    STEP_FILES,
    damage,
    newest_whole,
    read_config,
    read_weights,
    run_id,
)
from llm.checkpoints.opening import open_weights
from llm.checkpoints.weights import Weights
from llm.config import ModelConfig, PretrainConfig, TokenizerConfig, differences
from llm.errors import UserError
from llm.files import remove, remove_leftovers, replacing
from llm.run_folder import (
    CHECKPOINTS,
    RECORDS,
    find_run,
    read_summary,
    refuse_to_overwrite,
    step_folders,
)

log = logging.getLogger(__name__)

# What decides the numbers from the first update on. The text may lie elsewhere: its fingerprint is compared.
FIXED = ("model.", "tokenizer.", "data.", "seed", "optimizer.name", "training.accumulate", "init_from")
FREE_DATA_KEYS = ("data.source", "data.path", "data.cache_dir")

# Keys of a model that given weights leave open: how it was initialised, and its dropout from here on.
FREE_MODEL_KEYS = ("init", "drop_rate")
SIZES = ("emb_dim", "n_heads", "n_layers")  # by which presets such as gpt124m are named


@dataclass
class Start:
    """Where a run begins, and as what."""

    config: PretrainConfig  # as it will run: with the model of given weights, or as recorded
    run_dir: Path
    run_id: str
    checkpoint: Path | None = None  # verified, and of this run
    was_finished: bool = False
    changes: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # since the checkpoint: (was, is)
    rerun_of: Path | None = None
    weights: Weights | None = None  # of init_from, which decide the config; until the model has taken them

    def __getstate__(self) -> dict[str, Any]:
        """Other processes of the run get all but the weights, which each reads for itself."""
        return {**self.__dict__, "weights": None}

    def take_weights(self) -> Weights | None:
        """The weights to begin with, if any; handed over, so that they are not kept beside the model's."""
        weights, self.weights = self.weights, None
        if weights is None and self.checkpoint:
            return read_weights(self.checkpoint)
        if weights is None and self.config.init_from:
            return open_weights(self.config.init_from)
        return weights


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


def find_start(config: PretrainConfig, run_dir: Path, given: Collection[str]) -> Start:
    """
    Args:
        given: keys and groups that were asked for by name, see `with_weights`.

    Raises:
        UserError: the run, checkpoint or weights that the config names do not exist or are damaged, or the
            config changes what cannot change.
    """
    if config.resume:
        return _resume(config, config.resume, run_dir, given)
    identity = run_id(run_dir)
    if config.rerun:
        rerun_of = find_run(config.rerun)
        return Start(recorded_config(config, rerun_of), run_dir, identity, rerun_of=rerun_of)
    if config.init_from:
        weights = open_weights(config.init_from)
        config = with_weights(config, weights.model, weights.tokenizer, weights.origin, given)
        return Start(config, run_dir, identity, weights=weights)
    return Start(config, run_dir, identity)


def _resume(config: PretrainConfig, name: str, run_dir: Path, given: Collection[str]) -> Start:
    identity, checkpoint = run_id(run_dir), None
    if Path(name).parent.name == CHECKPOINTS:
        checkpoint = Path(name).resolve()
        if problem := damage(checkpoint, STEP_FILES):
            raise UserError(f"resume={name} cannot be resumed: {problem}")
    elif step_folders(run_dir):
        checkpoint = newest_whole(run_dir, STEP_FILES, identity)
    if checkpoint is None:
        log.info("%s has no checkpoint yet: it starts from the beginning", run_dir)
        return find_start(replace(config, resume=None), run_dir, given)
    recorded = read_config(checkpoint)
    if config.rerun:
        config = replace(recorded, resume=config.resume, tracking=config.tracking)
    if config.init_from:  # what the model is came from the weights
        config = with_weights(config, recorded.model, recorded.tokenizer.name, name, given)
    changes = differences(recorded, config)
    changes = {key: values for key, values in changes.items() if key not in ("resume", "rerun")}
    refused = [key for key in changes if key.startswith(FIXED) and key not in FREE_DATA_KEYS]
    if refused:
        listed = ", ".join(f"{key}={changes[key][1]} (it is {changes[key][0]})" for key in refused)
        raise UserError(
            f"resume={name}: {listed} cannot change within a run; leave it as it is, or start a new run from "
            f"its weights with init_from={name}"
        )
    return Start(
        config,
        run_dir,
        identity,
        checkpoint,
        was_finished=read_summary(run_dir).get("status") == "finished",
        changes=changes,
        rerun_of=Path(config.rerun) if config.rerun else None,
    )


def recorded_config(config: PretrainConfig, run_dir: Path) -> PretrainConfig:
    """The config that a run was trained with, to train with it again. Tracking is as asked for now, and the
    text may lie elsewhere now."""
    recorded = read_config(newest_whole(run_dir, STEP_FILES))
    data = replace(
        recorded.data,
        path=config.data.path or recorded.data.path,
        cache_dir=config.data.cache_dir or recorded.data.cache_dir,
    )
    return replace(recorded, data=data, tracking=config.tracking, resume=None, rerun=str(run_dir))


def with_weights(
    config: PretrainConfig, model: ModelConfig, tokenizer: str | None, origin: str, given: Collection[str]
) -> PretrainConfig:
    """The config with the model that given weights make, and with their tokenizer if it is known.

    Args:
        given: what was asked for by name: keys such as `model.n_layers`, and groups such as `model`, of which
            an option was chosen. The weights decide everything else.

    Raises:
        UserError: another model or tokenizer was asked for.
    """
    chosen = {f"model.{name}" for name in SIZES} if "model" in given else set()
    for item in fields(ModelConfig):
        key, wanted, found = f"model.{item.name}", getattr(config.model, item.name), getattr(model, item.name)
        if item.name in (*FREE_MODEL_KEYS, "context_length") or wanted == found:
            continue
        if key in given or key in chosen:
            raise UserError(f"{key}={wanted}: the weights of {origin} have {found}; remove it")
    tokenizer = tokenizer or config.tokenizer.name
    if config.tokenizer.name != tokenizer and {"tokenizer", "tokenizer.name"} & set(given):
        raise UserError(
            f"tokenizer.name={config.tokenizer.name}: the weights of {origin} have {tokenizer}; remove it"
        )
    context = model.context_length
    if {"model", "model.context_length"} & set(given):
        context = config.model.context_length
    if context > model.context_length:
        raise UserError(
            f"model.context_length={context}: the weights of {origin} have positions for "
            f"{model.context_length}; ask for no more"
        )
    free = {name: getattr(config.model, name) for name in FREE_MODEL_KEYS}
    return replace(
        config,
        model=replace(model, context_length=context, **free),
        tokenizer=TokenizerConfig(tokenizer),
    )


def keys_unlike_default(config: PretrainConfig) -> set[str]:
    """What counts as given in a config made in Python, where nobody knows what was left at its default."""
    return set(differences(PretrainConfig(), config))


def rewind(start: Start) -> None:
    """Let a run folder hold what it held at the checkpoint to continue from, or nothing if there is none."""
    for folder in (start.run_dir, start.run_dir / CHECKPOINTS):
        remove_leftovers(folder)
    for name in RECORDS:
        path = start.run_dir / name
        if start.checkpoint and (content := (start.checkpoint / name).read_bytes()):
            with replacing(path) as temporary:
                temporary.write_bytes(content)
        else:
            remove(path)
