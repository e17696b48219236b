"""Where metrics go: `metrics.jsonl` in the run folder, and Weights & Biases under the same names."""

import logging
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from llm.config import TrackingConfig
from llm.errors import UserError, first_line
from llm.files import as_json_lines, as_typed, read_json_lines, remove
from llm.line_file import LineFile
from llm.records import read_samples
from llm.run_folder import RECORDS
from llm.wandb_client import answers, finish_run, given_up, start_run, sync_command, tracking_mode

log = logging.getLogger(__name__)


class Tracker:
    """Records one run. W&B is imported only if it is enabled, and its run is always finished.

    W&B's own process writes everything to the run folder and uploads it from there, so neither the training
    loop nor the record depends on the server. If that process dies, training continues, and W&B gets the run
    at its end.

    W&B's history is always written from the first line of `metrics.jsonl`, over any history that W&B has of
    the same run. Appending to it would show twice what a resumed run does again.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrackingConfig,
        run_config: dict[str, Any],
        job_type: str,
        run_id: str | None = None,
    ) -> None:
        """Start W&B's run. If there are lines from before a resume, call `replay`.

        Args:
            run_id: if W&B has a run with this id already, it is written anew.

        Raises:
            UserError: W&B is to be online, and no API key is set up, or a malformed one.
        """
        self.run_dir, self.config, self.run_config = run_dir, config, run_config
        self.job_type, self.run_id, self.mode = job_type, run_id, tracking_mode(config)
        self.metrics, self.samples = (LineFile(run_dir / name) for name in RECORDS)
        self.wandb_folder: Path | None = None  # with what is not uploaded, for `wandb sync` and `wandb leet`
        self._wandb_run: Any = None  # None, too, once its process has died
        self._last: list[Callable[[Any], None]] = []  # to be logged at the end
        if self.mode != "disabled":
            self._begin_wandb()

    def replay(self) -> None:
        """Log the existing lines of a run that is resumed to W&B."""
        self.metrics, self.samples = (LineFile(record.path) for record in (self.metrics, self.samples))
        self._to_wandb(self._replay)

    def _replay(self, run: Any) -> None:
        for line in read_json_lines(self.metrics.path):
            run.log({name: math.nan if value is None else value for name, value in line.items()})
        for folder in (self.run_dir / "wandb").glob("*run-*"):  # what they hold is in this one, or abandoned
            if folder.name != Path(run.dir).parent.name:
                remove(folder)

    def _begin_wandb(self) -> None:
        run = start_run(self.run_dir, self.mode, self.config, self.job_type, self.run_config, self.run_id)
        self.wandb_folder = as_typed(Path(run.dir).parent)
        self._wandb_run = run
        self._to_wandb(self._define_axes)

    def _define_axes(self, run: Any) -> None:
        # Runs with different batch sizes are comparable over tokens seen; `step` can be chosen as the axis
        # too. W&B's own step counts calls of `log`, which mean nothing here.
        run.define_metric("step")
        run.define_metric("tokens_seen")
        run.define_metric("*", step_metric="tokens_seen")

    def _to_wandb(self, act: Callable[[Any], None]) -> None:
        """Do something with W&B's run, if there is one. If W&B's process was killed or is broken, the run
        continues without it: no error of W&B's is a reason to end training."""
        if self._wandb_run is None:
            return
        try:
            act(self._wandb_run)
        except Exception as error:
            self._lose_wandb(error)

    def _lose_wandb(self, error: Exception) -> None:
        import wandb

        self._wandb_run = None
        with suppress(Exception):  # its end is all that is wanted of it
            wandb.teardown()
        log.warning(
            "W&B stopped recording (%s): %s has everything, and W&B is given all of it at the end of the run",
            first_line(error) or type(error).__name__,
            self.metrics.path,
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record metrics of the update `step`, counted from 0."""
        self._append(self.metrics, {"step": step, **metrics})
        self._to_wandb(lambda run: run.log({"step": step, **metrics}))

    def log_sample(self, line: dict[str, Any]) -> None:
        """Append a sample to `samples.jsonl`; `finish` logs all of them to W&B as one table."""
        self._append(self.samples, line)

    def _append(self, record: LineFile, line: dict[str, Any]) -> None:
        """Append a line; if the disk is full, keep it in memory and try again with the next one."""
        is_first = not record.pending
        record.pending += as_json_lines([line])
        try:
            self.flush()
        except UserError as error:
            if is_first:
                log.warning("%s; its lines stay in memory until it can be written", error)

    def flush(self) -> None:
        """Write the lines that are still in memory.

        Raises:
            UserError: they still cannot be written.
        """
        self.metrics.flush()
        self.samples.flush()

    def record_sizes(self) -> dict[str, int]:
        """The sizes of `metrics.jsonl` and `samples.jsonl` in bytes, with all lines so far written.

        Raises:
            UserError: a line cannot be written.
        """
        return {record.path.name: record.check() for record in (self.metrics, self.samples)}

    def log_table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Log rows to W&B at the end, as a table that it can plot. Columns of lists or dicts are skipped."""
        columns: list[Any] = [
            key for key, value in (rows or [{}])[0].items() if not isinstance(value, dict | list)
        ]

        def log_to(run: Any) -> None:
            import wandb

            data = [[row.get(column) for column in columns] for row in rows]
            table = wandb.Table(columns=columns, data=data)
            if not run.offline and not answers():
                # Online, the client asks the server about a table, waits long for an answer and raises
                # without one. A table already bound to the run is only kept as a file.
                table.bind_to_run(run, name, run.step)
            run.log({name: table})

        if rows:
            self._last.append(log_to)

    def log_picture(self, name: str, path: Path) -> None:
        """Log a picture to W&B at the end, if it exists."""

        def log_to(run: Any) -> None:
            import wandb

            run.log({name: wandb.Image(str(path))})

        if path.exists():
            self._last.append(log_to)

    def finish(self, summary: dict[str, Any], failed: bool = False) -> None:
        """Log the samples and the summary to W&B and finish its run; warn if something was not uploaded."""
        if self.mode == "disabled":
            return
        self.log_table("samples", read_samples(self.samples.path))
        self._to_wandb(lambda run: self._finish_wandb(run, summary, failed))
        if self._wandb_run is None:  # lost, now or earlier
            try:
                self._begin_wandb()
                self._to_wandb(self._replay)
                self._finish_wandb(self._wandb_run, summary, failed)
            except Exception as error:
                log.warning("W&B could not be given this run (%s)", first_line(error))
                self.wandb_folder = None

    def _finish_wandb(self, run: Any, summary: dict[str, Any], failed: bool) -> None:
        for log_to in self._last:
            log_to(run)
        run.summary.update(summary)
        lost = finish_run(run, failed)
        if run.offline:
            return
        assert self.wandb_folder
        if lost := lost or given_up(self.wandb_folder):
            log.warning(
                "W&B did not receive %s; the whole run is on disk: %s",
                lost,
                sync_command(self.wandb_folder),
            )
        else:
            self.wandb_folder = None
            log.info("synced to W&B: %s", run.url)
