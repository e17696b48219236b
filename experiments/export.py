"""Write a checkpoint in another program's format: `python experiments/export.py --help`."""

from pathlib import Path

from launch import launch

from llm.config import ExportConfig


def run(config: ExportConfig, run_dir: Path) -> None:
    """Export."""
    from llm.commands.export import export_checkpoint  # imports torch, which --help need not wait for

    export_checkpoint(config, run_dir)


if __name__ == "__main__":
    launch("export", ExportConfig, run)
