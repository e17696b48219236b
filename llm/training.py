"""The training loop, made of the parts in the modules beside it."""

import logging
import math
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import tiktoken
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llm import dataset, plots
from llm.checkpoint import find_run, load_training_state, load_weights, save_checkpoint
from llm.config import PretrainConfig, UserError, validate
from llm.dataset import TrainingBatches, Windows, load_windows
from llm.evaluation import Evaluation, evaluate
from llm.files import write_json
from llm.generation import generate, sample_generator
from llm.model import GPTModel, parameter_count, training_flops_per_token
from llm.optimizer import Optimizers, build_optimizers, orthogonalisation_flops
from llm.progress import Progress, format_count, format_seconds
from llm.runtime import Runtime, device_name, measure_matmul_flops, peak_memory_bytes, processes
from llm.schedule import lr_factor
from llm.tokenizer import bytes_of_tokens, load_tokenizer, text_to_token_ids, token_ids_to_text
from llm.tracking import Tracker

log = logging.getLogger(__name__)


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
    """The parts of one run, put together by `_build_run`."""

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
    summary = Summary(str(run_dir), seed=config.seed, git_commit=_git_commit(), versions=_versions())
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
    _print_summary(summary, run)
    return summary


def _pretrain(config: PretrainConfig, run_dir: Path, summary: Summary, runtime: Runtime) -> Run:
    """What each process of a run does; the main one fills in the summary."""
    run = _build_run(config, run_dir, runtime)
    summary.device, summary.precision = device_name(runtime.device), runtime.precision
    summary.parameters = parameter_count(run.model)
    matmul_flops = measure_matmul_flops(runtime) * runtime.processes
    if runtime.is_main:
        write_json(run_dir / "summary.json", asdict(summary))
        _announce(run, matmul_flops)
    try:
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
            run.tracker.finish(figures, run_dir / "loss.png", failed=summary.status == "running")
    return run


def train(run: Run, stop: "StopRequest") -> None:
    """Update after update until the budget is spent or a stop is asked for; then save."""
    training, checkpoint, counters = run.config.training, run.config.checkpoint, run.counters
    progress = Progress("training", _progress(run))
    saved_steps, saved_seconds = counters.steps, counters.seconds
    while (done := run.runtime.agree(_progress(run))) < 1 and not run.runtime.agree(stop.is_set):
        metrics = update(run, lr=run.config.optimizer.lr * lr_factor(run.config.schedule, done))
        step = counters.steps - 1
        if run.tracker:
            run.tracker.log(step, metrics)
            progress.update(_progress(run), _status(metrics))
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
        raise UserError(_not_finite(run, mean_loss, norm))
    run.optimizers.set_lr(lr)
    run.optimizers.step()
    run.optimizers.zero_grad()
    seconds = time.perf_counter() - start
    counters.steps += 1
    counters.tokens_seen += tokens
    counters.seconds += seconds
    return {
        **_position(run),
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
    run.tracker.log(step, {**_position(run), **metrics})
    log.info(
        "Ep %d (Step %06d): Train loss %.3f, Val loss %.3f, %.3f bits per byte",
        step // run.updates_per_epoch + 1,
        step,
        train.loss,
        validation.loss,
        validation.bits_per_byte,
    )
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
    prompt = text_to_token_ids(config.prompt, run.tokenizer).to(run.runtime.device)
    with run.runtime.autocast():
        token_ids = generate(
            run.model,
            prompt,
            config.max_new_tokens,
            context_size=run.config.model.context_length,
            **asdict(sampling),
            generator=sample_generator(run.config.seed, 0, run.runtime.device),
        )
    text = token_ids_to_text(token_ids, run.tokenizer)
    assert run.tracker
    run.tracker.log_sample(run.counters.steps - 1, config.prompt, text, asdict(sampling))
    log.info("\nSample after %d updates:\n%s\n", run.counters.steps, text.rstrip())


def save(run: Run) -> None:
    """Save all that is needed to go on exactly. Every process calls it, the main one writes."""
    generator_states = run.runtime.gather(_generator_state(run.runtime))
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
        _set_generator_state(run.runtime, state["generators"][run.runtime.rank])


def _generator_state(runtime: Runtime) -> Tensor:
    """The state of the generator that dropout draws from."""
    return torch.cuda.get_rng_state() if runtime.device.type == "cuda" else torch.get_rng_state()


def _set_generator_state(runtime: Runtime, state: Tensor) -> None:
    if runtime.device.type == "cuda":
        torch.cuda.set_rng_state(state)
    else:
        torch.set_rng_state(state)


def _build_run(config: PretrainConfig, run_dir: Path, runtime: Runtime) -> Run:
    """Everything that can go wrong by the user's hand goes wrong here, before the first update."""
    tokenizer = load_tokenizer(config.tokenizer.name)
    training_windows, validation_windows = load_windows(config, tokenizer)
    torch.manual_seed(config.seed)
    model = GPTModel(config.model).to(runtime.device)
    tracker = Tracker(run_dir, config.tracking, asdict(config), "pretrain") if runtime.is_main else None
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
        tracker=tracker,
    )
    if not runtime.is_main:
        torch.manual_seed(config.seed + runtime.rank)  # dropout differs between processes
    if config.resume:
        _restore(run)
        if _progress(run) >= 1:
            limit = max(_spent(run), key=lambda name: _spent(run)[name])
            raise UserError(
                f"{run_dir} is finished: training.{limit}={getattr(config.training, limit):g} is spent; "
                f"to go on, raise it"
            )
        if tracker:
            tracker.rewind(run.counters.steps)
    model.train()
    return run


def _without_gradient_exchange(model: nn.Module, skip: bool) -> Any:
    return model.no_sync() if skip and isinstance(model, DistributedDataParallel) else nullcontext()


def _progress(run: Run) -> float:
    """The share of the budget that is spent; at 1 the run ends. The limit reached first counts."""
    return max(_spent(run).values())


def _spent(run: Run) -> dict[str, float]:
    """For each limit that is set, by its key: the share of it that is spent."""
    training, counters = run.config.training, run.counters
    spent = {}
    if training.max_steps is not None:
        spent["max_steps"] = counters.steps / training.max_steps
    if training.max_epochs is not None:
        spent["max_epochs"] = counters.steps / (training.max_epochs * run.updates_per_epoch)
    if training.max_minutes is not None:
        spent["max_minutes"] = counters.seconds / (60 * training.max_minutes)
    return spent


def _position(run: Run) -> dict[str, float]:
    """What every line of metrics says of where it stands; `epoch` is how many passes are done, in parts."""
    counters = run.counters
    return {
        "tokens_seen": counters.tokens_seen,
        "epoch": counters.steps / run.updates_per_epoch,
        "seconds": counters.seconds,
    }


def _status(metrics: dict[str, float]) -> str:
    return (
        f"epoch {metrics['epoch']:.2f} · {format_count(metrics['tokens_seen'])} tokens · "
        f"loss {metrics['train/loss']:.3f} · {format_count(metrics['tokens_per_second'])} tokens/s"
    )


def _not_finite(run: Run, loss: float, grad_norm: float) -> str:
    last = run.run_dir / "checkpoints" / "last"
    good = f"the last good checkpoint is {last.resolve()}" if last.exists() else "no checkpoint was saved yet"
    return (
        f"step {run.counters.steps}: loss {loss} with gradient norm {grad_norm} is not finite; {good}; "
        f"lower optimizer.lr or set training.grad_clip"
    )


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


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "numpy", "tiktoken", "wandb")}
    return {"python": platform.python_version(), **packages}


def _git_commit() -> str | None:
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


EXPECTED_MFU = 0.45  # of small models on CPUs, for the estimate before the first update


def _announce(run: Run, matmul_flops: float) -> None:
    """Say what the run will be, and how to ask for more, before it starts."""
    config, training, runtime = run.config, run.config.training, run.runtime
    update_tokens = config.data.batch_size * training.accumulate * config.model.context_length
    token_flops = training_flops_per_token(config.model)
    optimizer_flops = orthogonalisation_flops(run.model, config.optimizer)
    tokens_per_second = EXPECTED_MFU * matmul_flops / (token_flops + optimizer_flops / update_tokens)
    validation_flops = len(run.validation_windows) * config.model.context_length * token_flops / 3
    limits = {
        "max_minutes": training.max_minutes and 60 * training.max_minutes * tokens_per_second,
        "max_steps": training.max_steps and training.max_steps * update_tokens,
        "max_epochs": training.max_epochs and training.max_epochs * run.updates_per_epoch * update_tokens,
    }
    first, tokens = min(
        ((name, tokens) for name, tokens in limits.items() if tokens), key=lambda limit: limit[1]
    )
    left = tokens - run.counters.tokens_seen
    log.info(
        "model      %s parameters: %d layers, width %d, %d heads, context %d",
        format_count(parameter_count(run.model)),
        config.model.n_layers,
        config.model.emb_dim,
        config.model.n_heads,
        config.model.context_length,
    )
    log.info(
        "data       %s training and %s validation tokens (%s)",
        format_count(len(run.training_windows.tokens)),
        format_count(len(run.validation_windows.tokens)),
        config.data.path or config.data.source,
    )
    log.info(
        "device     %s; %s; matrix products at %sFLOP/s%s",
        device_name(runtime.device),
        runtime.precision,
        format_count(matmul_flops),
        f"; {runtime.processes} processes" if runtime.processes > 1 else "",
    )
    log.info(
        "update     %d windows of %d tokens%s: %s tokens",
        config.data.batch_size,
        config.model.context_length,
        f", {training.accumulate} times" if training.accumulate > 1 else "",
        format_count(update_tokens),
    )
    log.info(
        "budget     training.%s=%g: about %s tokens (%.2g epochs) in %s; more: training.%s=%g",
        first,
        getattr(training, first),
        format_count(tokens),
        tokens / update_tokens / run.updates_per_epoch,
        format_seconds(left / tokens_per_second),
        first,
        4 * getattr(training, first),
    )
    validation_seconds = validation_flops / EXPECTED_MFU / matmul_flops
    log.info("then       a pass over the validation split: about %s", format_seconds(validation_seconds))
    log.info("run folder %s\n", run.run_dir)
    if run.counters.steps:
        log.info("resumed after %d updates, %.2f epochs\n", run.counters.steps, _position(run)["epoch"])


def _conclude(run: Run, summary: Summary, matmul_flops: float) -> None:
    """Final figures, samples and the plot."""
    counters = run.counters
    summary.steps, summary.tokens_seen, summary.seconds = (
        counters.steps,
        counters.tokens_seen,
        counters.seconds,
    )
    summary.best_val_loss, summary.best_step = counters.best_val_loss, counters.best_step
    summary.tokens_per_second = counters.tokens_seen / counters.seconds
    summary.mfu = summary.tokens_per_second * training_flops_per_token(run.config.model) / matmul_flops
    summary.peak_memory_bytes = peak_memory_bytes(run.runtime)
    if summary.status == "finished":  # who pressed Ctrl-C does not want to wait for these
        summary.train_loss = _evaluate_some(run, run.training_windows).loss
        validation = _evaluate_validation_split(run)
        summary.val_loss, summary.val_perplexity = validation.loss, validation.perplexity
        summary.val_bits_per_byte = validation.bits_per_byte
        sample(run)
    plots.plot_losses(run.run_dir)


def _print_summary(summary: Summary, run: Run) -> None:
    """The figures as a table, and what to do next."""
    rows = {
        "status": summary.status,
        "updates": f"{summary.steps:,}",
        "tokens seen": f"{summary.tokens_seen:,} ({_position(run)['epoch']:.2f} epochs)",
        "training loss": _figure(summary.train_loss, "{:.3f}"),
        "validation loss": _figure(summary.val_loss, "{:.3f}"),
        "validation perplexity": _figure(summary.val_perplexity, "{:.1f}"),
        "validation bits per byte": _figure(summary.val_bits_per_byte, "{:.3f}"),
        "best validation loss": _figure(summary.best_val_loss, "{:.3f}") + f" (step {summary.best_step})",
        "training time": format_seconds(summary.seconds),
        "execution time": format_seconds(summary.total_seconds),
        "tokens per second": _figure(summary.tokens_per_second, "{:,.0f}"),
        "peak memory": f"{format_count(summary.peak_memory_bytes or 0)}B",
        "model FLOPs utilisation": _figure(summary.mfu, "{:.0%}"),
    }
    width = max(map(len, rows))
    log.info("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items() if value != "–"))
    log.info("\nloss plot   %s", run.run_dir / "loss.png")
    log.info("sample      python experiments/generate.py checkpoint=%s", run.run_dir)
    limit = max(_spent(run), key=lambda name: _spent(run)[name])
    more = 4 * getattr(run.config.training, limit)
    log.info("resume      python experiments/pretrain.py resume=%s training.%s=%g", run.run_dir, limit, more)
    if run.tracker and (folder := run.tracker.wandb_folder):
        log.info("W&B         wandb sync %s", folder)
        log.info("W&B, here   wandb leet %s", folder)


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
