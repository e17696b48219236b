"""A training run: its parts, put together."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiktoken
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from llm.config import PretrainConfig
from llm.data.token_file import token_files
from llm.data.tokenizer import bytes_of_tokens, load_tokenizer
from llm.data.windows import TrainingBatches, Windows, cut_windows
from llm.model.gpt import GPTModel
from llm.runtime import Runtime
from llm.training.optimizers import Optimizers, build_optimizers
from llm.training.reruns import recorded_clock
from llm.training.schedules import spent
from llm.training.start import Start
from llm.training.summary import Counters


@dataclass
class Run:
    """What the loop works on."""

    config: PretrainConfig
    run_dir: Path
    runtime: Runtime
    tokenizer: tiktoken.Encoding
    bytes_of_tokens: Tensor  # (vocab_size,)
    model: GPTModel
    trained_model: GPTModel | DistributedDataParallel  # the model itself, or what averages its gradients
    optimizers: Optimizers
    data: list[str]  # fingerprints of the training and of the validation tokens
    training_windows: Windows
    validation_windows: Windows
    batches: TrainingBatches
    counters: Counters = field(default_factory=Counters)
    # In a rerun, the seconds of training after each update, as the original run recorded them: one limited by
    # the clock then ends after the same update, with the same learning rates on the way.
    recorded_clock: list[float] = field(default_factory=list)
    resumed: list[dict[str, Any]] = field(default_factory=list)  # see Summary

    @property
    def updates_per_epoch(self) -> int:
        return len(self.batches) // self.config.training.accumulate

    def position(self) -> dict[str, float]:
        """Where the run is, as each line of metrics says. Epochs are passes done, fractions included."""
        counters = self.counters
        return {
            "tokens_seen": counters.tokens_seen,
            "epoch": counters.steps / self.updates_per_epoch,
            "seconds": counters.seconds,
        }

    def spent(self) -> dict[str, float]:
        """The share of each limit that is spent, by its key; limits that are not set are absent."""
        position = self.position()
        return spent(self.config.training, self.counters.steps, position["epoch"], position["seconds"])

    def progress(self) -> float:
        """The share of the budget that is spent; at 1 the run ends. The limit reached first counts."""
        return max(self.spent().values())

    def binding_limit(self) -> tuple[str, float]:
        """The limit that is reached first: its key and its value."""
        shares = self.spent()
        name = max(shares, key=lambda each: shares[each])
        return f"training.{name}", getattr(self.config.training, name)


def build_run(start: Start, runtime: Runtime) -> Run:
    """Put a run together. What a user can have got wrong is found here, before the first update.

    Raises:
        UserError: the text does not exist or does not suit the run, see `cut_windows`.
    """
    config = start.config
    tokenizer = load_tokenizer(start.tokenizer)
    files = token_files(config.data, tokenizer)
    training_windows, validation_windows = cut_windows(config, tokenizer, files)
    torch.manual_seed(config.seed)
    model = GPTModel(config.model).to(runtime.device)
    run = Run(
        config=config,
        run_dir=start.run_dir,
        runtime=runtime,
        tokenizer=tokenizer,
        bytes_of_tokens=bytes_of_tokens(tokenizer, config.model.vocab_size),
        model=model,
        trained_model=DistributedDataParallel(model) if runtime.processes > 1 else model,
        optimizers=build_optimizers(model, config.optimizer),
        data=[file.fingerprint for file in files],
        training_windows=training_windows,
        validation_windows=validation_windows,
        batches=TrainingBatches(training_windows, config.data, config.seed),
        recorded_clock=recorded_clock(start.rerun_of) if start.rerun_of else [],
    )
    if not runtime.is_main:
        torch.manual_seed(config.seed + runtime.rank)  # else dropout would be the same in every process
    return run
