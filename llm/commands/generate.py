"""The work of `experiments/generate.py`: sampling from a checkpoint, printing and saving the samples, and
measuring them in a study."""

import functools
import logging
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llm.config import GenerateConfig
from llm.config_rules import validate
from llm.data.byte_level import END_OF_TEXT
from llm.data.decoding import read_text, text_of
from llm.data.text_files import find_files
from llm.data.tokenizer import identity_of
from llm.device import device_errors_in_one_line
from llm.errors import UserError, shown
from llm.files import append_json_lines, cache_folder, remove
from llm.generation.copying import NgramIndex, load_ngram_index
from llm.generation.inference import Loaded, load_for_inference, splits_of
from llm.generation.study import copying_metrics, copying_of, sample_metrics
from llm.generation.texts import Sample, generate_texts
from llm.outcome import Outcome
from llm.records import read_samples
from llm.run_folder import read_summary, write_summary
from llm.runtime import start_runtime
from llm.sweeps.jobs import Job
from llm.sweeps.report import study_report
from llm.sweeps.study import MAIN_METRICS, METRICS, notes_on, written
from llm.sweeps.tracked import log_findings, tracking_of
from llm.tables import fitted, format_table, terminal_width
from llm.tracking import Tracker
from llm.wandb_client import sync_command

log = logging.getLogger(__name__)

SAMPLES = "samples.jsonl"
STUDY_SAMPLES = 32


def run_generation(config: GenerateConfig, run_dir: Path) -> Outcome:
    """Generate samples with a checkpoint's model and tokenizer, print them and write them to
    `run_dir/samples.jsonl`; a study also writes `summary.json`.

    Raises:
        UserError: a value is out of range, a prompt is empty or cannot be read, or the checkpoint cannot be
            loaded.
    """
    validate(config)
    if config.quiet:
        _keep_log_off_standard_output()
    sizes = f"{config.batch_size} samples are generated side by side; lower batch_size or max_new_tokens"
    with device_errors_in_one_line(lambda: sizes):
        about = _study(config, run_dir) if config.study else _generate(config, run_dir)
    return Outcome({**about, **outcome_of(run_dir).figures}, {"samples": run_dir / SAMPLES})


def outcome_of(run_dir: Path) -> Outcome:
    """The outcome in a folder: its samples, and a study's measures of them."""
    samples = read_samples(run_dir / SAMPLES)
    figures = {**read_summary(run_dir), "samples": samples} if samples else {}
    return Outcome(figures, {"samples": run_dir / SAMPLES})


def show_again(config: GenerateConfig, run_dir: Path) -> None:
    """Print the samples in a folder, as when they were generated."""
    samples = read_samples(run_dir / SAMPLES)
    if config.quiet:
        _keep_log_off_standard_output()
    end, between = ("\n", f"{END_OF_TEXT}\n") if config.quiet else ("\n\n", "")
    _printer(config.quiet)(between.join(f"{sample['text']}{end}" for sample in samples))
    count = "1 sample" if len(samples) == 1 else f"{len(samples)} samples"
    log.info("%s; saved to %s", count, run_dir / SAMPLES)


def _study(config: GenerateConfig, run_dir: Path) -> dict[str, Any]:
    summary: dict[str, Any] = {"status": "failed", "sampling": asdict(config.sampling), "seed": config.seed}
    tracker = Tracker(run_dir, config.tracking, asdict(config), "generate")
    try:
        about = _generate(config, run_dir)
        summary |= about | {"status": "finished"}
        return about
    except BaseException as error:
        if isinstance(error, Exception):
            is_users = isinstance(error, UserError)
            summary["error"] = str(error) if is_users else f"{type(error).__name__}: {error}"
        else:
            summary["status"] = "interrupted"
        raise
    finally:
        write_summary(run_dir, summary)
        tracker.finish(summary, failed=summary["status"] == "failed")


def conclude_study(folder: Path, jobs: list[Job]) -> Path:
    """Conclude a sweep that is a study: print a table, write a report to its folder, and log it as a W&B run
    beside those of the jobs. Returns the report's page."""
    report = study_report(jobs, [folder], folder)
    unsynced = log_findings(report.findings, folder, jobs, tracking_of(jobs))
    failed = [job for job in jobs if job.error]
    cells = [["job", "set", *(METRICS[metric][0].lower() for metric in MAIN_METRICS)]]
    cells += [[job.name, job.title, *(written(job, metric) for metric in MAIN_METRICS)] for job in jobs]
    width = terminal_width()
    spare = range(len(cells[0]) - 1, 2, -1)  # the last ones first; the perplexity stays
    print("\n" + format_table(cells, {0, 1}, wrapped=1, spare=spare, width=width))
    for text in [f"job {job.name}: {job.error}" for job in failed] + notes_on(jobs):
        print(fitted(text, width))
    print(shown(f"\nreport      {report.page}"))
    if unsynced:
        print(shown(f"W&B         {sync_command(folder, 'wandb/*run-*', '*/wandb/*run-*')}"))
    return report.page


def _generate(config: GenerateConfig, run_dir: Path) -> dict[str, Any]:
    """Print and save the samples; returns the figures for their summary."""
    runtime = start_runtime(config.runtime)
    loaded = load_for_inference(config.checkpoint, runtime, config.model.n_heads, config.tokenizer.name)
    names, prompts = zip(*_prompts(config).items(), strict=True)
    num_samples = config.num_samples or (STUDY_SAMPLES if config.study else 1)
    count = len(prompts) * num_samples
    log.info("checkpoint %s · %s · %s\n", loaded.name, runtime.device, runtime.precision)
    streaming = not config.study and (count == 1 or config.batch_size == 1)
    index = _training_index(loaded) if config.study else None
    remove(run_dir / SAMPLES)  # left by a job of a sweep that was interrupted and starts again
    begin = time.perf_counter()
    show = _printer(config.quiet)
    samples, copying = [], []
    for sample in generate_texts(
        loaded.model,
        loaded.tokenizer,
        [*prompts],
        config.sampling,
        config.max_new_tokens,
        num_samples,
        config.seed,
        config.batch_size,
        [_unescaped(text) for text in config.stop],
        config.eos,
        config.past_context,
        show=show if streaming else None,
        names=[*names],
    ):
        samples.append(sample)
        if index:
            copying.append(copying_of(sample, index, loaded.tokenizer))
        line = {"step": loaded.step, **sample.line(), **(copying[-1] if index else {})}
        append_json_lines(run_dir / SAMPLES, [{**line, "sampling": asdict(config.sampling)}])
        text = "" if streaming else sample.text
        if config.quiet:
            show(f"{text}\n{END_OF_TEXT}\n" if len(samples) < count else f"{text}\n")
        elif streaming:
            show("\n\n")
        elif not config.study:
            show(f"{_heading(sample, len(prompts))}\n{text}\n\n")
    seconds = time.perf_counter() - begin
    new_tokens = sum(len(sample.token_ids) for sample in samples)
    about = {
        "checkpoint": loaded.name,
        "step": loaded.step,
        "tokenizer": identity_of(loaded.tokenizer),
        "num_samples": len(samples),
        "new_tokens": new_tokens,
        "seconds": seconds,
        "tokens_per_second": new_tokens / seconds,
        "device": runtime.device.type,
        "precision": runtime.precision,
    }
    if config.study:
        about |= sample_metrics(samples)
    if index:
        about |= copying_metrics(samples, copying)
    log.info("%d tokens at %.1f tokens/s; saved to %s", new_tokens, new_tokens / seconds, run_dir / SAMPLES)
    return about


def _prompts(config: GenerateConfig) -> dict[str, str]:
    """The prompt, or the content of each file without the newline that editors add at its end; by the name to
    use in errors."""
    if config.prompt_file is None:
        return {"prompt": config.prompt}
    if config.prompt_file == "-":
        if sys.stdin is None:
            raise UserError("prompt_file=-: standard input is closed")
        content = {"standard input": text_of(sys.stdin.buffer.read(), "standard input")}
    else:
        content = {str(file): read_text(file) for file in find_files(config.prompt_file, "prompt_file")}
    return {name: text.removesuffix("\n") for name, text in content.items()}


def _unescaped(stop: str) -> str:
    r"""A stop text with a newline for `\n`, a tab for `\t` and a backslash for `\\`, which Hydra's quotes do
    not have."""
    return re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t"}.get(match[1], "\\"), stop)


def _heading(sample: Sample, prompts: int) -> str:
    prompt = f"prompt {sample.prompt_index + 1}, " if prompts > 1 else ""
    return f"{prompt}sample {sample.index + 1}:"


def _keep_log_off_standard_output() -> None:
    """Show only warnings, on standard error; the log file gets everything."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
            handler.setStream(sys.stderr)
            handler.setLevel(logging.WARNING)


def _printer(quiet: bool) -> Callable[[str], None]:
    """A function that prints pieces of text, made safe for a terminal; or exactly as they are, if only texts
    are wanted and the output is a file or a pipe."""
    to_the_letter = quiet and not sys.stdout.isatty()
    return lambda piece: print(piece if to_the_letter else shown(piece), end="", flush=True)


@functools.lru_cache(maxsize=1)
def _training_index(loaded: Loaded) -> NgramIndex | None:
    """The index of the tokens that a checkpoint was trained on; None, with a warning, if they are not
    available."""
    if loaded.trained is None:
        log.warning("copying is not measured: the training data of %s is unknown", loaded.name)
        return None
    data = loaded.trained.data
    if data.source == "shards":
        log.warning("copying is not measured: the training text is in shards, which are not indexed")
        return None
    try:
        training, _ = splits_of(loaded)
    except UserError as error:
        log.warning("copying is not measured, as the training text is not available: %s", error)
        return None
    return load_ngram_index(training, cache_folder(data.cache_dir))
