"""Where metrics go: `metrics.jsonl` in the run folder, and Weights & Biases under the same names."""

import json
import logging
import math
import os
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Timer
from typing import Any

from llm.config import TrackingConfig
from llm.errors import UserError, first_line
from llm.files import (
    append,
    as_json_lines,
    as_typed,
    cache_folder,
    ensure_home,
    read_json_lines,
    remove,
    replacing,
    writing,
)
from llm.records import read_samples
from llm.run_folder import RECORDS, step_folders

log = logging.getLogger(__name__)

PROJECT = "gpt-experiment-runner"
MODES = {
    "offline": "offline",
    "online": "online",
    "disabled": "disabled",
    "dryrun": "offline",
    "run": "online",
}

# Timeouts in seconds: to start a W&B run, to hear whether the server answers at all, to upload the rest.
BEGIN, ANSWER, DELIVER = 30, 3, 20

# How messages begin in the client's own log where it gave up an upload, and of what; retries log others.
GIVEN_UP = {
    "filestream: fatal error": "metrics",
    "runupserter: failed": "config",
    "runfiles: ": "files",
}

# Variables by which W&B would append to the history of a run, or cut it, as it likes.
APPENDING = ("WANDB_RESUME", "WANDB_RESUME_FROM", "WANDB_FORK_FROM")


def tracking_mode(config: TrackingConfig) -> str:
    """`offline`, `online` or `disabled`: as configured, else as `WANDB_MODE` says, else offline.

    Raises:
        UserError: `WANDB_MODE` is none that W&B knows, or one that shares a run between machines.
    """
    wanted = config.mode or os.environ.get("WANDB_MODE") or "offline"
    if wanted not in MODES:
        raise UserError(f"WANDB_MODE={wanted}: must be one of {', '.join(MODES)}")
    return MODES[wanted]


def tracking_project(config: TrackingConfig) -> str:
    """W&B's project: as configured, else as `WANDB_PROJECT` says, else ours."""
    return config.project or os.environ.get("WANDB_PROJECT") or PROJECT


class Record:
    """A file of a run that grows line by line, and is restored if something else deletes or changes it.

    What no checkpoint has a copy of is kept in memory: the lines since the newest checkpoint, and those that
    a full disk keeps out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = self._size_on_disk()  # of all that was written
        self.pending = bytearray()  # to be written
        self._uncopied = bytearray()  # the end of what was written: that no checkpoint holds

    def _size_on_disk(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def flush(self) -> None:
        """Write what is pending, to a file that is as it was left.

        Raises:
            UserError: it cannot be written.
        """
        with writing(self.path):
            if self._size_on_disk() != self.size:
                self._restore()
        if self.pending:
            append(self.path, bytes(self.pending))
            self.size += len(self.pending)
            self._uncopied += self.pending
            self.pending.clear()

    def check(self) -> int:
        """Before a checkpoint: see that the file ends as it was written, and forget what the newest
        checkpoint holds. Returns the file's size in bytes.

        Raises:
            UserError: it cannot be written.
        """
        self.flush()
        with writing(self.path):
            if self._uncopied:
                with self.path.open("rb") as file:
                    file.seek(-len(self._uncopied), os.SEEK_END)
                    if file.read() != self._uncopied:
                        self._restore()
            copied = self.size - len(self._uncopied)
            newest = max((copy.stat().st_size for copy in self._copies()), default=0)
        del self._uncopied[: max(0, min(newest, self.size) - copied)]
        return self.size

    def _copies(self) -> list[Path]:
        copies = [folder / self.path.name for folder in step_folders(self.path.parent)]
        return [copy for copy in copies if copy.exists()]

    def _restore(self) -> None:
        copied, found = self.size - len(self._uncopied), self._size_on_disk()
        begin = next((copy.read_bytes() for copy in self._copies() if copy.stat().st_size == copied), b"")
        with replacing(self.path) as temporary:
            temporary.write_bytes(begin + self._uncopied)
        lost = f", but for its first {copied} bytes, which no checkpoint holds" if len(begin) < copied else ""
        log.warning(
            "%s was changed by something else (%s of the %d bytes written): it is restored%s",
            self.path,
            f"{found} bytes" if self.path.exists() and found else "none are there",
            self.size,
            lost,
        )
        self.size = len(begin) + len(self._uncopied)


class Tracker:
    """Records one run. W&B is imported only if it is enabled, and its run is always finished.

    W&B's own process writes everything to the run folder and uploads it from there, so that neither the
    training loop nor the record depends on the server. If that process dies, training continues, and W&B gets
    the run at its end.

    W&B's history is always written from its first line, out of `metrics.jsonl`: over the history of the same
    run that W&B may have. To append to that would show twice what a resumed run does again.
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
        """Start W&B's run. `replay` tells it, and this, of lines that are there already.

        Args:
            run_id: if W&B has a run with this id already, it is written anew.

        Raises:
            UserError: W&B is to be online, and no API key is set up, or a malformed one.
        """
        self.run_dir, self.config, self.run_config = run_dir, config, run_config
        self.job_type, self.run_id, self.mode = job_type, run_id, tracking_mode(config)
        self.metrics, self.samples = (Record(run_dir / name) for name in RECORDS)
        self.wandb_folder: Path | None = None  # with what is not uploaded, for `wandb sync` and `wandb leet`
        self._wandb_run: Any = None  # None, too, once its process has died
        self._last: list[Callable[[Any], None]] = []  # to be logged at the end
        if self.mode != "disabled":
            self._begin_wandb()

    def replay(self) -> None:
        """Take over the lines of a run that is being resumed."""
        self.metrics, self.samples = (Record(record.path) for record in (self.metrics, self.samples))
        self._to_wandb(self._replay)

    def _replay(self, run: Any) -> None:
        for line in read_json_lines(self.metrics.path):
            run.log({name: math.nan if value is None else value for name, value in line.items()})
        for folder in (self.run_dir / "wandb").glob("*run-*"):  # what they hold is in this one, or abandoned
            if folder.name != Path(run.dir).parent.name:
                remove(folder)

    def _begin_wandb(self) -> None:
        run = self._start_wandb()
        self.wandb_folder = as_typed(Path(run.dir).parent)
        self._wandb_run = run
        self._to_wandb(self._define_axes)

    def _define_axes(self, run: Any) -> None:
        # Runs of different batch sizes compare over tokens seen; `step` can be chosen as the axis too.
        # W&B's own step counts calls of `log`, which mean nothing here.
        run.define_metric("step")
        run.define_metric("tokens_seen")
        run.define_metric("*", step_metric="tokens_seen")

    def _start_wandb(self) -> Any:
        os.environ.setdefault("WANDB_SILENT", "true")  # the run's own summary says what W&B would print
        # Its telemetry would wait for the server at the end, and log its own failures among the run's lines.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        for name in APPENDING:
            os.environ.pop(name, None)
        ensure_home()
        if not os.access(Path.home(), os.W_OK):  # where it would keep tables before they are uploaded
            os.environ.setdefault("WANDB_DATA_DIR", str(cache_folder(None)))
            os.environ.setdefault("WANDB_CACHE_DIR", str(cache_folder(None)))
        import wandb

        config = self.config

        def start(mode: str) -> Any:
            return wandb.init(  # what is None is left to W&B's own variables
                mode=mode,  # type: ignore[arg-type]  # one of those that it knows
                project=tracking_project(config),
                entity=config.entity,
                group=config.group,
                name=config.name,
                tags=config.tags or None,
                job_type=os.environ.get("WANDB_JOB_TYPE") or self.job_type,
                config=self.run_config,
                id=self.run_id,
                dir=self.run_dir,
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    init_timeout=BEGIN,
                    finish_timeout=DELIVER,
                    finish_timeout_raises=True,
                ),
            )

        if Tracker.failed_to_start and self.mode == "online" and not _answers():
            log.warning("W&B still does not answer: this run is recorded offline")
            return start("offline")
        folders = self.run_dir / "wandb"
        there = set(folders.glob("run-*"))
        try:
            with _announced_wait("start", BEGIN):
                run = start(self.mode)
        except (wandb.errors.Error, OSError) as error:
            if self.mode == "offline" or isinstance(error, wandb.errors.UsageError):
                raise UserError(
                    f"tracking={self.mode}: Weights & Biases did not start ({first_line(error)}); "
                    f"log in with `wandb login`, or use tracking=offline and `wandb sync` later"
                ) from error
            failed = set(folders.glob("run-*")) - there
            reason = _short(str(error))
            if reason == "<no message>":  # as where the server refuses the key
                reason = ", ".join(map(_given_up, failed))
            log.warning("W&B cannot start this run now (%s): it is recorded offline", reason)
            wandb.teardown()  # else its process keeps the run's id
            for folder in failed:
                remove(folder)
            Tracker.failed_to_start = True
            run = start("offline")
        return run

    def _to_wandb(self, act: Callable[[Any], None]) -> None:
        """Do something with W&B's run, if there is one. Where its process has been killed or has broken, the
        run continues without: an error of any kind is no reason to end it."""
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

    def _append(self, record: Record, line: dict[str, Any]) -> None:
        """Append a line; if the disk is full, keep it in memory and try again with the next one."""
        is_first = not record.pending
        record.pending += as_json_lines([line])
        try:
            self.flush()
        except UserError as error:
            if is_first:
                log.warning("%s; its lines stay in memory until it can be written", error)

    def flush(self) -> None:
        """Write the lines still in memory.

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
            if not run.offline and not _answers():
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
        """Log the samples and the summary to W&B and finish its run; warn of what was not uploaded."""
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
        lost = None
        for log_to in self._last:
            log_to(run)
        run.summary.update(summary)
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


def sync_command(folder: Path, *patterns: str) -> str:
    """The command that uploads a run W&B does not have, or has only in part. Without an option, the client
    skips runs that were online.

    Args:
        folder: of one W&B run; with `patterns` for the shell, such as `*/wandb/*run-*`, one that holds many.
    """
    if patterns:
        paths = [f"{shlex.quote(str(folder))}/{pattern}" for pattern in patterns]
    else:
        paths = [shlex.quote(str(folder))]
    options = [] if folder.name.startswith("offline-") and not patterns else ["--include-online"]
    return " ".join(["wandb", "sync", *options, *paths])


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
