"""Write a checkpoint in another program's format: `python experiments/export.py --help`."""

from launch import Invocation, launch

from llm.config import ExportConfig
from llm.outcome import Outcome


def run(config: ExportConfig, invocation: Invocation) -> Outcome:
    from llm.commands.export import export_checkpoint  # imports torch, which --help need not wait for

    return export_checkpoint(config, invocation.run_dir)


if __name__ == "__main__":
    launch("export", ExportConfig, run)
