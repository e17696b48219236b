"""The training loop, made of the parts in the modules beside it."""

import logging
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from llm.checkpoints.checkpoint import copy_weights, run_id
from llm.config import PretrainConfig, validate
from llm.data import windows as dataset
from llm.data.windows import Windows
from llm.errors import UserError
from llm.files import write_json
from llm.generation.inference import for_inference
from llm.generation.texts import generate_texts
from llm.model.gpt import parameter_count, training_flops_per_token
from llm.progress import Progress
from llm.run_folder import claimed
from llm.runtime import (
    Runtime,
    device_errors_in_one_line,
    device_name,
    follow,
    launched_processes,
    measure_matmul_flops,
    peak_memory_bytes,
    processes,
)
from llm.training import console, plots
from llm.training.early_stopping import EarlyStopping
from llm.training.evaluation import Evaluation, evaluate
from llm.training.record import compare_rerun
from llm.training.run import Run, Summary, build_run, compile_blocks, finish_saving, save
from llm.training.schedules import lr_factor
from llm.training.start import Start, find_start, run_folder

log = logging.getLogger(__name__)

SPIKE = 4.0  # times the running mean of the gradient norm
SPIKES_FROM_STEP = 20  # before, it falls too fast for a mean to say much


def pretrain(config: PretrainConfig, run_dir: str | Path | None = None) -> Summary:
    """Pretrain a GPT and leave all there is to know of it in `run_dir`.

    Args:
        run_dir: where everything is written; without one, a new folder `outputs/pretrain/DATE/TIME`, or
            the folder of the run that `config.resume` names.

    Raises:
        UserError: a config value, the text, the disk or a loss that is not finite stopped the run. Its
            summary then says `failed`, and why.
    """
    if launched := launched_processes():
        config = replace(config, runtime=replace(config.runtime, processes=launched))
    if not logging.getLogger().handlers:  # in a notebook; under Hydra the log is set up by then
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    begin = time.perf_counter()
    run_dir = run_folder(config, run_dir)
    with claimed(run_dir):
        identity = run_id(run_dir)
        summary = Summary(str(run_dir), seed=config.seed)
        try:
            validate(config)
            start = find_start(config, run_dir)
            validate(start.config)
            summary.seed, summary.init_from = start.config.seed, start.config.init_from
            with processes(start.config.runtime, _pretrain, start, identity, summary) as runtime:
                run = _pretrain(start, identity, summary, runtime)
        except BaseException as error:
            summary.status = _status_after(error)
            summary.error = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            raise
        finally:
            summary.total_seconds = time.perf_counter() - begin
            if summary.device or not config.resume:  # a resumed run that did not start keeps its summary
                write_json(run_dir / "summary.json", asdict(summary))
        console.print_summary(summary, run)
        if start.rerun_of and summary.status == "finished":
            compare_rerun(run_dir, start.rerun_of)
    return summary


def take_part() -> None:
    """Take part in the run that `pretrain` begins in the first of torchrun's processes.

    Raises:
        UserError: what the first process has, as the text, is not to be had here.
    """
    follow(_pretrain)


def _pretrain(start: Start, identity: str, summary: Summary, runtime: Runtime) -> Run:
    """What each process of a run does; the main one fills in the summary."""
    config, run_dir = start.config, start.run_dir
    with device_errors_in_one_line(lambda: console.sizes(config)):
        run = build_run(start, identity, runtime)
        try:
            summary.device, summary.precision = device_name(runtime.device), runtime.precision
            summary.parameters, summary.resumed = parameter_count(run.model), run.resumed
            matmul_flops = measure_matmul_flops(runtime) * runtime.processes
            if runtime.is_main:
                write_json(run_dir / "summary.json", asdict(summary))
                console.announce(run, matmul_flops)
            if runtime.compile:
                compile_blocks(run)
            with _stop_requests(runtime) as stop:
                train(run, stop)
            summary.status = "interrupted" if stop.is_set else "finished"
            summary.stopped_early = None if stop.by_hand else stop.early
            if runtime.is_main:
                _conclude(run, summary, matmul_flops)
        except BaseException as error:
            summary.status = _status_after(error)
            raise
        finally:
            for name, value in asdict(run.counters).items():
                if hasattr(summary, name):
                    setattr(summary, name, value)
            _close(run, summary)
    return run


def _status_after(error: BaseException) -> str:
    """A second Ctrl-C is no failure of the run, nor is Slurm's warning before it queues the job again."""
    return "failed" if isinstance(error, Exception) else "interrupted"


def _close(run: Run, summary: Summary) -> None:
    """End what a run has open, whatever became of it."""
    if run.writer:
        run.writer.wait()
    if run.tracker:
        figures = asdict(summary)
        del figures["total_seconds"], figures["wandb_folder"]  # not known yet
        run.tracker.log_picture("loss", run.run_dir / "loss.png")
        run.tracker.finish(figures, failed=summary.status == "failed")
        folder = run.tracker.wandb_folder
        summary.wandb_folder = str(folder) if folder else None


def train(run: Run, stop: "StopRequest") -> None:
    """Update after update until the budget is spent or a stop is asked for; then save."""
    training, checkpoint, counters = run.config.training, run.config.checkpoint, run.counters
    progress = Progress("training", run.progress())
    early_stopping = EarlyStopping(run)
    saved_steps, saved_seconds = counters.steps, counters.seconds
    while (done := run.runtime.agree(run.progress())) < 1 and not run.runtime.agree(stop.is_set):
        metrics = update(run, lr=run.config.optimizer.lr * lr_factor(run.config.schedule, done))
        step = counters.steps - 1
        if run.tracker:
            run.tracker.log(step, metrics)
            progress.update(run.progress(), console.status(metrics))
            if training.eval_freq and step % training.eval_freq == 0:
                progress.clear()
                evaluate_splits(run)
                stop.early = early_stopping.reason_to_stop()
            if run.config.samples.every_epoch and counters.steps % run.updates_per_epoch == 0:
                progress.clear()
                sample(run)
        steps_due = checkpoint.every_steps and counters.steps - saved_steps >= checkpoint.every_steps
        minutes_due = (
            checkpoint.every_minutes and counters.seconds - saved_seconds >= 60 * checkpoint.every_minutes
        )
        if run.runtime.agree(bool(steps_due or minutes_due) and not counters.skipped_in_a_row):
            save(run)
            saved_steps, saved_seconds = counters.steps, counters.seconds
    progress.clear()
    finish_saving(run)


def update(run: Run, lr: float) -> dict[str, float]:
    """One optimizer step over `accumulate` batches; returns its metrics. It is left out, and counted, if the
    loss or the gradient is not finite.

    Raises:
        UserError: more than `max_skipped` in a row were left out; the weights are those before them.
    """
    training, runtime, counters = run.config.training, run.runtime, run.counters
    start = time.perf_counter()
    loss = torch.zeros((), device=runtime.device)
    tokens = 0
    for micro_step in range(training.accumulate):
        inputs, targets = next(run.batches)
        tokens += inputs.numel()
        last = micro_step == training.accumulate - 1
        with _without_gradient_exchange(run.trained_model, skip=not last), runtime.autocast():
            batch_loss = (
                run.trained_model(runtime.share(inputs), runtime.share(targets)) / training.accumulate
            )
            batch_loss.backward()
        loss += batch_loss.detach()
    parameters = list(run.model.parameters())
    grad_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if training.grad_clip is not None:
        nn.utils.clip_grads_with_norm_(parameters, training.grad_clip, grad_norm)
    mean_loss, norm = runtime.mean(loss).item(), grad_norm.item()
    finite = math.isfinite(mean_loss) and math.isfinite(norm)
    if finite:
        run.optimizers.set_lr(lr)
        run.optimizers.step()
    run.optimizers.zero_grad()
    seconds = time.perf_counter() - start
    watch(run, finite, mean_loss, norm)
    recorded = run.clock[counters.steps : counters.steps + 1]  # in a rerun
    counters.seconds = recorded[0] if recorded else counters.seconds + seconds
    counters.steps += 1
    counters.tokens_seen += tokens
    return {
        **run.position(),
        "train/loss": mean_loss,
        "lr": lr,
        "grad_norm": norm,
        "tokens_per_second": tokens / seconds,
        **({} if finite else {"skipped": counters.skipped}),
    }


def watch(run: Run, finite: bool, loss: float, grad_norm: float) -> None:
    """Count updates that are left out and gradient norms far above their running mean, and say so.

    Raises:
        UserError: too many in a row are left out.
    """
    counters = run.counters
    counters.skipped_in_a_row = 0 if finite else counters.skipped_in_a_row + 1
    if not finite:
        if counters.skipped_in_a_row > run.config.training.max_skipped:
            raise UserError(console.not_finite(run, loss, grad_norm))
        counters.skipped += 1
        log.warning("step %d left out: loss %s, gradient norm %s", counters.steps, loss, grad_norm)
        return
    usual = counters.usual_grad_norm
    if usual and grad_norm > SPIKE * usual and counters.steps >= SPIKES_FROM_STEP:
        counters.grad_norm_spikes += 1
        ratio = grad_norm / usual
        log.warning("step %d: gradient norm %.3g, %.1f times its mean", counters.steps, grad_norm, ratio)
    counters.usual_grad_norm = grad_norm if usual is None else 0.95 * usual + 0.05 * grad_norm


def evaluate_splits(run: Run) -> None:
    """Loss on `eval_iter` batches of either split, and the best weights so far if these are they."""
    counters, step = run.counters, run.counters.steps - 1
    train, validation = _evaluate_some(run, run.training_windows), _evaluate_some(run, run.validation_windows)
    assert run.tracker
    metrics = {
        "eval/train_loss": train.loss,
        "val/loss": validation.loss,
        "val/perplexity": validation.perplexity,
        "val/bits_per_byte": validation.bits_per_byte,
    }
    run.tracker.log(step, {**run.position(), **metrics})
    log.info(console.evaluation_line(run, train, validation))
    if validation.loss < (math.inf if counters.best_val_loss is None else counters.best_val_loss):
        counters.best_val_loss, counters.best_step = validation.loss, step
        assert run.writer
        run.writer.best = counters.steps, copy_weights(run.model)


def _evaluate_some(run: Run, windows: Windows) -> Evaluation:
    """The same `eval_iter` batches each time; in the book's order, the first of a fresh pass."""
    data, eval_iter = run.config.data, run.config.training.eval_iter
    if data.order == "book":
        batches = dataset.book_batches(windows, data.batch_size, training=windows is run.training_windows)
    else:
        stream = (run.config.seed, 0, 1)  # one more number than training's streams have
        batches = dataset.shuffled_batches(windows, data.batch_size, stream, drop_last=False)
    return evaluate(
        run.model,
        batches,
        run.bytes_of_tokens,
        run.runtime,
        max_batches=eval_iter,
        weigh_batches_equally=data.order == "book",
    )


def _evaluate_validation_split(run: Run) -> Evaluation:
    """Every window of the validation split, with progress."""
    windows, batch_size = run.validation_windows, run.config.data.batch_size
    progress = Progress("validating")

    def batches() -> Iterator[dataset.Batch]:
        for number, batch in enumerate(dataset.ordered_batches(windows, batch_size)):
            progress.update(
                number * batch_size / len(windows), f"window {number * batch_size} of {len(windows)}"
            )
            yield batch

    evaluation = evaluate(run.model, batches(), run.bytes_of_tokens, run.runtime)
    progress.clear()
    return evaluation


def sample(run: Run) -> None:
    """Generate from `samples.prompt`, on a random stream apart from training's."""
    config, sampling = run.config.samples, run.config.sampling
    # To compile the step takes longer than one sample.
    model = for_inference(run.model, replace(run.runtime, compile=False))
    [text] = generate_texts(
        model, run.tokenizer, [config.prompt], sampling, config.max_new_tokens, seed=run.config.seed
    )
    assert run.tracker
    run.tracker.log_sample({"step": run.counters.steps - 1, **text.line(), "sampling": asdict(sampling)})
    log.info("\nSample after %d updates:\n%s\n", run.counters.steps, text.text.rstrip())


def _conclude(run: Run, summary: Summary, matmul_flops: float) -> None:
    """Final figures, samples and the plot."""
    if run.counters.steps:
        summary.tokens_per_second = run.counters.tokens_seen / run.counters.seconds
        summary.mfu = summary.tokens_per_second * training_flops_per_token(run.config.model) / matmul_flops
    summary.peak_memory_bytes = peak_memory_bytes(run.runtime)
    if summary.status == "finished":  # who pressed Ctrl-C does not want to wait for these
        summary.train_loss = _evaluate_some(run, run.training_windows).loss
        validation = _evaluate_validation_split(run)
        summary.val_loss, summary.val_perplexity = validation.loss, validation.perplexity
        summary.val_bits_per_byte = validation.bits_per_byte
        sample(run)
    plots.plot_losses(run.run_dir)


def _without_gradient_exchange(model: nn.Module, skip: bool) -> Any:
    return model.no_sync() if skip and isinstance(model, DistributedDataParallel) else nullcontext()


class StopRequest:
    """Made by Ctrl-C, by SIGTERM or by early stopping; the loop then ends after the update it is in."""

    by_hand = False
    early: str | None = None  # why

    @property
    def is_set(self) -> bool:
        return self.by_hand or self.early is not None


@contextmanager
def _stop_requests(runtime: Runtime) -> Iterator[StopRequest]:
    """Let SIGINT and SIGTERM ask for a stop; a second one ends the process at once."""
    stop = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        stop.by_hand = True
        if runtime.is_main:
            log.info("\n%s: finishing this update, then saving", signal.Signals(number).name)
            for each, handler in previous.items():
                signal.signal(each, handler)

    previous = {each: signal.signal(each, handle) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
