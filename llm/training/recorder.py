"""What the processes of a run do around the loop: the main one records, the others contribute to saving."""

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

HEARTBEAT_SECONDS = 15.0  # from one to the next; more where a disk is so slow that they would take time
LARGEST_SHARE = 0.005  # of a run's time, for heartbeats
MEASURED_SECONDS = 2.0  # of updates, that tell how fast a run trains


class Follower:
    """The observer of a process beside the main one: it contributes its random state, and the part of weights
    and of the optimizer's state that it keeps, to each checkpoint."""

    def __init__(self, run: Run, start: Start) -> None:
        self.run, self.run_id = run, start.run_id
        self.writer = checkpoint_writer(run)

    def updated(self, metrics: dict[str, float]) -> None: ...

    def evaluated(self, training: dict[str, float], validation: dict[str, float]) -> None:
        if self.run.takes_part(False):  # the main process knows whether the weights are the best so far
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
        """Save what is not saved yet."""
        if self.run.runtime.agree(False):  # the main process knows
            self.save()


def checkpoint_writer(run: Run) -> CheckpointWriter:
    """The writer of a run's checkpoints; of a sharded run, of this process's part of them."""
    return CheckpointWriter(run.run_dir, run.config.checkpoint.keep, run.runtime if run.sharded else None)


def keep_best(run: Run, writer: CheckpointWriter) -> None:
    """Let the weights of now be saved as the best so far."""
    writer.best = run.counters.steps, copies_of(parts_of_weights(run))


class Recorder:
    """The observer of the main process: metrics, evaluations, samples, checkpoints, early stopping."""

    def __init__(self, run: Run, start: Start, summary: Summary) -> None:
        """
        Raises:
            UserError: W&B cannot start, or the run folder cannot be written.
        """
        self.run, self.run_id, self.summary = run, start.run_id, summary
        self._next_heartbeat = 0.0
        was_stopped = bool(read_summary(run.run_dir).get("stopped_early"))
        self.tracker = Tracker(run.run_dir, run.config.tracking, asdict(run.config), "pretrain", start.run_id)
        rewind(start)  # W&B has started: from here on, little can keep the run from continuing
        correct_record(run.run_dir, run.chosen)
        self.tracker.replay()
        self.writer = checkpoint_writer(run)
        self.progress = Progress("training")
        run.alive = self.heartbeat
        self._before = replace(run.counters)  # the update that is being done
        # Tokens and seconds of each update of this process, until they have corrected the announcement.
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
        """Now and then, let `summary.json` say how far the run is and that it lives: one that hangs does not
        come here."""
        begin = time.monotonic()
        if begin < self._next_heartbeat:
            return
        self.summary.count(self.run.counters)
        self.summary.heartbeat = time.time()
        with suppress(UserError):  # a full disk, of which others speak
            self.summary.write(self.run.run_dir)
        now = time.monotonic()
        self._next_heartbeat = now + max(HEARTBEAT_SECONDS, (now - begin) / LARGEST_SHARE)

    def _measure(self, tokens_per_second: float) -> None:
        """Correct the announcement, when some updates have shown how fast this run trains."""
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
        """Record an evaluation, keep the weights if they are the best so far, and consider stopping early."""
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
        """Whether `samples.every_minutes` or an epoch are over with the update just launched."""
        if self._sampled_step == self.run.step:  # by this run, before it was killed and resumed
            return False
        return self._periods() > self._sampled_periods or (
            epoch_ended and self.run.config.samples.every_epoch
        )

    def _periods(self) -> int:
        """How many times `samples.every_minutes` are over."""
        minutes = self.run.config.samples.every_minutes
        return 0 if minutes is None else int(self.run.counters.seconds // (60 * minutes))

    def final_sample_due(self) -> bool:
        """Whether to sample at the end: unless the minutes have just given the same."""
        return self.run.config.samples.every_minutes is None or self._sampled_step != self.run.step

    def sample(self) -> None:
        """Generate from the run's prompt, on a random stream apart from training's."""
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
        """Start writing a checkpoint of all that is needed to continue exactly."""
        self.writer.wait()  # so that memory never holds two
        try:
            record_sizes = self.tracker.record_sizes()
        except UserError as error:
            log.warning(NOT_SAVED, error)
            record_sizes = None
        state = snapshot(self.run, self.run_id, record_sizes or {})
        self.writer.write(None if record_sizes is None else state)

    def finish_saving(self) -> None:
        """Save what is not saved yet, and wait until all is on disk.

        Raises:
            UserError: the last state cannot be saved.
        """
        self.progress.clear()
        if self.run.runtime.agree(not self.writer.has_saved(self.run.counters.steps)):
            self.save()  # never tried, or tried without success
        if error := self.writer.wait():
            raise error
        self.tracker.flush()
