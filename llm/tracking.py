"""Where metrics go: `metrics.jsonl` in the run folder, and Weights & Biases under the same names."""

import logging
import math
import os
from pathlib import Path
from typing import Any

from llm.config import TrackingConfig, UserError
from llm.files import append_json_lines, read_json_lines

log = logging.getLogger(__name__)


class Tracker:
    """Records one run. W&B is imported only if it is wanted, and a run of it is always ended."""

    def __init__(
        self,
        run_dir: Path,
        config: TrackingConfig,
        run_config: dict[str, Any],
        job_type: str,
        run_id: str | None = None,
    ) -> None:
        """
        Args:
            run_id: a run with this id goes on in W&B, if it is there already.

        Raises:
            UserError: W&B cannot start online, for want of a key or a network.
        """
        self.run_dir = run_dir
        self.metrics = run_dir / "metrics.jsonl"
        self.samples = run_dir / "samples.jsonl"
        self._pending: dict[Path, list[dict[str, Any]]] = {self.metrics: [], self.samples: []}
        self._wandb_run = None
        if config.mode != "disabled":
            self._wandb_run = self._start_wandb(config, run_config, job_type, run_id)

    def _start_wandb(
        self, config: TrackingConfig, run_config: dict[str, Any], job_type: str, run_id: str | None
    ) -> Any:
        os.environ.setdefault("WANDB_SILENT", "true")  # what it says at its end, the run says itself
        import wandb

        try:
            run = wandb.init(
                mode=config.mode,  # type: ignore[arg-type]  # validated: offline or online
                project=config.project,
                entity=config.entity,
                group=config.group,
                name=config.name,
                tags=config.tags,
                job_type=job_type,
                config=run_config,
                id=run_id,
                resume="allow",
                dir=self.run_dir,
                settings=wandb.Settings(silent=True, console="off", init_timeout=30),
            )
        except (wandb.errors.Error, OSError) as error:
            raise UserError(
                f"tracking={config.mode}: Weights & Biases did not start ({str(error).splitlines()[0]}); "
                f"log in with `wandb login`, or use tracking=offline and `wandb sync` later"
            ) from error
        # Any panel may be drawn over either axis; W&B's own step counts log calls and means nothing here.
        run.define_metric("step")
        run.define_metric("tokens_seen")
        run.define_metric("*", step_metric="step")
        return run

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record metrics of the update `step`, counted from 0. What is not finite is null in the file."""
        written = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._append(self.metrics, {"step": step, **written})
        if self._wandb_run:
            self._wandb_run.log({"step": step, **metrics})

    def log_sample(self, line: dict[str, Any]) -> None:
        """Keep a sample in `samples.jsonl`; `finish` gives all of them to W&B."""
        self._append(self.samples, line)

    def _append(self, file: Path, line: dict[str, Any]) -> None:
        """Add a line; if the disk is full, keep it in memory and try again with the next one."""
        self._pending[file].append(line)
        try:
            self.flush()
        except UserError as error:
            if len(self._pending[file]) == 1:
                log.warning("%s; its lines are kept in memory and tried again", error)

    def flush(self) -> None:
        """Write the lines that are kept in memory.

        Raises:
            UserError: they still cannot be written.
        """
        for file, lines in self._pending.items():
            if lines:
                append_json_lines(file, lines)
                lines.clear()

    def record_sizes(self) -> dict[str, int]:
        """The sizes of `metrics.jsonl` and `samples.jsonl` in bytes, with all lines so far in them.

        Raises:
            UserError: a line cannot be written.
        """
        self.flush()
        return {file.name: file.stat().st_size if file.exists() else 0 for file in self._pending}

    def log_table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Show rows in W&B as a table, which it can plot; what is no plain value is left out."""
        if self._wandb_run and rows:
            import wandb

            columns: list[Any] = [key for key, value in rows[0].items() if not isinstance(value, dict | list)]
            data = [[row[column] for column in columns] for row in rows]
            self._wandb_run.log({name: wandb.Table(columns=columns, data=data)})

    def log_picture(self, name: str, path: Path) -> None:
        """Show a picture in W&B."""
        if self._wandb_run and path.exists():
            import wandb

            self._wandb_run.log({name: wandb.Image(str(path))})

    def finish(self, summary: dict[str, Any], failed: bool = False) -> None:
        """Give W&B the samples as a table, and the summary, and end its run."""
        if self._wandb_run:
            self.log_table("samples", read_json_lines(self.samples))
            self._wandb_run.summary.update(summary)
            self._wandb_run.finish(exit_code=int(failed))
            self._wandb_run = None

    @property
    def wandb_folder(self) -> Path | None:
        """The folder of the latest offline W&B run here, for `wandb sync` and `wandb leet`."""
        folders = sorted((self.run_dir / "wandb").glob("*run-*-*"), key=lambda folder: folder.name)
        return folders[-1] if folders else None
