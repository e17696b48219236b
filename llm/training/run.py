"""The parts of a training run, put together, saved and restored."""

import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tiktoken
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from llm.checkpoints.checkpoint import (
    STATE_TENSORS,
    WEIGHTS,
    CheckpointWriter,
    Snapshot,
    check_shapes,
    copy_weights,
    load_optimizer_state,
    read_state,
    read_tensors,
)
from llm.checkpoints.pretrained import open_weights
from llm.config import PretrainConfig
from llm.data.tokenizer import bytes_of_tokens, load_tokenizer
from llm.data.windows import TrainingBatches, Windows, load_windows, path_of
from llm.errors import UserError
from llm.model.gpt import GPTModel
from llm.progress import format_seconds, format_value
from llm.runtime import Runtime
from llm.tracking import Tracker
from llm.training.optimizers import Optimizers, build_optimizers
from llm.training.record import git_commit, git_is_clean, machine, package_versions, recorded_clock
from llm.training.schedules import spent
from llm.training.start import Start, rewind

log = logging.getLogger(__name__)


@dataclass
class Counters:
    """How far a run is; saved with each checkpoint."""

    steps: int = 0  # updates done, those left out among them
    tokens_seen: int = 0
    seconds: float = 0.0  # of training; evaluation, samples and saving do not count
    best_val_loss: float | None = None
    best_step: int | None = None
    skipped: int = 0  # updates left out, their loss or gradient not finite
    skipped_in_a_row: int = 0
    usual_grad_norm: float | None = None  # a running mean
    grad_norm_spikes: int = 0


@dataclass
class Summary:
    """What came out of a run; the content of `summary.json`. Losses are in nats per token."""

    run_dir: str
    status: str = "running"  # or finished, interrupted, failed
    stopped_early: str | None = None  # of an interrupted run: why, if a rule stopped it and not a person
    steps: int = 0
    tokens_seen: int = 0
    seconds: float = 0.0
    train_loss: float | None = None  # over eval_iter batches, at the end
    val_loss: float | None = None  # over the whole validation split, at the end
    val_perplexity: float | None = None
    val_bits_per_byte: float | None = None
    best_val_loss: float | None = None  # of the evaluations along the way
    best_step: int | None = None
    skipped: int = 0
    grad_norm_spikes: int = 0
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    mfu: float | None = None  # model FLOPs a second over those of a large matrix product
    total_seconds: float = 0.0  # of this process, everything counted
    parameters: int = 0
    seed: int = 0
    device: str = ""
    precision: str = ""
    machine: str = field(default_factory=machine)
    versions: dict[str, str] = field(default_factory=package_versions)
    git_commit: str | None = field(default_factory=git_commit)
    git_clean: bool | None = field(default_factory=git_is_clean)  # whether the code was as committed
    init_from: str | None = None
    resumed: list[dict[str, Any]] = field(default_factory=list)  # after how many updates, with what changed
    wandb_folder: str | None = None  # of the W&B run, if W&B has not got all of it
    error: str | None = None


@dataclass
class Run:
    """The parts of one run, put together by `build_run`."""

    config: PretrainConfig
    run_dir: Path
    run_id: str
    runtime: Runtime
    tokenizer: tiktoken.Encoding
    bytes_of_tokens: Tensor  # (vocab_size,)
    model: GPTModel
    trained_model: GPTModel | DistributedDataParallel  # the model itself, or what shares its gradients
    optimizers: Optimizers
    training_windows: Windows
    validation_windows: Windows
    batches: TrainingBatches
    counters: Counters
    clock: list[float]  # of a rerun: the seconds of training after each update, as recorded
    resumed: list[dict[str, Any]]  # see Summary
    tracker: Tracker | None  # the main process's alone, as is the writer
    writer: CheckpointWriter | None

    @property
    def updates_per_epoch(self) -> int:
        return len(self.batches) // self.config.training.accumulate

    def spent(self) -> dict[str, float]:
        """For each limit that is set, by its key: the share of it that is spent."""
        position = self.position()
        return spent(self.config.training, self.counters.steps, position["epoch"], position["seconds"])

    def progress(self) -> float:
        """The share of the budget that is spent; at 1 the run ends. The limit reached first counts."""
        return max(self.spent().values())

    def binding_limit(self) -> tuple[str, float]:
        """The limit that ends this run, by its key, and its value."""
        spent = self.spent()
        name = max(spent, key=lambda limit: spent[limit])
        return f"training.{name}", getattr(self.config.training, name)

    def position(self) -> dict[str, float]:
        """Where every line of metrics stands; `epoch` is how many passes are done, in parts."""
        counters = self.counters
        return {
            "tokens_seen": counters.tokens_seen,
            "epoch": counters.steps / self.updates_per_epoch,
            "seconds": counters.seconds,
        }


def build_run(start: Start, run_id: str, runtime: Runtime) -> Run:
    """Everything that can go wrong by the user's hand goes wrong here, before the first update."""
    config, run_dir = start.config, start.run_dir
    tokenizer = load_tokenizer(config.tokenizer.name)
    training_windows, validation_windows = load_windows(config, tokenizer)
    torch.manual_seed(config.seed)
    model = GPTModel(config.model).to(runtime.device)
    run = Run(
        config=config,
        run_dir=run_dir,
        run_id=run_id,
        runtime=runtime,
        tokenizer=tokenizer,
        bytes_of_tokens=bytes_of_tokens(tokenizer, config.model.vocab_size),
        model=model,
        trained_model=DistributedDataParallel(model) if runtime.processes > 1 else model,
        optimizers=build_optimizers(model, config.optimizer),
        training_windows=training_windows,
        validation_windows=validation_windows,
        batches=TrainingBatches(training_windows, config.data, config.seed),
        counters=Counters(),
        clock=recorded_clock(start.rerun_of) if start.rerun_of else [],
        resumed=[],
        tracker=None,
        writer=None,
    )
    if not runtime.is_main:
        torch.manual_seed(config.seed + runtime.rank)  # dropout differs between processes
    if start.checkpoint:
        _restore(run, start)
    elif config.init_from:
        _begin_from(run, config.init_from)
    if runtime.is_main:  # last, for from here on it has to be ended
        rewind(start)
        run.tracker = Tracker(run_dir, config.tracking, asdict(config), "pretrain", run_id)
        run.writer = CheckpointWriter(run_dir, config.checkpoint.keep)
    model.train()
    return run


def compile_blocks(run: Run) -> None:
    """Compile the blocks for training, and wait for that here, so that no update's time holds it.

    Weights, gradients and random streams are left as they are.
    """
    begin = time.perf_counter()
    # Else each block is cut into graphs at the sizes of DDP's buckets, which overlap between blocks anyway.
    torch._dynamo.config.optimize_ddp = False
    for block in run.model.trf_blocks:
        block.compile()
    states = _generator_states(run.runtime)
    inputs, targets = run.training_windows.batch(torch.arange(run.config.data.batch_size))
    with run.runtime.autocast():
        run.trained_model(run.runtime.share(inputs), run.runtime.share(targets)).backward()
    run.optimizers.zero_grad()
    for kind, state in states.items():
        _GENERATORS[kind].set_rng_state(state)
    log.info("compiled in %s", format_seconds(time.perf_counter() - begin))


def save(run: Run) -> None:
    """Begin to save all that is needed to go on exactly. Every process calls it, the main one writes."""
    generators = run.runtime.gather(_generator_states(run.runtime))
    if not run.writer or not run.tracker:
        return
    run.writer.wait()
    try:
        record_sizes = run.tracker.record_sizes()
    except UserError as error:
        log.warning("checkpoint not saved: %s; training goes on, and the next one tries again", error)
        return
    place, epoch_generator_state = run.batches.state()
    tensors = {
        **{
            f"optimizer/{name}/{key}": tensor.to("cpu", copy=True)
            for name, state in run.optimizers.state(run.model).items()
            for key, tensor in state.items()
        },
        **{
            f"generator/{rank}/{kind}": state
            for rank, states in enumerate(generators)
            for kind, state in states.items()
        },
    }
    if epoch_generator_state is not None:
        tensors["epoch_generator"] = epoch_generator_state
    state = {
        "run_id": run.run_id,
        "counters": asdict(run.counters),
        "batches": place,
        "data": _data(run),
        "resumed": run.resumed,
    }
    weights = copy_weights(run.model)
    run.writer.write(Snapshot(run.counters.steps, run.config, weights, tensors, state, record_sizes))


def finish_saving(run: Run) -> None:
    """Wait until all is on disk; every process calls it.

    Raises:
        UserError: the last state is not saved.
    """
    if run.runtime.agree(bool(run.writer and not run.writer.has_saved(run.counters.steps))):
        save(run)  # never tried, or tried in vain
    if run.writer and (error := run.writer.wait()):
        raise error
    if run.tracker:
        run.tracker.flush()


def _data(run: Run) -> list[str]:
    return [path_of(windows).stem for windows in (run.training_windows, run.validation_windows)]


def _restore(run: Run, start: Start) -> None:
    """The inverse of `save`.

    Raises:
        UserError: the checkpoint is of other data or another model, or the run has come to its end.
    """
    folder = start.checkpoint
    assert folder
    weights, tensors, state = (
        read_tensors(folder / WEIGHTS),
        read_tensors(folder / STATE_TENSORS),
        read_state(folder),
    )
    check_shapes(run.model, weights, folder)
    run.model.load_state_dict(weights)
    run.optimizers.load_state(run.model, load_optimizer_state(folder), str(folder))
    try:
        run.counters = Counters(**state["counters"])
        run.batches.load_state(state["batches"], tensors.get("epoch_generator"))
        run.resumed = state["resumed"]
        if state["data"] != _data(run):
            raise UserError(
                f"the text is not the one that {start.run_dir} was trained on: give that one with data.path, "
                f"or begin a new run with init_from={start.run_dir}"
            )
        for kind in {"cpu", run.runtime.device.type}:
            if (name := f"generator/{run.runtime.rank}/{kind}") in tensors:
                _GENERATORS[kind].set_rng_state(tensors[name])
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{folder} is damaged or of another format: {error}") from error
    if run.progress() >= 1 and start.was_finished:
        key, value = run.binding_limit()
        raise UserError(
            f"{start.run_dir} is finished: {key}={format_value(value)} is spent; to go on, raise it"
        )
    changed = {key: list(values) for key, values in start.changes.items() if not key.startswith("tracking.")}
    run.resumed = [*run.resumed, {"steps": run.counters.steps, "changed": changed}]


def _begin_from(run: Run, name: str) -> None:
    """Take over given weights, and the optimizer's state where they come with it."""
    source = open_weights(name)
    weights = dict(source.weights)
    positions = run.config.model.context_length
    weights["pos_emb.weight"] = weights["pos_emb.weight"][:positions]
    check_shapes(run.model, weights, source.origin)
    run.model.load_state_dict(weights)
    if not source.optimizer_state:
        return
    if run.config.optimizer.name == "adamw" and positions == source.model.context_length:
        run.optimizers.load_state(run.model, source.optimizer_state, source.origin)
    else:
        log.info(
            "the optimizer state in %s is left out: it is AdamW's, for a context of %d tokens",
            source.origin,
            source.model.context_length,
        )


def _generator_states(runtime: Runtime) -> dict[str, Tensor]:
    """The states of torch's global generators: the CPU's, and that of the device, where dropout draws."""
    return {kind: _GENERATORS[kind].get_rng_state() for kind in {"cpu", runtime.device.type}}


_GENERATORS: dict[str, Any] = {"cpu": torch, "cuda": torch.cuda, "mps": torch.mps}
