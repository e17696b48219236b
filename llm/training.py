"""The training loop, made of the parts in the modules beside it."""

import logging
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from llm import console, dataset, plots
from llm.checkpoint import find_run, save_checkpoint
from llm.config import PretrainConfig, UserError, validate
from llm.dataset import Windows
from llm.evaluation import Evaluation, evaluate
from llm.files import write_json
from llm.inference import for_inference
from llm.model import parameter_count, training_flops_per_token
from llm.progress import Progress
from llm.run import Run, Summary, build_run, git_commit, package_versions, save
from llm.runtime import Runtime, device_name, measure_matmul_flops, peak_memory_bytes, processes
from llm.schedule import lr_factor
from llm.text_generation import generate_texts

log = logging.getLogger(__name__)


def pretrain(config: PretrainConfig, run_dir: str | Path | None = None) -> Summary:
    """Pretrain a GPT and leave all there is to know of it in `run_dir`.

    Args:
        run_dir: where everything is written; without one, a new folder `outputs/pretrain/DATE/TIME`, or
            the folder of the run that `config.resume` names.

    Raises:
        UserError: a config value, the text, the disk or a loss that is not finite stopped the run. Its
            summary then says `failed`, and why.
    """
    if not logging.getLogger().handlers:  # in a notebook; under Hydra the log is set up by then
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    begin = time.perf_counter()
    if config.resume:
        run_dir = find_run(config.resume)
    run_dir = Path(run_dir or f"outputs/pretrain/{datetime.now():%Y-%m-%d/%H-%M-%S}")
    run_dir.mkdir(parents=True, exist_ok=True)
    summary = Summary(str(run_dir), seed=config.seed, git_commit=git_commit(), versions=package_versions())
    try:
        validate(config)
        with processes(config.runtime, _pretrain, config, run_dir, summary) as runtime:
            run = _pretrain(config, run_dir, summary, runtime)
    except BaseException as error:
        summary.status = "failed"
        summary.error = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise
    finally:
        summary.total_seconds = time.perf_counter() - begin
        if summary.device or not config.resume:  # a resumed run that did not start keeps the summary it has
            write_json(run_dir / "summary.json", asdict(summary))
    console.print_summary(summary, run)
    return summary


def _pretrain(config: PretrainConfig, run_dir: Path, summary: Summary, runtime: Runtime) -> Run:
    """What each process of a run does; the main one fills in the summary."""
    run = build_run(config, run_dir, runtime)
    try:
        summary.device, summary.precision = device_name(runtime.device), runtime.precision
        summary.parameters = parameter_count(run.model)
        matmul_flops = measure_matmul_flops(runtime) * runtime.processes
        if runtime.is_main:
            write_json(run_dir / "summary.json", asdict(summary))
            console.announce(run, matmul_flops)
        with _stop_requests(runtime) as stop:
            train(run, stop)
        summary.status = "interrupted" if stop.is_set else "finished"
        if runtime.is_main:
            _conclude(run, summary, matmul_flops)
    finally:
        counters = run.counters
        summary.steps, summary.tokens_seen, summary.seconds = (
            counters.steps,
            counters.tokens_seen,
            counters.seconds,
        )
        summary.best_val_loss, summary.best_step = counters.best_val_loss, counters.best_step
        if run.tracker:
            figures = asdict(summary)
            del figures["total_seconds"]  # not known yet
            run.tracker.log_picture("loss", run_dir / "loss.png")
            run.tracker.finish(figures, failed=summary.status == "running")
    return run


def train(run: Run, stop: "StopRequest") -> None:
    """Update after update until the budget is spent or a stop is asked for; then save."""
    training, checkpoint, counters = run.config.training, run.config.checkpoint, run.counters
    progress = Progress("training", run.progress())
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
            if run.config.samples.every_epoch and counters.steps % run.updates_per_epoch == 0:
                progress.clear()
                sample(run)
        steps_due = checkpoint.every_steps and counters.steps - saved_steps >= checkpoint.every_steps
        minutes_due = (
            checkpoint.every_minutes and counters.seconds - saved_seconds >= 60 * checkpoint.every_minutes
        )
        if run.runtime.agree(bool(steps_due or minutes_due)):
            save(run)
            saved_steps, saved_seconds = counters.steps, counters.seconds
    progress.clear()
    if counters.steps > saved_steps:
        save(run)


def update(run: Run, lr: float) -> dict[str, float]:
    """One optimizer step over `accumulate` batches; returns its metrics.

    Raises:
        UserError: the loss or the gradient is not finite; the weights are those before this step.
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
    if not (math.isfinite(mean_loss) and math.isfinite(norm)):
        raise UserError(console.not_finite(run, mean_loss, norm))
    run.optimizers.set_lr(lr)
    run.optimizers.step()
    run.optimizers.zero_grad()
    seconds = time.perf_counter() - start
    counters.steps += 1
    counters.tokens_seen += tokens
    counters.seconds += seconds
    return {
        **run.position(),
        "train/loss": mean_loss,
        "lr": lr,
        "grad_norm": norm,
        "tokens_per_second": tokens / seconds,
    }


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
    if counters.best_val_loss is None or validation.loss < counters.best_val_loss:
        counters.best_val_loss, counters.best_step = validation.loss, step
        save_checkpoint(run.run_dir, "best", counters.steps, run.model, run.config)


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
    model = for_inference(run.model, run.runtime)
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
    """Set by Ctrl-C or SIGTERM; the loop then ends after the update it is in."""

    is_set = False


@contextmanager
def _stop_requests(runtime: Runtime) -> Iterator[StopRequest]:
    """Let SIGINT and SIGTERM ask for a stop; a second one ends the process at once."""
    stop = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        stop.is_set = True
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
