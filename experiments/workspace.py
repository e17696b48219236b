"""Save a W&B workspace for a project's runs: `python experiments/workspace.py --help`."""

from launch import Invocation, launch

from llm.config import WorkspaceConfig
from llm.errors import shown


def run(config: WorkspaceConfig, invocation: Invocation) -> None:
    """Save the workspace and say where it is."""
    from llm.commands.workspace import save_workspace

    print(shown(f"workspace   {save_workspace(config)}"))


if __name__ == "__main__":
    launch("workspace", WorkspaceConfig, run)
