"""A training run: its parts, put together."""

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
    """An update that the device is given, and perhaps still works on."""

    figures: Late  # its loss and its gradient norm
    tokens: int
    epoch: float  # passes over the training split, once it is done
    lr: float
    begin: float  # on the clock of `time.perf_counter`


@dataclass
class Run:
    """What the loop works on."""

    config: PretrainConfig
    run_dir: Path
    runtime: Runtime
    tokenizer: tiktoken.Encoding
    bytes_of_tokens: Tensor  # (vocab_size,)
    model: GPTModel
    # What averages the gradients over the processes: of a sharded model, that model itself.
    trained_model: GPTModel | DistributedDataParallel
    optimizers: Optimizers
    data: list[str]  # fingerprints of the training and of the validation tokens
    training_windows: AnyWindows | Mixture
    validation_windows: AnyWindows
    batches: TrainingBatches
    sample_prompt: str
    skipped_in_a_row: Tensor  # the same as in `counters`, on the device: it decides what to skip itself
    counters: Counters = field(default_factory=Counters)
    # In a rerun, the seconds of training after each update and its learning rate, as the original recorded
    # them: one limited by the clock then ends after the same update, with the same rates on the way.
    recorded_clock: list[tuple[float, float]] = field(default_factory=list)
    resumed: list[dict[str, Any]] = field(default_factory=list)  # see Summary
    chosen: dict[str, int] = field(default_factory=dict)  # keys and values of the config, for this device
    # The updates that are launched and not yet counted, oldest first: at most one, and none where the device
    # has no queue. So `counters` are about those before.
    in_flight: deque[Launched] = field(default_factory=deque)
    update_seconds: float = 1e-3  # that the newest update counted has taken; until there is one, a guess
    finished_at: float = 0.0  # when that was, on the clock of `time.perf_counter`
    # `queue_update` as one CUDA graph, see llm/training/capture.py.
    captured: Callable[[list[Batch]], Tensor] | None = None
    # Called now and then by what takes long, to show that the run lives.
    alive: Callable[[], None] = lambda: None

    @property
    def sharded(self) -> bool:
        """Whether each process has but a part of the weights."""
        return self.config.runtime.sharding != "none"

    def takes_part(self, wanted: bool) -> bool:
        """Whether this process is to take part in what the main one wants of the weights: that one alone, or
        all where each has but a part of them."""
        return bool(self.runtime.agree(wanted)) if self.sharded else self.runtime.is_main and wanted

    @property
    def step(self) -> int:
        """The newest update launched, counted from 0."""
        return self.counters.step + len(self.in_flight)

    def epochs(self, more: int = 0) -> float:
        """Passes over the training split that are done, fractions included, once so many more of its batches
        are used. An update may use the last batches of one epoch and the first of the next."""
        return (self.batches.used + more) / len(self.batches)

    def micro_batches(self) -> int:
        """Batches that the next update averages: `accumulate`, or the fewer that are left of `max_epochs`, so
        that each batch of the split is trained on as often as that says."""
        training = self.config.training
        if training.max_epochs is None:
            return training.accumulate
        return sum(self.epochs(more) < training.max_epochs for more in range(training.accumulate))

    def position(self) -> dict[str, float]:
        """Where the run is, as each line of metrics says."""
        counters = self.counters
        return {
            "tokens_seen": counters.tokens_seen,
            "epoch": self.epochs(),
            "seconds": counters.seconds,
        }

    def spent(self, steps: int = 0, seconds: float = 0.0) -> dict[str, float]:
        """The share of each limit that is spent, by its key, once so many more updates and seconds are
        counted; limits that are not set are absent. Of an update in flight, no seconds are counted yet."""
        launched, counted = self.step + 1, self.counters.seconds
        shares = spent(self.config.training, launched + steps, self.epochs(), counted + seconds)
        if "max_minutes" in shares and launched < len(self.recorded_clock):
            # A run's clock may be over an update before its record: that one was in flight already.
            shares["max_minutes"] = min(shares["max_minutes"], math.nextafter(1, 0))
        return shares

    def progress(self, steps: int = 0, seconds: float = 0.0) -> float:
        """The share of the budget that is spent; at 1 the run ends. The limit reached first counts."""
        return max(self.spent(steps, seconds).values())

    def learning_rate(self, done: float, seconds: float) -> float:
        """The learning rate of the next update; the same in every process.

        Args:
            done: the share of the budget that was spent before it.
            seconds: by which the clock will be further than `counters` say, as far as is known: nobody knows
                before its end how much of `max_minutes` an update takes.
        """
        if self.config.training.max_minutes is not None and (recorded := self._recorded(self.step + 1)):
            return recorded[1]
        reached = self.runtime.agree(self.progress(steps=1, seconds=seconds))
        return self.config.optimizer.lr * lr_factor(self.config.schedule, done, reached)

    def count(self, tokens: int, seconds: float) -> None:
        """Count an update that took so many tokens and seconds."""
        recorded = self._recorded(self.counters.steps)
        self.counters.seconds = recorded[0] if recorded else self.counters.seconds + seconds
        self.counters.steps += 1
        self.counters.tokens_seen += tokens

    def _recorded(self, step: int) -> tuple[float, float] | None:
        """In a rerun, what the original recorded of an update."""
        return self.recorded_clock[step] if step < len(self.recorded_clock) else None

    def binding_limit(self) -> tuple[str, float]:
        """The limit that is reached first: its key and its value."""
        shares = self.spent()
        name = max(shares, key=lambda each: shares[each])
        return f"training.{name}", getattr(self.config.training, name)


def build_run(start: Start, runtime: Runtime, planned_for: Device | None = None) -> Run:
    """Put a run together. What a user can have got wrong is found here, before the first update; and what
    is left to the device is chosen, and from here on is part of the config.

    Args:
        planned_for: the run is only to be planned, for this device, where `runtime` is of a CPU: the model
            and the optimizers have shapes, and no data.

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
        raise MemoryError  # now: a system that is out of memory kills a process without a word
    training_windows, validation_windows = cut_windows(config, tokenizer, files)
    # The sample comes last, and a prompt that cannot be used would be found when the budget is spent.
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
