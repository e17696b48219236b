"""The work of `experiments/report.py`: a page, a table and a picture of a sweep, a study or a run."""

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from llm.config import ReportConfig
from llm.config_rules import validate
from llm.errors import UserError, shown
from llm.outcome import Outcome
from llm.sweeps.jobs import RECORD, Job, find_sweep, none_begun, read_jobs, read_record
from llm.sweeps.report import study_report, sweep_report
from llm.sweeps.study import is_study
from llm.sweeps.tracked import log_findings, tracking_for
from llm.wandb_client import sync_command

Train = Callable[[list[str]], None]  # runs pretrain.py with such arguments


def write_report(config: ReportConfig, run_dir: Path, train: Train | None = None) -> Outcome:
    """Write `report.html` (a self-contained page), `report.csv` and `report.png`: into `config.to`, else into
    the folder of the sweep or run, or for several into `run_dir`. For a ladder, also write `scaling.json` and
    `scaling.png`, and predict a larger run, which `train` trains if `config.run` is set. If the runs were
    tracked, log the findings to W&B, see `tracking_for`.

    Raises:
        UserError: there is no such sweep or run, it has no jobs, or the files cannot be written; a prediction
            was asked for that cannot be made, or its run did not finish.
    """
    validate(config)
    if config.run and config.predict is None:
        raise UserError("run=true trains a run that predict=… predicts: give how many times as large, as 2")
    names = config.sweep if isinstance(config.sweep, list) else [config.sweep]
    folders = [find_sweep(str(name)) for name in names]
    jobs = read_jobs(folders)
    if not jobs:
        raise none_begun(folders)
    target = Path(config.to) if config.to else folders[0] if len(folders) == 1 else run_dir
    if not _is_study(folders, jobs):
        report = sweep_report(jobs, folders, target, config.predict)
    elif config.predict is None:
        report = study_report(jobs, folders, target)
    else:
        raise UserError(f"predict={config.predict:g}: {folders[0]} is a study of samples, not a ladder")
    files = {"report": report.page, "table": target / "report.csv", "picture": target / "report.png"}
    for name, line in [*files.items(), *report.lines]:
        print(shown(f"{name:<11} {line}", keep=""))
    commands = [line for name, line in report.lines if name == "command"]
    if config.run and train and commands:
        train(shlex.split(commands[-1])[2:])
        return write_report(replace(config, run=False), run_dir)
    outcome = Outcome(report.findings.summary, files)
    if commands:
        outcome.next["predicted run"] = commands[-1]
    if unsynced := log_findings(report.findings, target, jobs, tracking_for(config.tracking, jobs)):
        outcome.next["sync"] = sync_command(unsynced)
        print(shown(f"{'W&B':<11} {outcome.next['sync']}", keep=""))
    return outcome


def _is_study(folders: list[Path], jobs: list[Job]) -> bool:
    """Whether the jobs measure samples, or will do so."""
    scripts = {read_record(folder)["script"] for folder in folders if (folder / RECORD).exists()}
    return is_study(jobs) or scripts == {"generate"}
