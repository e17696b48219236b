"""How a sweep ends: a table of its jobs, its report, and how to resume it."""

from pathlib import Path
from typing import Any

from llm.errors import shown
from llm.files import as_typed
from llm.outcome import Outcome
from llm.overrides import as_command, as_override
from llm.sweeps.jobs import DONE, Job, read_jobs, read_record
from llm.sweeps.report import sweep_report
from llm.sweeps.study import is_study
from llm.sweeps.tracked import log_findings, tracking_of
from llm.sweeps.watch import sweep_table
from llm.wandb_client import sync_command


def conclude(folder: Path) -> Outcome:
    """Print the results of a sweep and write its report; log it to W&B too, if the jobs were tracked.

    Raises:
        UserError: the report cannot be written.
    """
    folder = as_typed(folder)
    jobs, script = read_jobs([folder]), read_record(folder)["script"]
    outcome = Outcome({"jobs": [_told(job) for job in jobs]})
    if is_study(jobs):
        from llm.commands.generate import conclude_study

        outcome.files["report"] = conclude_study(folder, jobs)
    else:
        own: list[str] = []
        print(shown(f"\n{sweep_table(jobs)}\n\nsweep folder {folder}"))
        if script == "pretrain" and jobs:
            report = sweep_report(jobs, [folder], folder)
            outcome.files["report"] = report.page
            outcome.figures["report"] = report.findings.summary
            for head, line in [("report", str(report.page)), *report.lines]:
                print(shown(f"{head:<11} {line}"))
            own = ["wandb/*run-*"] * bool(log_findings(report.findings, folder, jobs, tracking_of(jobs)))
        unsynced = ["*/wandb/*run-*"] * any(job.summary.get("wandb_folder") for job in jobs)
        if patterns := [*own, *unsynced]:
            outcome.next["sync"] = sync_command(folder, *patterns)
            print(shown(f"W&B         {outcome.next['sync']}"))
    if taken := sum("taken_from" in job.summary for job in jobs):
        print(f"done before {taken} of {len(jobs)} jobs, taken from there; if_done=again trains them again")
    if any(job.state not in DONE for job in jobs):
        outcome.next["resume"] = as_command(script, "-m", as_override("sweep.resume", folder))
        print(shown(f"resume      {outcome.next['resume']}"))
    outcome.failed = any(job.state in ("failed", "killed", "interrupted") for job in jobs)
    return outcome


def _told(job: Job) -> dict[str, Any]:
    about = {"job": job.name, "folder": str(as_typed(job.folder)), "setting": job.title, "state": job.state}
    return {**about, "error": job.error, "figures": job.summary}
