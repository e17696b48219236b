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

# Seconds that a run waits for W&B at most: to begin, for a sign of life at the end, to deliver the rest.
BEGIN, ANSWER, DELIVER = 30, 3, 20

# How the client's own log says what it gave up to deliver; what it only tries again is not among these.
GIVEN_UP = {
    "filestream: fatal error": "metrics",
    "runupserter: failed": "config",
    "runfiles: ": "files",
}


class Tracker:
    """Records one run. W&B is imported only if it is wanted, and a run of it is always ended.

    W&B's own process writes all to the run's folder and delivers it from there, so that neither the loop nor
    the record depends on the server.
    """

    passed_over = False  # whether W&B did not take a run of this process, of which there may be many

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
            UserError: W&B is to be online, and no key is set up, or one that cannot be a key.
        """
        self.run_dir = run_dir
        self.metrics = run_dir / "metrics.jsonl"
        self.samples = run_dir / "samples.jsonl"
        self.wandb_folder: Path | None = None  # with what W&B has not got, for `wandb sync` and `wandb leet`
        self._pending: dict[Path, list[dict[str, Any]]] = {self.metrics: [], self.samples: []}
        self._wandb_run = None
        if config.mode != "disabled":
            self._wandb_run = self._start_wandb(config, run_config, job_type, run_id)
            # Tokens are an axis that runs of different batch sizes share; `step` may be chosen too. W&B's own
            # step counts log calls and means nothing here.
            self._wandb_run.define_metric("step")
            self._wandb_run.define_metric("tokens_seen")
            self._wandb_run.define_metric("*", step_metric="tokens_seen")
            self.wandb_folder = as_typed(Path(self._wandb_run.dir).parent)

    def _start_wandb(
        self, config: TrackingConfig, run_config: dict[str, Any], job_type: str, run_id: str | None
    ) -> Any:
        os.environ.setdefault("WANDB_SILENT", "true")  # what it says at its end, the run says itself
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

        if Tracker.passed_over and config.mode == "online" and not _answers():
            log.warning("W&B still does not answer: this run is recorded offline")
            return start("offline")
        folders = self.run_dir / "wandb"
        there = set(folders.glob("run-*"))
        try:
            with _announced_wait("begin", BEGIN):
                run = start(config.mode)
        except (wandb.errors.Error, OSError) as error:
            if config.mode == "offline" or isinstance(error, wandb.errors.UsageError):
                raise UserError(
                    f"tracking={config.mode}: Weights & Biases did not start ({first_line(error)}); "
                    f"log in with `wandb login`, or use tracking=offline and `wandb sync` later"
                ) from error
            log.warning("W&B does not take this run now (%s): it is recorded offline", _short(str(error)))
            wandb.teardown()  # else its process holds the run's id
            for folder in set(folders.glob("run-*")) - there:
                remove(folder)  # of the run that did not begin
            Tracker.passed_over = True
            run = start("offline")
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
            table = wandb.Table(columns=columns, data=data)
            if not self._wandb_run.offline and not _answers():
                # Online the client asks the server about a table, for long, and raises when there is no
                # answer. One that is bound to the run already is not asked about, and kept as a file alone.
                table.bind_to_run(self._wandb_run, name, self._wandb_run.step)
            self._wandb_run.log({name: table})

    def log_picture(self, name: str, path: Path) -> None:
        """Show a picture in W&B."""
        if self._wandb_run and path.exists():
            import wandb

            self._wandb_run.log({name: wandb.Image(str(path))})

    def finish(self, summary: dict[str, Any], failed: bool = False) -> None:
        """Give W&B the samples as a table, and the summary, and end its run; say what it did not get."""
        if not self._wandb_run:
            return
        self.log_table("samples", read_json_lines(self.samples))
        run, self._wandb_run = self._wandb_run, None
        run.summary.update(summary)
        lost = None
        try:
            with _announced_wait("take the rest of the run", DELIVER):
                run.finish(exit_code=int(failed))
        except TimeoutError:
            lost = f"what it had not taken after {DELIVER} seconds"
        if run.offline:
            return
        assert self.wandb_folder
        if lost := lost or _given_up(self.wandb_folder):
            log.warning(
                "W&B did not get %s; all of the run is kept here: %s", lost, sync_command(self.wandb_folder)
            )
        else:
            self.wandb_folder = None
            log.info("W&B has this run: %s", run.url)


def sync_command(folder: Path) -> str:
    """What gives W&B a run that it has not got, or not all of it. The client passes over runs that were
    online, unless it is told not to."""
    option = "" if folder.name.startswith("offline-") else "--include-online "
    return f"wandb sync {option}{folder}"


@contextmanager
def _announced_wait(what: str, seconds: int) -> Iterator[None]:
    """Say what is waited for, if it takes long enough for one to wonder."""
    timer = Timer(3, log.info, [f"waiting for W&B to {what}, for {seconds} seconds at most"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _answers() -> bool:
    """Whether the W&B server answers, and takes the key."""
    import wandb

    try:
        wandb.Api(timeout=ANSWER)
    except (wandb.errors.Error, OSError):
        return False
    return True


def _given_up(folder: Path) -> str:
    """What the client gave up to deliver of the run in a W&B folder, with the reason, by its own log."""
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
    """What went wrong, without the server's whole answer."""
    return re.split(r" url=|: \{|\n", reason.rpartition("while retrying: ")[2])[0].strip(" :")
