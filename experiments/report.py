"""Read a sweep as a page, a table and a picture: `python experiments/report.py --help`."""

import os
from contextlib import suppress

from launch import Invocation, launch

from llm.config import ReportConfig


def run(config: ReportConfig, invocation: Invocation) -> None:
    from llm.commands.report import write_report  # imports numpy, which --help need not wait for

    try:
        write_report(config, invocation.run_dir)
    finally:
        with suppress(OSError):  # Hydra makes the folder in any case; not empty if the report is in it
            os.removedirs(invocation.run_dir)


if __name__ == "__main__":
    launch("report", ReportConfig, run)
