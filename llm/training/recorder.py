"""The loop's observers: the main process records the run, the others contribute to its checkpoints."""

import logging
import math
import time
from contextlib import suppress
from dataclasses import asdict, replace

from llm.checkpoints.writing import NOT_SAVED, CheckpointWriter
from llm.errors import UserError
from llm.generation.inference import for_inference
from llm.generation.texts import generate_texts
from llm.progress import Progress
from llm.records import read_samples
from llm.run_folder import correct_record, read_summary
from llm.runtime import any_kernels
from llm.tracking import Tracker
from llm.training import console
from llm.training.early_stopping import EarlyStopping
from llm.training.run import Run
from llm.training.sharding import copies_of
from llm.training.start import Start, rewind
from llm.training.state import copy_weights, parts_of_weights, snapshot, whole_model
from llm.training.summary import Summary

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 15.0  # from one heartbeat to the next; longer if the disk is slow
LARGEST_SHARE = 0.005  # of a run's time that heartbeats may take
MEASURED_SECONDS = 2.0  # of updates, after which the estimate of the run's speed is corrected


class Follower:
    """The observer of every process but the main one. To each checkpoint it contributes its random state, and
    its part of the weights and of the optimizer's state."""

    def __init__(self, run: Run, start: Start) -> None:
        self.run, self.run_id = run, start.run_id
        self.writer = checkpoint_writer(run)

    def updated(self, metrics: dict[str, float]) -> None: ...

    def evaluated(self, training: dict[str, float], validation: dict[str, float]) -> None:
        if self.run.takes_part(False):  # the main process decides whether the weights are the best so far
            keep_best(self.run, self.writer)

    def sample_due(self, epoch_ended: bool) -> bool:
        return False

    def final_sample_due(self) -> bool:
        return False

    def sample(self) -> None:
        copy_weights(self.run.model, is_main=False)

    def save(self) -> None:
        self.writer.wait()
        state = snapshot(self.run, self.run_id, {})
        if self.run.sharded:
            self.writer.write(state)

    def finish_saving(self) -> None:
        """Save the last state, if it is not saved yet."""
        if self.run.runtime.agree(False):  # the main process decides
            self.save()


def checkpoint_writer(run: Run) -> CheckpointWriter:
    """A writer of a run's checkpoints; in a sharded run, of this process's part of them."""
    return CheckpointWriter(run.run_dir, run.config.checkpoint.keep, run.runtime if run.sharded else None)


def keep_best(run: Run, writer: CheckpointWriter) -> None:
    """Keep a copy of the weights, to be saved as the best so far."""
    writer.best = run.counters.steps, copies_of(parts_of_weights(run))


class Recorder:
    """The observer of the main process. Records metrics, evaluations and samples, writes checkpoints, and
    decides on early stopping."""

    def __init__(self, run: Run, start: Start, summary: Summary) -> None:
        """
        Raises:
            UserError: W&B cannot start, or the run folder cannot be written.
        """
        self.run, self.run_id, self.summary = run, start.run_id, summary
        self._next_heartbeat = 0.0
        was_stopped = bool(read_summary(run.run_dir).get("stopped_early"))
        self.tracker = Tracker(run.run_dir, run.config.tracking, asdict(run.config), "pretrain", start.run_id)
        rewind(start)  # only after W&B has started, as that may fail and should leave the folder untouched
        correct_record(run.run_dir, run.chosen)
        self.tracker.replay()
        self.writer = checkpoint_writer(run)
        self.progress = Progress("training")
        run.alive = self.heartbeat
        self._before = replace(run.counters)  # as they were before the current update
        # Tokens and seconds of each update so far; None once they have corrected the announcement.
        self._measured: list[tuple[int, float]] | None = []
        samples = read_samples(run.run_dir / "samples.jsonl")
        self._sampled_step = samples[-1].get("step") if samples else None
        self._sampled_periods = self._periods()
        self.early_stopping = EarlyStopping(run)
        self.stopped_early = self.early_stopping.pending_reason(was_stopped)  # why the run should end, if so

    def updated(self, metrics: dict[str, float]) -> None:
        self.tracker.log(self.run.counters.step, metrics)
        self.progress.update(self.run.progress(), *console.status(metrics))
        self._measure(metrics["tokens_per_second"])
        self._before = replace(self.run.counters)
        self.heartbeat()

    def heartbeat(self) -> None:
        """From time to time, record in `summary.json` how far the run is and that it is alive; a run that
        hangs does not get here."""
        begin = time.monotonic()
        if begin < self._next_heartbeat:
            return
        self.summary.count(self.run.counters)
        self.summary.heartbeat = time.time()
        with suppress(UserError):  # a full disk, which is reported elsewhere
            self.summary.write(self.run.run_dir)
        now = time.monotonic()
        self._next_heartbeat = now + max(HEARTBEAT_SECONDS, (now - begin) / LARGEST_SHARE)

    def _measure(self, tokens_per_second: float) -> None:
        """Correct the announcement once some updates have shown how fast the run trains."""
        if self._measured is None:
            return
        tokens = self.run.counters.tokens_seen - self._before.tokens_seen
        self._measured.append((tokens, tokens / tokens_per_second))
        usual = self._measured[1:]  # the first takes longer
        if (seconds := sum(each for _, each in usual)) >= MEASURED_SECONDS:
            self._measured = None
            self.progress.clear()
            console.announce_measured(self.run, sum(tokens for tokens, _ in usual) / seconds)

    def evaluated(self, training: dict[str, float], validation: dict[str, float]) -> None:
        """Record an evaluation, keep the weights if they are the best, and decide on early stopping."""
        run, counters = self.run, self.run.counters
        metrics = {
            "eval/train_loss": training["loss"],
            **{f"val/{name}": validation[name] for name in validation},
        }
        self.tracker.log(counters.step, {**run.position(), **metrics})
        self.progress.clear()
        log.info(console.evaluation_line(run, training, validation))
        best = math.inf if counters.best_val_loss is None else counters.best_val_loss
        if run.takes_part(validation["loss"] < best):
            counters.best_val_loss, counters.best_step = validation["loss"], counters.step
            keep_best(run, self.writer)
        self.stopped_early = self.early_stopping.reason_to_stop()

    def sample_due(self, epoch_ended: bool) -> bool:
        """Whether the update just launched completes another `samples.every_minutes`, or an epoch."""
        if self._sampled_step == self.run.step:  # already sampled, before the run was killed and resumed
            return False
        return self._periods() > self._sampled_periods or (
            epoch_ended and self.run.config.samples.every_epoch
        )

    def _periods(self) -> int:
        """How many times `samples.every_minutes` have passed."""
        minutes = self.run.config.samples.every_minutes
        return 0 if minutes is None else int(self.run.counters.seconds // (60 * minutes))

    def final_sample_due(self) -> bool:
        """Whether to sample at the end: yes, unless `samples.every_minutes` has just had the same sampled."""
        return self.run.config.samples.every_minutes is None or self._sampled_step != self.run.step

    def sample(self) -> None:
        """Generate from the run's prompt, with a random stream separate from training's."""
        self._sampled_periods = self._periods()
        self.progress.clear()
        self._sampled_step = self.run.counters.step
        run, config, sampling = self.run, self.run.config.samples, self.run.config.sampling
        model = for_inference(*whole_model(run))
        limit, seed = config.max_new_tokens, run.config.seed
        with any_kernels():
            [sample] = generate_texts(model, run.tokenizer, [run.sample_prompt], sampling, limit, seed=seed)
        self.tracker.log_sample({"step": run.counters.step, **sample.line(), "sampling": asdict(sampling)})
        log.info("\nSample after %d updates:\n%s\n", run.counters.steps, sample.text.rstrip())

    def save(self) -> None:
        """Start writing a checkpoint with all that is needed to continue exactly."""
        self.writer.wait()  # so that memory never holds two snapshots
        try:
            record_sizes = self.tracker.record_sizes()
        except UserError as error:
            log.warning(NOT_SAVED, error)
            record_sizes = None
        state = snapshot(self.run, self.run_id, record_sizes or {})
        self.writer.write(None if record_sizes is None else state)

    def finish_saving(self) -> None:
        """Save the last state, if it is not saved yet, and wait until all is on disk.

        Raises:
            UserError: it cannot be saved.
        """
        self.progress.clear()
        if self.run.runtime.agree(not self.writer.has_saved(self.run.counters.steps)):
            self.save()  # never tried, or failed
        if error := self.writer.wait():
            raise error
        self.tracker.flush()
