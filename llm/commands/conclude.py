"""How a sweep ends: a table of its jobs, its report, and how to resume it."""

from pathlib import Path

from llm.errors import shown
from llm.files import as_typed
from llm.overrides import as_command, as_override
from llm.sweeps.jobs import DONE, read_jobs, read_record
from llm.sweeps.report import sweep_report
from llm.sweeps.study import is_study
from llm.sweeps.watch import sweep_table
from llm.tracking import sync_command


def conclude(folder: Path) -> bool:
    """Say what came of a sweep and write its report; returns whether a job that ran has no result.

    Raises:
        UserError: the report cannot be written.
    """
    folder = as_typed(folder)
    jobs, script = read_jobs([folder]), read_record(folder)["script"]
    if is_study(jobs):
        from llm.commands.generate import conclude_study

        conclude_study(folder, jobs)
    else:
        print(shown(f"\n{sweep_table(jobs)}\n\nsweep folder {folder}"))
        if script == "pretrain" and jobs:
            report = sweep_report(jobs, [folder], folder)
            for head, line in [("report", str(report.page)), *report.lines]:
                print(shown(f"{head:<11} {line}"))
        if any(job.summary.get("wandb_folder") for job in jobs):
            print(shown(f"W&B         {sync_command(folder, '*/wandb/*run-*')}"))
    if any(job.state not in DONE for job in jobs):
        print(shown(f"resume      {as_command(script, '-m', as_override('sweep.resume', folder))}"))
    return any(job.state in ("failed", "killed", "interrupted") for job in jobs)
