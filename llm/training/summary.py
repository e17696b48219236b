"""Counters of a run's progress, and the summary of its results."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from llm.run_folder import write_summary
from llm.training.circumstances import Circumstances
from llm.training.evaluation import METRICS


@dataclass
class Counts:
    """How far a run is."""

    steps: int = 0  # updates done, skipped ones included
    tokens_seen: int = 0
    seconds: float = 0.0  # of training; evaluation, samples and checkpoints do not count
    best_val_loss: float | None = None  # of the evaluations during training
    best_step: int | None = None
    skipped: int = 0  # updates skipped because their loss or gradient norm was not finite
    grad_norm_spikes: int = 0

    @property
    def step(self) -> int:
        """The update just done, counted from 0 as in the book."""
        return self.steps - 1


@dataclass
class Counters(Counts):
    """What the loop counts, and saves with each checkpoint."""

    skipped_in_a_row: int = 0
    usual_grad_norm: float | None = None  # a running mean


@dataclass
class Summary(Counts):
    """The results of a run; `summary.json` holds them flat. Losses are in nats per token."""

    run_dir: str = ""
    status: str = "running"  # or finished, interrupted, failed
    stopped_early: str | None = None  # why, if a rule interrupted the run
    stopped_by: str | None = None  # name of the signal that interrupted the run, such as SIGTERM
    error: str | None = None  # of a failed run
    train_loss: float | None = None  # over eval_iter batches, at the end
    validation: dict[str, float] = field(default_factory=dict)  # METRICS at the end, on `evaluated_windows`
    evaluated_windows: int | None = None  # of the validation split; as many windows are always the same ones
    validation_windows: int | None = None  # of the whole split
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    mfu: float | None = None  # model FLOPs per second over those of a large matrix product
    heartbeat: float | None = None  # when it was last known to be alive, in seconds since 1970
    total_seconds: float = 0.0  # since the run was started or resumed, everything included
    parameters: int = 0
    seed: int = 0
    device: str = ""
    precision: str = ""
    circumstances: Circumstances = field(default_factory=Circumstances)
    # Fingerprints. Losses are comparable if both are the same, bits per byte if the text is.
    tokenizer: str = ""
    validation_text: str = ""
    init_from: str | None = None
    resumed: list[dict[str, Any]] = field(default_factory=list)  # after how many updates, with what changed
    wandb_folder: str | None = None  # of the W&B run, if it still has to be synced

    def __getattr__(self, name: str) -> float | None:
        """`summary.val_loss` and the like: a metric of `validation`, or None if there is none yet."""
        if name.startswith("val_"):
            return self.validation.get(name.removeprefix("val_"))
        raise AttributeError(name)

    def count(self, counters: Counts) -> None:
        """Copy how far the run is."""
        for item in fields(Counts):
            setattr(self, item.name, getattr(counters, item.name))

    def as_dict(self) -> dict[str, Any]:
        """The summary as in `summary.json`: flat."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        validation = {**dict.fromkeys(METRICS), **values.pop("validation")}
        circumstances = asdict(values.pop("circumstances"))
        return {
            **{name: values.pop(name) for name in ("run_dir", "status", "stopped_early", "error")},
            **{f"val_{name}": value for name, value in validation.items()},
            **{name: values.pop(name) for name in ("evaluated_windows", "validation_windows")},
            **values,
            **circumstances,
        }

    def write(self, run_dir: Path) -> None:
        write_summary(run_dir, self.as_dict())
