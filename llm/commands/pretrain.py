"""The work of `experiments/pretrain.py`; in Python, `from llm import pretrain`."""

import logging
import sys
import time
from collections.abc import Collection
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from llm.config import PretrainConfig
from llm.config_rules import validate
from llm.data.bpe import find_tokenizer
from llm.data.shards import with_shards_there
from llm.data.tokenizer import LEARNT
from llm.errors import UserError
from llm.files import as_typed
from llm.launched import PROCESSES, launched_processes
from llm.outcome import Outcome
from llm.overrides import as_command, as_override
from llm.processes import follow, processes
from llm.progress import LineFormatter, format_figure
from llm.run_folder import CHECKPOINTS, LOSS_PLOT, RECORDS, SUMMARY, claimed, read_summary
from llm.runs import find_run
from llm.runtime import device_kind
from llm.training import console
from llm.training.evaluation import METRICS
from llm.training.lifecycle import execute, status_after
from llm.training.reruns import compare_rerun
from llm.training.start import find_start, keys_unlike_default
from llm.training.summary import Summary
from llm.training.update_size import refuse_uneven

log = logging.getLogger(__name__)


def pretrain(
    config: PretrainConfig, run_dir: str | Path | None = None, given: Collection[str] | None = None
) -> Summary:
    """Pretrain a GPT, and write everything about the run into a folder.

    Args:
        run_dir: a folder that holds no run; None: a new folder `outputs/pretrain/DATE/TIME`. With
            `config.resume`, that run's folder is used.
        given: keys such as `model.n_layers`, and groups such as `model`, that were asked for by name. With
            `config.resume` they replace what the run recorded, and with `config.init_from` the weights must
            agree with them; the record or the weights decide everything else. None: the keys whose values are
            not the defaults.

    Raises:
        UserError: a config value, the text, the disk, or a loss that is not finite stopped the run. If it had
            begun, its summary says `failed`, and why; if not, the folder is as it was.
    """
    if given is None:
        given = keys_unlike_default(config)
    if config.resume:
        wanted = find_run(config.resume, with_checkpoint=False)
    else:
        wanted = Path(run_dir or f"outputs/pretrain/{datetime.now():%Y-%m-%d/%H-%M-%S}")
    old = bool(config.resume)
    with claimed(wanted, old, beside=run_dir is None and not old) as folder:
        return pretrain_in(folder, config, given)


def pretrain_in(run_dir: Path, config: PretrainConfig, given: Collection[str]) -> Summary:
    """`pretrain`, in a folder that this process has claimed."""
    launched = launched_processes()
    if launched and PROCESSES in given and config.runtime.processes != launched:
        raise UserError(
            f"{PROCESSES}={config.runtime.processes}: {launched} processes were launched; remove it"
        )
    if launched:
        config = replace(config, runtime=replace(config.runtime, processes=launched))
        given = {*given, PROCESSES}  # which a run that is resumed has not recorded
    if not logging.getLogger().handlers:  # in a notebook; under Hydra the log is set up by now
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(LineFormatter("%(message)s"))
        logging.basicConfig(level=logging.INFO, handlers=[handler])
    begin = time.perf_counter()
    summary = Summary(run_dir=str(run_dir))
    try:
        validate(config)
        start = find_start(config, run_dir, given)
        start.config = replace(start.config, data=with_shards_there(start.config.data))
        validate(start.config)
        if launched and start.config.runtime.processes != launched:
            raise UserError(
                f"rerun={start.rerun_of}: it was trained with {PROCESSES}={start.config.runtime.processes}, "
                f"and {launched} processes were launched: launch as many"
            )
        refuse_uneven(start.config, start.undecided, device_kind(start.config.runtime))
        summary.seed, summary.init_from = start.config.seed, start.config.init_from
        if start.tokenizer.name == LEARNT and start.config.runtime.processes > 1:
            # It is learnt here, as the other processes would show no progress.
            find_tokenizer(start.tokenizer, start.config.data)
        with processes(start.config.runtime, execute, start, summary) as runtime:
            run, recorder = execute(start, summary, runtime)
    except BaseException as error:
        summary.status = status_after(error)
        summary.error = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise
    finally:
        summary.total_seconds = time.perf_counter() - begin
        if summary.device:  # it began
            summary.write(run_dir)
    console.print_summary(summary, run, recorder.tracker.wandb_folder if recorder else None)
    if start.rerun_of and summary.status == "finished":
        compare_rerun(run_dir, start.rerun_of)
    return summary


def outcome_of(run_dir: Path) -> Outcome:
    """The outcome of the run in a folder."""
    summary = read_summary(run_dir)
    names = {
        "loss plot": LOSS_PLOT,
        "metrics": RECORDS[0],
        "summary": SUMMARY,
        "checkpoint": f"{CHECKPOINTS}/last",
    }
    return Outcome(
        summary,
        {name: path for name, file in names.items() if (path := run_dir / file).exists()},
        {
            "sample": as_command("generate", as_override("checkpoint", as_typed(run_dir))),
            "resume": as_command("pretrain", as_override("resume", as_typed(run_dir))),
        },
        summary.get("val_loss"),
    )


def show_again(config: PretrainConfig, run_dir: Path) -> None:
    """Print the results of the run in a folder."""
    if launched := launched_processes():
        with processes(replace(config.runtime, processes=launched), None):
            pass  # the others wait to be told that there is nothing to do
    outcome = outcome_of(run_dir)
    for name, metric in METRICS.items():
        figure = format_figure(outcome.figures.get(f"val_{name}"), metric.form)
        log.info("validation %-14s %s", metric.title, figure)
    for name, line in [*outcome.files.items(), *outcome.next.items()]:
        log.info("%-11s %s", name, line)


def take_part() -> None:
    """Take part in the run that `pretrain` starts in the first of the launched processes.

    Raises:
        UserError: something that the run needs, such as the text, is not available to this process.
    """
    follow(execute)
