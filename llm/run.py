"""The parts of a training run, put together, saved and restored."""

import platform
import subprocess
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tiktoken
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from llm.checkpoint import load_training_state, load_weights, save_checkpoint
from llm.config import PretrainConfig, UserError
from llm.dataset import TrainingBatches, Windows, load_windows
from llm.model import GPTModel
from llm.optimizer import Optimizers, build_optimizers
from llm.runtime import Runtime
from llm.tokenizer import bytes_of_tokens, load_tokenizer
from llm.tracking import Tracker


@dataclass
class Counters:
    """How far a run is; saved with each checkpoint."""

    steps: int = 0  # updates done
    tokens_seen: int = 0
    seconds: float = 0.0  # of training; evaluation, samples and saving do not count
    best_val_loss: float | None = None
    best_step: int | None = None


@dataclass
class Summary:
    """What came out of a run; the content of `summary.json`. Losses are in nats per token."""

    run_dir: str
    status: str = "running"  # or finished, interrupted, failed
    steps: int = 0
    tokens_seen: int = 0
    seconds: float = 0.0
    train_loss: float | None = None  # over eval_iter batches, at the end
    val_loss: float | None = None  # over the whole validation split, at the end
    val_perplexity: float | None = None
    val_bits_per_byte: float | None = None
    best_val_loss: float | None = None  # of the evaluations along the way
    best_step: int | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    mfu: float | None = None  # model FLOPs a second over those of a large matrix product
    total_seconds: float = 0.0  # of this process, everything counted
    parameters: int = 0
    seed: int = 0
    device: str = ""
    precision: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    git_commit: str | None = None
    error: str | None = None


@dataclass
class Run:
    """The parts of one run, put together by `build_run`."""

    config: PretrainConfig
    run_dir: Path
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
    tracker: Tracker | None  # the main process's alone

    @property
    def updates_per_epoch(self) -> int:
        return len(self.batches) // self.config.training.accumulate

    def spent(self) -> dict[str, float]:
        """For each limit that is set, by its key: the share of it that is spent."""
        training, counters = self.config.training, self.counters
        spent = {}
        if training.max_steps is not None:
            spent["max_steps"] = counters.steps / training.max_steps
        if training.max_epochs is not None:
            spent["max_epochs"] = counters.steps / (training.max_epochs * self.updates_per_epoch)
        if training.max_minutes is not None:
            spent["max_minutes"] = counters.seconds / (60 * training.max_minutes)
        return spent

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


def build_run(config: PretrainConfig, run_dir: Path, runtime: Runtime) -> Run:
    """Everything that can go wrong by the user's hand goes wrong here, before the first update."""
    tokenizer = load_tokenizer(config.tokenizer.name)
    training_windows, validation_windows = load_windows(config, tokenizer)
    torch.manual_seed(config.seed)
    model = GPTModel(config.model).to(runtime.device)
    run = Run(
        config=config,
        run_dir=run_dir,
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
        tracker=None,
    )
    if not runtime.is_main:
        torch.manual_seed(config.seed + runtime.rank)  # dropout differs between processes
    if config.resume:
        _restore(run)
        if run.progress() >= 1:
            key, value = run.binding_limit()
            raise UserError(f"{run_dir} is finished: {key}={value:g} is spent; to go on, raise it")
    if runtime.is_main:  # last, for from here on it has to be ended
        run.tracker = Tracker(run_dir, config.tracking, asdict(config), "pretrain")
        if config.resume:
            run.tracker.rewind(run.counters.steps)
    model.train()
    return run


def save(run: Run) -> None:
    """Save all that is needed to go on exactly. Every process calls it, the main one writes."""
    generator_states = run.runtime.gather(_generator_states(run.runtime))
    if run.runtime.is_main:
        training_state = {
            "optimizers": run.optimizers.state_dict(),
            "counters": asdict(run.counters),
            "batches": run.batches.state(),
            "generators": generator_states,
        }
        save_checkpoint(run.run_dir, "step", run.counters.steps, run.model, run.config, training_state)


def _restore(run: Run) -> None:
    """The inverse of `save`."""
    folder = (run.run_dir / "checkpoints" / "last").resolve()
    weights, state = load_training_state(folder)
    load_weights(run.model, weights, folder)
    run.optimizers.load_state_dict(state["optimizers"])
    run.counters = Counters(**state["counters"])
    run.batches.load_state(state["batches"])
    if run.runtime.rank < len(state["generators"]):
        _set_generator_states(run.runtime, state["generators"][run.runtime.rank])


def _generator_states(runtime: Runtime) -> dict[str, Tensor]:
    """The states of torch's global generators: the CPU's, and that of the device, where dropout draws."""
    return {kind: _GENERATORS[kind].get_rng_state() for kind in {"cpu", runtime.device.type}}


def _set_generator_states(runtime: Runtime, states: dict[str, Tensor]) -> None:
    for kind in {"cpu", runtime.device.type} & states.keys():
        _GENERATORS[kind].set_rng_state(states[kind])


_GENERATORS: dict[str, Any] = {"cpu": torch, "cuda": torch.cuda, "mps": torch.mps}


def package_versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "numpy", "tiktoken", "wandb")}
    return {"python": platform.python_version(), **packages}


def git_commit() -> str | None:
    """The commit of this code, or None outside a git checkout."""
    try:
        return subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
