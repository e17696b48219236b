"""What `experiments/report.py` does: a page, a table and a picture of a sweep, a study or a run."""

from pathlib import Path

from llm.config import ReportConfig
from llm.errors import shown
from llm.sweeps.jobs import RECORD, Job, find_sweep, none_begun, read_jobs, read_record
from llm.sweeps.report import study_report, sweep_report
from llm.sweeps.study import is_study


def write_report(config: ReportConfig, run_dir: Path) -> Path:
    """Write `report.html`, which needs nothing but itself, `report.csv` and `report.png`: into the folder of
    the sweep or run, for several into `run_dir`, or where `config.to` says.

    Returns the page.

    Raises:
        UserError: there is no such sweep or run, it has no jobs, or the files cannot be written.
    """
    names = config.sweep if isinstance(config.sweep, list) else [config.sweep]
    folders = [find_sweep(str(name)) for name in names]
    jobs = read_jobs(folders)
    if not jobs:
        raise none_begun(folders)
    target = Path(config.to) if config.to else folders[0] if len(folders) == 1 else run_dir
    report = study_report if _is_study(folders, jobs) else sweep_report
    page = report(jobs, folders, target)
    for name, file in (
        ("report", page),
        ("table", target / "report.csv"),
        ("picture", target / "report.png"),
    ):
        print(shown(f"{name:<11} {file}", keep=""))
    return page


def _is_study(folders: list[Path], jobs: list[Job]) -> bool:
    """Whether the jobs measured samples, or will."""
    scripts = {read_record(folder)["script"] for folder in folders if (folder / RECORD).exists()}
    return is_study(jobs) or scripts == {"generate"}
