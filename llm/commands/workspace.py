"""Saving a W&B workspace: views of a project's runs that would otherwise have to be assembled by hand."""

import os
from typing import Any

from llm.config import WorkspaceConfig
from llm.config_rules import validate
from llm.errors import UserError, first_line
from llm.wandb_client import tracking_project

CURVES = ("train/loss", "val/loss", "val/bits_per_byte", "lr", "grad_norm", "tokens_per_second")
VARIED = ("optimizer.lr", "seed", "model.emb_dim", "model.n_layers", "model.n_heads", "model.context_length")
RESULT = "val_bits_per_byte"  # at the end, in a run's summary; compares between tokenizers
# What llm/sweeps/tracked.py logs of reports, races, ladders and verdicts.
SENTENCES = ("verdict/sentence", "race/verdict", "best/possibly", "scaling/law")
INTERVALS = {
    "Difference, b - a, and its 95 % interval": ("verdict/low", "verdict/difference", "verdict/high"),
    "Lowest mean and the noise of seeds": ("noise/low", "best/mean", "noise/high"),
    "Predicted loss, its interval, and what was measured": (
        *("scaling/predicted_low", "scaling/predicted", "scaling/predicted_high"),
        "scaling/measured",
    ),
}
TABLES = ("ranking", "seeds", "ladder", "optima", "predictions")
PICTURES = ("verdict", "report", "scaling")


def save_workspace(config: WorkspaceConfig) -> str:
    """Save a workspace with the curves, hyperparameters, verdicts and samples of a project; returns its URL.

    Raises:
        UserError: wandb-workspaces is not installed, there is no API key, or W&B refuses it or the workspace,
            or does not answer.
    """
    validate(config)
    os.environ.setdefault("WANDB_SILENT", "true")  # else it prints the URL a second time
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    project = tracking_project(config.tracking)
    try:
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise UserError(
            "the package wandb-workspaces is not installed: pip install -c constraints.txt -e '.[workspace]'"
        ) from error
    try:
        entity = config.tracking.entity or os.environ.get("WANDB_ENTITY") or wandb.Api().default_entity
        if not entity:
            raise UserError("your W&B account has no default entity: set tracking.entity")
        workspace = workspaces.Workspace(
            name=config.name,
            entity=entity,
            project=project,
            sections=_sections(),
            settings=workspaces.WorkspaceSettings(x_axis="tokens_seen"),
        )
        workspace.save()
        return str(workspace.url)
    except (wandb.errors.Error, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"could not save workspace {config.name!r} in {project} ({first_line(error)}); "
            f"check that you are logged in (`wandb login`) and may write to that project (tracking.entity)"
        ) from error


def _sections() -> list[Any]:
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces

    axes: list[Any] = [*(panels.Config(name) for name in VARIED), panels.SummaryMetric(RESULT)]
    content: dict[str, list[Any]] = {
        "Curves": [panels.LinePlot(title=name, x="tokens_seen", y=[name]) for name in CURVES],
        "Hyperparameters": [
            panels.ParallelCoordinatesPlot(
                columns=[panels.ParallelCoordinatesPlotColumn(axis) for axis in axes]
            ),
            panels.ParameterImportancePlot(with_respect_to=RESULT),
        ],
        "Verdicts": [
            *(panels.WeavePanelSummaryTable(table_name=name) for name in (*SENTENCES, *TABLES)),
            *(panels.BarPlot(title=title, metrics=[*names]) for title, names in INTERVALS.items()),
            panels.MediaBrowser(title="Pictures", media_keys=[*PICTURES], num_columns=1),
        ],
        "Samples": [panels.WeavePanelSummaryTable(table_name="samples")],
    }
    return [workspaces.Section(name=name, panels=each, is_open=True) for name, each in content.items()]
