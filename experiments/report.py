"""Read a sweep as a page, a table and a picture: `python experiments/report.py --help`."""

import os
from contextlib import suppress
from pathlib import Path

from launch import launch

from llm.config import ReportConfig


def run(config: ReportConfig, run_dir: Path) -> None:
    """Report."""
    from llm.commands.report import write_report  # imports numpy, which --help need not wait for

    try:
        write_report(config, run_dir)
    finally:
        with suppress(OSError):  # it holds the report; Hydra made it in any case
            os.removedirs(run_dir)


if __name__ == "__main__":
    launch("report", ReportConfig, run)
