"""Where a run starts: from scratch, from given weights, from one of its checkpoints, or as a rerun."""

import logging
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llm.checkpoints.checkpoint import (
    STEP_FILES,
    damage,
    kept_tokenizer,
    newest_whole,
    read_config,
    run_id,
    start_config,
)
from llm.checkpoints.opening import open_weights, tokenizer_of
from llm.checkpoints.pruning import go_back
from llm.checkpoints.weights import Weights
from llm.checkpoints.writing import write_start
from llm.config import AUTO, ModelConfig, PretrainConfig, TokenizerConfig
from llm.config_values import differences, own_defaults, with_given
from llm.data.corpus import source_prompt
from llm.data.tokenizer import LEARNT
from llm.errors import UserError
from llm.files import as_typed, read_content, remove, remove_leftovers, replacing, write_text
from llm.model.parts import POSITIONS, spelled_out
from llm.overrides import as_argument
from llm.run_folder import (
    CHECKPOINTS,
    LOSS_PLOT,
    RECORDS,
    RUN_ID,
    read_summary,
    step_folders,
    steps_of,
    write_summary,
)
from llm.runs import BEST, find_run, named_checkpoint, path_of
from llm.training.update_size import DEVICE_KEYS

log = logging.getLogger(__name__)

# Keys that cannot change within a run, as they decide its numbers from the first update on. The text may have
# moved: its fingerprint is compared instead of its path.
FIXED = ("model.", "tokenizer.", "data.", "seed", "optimizer.name", "training.accumulate", "init_from")
FREE_DATA_KEYS = ("data.source", "data.path", "data.cache_dir")
FREE_IN_RERUN = (*FREE_DATA_KEYS, "tracking.")

# Keys of a model that given weights do not determine.
FREE_MODEL_KEYS = ("init", "drop_rate")
# Keys in which a preset (model=gpt124m) may differ from given weights without contradicting them.
INCIDENTAL_KEYS = ("vocab_size", "qkv_bias", "tie_weights", "hidden_dim", "norm_eps", "rotary_base")

# What a summary says about a run's end, besides the `val_…` metrics; cleared when it is resumed.
RESULTS = ("error", "stopped_early", "train_loss", "evaluated_windows", "heartbeat")


@dataclass
class Start:
    """Where a run starts, and with which config."""

    config: PretrainConfig  # final: with the model of given weights, or as recorded
    run_dir: Path
    run_id: str
    checkpoint: Path | None = None  # verified, and of this run
    was_finished: bool = False
    changes: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # key: (at the checkpoint, now)
    rerun_of: Path | None = None
    undecided: frozenset[str] = frozenset()  # keys among DEVICE_KEYS that neither the user nor a record sets
    weights: Weights | None = None  # those of init_from, until the model has taken them

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the weights: the run's other processes read them from disk."""
        return {**self.__dict__, "weights": None}

    @property
    def steps(self) -> int:
        """Updates done so far."""
        return steps_of(self.checkpoint) if self.checkpoint else 0

    @property
    def tokenizer(self) -> TokenizerConfig:
        """The tokenizer to load. A checkpoint keeps the files of its tokenizer, so that resuming neither
        needs the original files nor learns the tokenizer again."""
        ours = self.config.tokenizer
        kept = kept_tokenizer(self.checkpoint, self.config) if self.checkpoint else ours.name
        return ours if kept == ours.name else TokenizerConfig(kept)

    def take_weights(self) -> Weights | None:
        """The weights to start a new run from, if any. They are handed over, not kept, so that memory does
        not hold them twice."""
        weights, self.weights = self.weights, None
        if weights is None and self.config.init_from:
            return open_weights(self.config.init_from, self.config.model.n_heads)
        return weights


def find_start(config: PretrainConfig, run_dir: Path, given: Collection[str]) -> Start:
    """Decide where a run starts: read its checkpoint, its weights or the run to repeat, as the config says.

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
        return Start(repeated_config(config, rerun_of), run_dir, identity, rerun_of=rerun_of)
    undecided = frozenset(DEVICE_KEYS) - set(given)
    if config.samples.prompt is None:  # record the source's, so that the prompt stays if the text moves
        config = replace(config, samples=replace(config.samples, prompt=source_prompt(config.data)))
    if config.init_from:
        asked = set(given)
        weights = open_weights(
            config.init_from, config.model.n_heads if {"model", "model.n_heads"} & asked else None
        )
        name = config.tokenizer.name if {"tokenizer", "tokenizer.name"} & asked else None
        tokenizer = TokenizerConfig(tokenizer_of(weights, name))
        if weights.trained:
            tokenizer.vocab_size = weights.trained.tokenizer.vocab_size
        if name:  # it may be another name for the same tokenizer
            config = replace(config, tokenizer=replace(config.tokenizer, name=tokenizer.name))
        if weights.folder:  # record the checkpoint itself: "latest" and a run's newest soon mean another one
            config = replace(config, init_from=weights.origin)
        config = with_weights(config, weights.model, tokenizer, weights.origin, given)
        return Start(config, run_dir, identity, undecided=undecided, weights=weights)
    ours = config.tokenizer
    if "tokenizer.vocab_size" in given and ours.vocab_size and ours.name != LEARNT:
        raise UserError(
            f"tokenizer.vocab_size={ours.vocab_size}: tokenizer.name={ours.name} has a size of its own; "
            f"remove it, or learn a tokenizer of that size with tokenizer=bpe"
        )
    return Start(config, run_dir, identity, undecided=undecided)


def _resume(config: PretrainConfig, name: str, run_dir: Path, given: Collection[str]) -> Start:
    """Resume a run with its recorded config, changed by what is given now."""
    identity, checkpoint = run_id(run_dir), named_checkpoint(path_of(name))
    if checkpoint:
        if checkpoint.name.startswith(BEST):
            raise UserError(
                f"resume={name}: the best checkpoint holds weights alone; continue from the newest with "
                f"{as_argument('resume', as_typed(run_dir))}, or start a new run from these weights with "
                f"{as_argument('init_from', name)}"
            )
        if problem := damage(checkpoint, STEP_FILES):
            raise UserError(f"resume={name} cannot be resumed: {problem}")
        resumable = [*step_folders(run_dir), *step_folders(run_dir, "abandoned-step")]
        if checkpoint not in map(Path.resolve, resumable):
            raise UserError(f"resume={name}: it does not have the name of a checkpoint, as step-00000100")
    elif step_folders(run_dir):
        checkpoint = newest_whole(run_dir, STEP_FILES, identity)
    if checkpoint is None:
        return _begin_again(config, name, run_dir, given)
    recorded = read_config(checkpoint)
    continued = start_config(run_dir, steps_of(checkpoint)) or recorded
    wanted = replace(_with_given(continued, config, given), resume=config.resume, rerun=continued.rerun)
    if wanted.init_from:  # the recorded model and tokenizer are those of the weights
        wanted = with_weights(wanted, recorded.model, recorded.tokenizer, name, given)
    changes = differences(recorded, wanted)
    changes = {key: values for key, values in changes.items() if key not in ("resume", "rerun", "if_done")}
    refused = [key for key in changes if key.startswith(FIXED) and key not in FREE_DATA_KEYS]
    if refused:
        listed = ", ".join(f"{key}={changes[key][1]} (it is {changes[key][0]})" for key in refused)
        raise UserError(
            f"resume={name}: {listed} cannot change within a run; leave it as it is, or start a new run from "
            f"its weights with {as_argument('init_from', name)}"
        )
    was_finished = read_summary(run_dir).get("status") == "finished"
    changed = [f"{key}={now}" for key, (_, now) in changes.items() if not key.startswith(FREE_IN_RERUN)]
    if wanted.rerun and changed:
        if not was_finished:
            raise UserError(
                f"resume={name} is a rerun, which repeats a run as it was: remove {' '.join(changed)} until "
                f"it has finished"
            )
        wanted = replace(wanted, rerun=None)  # it has been compared: from here on it is a run like others
    return Start(
        wanted,
        run_dir,
        identity,
        checkpoint,
        was_finished=was_finished,
        changes=changes,
        rerun_of=find_run(wanted.rerun) if wanted.rerun else None,
    )


def _with_given(recorded: PretrainConfig, config: PretrainConfig, given: Collection[str]) -> PretrainConfig:
    """`with_given`, where `data.batch_size=auto` means the size that was chosen when the run began."""
    wanted = with_given(recorded, config, given)
    if wanted.data.batch_size == AUTO:
        wanted = replace(wanted, data=replace(wanted.data, batch_size=recorded.data.batch_size))
    return wanted


def _begin_again(config: PretrainConfig, name: str, run_dir: Path, given: Collection[str]) -> Start:
    """Restart a run that has no checkpoint yet, with its recorded config."""
    recorded = start_config(run_dir, 0)
    if recorded is None:
        raise UserError(
            f"resume={name}: there is no checkpoint, and no undamaged record of the config: "
            f"delete {run_dir}, and start the run again"
        )
    log.info("%s has no checkpoint yet: it starts from the beginning", run_dir)
    wanted = replace(_with_given(recorded, config, given), resume=None)
    # The record holds the model and tokenizer of given weights, and what was chosen for the device. All of
    # that counts as given, so that none of it changes.
    return find_start(wanted, run_dir, {*given, "model", "tokenizer.name", *DEVICE_KEYS})


def repeated_config(config: PretrainConfig, run_dir: Path) -> PretrainConfig:
    """The config of a run, to train with it again. Tracking, and where the text is, are as asked for now."""
    checkpoint = newest_whole(run_dir, STEP_FILES)
    recorded = read_config(checkpoint)
    data = replace(
        recorded.data,
        path=config.data.path or recorded.data.path,
        cache_dir=config.data.cache_dir or recorded.data.cache_dir,
    )
    return replace(
        recorded,
        data=data,
        tokenizer=TokenizerConfig(kept_tokenizer(checkpoint, recorded)),
        tracking=config.tracking,
        resume=None,
        rerun=str(run_dir),
    )


def with_weights(
    config: PretrainConfig,
    model: ModelConfig,
    tokenizer: TokenizerConfig,
    origin: str,
    given: Collection[str],
) -> PretrainConfig:
    """The config with the model and the tokenizer of given weights.

    Args:
        model, tokenizer: those of the weights.
        origin: where the weights come from, for messages.
        given: what was asked for by name: keys such as `model.n_layers`, and groups such as `model` of which
            an option was chosen. The weights decide everything else.

    Raises:
        UserError: what was asked for contradicts the weights.
    """
    for name, (wanted, found) in differences(spelled_out(config.model), spelled_out(model)).items():
        key = f"model.{name}"
        asked = key in given or ("model" in given and name not in INCIDENTAL_KEYS)
        if asked and name not in (*FREE_MODEL_KEYS, "context_length"):
            raise UserError(f"{key}={wanted}: the weights of {origin} have {found}; remove it")
    for key in ("name", "vocab_size"):
        wanted, found = getattr(config.tokenizer, key), getattr(tokenizer, key)
        if wanted not in (None, found) and {"tokenizer", f"tokenizer.{key}"} & set(given):
            raise UserError(
                f"tokenizer.{key}={wanted}: the weights of {origin} have {found or tokenizer.name}; remove it"
            )
    context = model.context_length
    if {"model", "model.context_length"} & set(given):
        context = config.model.context_length
    if context > model.context_length and POSITIONS[model.position].embedding:
        raise UserError(
            f"model.context_length={context}: the weights of {origin} have positions for "
            f"{model.context_length}; ask for no more"
        )
    free = {name: getattr(config.model, name) for name in FREE_MODEL_KEYS}
    return replace(
        config,
        model=replace(model, context_length=context, **free),
        tokenizer=TokenizerConfig(tokenizer.name),
    )


def keys_unlike_default(config: PretrainConfig) -> set[str]:
    """The keys that count as given in a config made in Python: those that differ both from their value in
    `PretrainConfig()` and from the default of their own group's class."""
    return {*differences(PretrainConfig(), config)} & {*differences(own_defaults(PretrainConfig), config)}


def rewind(start: Start) -> None:
    """Take a run folder back to the checkpoint to continue from, or to empty records if there is none; and
    record the config with which the run continues.

    Raises:
        UserError: the folder cannot be written.
    """
    run_dir = start.run_dir
    for folder in (run_dir, run_dir / CHECKPOINTS):
        remove_leftovers(folder)
    if summary := read_summary(run_dir):  # first: from here on the run is no longer finished
        results = {key: None for key in summary if key.startswith("val_") or key in RESULTS}
        write_summary(run_dir, {**summary, **results, "status": "running"})
    write_start(run_dir, start.steps, start.config)
    start.checkpoint = go_back(run_dir, start.checkpoint)
    for name in RECORDS:
        path, content = run_dir / name, (start.checkpoint / name).read_bytes() if start.checkpoint else b""
        if path.exists() and read_content(path) != content:
            remove(run_dir / LOSS_PLOT)  # it shows what came after
        if content:
            with replacing(path) as temporary:
                temporary.write_bytes(content)
        else:
            remove(path)
    write_text(run_dir / RUN_ID, start.run_id)
