"""The lifecycle of a run in one process: build, announce, train, conclude, close."""

import logging

from llm.checkpoints.checkpoint import read_config
from llm.device import (
    device_errors_in_one_line,
    device_name,
    forget_peak_memory,
    measure_matmul_flops,
    peak_memory_bytes,
)
from llm.errors import NotFinite, UserError
from llm.model.gpt import parameter_count, training_flops_per_token
from llm.records import tokenizer_and_text
from llm.runtime import Runtime
from llm.training import console, plots
from llm.training.acceleration import accelerate, choose
from llm.training.loop import train
from llm.training.recorder import Follower, Recorder
from llm.training.run import Run, build_run
from llm.training.start import Start
from llm.training.state import begin_from, restore
from llm.training.stopping import stop_requests
from llm.training.summary import Summary
from llm.training.validation import evaluate_at_the_end, evaluate_some

log = logging.getLogger(__name__)


def execute(start: Start, summary: Summary, runtime: Runtime) -> tuple[Run, Recorder | None]:
    """Execute a run in one of its processes. The main one fills in the summary, and returns a recorder."""
    run_dir = start.run_dir
    forget_peak_memory()
    with device_errors_in_one_line(lambda: console.sizes(start.config)):
        run = build_run(start, runtime)
        choose(run, start)
        if start.checkpoint:
            restore(run, start)
        elif weights := start.take_weights():
            begin_from(run, weights)
            del weights  # the model has them
        # Before W&B starts, whose processes compete for the same cores.
        matmul_flops = measure_matmul_flops(runtime) * runtime.processes
        # Last, because the recorder has to be closed whatever happens from here on.
        recorder = Recorder(run, start, summary) if runtime.is_main else None
        observer = recorder or Follower(run, start)
        try:
            run.model.train()
            summary.device, summary.precision = device_name(runtime.device), runtime.precision
            summary.parameters, summary.resumed = parameter_count(run.model), run.resumed
            summary.validation_windows = len(run.validation_windows)
            summary.tokenizer, summary.validation_text = tokenizer_and_text(run.data[1])
            if recorder:
                summary.write(run_dir)
                before = read_config(start.checkpoint) if start.checkpoint else None
                console.announce(run, matmul_flops, before)
            accelerate(run)
            with stop_requests(announce=runtime.is_main) as stop:
                train(run, observer, lambda: bool(stop.by or (recorder and recorder.stopped_early)))
                observer.finish_saving()
            stopped_early = recorder.stopped_early if recorder and not stop.by else None
            summary.stopped_by = stop.by.name if stop.by else None
            summary.stopped_early = stopped_early
            conclude(run, observer, summary, matmul_flops, not (stop.by or stopped_early))
        except NotFinite as error:
            summary.status = "failed"
            if recorder:
                recorder.writer.wait()
            raise UserError(console.not_finite(run, error)) from error
        except BaseException as error:
            summary.status = status_after(error)
            raise
        finally:
            summary.count(run.counters)
            observer.writer.close()
            if recorder:
                close(recorder, summary)
    return run, recorder


def status_after(error: BaseException) -> str:
    """The status of a run that `error` ended. Neither a second Ctrl-C nor Slurm's signal before it requeues
    the job is a failure of the run."""
    return "failed" if isinstance(error, Exception) else "interrupted"


def conclude(
    run: Run, observer: Recorder | Follower, summary: Summary, matmul_flops: float, has_finished: bool
) -> None:
    """Compute the final figures, generate a sample and draw the plot. All processes of a sharded run take
    part. Only then does the summary say that the run has finished."""
    if run.sharded:
        has_finished = run.takes_part(has_finished)
    elif not run.runtime.is_main:
        return
    summary.peak_memory_bytes = peak_memory_bytes(run.runtime)
    if run.counters.steps:
        summary.tokens_per_second = run.counters.tokens_seen / run.counters.seconds
        summary.mfu = utilisation(run, summary.tokens_per_second, matmul_flops)
    if has_finished:  # whoever pressed Ctrl-C does not want to wait for these
        summary.train_loss = evaluate_some(run, run.training_windows)["loss"]
        summary.validation, summary.evaluated_windows = evaluate_at_the_end(run)
        if run.takes_part(observer.final_sample_due()):
            observer.sample()
    if run.runtime.is_main:
        plots.plot_losses(run.run_dir)
    summary.status = "finished" if has_finished else "interrupted"


def utilisation(run: Run, tokens_per_second: float, matmul_flops: float) -> float | None:
    """Model FLOPs utilisation (Chowdhery et al. 2022): the floating-point operations of training per second,
    as a share of those of a large matrix product.

    The latter was measured before training, perhaps while something else used the same cores, so it is
    measured once more. None if the share is still above 1, as then the measurement is no ceiling.
    """
    matmul_flops = max(matmul_flops, measure_matmul_flops(run.runtime) * run.runtime.processes)
    share = tokens_per_second * training_flops_per_token(run.model) / matmul_flops
    return share if share <= 1 else None


def close(recorder: Recorder, summary: Summary) -> None:
    """Finish tracking, whatever became of the run."""
    tracker = recorder.tracker
    figures = summary.as_dict()
    for name in ("total_seconds", "wandb_folder", "heartbeat"):  # not known yet, or of no use there
        del figures[name]
    tracker.log_picture("loss", recorder.run.run_dir / "loss.png")
    tracker.finish(figures, failed=summary.status == "failed")
    summary.wandb_folder = str(tracker.wandb_folder) if tracker.wandb_folder else None
