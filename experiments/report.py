"""Read a sweep as a page, a table and a picture: `python experiments/report.py --help`."""

from launch import Invocation, launch

from llm.config import ReportConfig


def run(config: ReportConfig, invocation: Invocation) -> None:
    from llm.commands.report import write_report  # imports numpy, which --help need not wait for

    write_report(config, invocation.run_dir)


if __name__ == "__main__":
    launch("report", ReportConfig, run, recorded=False)  # the report itself goes to the sweep's folder
