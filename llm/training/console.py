"""What a training run prints: its plan, its progress, its summary and what to do next."""

import logging
import shlex
from pathlib import Path

from llm.config import PretrainConfig
from llm.device import device_name, exactness_in_words, precision_in_words
from llm.errors import NotFinite
from llm.model.gpt import description, parameter_count, parameters_of
from llm.overrides import as_argument, as_command, as_override
from llm.progress import (
    format_count,
    format_figure,
    format_seconds,
    format_times,
    format_value,
    format_windows,
)
from llm.run_folder import step_folders, steps_of
from llm.training.acceleration import in_words
from llm.training.budget import Budget, estimate_budget, expected_speed
from llm.training.evaluation import METRICS
from llm.training.reruns import changes_on_the_way
from llm.training.run import Run
from llm.training.schedules import lr_factor, spent
from llm.training.summary import Summary
from llm.training.validation import LARGEST_SHARE
from llm.wandb_client import sync_command

log = logging.getLogger(__name__)


def announce(run: Run, matmul_flops: float, before: PretrainConfig | None) -> None:
    """Print what the run is about to do, how long it will take, and how to make it longer.

    Args:
        matmul_flops: floating-point operations per second of large matrix products, over all processes.
        before: the config of the checkpoint that the run is resumed from.
    """
    config, training, runtime = run.config, run.config.training, run.runtime
    budget = estimate_budget(run, expected_speed(run, matmul_flops, runtime.device.type))
    log.info(
        "model      %s parameters: %s",
        format_count(parameter_count(run.model)),
        description(config.model),
    )
    log.info(
        "data       %s training and %s validation tokens (%s)",
        format_count(len(run.training_windows.tokens)),
        format_count(len(run.validation_windows.tokens)),
        config.data.path or ", ".join(config.data.mixture) or config.data.source,
    )
    device = [
        device_name(runtime.device),
        precision_in_words(config.runtime.precision, runtime),
        f"matrix products at {format_count(matmul_flops)}FLOP/s",
        f"{runtime.processes} processes" if runtime.processes > 1 else "",
        exactness_in_words(runtime, config.runtime.deterministic),
    ]
    log.info("device     %s", "; ".join(filter(None, device)))
    if runtime.device.type == "cuda":
        log.info("kernels    %s", in_words(run))
    log.info(
        "update     %d windows of %d tokens%s: %s tokens",
        config.data.batch_size,
        config.model.context_length,
        f" × {training.accumulate} micro-batches" if training.accumulate > 1 else "",
        format_count(budget.update_tokens),
    )
    if run.chosen:
        log.info(
            "           for this device, as nobody gave them: %s",
            " ".join(f"{key}={value}" for key, value in run.chosen.items()),
        )
    limit, value = budget.limit, getattr(training, budget.limit)
    log.info(
        "budget     %straining.%s=%s: about %s tokens (%s epochs) in %s; more: %s",
        "what is left of " if run.resumed else "",
        limit,
        format_value(value),
        *_amount(budget),
        _raised(run, limit),
    )
    log.info("then       %s%s", _final_validation(run, budget), _other_choice(run, budget))
    log.info("run folder %s\n", run.run_dir)
    if run.resumed:
        changed = run.resumed[-1]["changed"]
        log.info("resumed after %d updates, %.2f epochs", run.counters.steps, run.position()["epoch"])
        for key, (was, now) in changed.items():
            log.info("changed    %s=%s (it was %s)", key, now, was)
        if before and (rates := _rates(run, before)):
            log.info(
                "lr         rises from %.3g to %.3g: schedule.name=%s now ends at training.%s=%s "
                "(to keep it low: schedule=constant optimizer.lr=…)",
                *rates,
                config.schedule.name,
                limit,
                format_value(value),
            )
        log.info("")
    elif run.config.rerun and (changes := changes_on_the_way(Path(run.config.rerun))):
        log.info(
            "rerun      %s; it is trained with that from the first update on, so its numbers may differ\n",
            "; ".join(changes),
        )


def announce_measured(run: Run, tokens_per_second: float) -> None:
    """Print the plan again, corrected by the measured speed of the first updates."""
    budget = estimate_budget(run, tokens_per_second)
    log.info(
        "measured   %s tokens/s: %s more tokens (%s epochs) in %s, then %s",
        format_count(tokens_per_second),
        *_amount(budget),
        _final_validation(run, budget),
    )


def _amount(budget: Budget) -> tuple[str, str, str]:
    """How much training is left: tokens, epochs, time."""
    epochs = format_times(budget.epochs_left)
    return format_count(budget.tokens_left), epochs, format_seconds(budget.seconds_left)


def _final_validation(run: Run, budget: Budget) -> str:
    """What the run is evaluated on at its end, and how long that takes."""
    on = format_windows(budget.windows, len(run.validation_windows))
    return f"validation on {on}: about {format_seconds(budget.validation_seconds)}"


def _other_choice(run: Run, budget: Budget) -> str:
    if budget.windows < len(run.validation_windows):
        return "; on all: training.final_eval=full"
    full = run.config.training.final_eval == "full"
    if full and budget.validation_seconds > LARGEST_SHARE * budget.seconds_left:
        return "; shorter: training.final_eval=tenth"
    return ""


def _rates(run: Run, before: PretrainConfig) -> tuple[float, float] | None:
    """The learning rates with which a run would have continued and now does, if the latter is higher."""
    counters, rates = run.counters, []
    for config in (before, run.config):
        shares = spent(config.training, counters.steps, run.epochs(), counters.seconds)
        done = min(1.0, max(shares.values()))
        rates.append(config.optimizer.lr * lr_factor(config.schedule, done, done))
    was, now = rates
    return (was, now) if now > 1.01 * was else None


def status(metrics: dict[str, float]) -> list[str]:
    """How far a run is, for its progress bar, the most important first: narrow terminals omit the rest."""
    return [
        f"loss {metrics['train/loss']:.3f}",
        f"epoch {metrics['epoch']:.2f}",
        f"{format_count(metrics['tokens_seen'])} tokens",
        f"{format_count(metrics['tokens_per_second'])} tokens/s",
    ]


def evaluation_line(run: Run, train: dict[str, float], validation: dict[str, float]) -> str:
    """The book's evaluation line, with bits per byte."""
    step = run.counters.step
    return (
        f"Ep {run.batches.epoch + 1} (Step {step:06d}): Train loss {train['loss']:.3f}, "
        f"Val loss {validation['loss']:.3f}, {validation['bits_per_byte']:.3f} bits per byte"
    )


def not_finite(run: Run, error: NotFinite) -> str:
    """Why a run stopped, and how to continue: from the last checkpoint whose weights gave a finite loss."""
    first = run.counters.steps - run.counters.skipped_in_a_row + 1  # of the skipped updates
    # The weights at that step gave the bad loss, so a checkpoint of them is no good either.
    good = [folder for folder in step_folders(run.run_dir) if steps_of(folder) < first]
    found = f"the last good checkpoint is {good[0]}" if good else "there is no good checkpoint"
    resume = f"continue with {as_argument('resume', good[0])} optimizer.lr=…" if good else None
    how = resume or "start anew with a lower optimizer.lr"
    skip = ", or training.max_skipped to skip such updates" if run.counters.skipped_in_a_row else ""
    return f"{error}; {found}; {how}, or set training.grad_clip{skip}"


def sizes(config: PretrainConfig) -> str:
    """About how much memory a run takes, and the keys to lower if it does not fit."""
    parameters = parameters_of(config.model)
    parts = 1 if config.runtime.sharding == "none" else config.runtime.processes
    data, rows = config.data, config.data.batch_size // config.runtime.processes
    return (
        f"{format_count(parameters)} parameters take about {format_count(16 * parameters / parts)}B with "
        f"gradients and optimizer state, plus activations of {rows} windows of "
        f"{config.model.context_length} tokens; "
        f"lower data.batch_size={data.batch_size} (and raise training.accumulate to match), "
        f"model.context_length, model.n_layers or model.emb_dim"
    )


def _raised(run: Run, limit: str) -> str:
    """A limit of training, such as max_steps, at four times its value, or at four times what is spent if it
    was lowered below that."""
    value = getattr(run.config.training, limit) * max(1, int(run.spent()[limit]))
    return f"training.{limit}={format_value(4 * value)}"


def _validated_on(summary: Summary) -> str:
    count, total = summary.evaluated_windows, summary.validation_windows
    return format_windows(count, total) if count and total else "–"


def print_summary(summary: Summary, run: Run, wandb_folder: Path | None) -> None:
    """Print the figures of a run as a table, and what to do next."""
    rows = {
        "status": summary.status,
        "stopped early": summary.stopped_early or "–",
        "updates": f"{summary.steps:,}",
        "tokens seen": f"{summary.tokens_seen:,} ({run.position()['epoch']:.2f} epochs)",
        "training loss": format_figure(summary.train_loss, "{:.3f}"),
        **{
            f"validation {metric.title}": format_figure(summary.validation.get(name), metric.form)
            for name, metric in METRICS.items()
        },
        "validated on": _validated_on(summary),
        "updates skipped": str(summary.skipped) if summary.skipped else "–",
        "gradient-norm spikes": str(summary.grad_norm_spikes) if summary.grad_norm_spikes else "–",
        "best validation loss": format_figure(summary.best_val_loss, f"{{:.3f}} (step {summary.best_step})"),
        "training time": format_seconds(summary.seconds),
        f"total time{' since resumed' if summary.resumed else ''}": format_seconds(summary.total_seconds),
        "tokens per second": format_figure(summary.tokens_per_second, "{:,.0f}"),
        "peak memory": f"{format_count(summary.peak_memory_bytes or 0)}B",
        "model FLOPs utilisation": format_figure(summary.mfu, "{:.0%}"),
    }
    width = max(map(len, rows))
    log.info("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items() if value != "–"))
    log.info("\nloss plot   %s", run.run_dir / "loss.png")
    log.info("sample      %s", as_command("generate", as_override("checkpoint", run.run_dir)))
    further = [_raised(run, run.binding_limit())] if summary.status == "finished" else []
    if summary.stopped_early:
        further = ["early_stopping.rule=none"]
    log.info("resume      %s", as_command("pretrain", as_override("resume", run.run_dir), *further))
    if wandb_folder:
        log.info("W&B         %s", sync_command(wandb_folder))
        log.info("W&B, here   wandb leet %s", shlex.quote(str(wandb_folder)))
