"""A training run: its model, optimizers, data and counters in one place."""

import math
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiktoken
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

from llm.config import PretrainConfig
from llm.data.bpe import find_tokenizer
from llm.data.prompt import first_line
from llm.data.token_file import token_files
from llm.data.tokenizer import bytes_of_tokens
from llm.data.windows import AnyWindows, Batch, Mixture, TrainingBatches, cut_windows
from llm.device import Device, device_of, memory_bytes
from llm.generation.texts import prompt_ids
from llm.model.gpt import GPTModel, parameters_of
from llm.runtime import Late, Runtime
from llm.training.optimizers import Optimizers, build_optimizers
from llm.training.reruns import recorded_clock
from llm.training.schedules import lr_factor, spent
from llm.training.sharding import shard
from llm.training.start import Start
from llm.training.summary import Counters
from llm.training.update_size import chosen_for_device, with_chosen


@dataclass(frozen=True)
class Launched:
    """An update that was launched and not yet counted; the device may still be working on it."""

    figures: Late  # its loss and its gradient norm
    tokens: int
    epoch: float  # passes over the training split after it
    lr: float
    begin: float  # on the clock of `time.perf_counter`


@dataclass
class Run:
    """Everything that the loop works on."""

    config: PretrainConfig
    run_dir: Path
    runtime: Runtime
    tokenizer: tiktoken.Encoding
    bytes_of_tokens: Tensor  # (vocab_size,)
    model: GPTModel
    # Averages the gradients over the processes. A sharded model does that itself.
    trained_model: GPTModel | DistributedDataParallel
    optimizers: Optimizers
    data: list[str]  # fingerprints of the training and the validation tokens
    training_windows: AnyWindows | Mixture
    validation_windows: AnyWindows
    batches: TrainingBatches
    sample_prompt: str
    skipped_in_a_row: Tensor  # as in `counters`, but on the device, which decides by itself what to skip
    counters: Counters = field(default_factory=Counters)
    # In a rerun: the seconds of training after each update and its learning rate, as the original recorded
    # them. A run limited by the clock then ends after the same update, with the same rates along the way.
    recorded_clock: list[tuple[float, float]] = field(default_factory=list)
    resumed: list[dict[str, Any]] = field(default_factory=list)  # see Summary
    chosen: dict[str, int] = field(default_factory=dict)  # config keys that were chosen for this device
    # Updates launched and not yet counted, oldest first; `counters` do not include them. Between two updates
    # of the loop there is one, or none where the device has no queue.
    in_flight: deque[Launched] = field(default_factory=deque)
    update_seconds: float = 1e-3  # duration of the update counted last; a guess until there is one
    finished_at: float = 0.0  # when it was counted, on the clock of `time.perf_counter`
    # `queue_update` as one CUDA graph, see llm/training/capture.py.
    captured: Callable[[list[Batch]], Tensor] | None = None
    # Called every so often by long work, to show that the run is alive.
    alive: Callable[[], None] = lambda: None

    @property
    def sharded(self) -> bool:
        """Whether each process holds only its part of the weights."""
        return self.config.runtime.sharding != "none"

    def takes_part(self, wanted: bool) -> bool:
        """Whether this process takes part in work on the weights that the main process may want: of a sharded
        run all processes do, of any other run the main one alone."""
        return bool(self.runtime.agree(wanted)) if self.sharded else self.runtime.is_main and wanted

    @property
    def step(self) -> int:
        """The update launched last, counted from 0."""
        return self.counters.step + len(self.in_flight)

    def epochs(self, more: int = 0) -> float:
        """Passes over the training split, fractions included, once `more` further batches are used. An update
        may take the last batches of one epoch and the first of the next."""
        return (self.batches.used + more) / len(self.batches)

    def micro_batches(self) -> int:
        """Batches in the next update: `accumulate`, or fewer at the very end, so that a run limited by
        `max_epochs` trains on each batch exactly that many times."""
        training = self.config.training
        if training.max_epochs is None:
            return training.accumulate
        return sum(self.epochs(more) < training.max_epochs for more in range(training.accumulate))

    def position(self) -> dict[str, float]:
        """Where the run is; part of each line of metrics."""
        counters = self.counters
        return {
            "tokens_seen": counters.tokens_seen,
            "epoch": self.epochs(),
            "seconds": counters.seconds,
        }

    def spent(self, steps: int = 0, seconds: float = 0.0) -> dict[str, float]:
        """The share of each limit that is spent, by its key, once `steps` more updates and `seconds` more are
        counted. Limits that are not set are absent. An update in flight counts, but its seconds do not
        yet."""
        launched, counted = self.step + 1, self.counters.seconds
        shares = spent(self.config.training, launched + steps, self.epochs(), counted + seconds)
        if "max_minutes" in shares and launched < len(self.recorded_clock):
            # The original's clock may have run out with one more update in flight: that one was made too.
            shares["max_minutes"] = min(shares["max_minutes"], math.nextafter(1, 0))
        return shares

    def progress(self, steps: int = 0, seconds: float = 0.0) -> float:
        """The share of the budget that is spent: that of the limit reached first. At 1 the run ends."""
        return max(self.spent(steps, seconds).values())

    def learning_rate(self, done: float, seconds: float) -> float:
        """The learning rate of the next update; the same in every process.

        Args:
            done: share of the budget that was spent before it.
            seconds: estimated time from the last counted update to the end of this one; only its end will
                show how much of `max_minutes` it took.
        """
        if self.config.training.max_minutes is not None and (recorded := self._recorded(self.step + 1)):
            return recorded[1]
        reached = self.runtime.agree(self.progress(steps=1, seconds=seconds))
        return self.config.optimizer.lr * lr_factor(self.config.schedule, done, reached)

    def count(self, tokens: int, seconds: float) -> None:
        """Count an update of `tokens` tokens that took `seconds`."""
        recorded = self._recorded(self.counters.steps)
        self.counters.seconds = recorded[0] if recorded else self.counters.seconds + seconds
        self.counters.steps += 1
        self.counters.tokens_seen += tokens

    def _recorded(self, step: int) -> tuple[float, float] | None:
        """In a rerun, the seconds and the learning rate that the original recorded for an update."""
        return self.recorded_clock[step] if step < len(self.recorded_clock) else None

    def binding_limit(self) -> str:
        """The limit of training that is reached first, such as max_steps."""
        shares = self.spent()
        return max(shares, key=lambda each: shares[each])


def build_run(start: Start, runtime: Runtime, planned_for: Device | None = None) -> Run:
    """Build a run. Mistakes in the config surface here, before the first update. Settings that were left to
    the device are chosen here, and are part of `start.config` from now on.

    Args:
        planned_for: build the run only to plan it, for this device: the model and the optimizers then have
            shapes but no data, and `runtime` is a CPU's.

    Raises:
        UserError: the text or the prompt of the samples does not exist or does not suit the run, see
            `cut_windows` and `prompt_ids`.
        MemoryError: the model cannot fit this machine.
    """
    config, device = start.config, planned_for or device_of(runtime)
    tokenizer, splits = find_tokenizer(start.tokenizer, config.data)
    files = token_files(config.data, tokenizer, splits)
    chosen = chosen_for_device(config, start.undecided, device, runtime.precision, len(files[0].ids))
    config = start.config = with_chosen(config, chosen)
    if not planned_for and 8 * parameters_of(config.model) > memory_bytes():  # weights and gradients in fp32
        raise MemoryError  # now, because a system that runs out of memory kills the process without a word
    training_windows, validation_windows = cut_windows(config, tokenizer, files)
    # Check the prompt now: it is first used at the end, when the budget is spent.
    prompt = config.samples.prompt
    if prompt is None:
        prompt = first_line(files[1].ids, tokenizer)
    prompt_ids(prompt, tokenizer, config.model.vocab_size, "samples.prompt")
    torch.manual_seed(config.seed)
    with FakeTensorMode() if planned_for else nullcontext():
        model = GPTModel(config.model)
        model.checkpoint_activations(config.runtime.checkpoint_activations)
        trained_model: GPTModel | DistributedDataParallel = model
        if config.runtime.sharding == "fsdp" and not planned_for:
            shard(model, runtime)
        elif not planned_for:
            model.to(runtime.device)
            trained_model = DistributedDataParallel(model) if runtime.processes > 1 else model
        optimizers = build_optimizers(model, config.optimizer, runtime)
    run = Run(
        config=config,
        run_dir=start.run_dir,
        runtime=runtime,
        tokenizer=tokenizer,
        bytes_of_tokens=bytes_of_tokens(tokenizer, config.model.vocab_size),
        model=model,
        trained_model=trained_model,
        optimizers=optimizers,
        data=[file.fingerprint for file in files],
        training_windows=training_windows,
        validation_windows=validation_windows,
        batches=TrainingBatches(training_windows, config.data, config.seed),
        sample_prompt=prompt,
        skipped_in_a_row=torch.zeros((), device=runtime.device),
        recorded_clock=recorded_clock(start.rerun_of) if start.rerun_of else [],
        chosen=chosen,
    )
    if not runtime.is_main:
        torch.manual_seed(config.seed + runtime.rank)  # else dropout would be the same in every process
    return run
