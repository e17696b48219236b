"""Report on a sweep as a page, a table and a picture: `python experiments/report.py --help`."""

import subprocess
import sys
from pathlib import Path

from launch import Invocation, launch

from llm.config import ReportConfig
from llm.errors import UserError
from llm.outcome import Outcome


def run(config: ReportConfig, invocation: Invocation) -> Outcome:
    from llm.commands.report import write_report  # imports numpy, which --help need not wait for

    return write_report(config, invocation.run_dir, train)


def train(arguments: list[str]) -> None:
    """Run pretrain.py.

    Raises:
        UserError: it failed, and has printed why.
    """
    sys.stdout.flush()
    script = Path(__file__).with_name("pretrain.py")
    if status := subprocess.run([sys.executable, str(script), *arguments]).returncode:
        raise UserError(f"the run that was predicted ended with status {status}: see above")


if __name__ == "__main__":
    launch("report", ReportConfig, run, recorded=False)  # the report itself goes to the sweep's folder
