"""Where metrics go: `metrics.jsonl` in the run folder, and Weights & Biases under the same names."""

import json
import logging
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Timer
from typing import Any

from llm.config import TrackingConfig
from llm.errors import UserError, first_line
from llm.files import append_json_lines, as_typed, read_json_lines, remove

log = logging.getLogger(__name__)

# Timeouts in seconds: to start a W&B run, to hear whether the server answers at all, to upload the rest.
BEGIN, ANSWER, DELIVER = 30, 3, 20

# How messages begin in the client's own log where it gave up an upload, and of what; retries log others.
GIVEN_UP = {
    "filestream: fatal error": "metrics",
    "runupserter: failed": "config",
    "runfiles: ": "files",
}


class Tracker:
    """Records one run. W&B is imported only if it is enabled, and its run is always finished.

    W&B's own process writes everything to the run folder and uploads it from there, so that neither the
    training loop nor the record depends on the server.
    """

    failed_to_start = False  # whether W&B failed to start an earlier run of this process, as of a sweep's job

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
            run_id: if W&B has a run with this id already, it is resumed.

        Raises:
            UserError: W&B is to be online, and no API key is set up, or a malformed one.
        """
        self.run_dir = run_dir
        self.metrics = run_dir / "metrics.jsonl"
        self.samples = run_dir / "samples.jsonl"
        self.wandb_folder: Path | None = None  # with what is not uploaded, for `wandb sync` and `wandb leet`
        self._pending: dict[Path, list[dict[str, Any]]] = {self.metrics: [], self.samples: []}
        self._wandb_run = None
        if config.mode != "disabled":
            self._wandb_run = self._start_wandb(config, run_config, job_type, run_id)
            # Runs of different batch sizes compare over tokens seen; `step` can be chosen as the axis too.
            # W&B's own step counts calls of `log`, which mean nothing here.
            self._wandb_run.define_metric("step")
            self._wandb_run.define_metric("tokens_seen")
            self._wandb_run.define_metric("*", step_metric="tokens_seen")
            self.wandb_folder = as_typed(Path(self._wandb_run.dir).parent)

    def _start_wandb(
        self, config: TrackingConfig, run_config: dict[str, Any], job_type: str, run_id: str | None
    ) -> Any:
        os.environ.setdefault("WANDB_SILENT", "true")  # the run's own summary says what W&B would print
        # Its telemetry would wait for the server at the end, and log its own failures among the run's lines.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        def start(mode: str) -> Any:
            return wandb.init(
                mode=mode,  # type: ignore[arg-type]  # validated: offline or online
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
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    init_timeout=BEGIN,
                    finish_timeout=DELIVER,
                    finish_timeout_raises=True,
                ),
            )

        if Tracker.failed_to_start and config.mode == "online" and not _answers():
            log.warning("W&B still does not answer: this run is recorded offline")
            return start("offline")
        folders = self.run_dir / "wandb"
        there = set(folders.glob("run-*"))
        try:
            with _announced_wait("start", BEGIN):
                run = start(config.mode)
        except (wandb.errors.Error, OSError) as error:
            if config.mode == "offline" or isinstance(error, wandb.errors.UsageError):
                raise UserError(
                    f"tracking={config.mode}: Weights & Biases did not start ({first_line(error)}); "
                    f"log in with `wandb login`, or use tracking=offline and `wandb sync` later"
                ) from error
            log.warning("W&B cannot start this run now (%s): it is recorded offline", _short(str(error)))
            wandb.teardown()  # else its process keeps the run's id
            for folder in set(folders.glob("run-*")) - there:
                remove(folder)  # of the run that did not start
            Tracker.failed_to_start = True
            run = start("offline")
        return run

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record metrics of the update `step`, counted from 0. JSON has no NaN or infinity: in the file,
        values that are not finite become null."""
        written = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._append(self.metrics, {"step": step, **written})
        if self._wandb_run:
            self._wandb_run.log({"step": step, **metrics})

    def log_sample(self, line: dict[str, Any]) -> None:
        """Append a sample to `samples.jsonl`; `finish` logs all of them to W&B as one table."""
        self._append(self.samples, line)

    def _append(self, file: Path, line: dict[str, Any]) -> None:
        """Append a line; if the disk is full, keep it in memory and try again with the next one."""
        self._pending[file].append(line)
        try:
            self.flush()
        except UserError as error:
            if len(self._pending[file]) == 1:
                log.warning("%s; its lines stay in memory until it can be written", error)

    def flush(self) -> None:
        """Write the lines still in memory.

        Raises:
            UserError: they still cannot be written.
        """
        for file, lines in self._pending.items():
            if lines:
                append_json_lines(file, lines)
                lines.clear()

    def record_sizes(self) -> dict[str, int]:
        """The sizes of `metrics.jsonl` and `samples.jsonl` in bytes, with all lines so far written.

        Raises:
            UserError: a line cannot be written.
        """
        self.flush()
        return {file.name: file.stat().st_size if file.exists() else 0 for file in self._pending}

    def log_table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Log rows to W&B as a table, which it can plot; columns of lists or dicts are skipped."""
        if self._wandb_run and rows:
            import wandb

            columns: list[Any] = [key for key, value in rows[0].items() if not isinstance(value, dict | list)]
            data = [[row[column] for column in columns] for row in rows]
            table = wandb.Table(columns=columns, data=data)
            if not self._wandb_run.offline and not _answers():
                # Online, the client asks the server about a table, waits long for an answer and raises
                # without one. A table already bound to the run is only kept as a file.
                table.bind_to_run(self._wandb_run, name, self._wandb_run.step)
            self._wandb_run.log({name: table})

    def log_picture(self, name: str, path: Path) -> None:
        """Log a picture to W&B, if it exists."""
        if self._wandb_run and path.exists():
            import wandb

            self._wandb_run.log({name: wandb.Image(str(path))})

    def finish(self, summary: dict[str, Any], failed: bool = False) -> None:
        """Log the samples and the summary to W&B and finish its run; warn of what was not uploaded."""
        if not self._wandb_run:
            return
        self.log_table("samples", read_json_lines(self.samples))
        run, self._wandb_run = self._wandb_run, None
        run.summary.update(summary)
        lost = None
        try:
            with _announced_wait("receive the rest of the run", DELIVER):
                run.finish(exit_code=int(failed))
        except TimeoutError:
            lost = f"the rest of the run within {DELIVER} seconds"
        if run.offline:
            return
        assert self.wandb_folder
        if lost := lost or _given_up(self.wandb_folder):
            log.warning(
                "W&B did not receive %s; the whole run is on disk: %s",
                lost,
                sync_command(self.wandb_folder),
            )
        else:
            self.wandb_folder = None
            log.info("synced to W&B: %s", run.url)


def sync_command(folder: Path) -> str:
    """The command that uploads a run W&B does not have, or has only in part. Without an option, the client
    skips runs that were online."""
    option = "" if folder.name.startswith("offline-") else "--include-online "
    return f"wandb sync {option}{folder}"


@contextmanager
def _announced_wait(what: str, seconds: int) -> Iterator[None]:
    """Say what the run is waiting for, once it takes long enough to make one wonder."""
    timer = Timer(3, log.info, [f"waiting up to {seconds} seconds for W&B to {what}"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _answers() -> bool:
    """Whether the W&B server answers and accepts the key."""
    import wandb

    try:
        wandb.Api(timeout=ANSWER)
    except (wandb.errors.Error, OSError):
        return False
    return True


def _given_up(folder: Path) -> str:
    """What of the run in a W&B folder the client gave up uploading, and why, according to its own log."""
    lost: dict[str, str] = {}
    client_log = folder / "logs" / "debug-internal.log"
    lines = client_log.read_text("utf-8", "replace").splitlines() if client_log.exists() else []
    for line in lines:
        with suppress(ValueError):  # a line that a full disk cut off
            entry = json.loads(line)
            message = entry["msg"]
            for start, what in GIVEN_UP.items():
                if entry["level"].startswith("ERROR") and message.startswith(start):
                    lost[what] = _short(str(entry.get("error", message.removeprefix(start))))
    return ", ".join(f"{what} ({reason})" for what, reason in lost.items())


def _short(reason: str) -> str:
    """The reason for a failure, without the server's whole response."""
    return re.split(r" url=|: \{|\n", reason.rpartition("while retrying: ")[2])[0].strip(" :")
