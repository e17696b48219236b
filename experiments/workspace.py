"""Save a W&B workspace for a project's runs: `python experiments/workspace.py --help`."""

from launch import Invocation, launch

from llm.config import WorkspaceConfig
from llm.errors import shown
from llm.outcome import Outcome


def run(config: WorkspaceConfig, invocation: Invocation) -> Outcome:
    """Save the workspace and say where it is."""
    from llm.commands.workspace import save_workspace

    address = save_workspace(config)
    print(shown(f"workspace   {address}"))
    return Outcome({"workspace": address})


if __name__ == "__main__":
    launch("workspace", WorkspaceConfig, run)
