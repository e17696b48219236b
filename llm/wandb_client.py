"""The client of Weights & Biases: choosing its mode, starting and finishing its run, and what it failed to
upload."""

import json
import logging
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Timer
from typing import Any

from llm.config import TrackingConfig
from llm.errors import UserError, first_line
from llm.files import cache_folder, ensure_home, remove

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
    """`offline`, `online` or `disabled`: as configured, else as in `WANDB_MODE`, else offline.

    Raises:
        UserError: `WANDB_MODE` is unknown to W&B, or shares a run between machines.
    """
    wanted = config.mode or os.environ.get("WANDB_MODE") or "offline"
    if wanted not in MODES:
        raise UserError(f"WANDB_MODE={wanted}: must be one of {', '.join(MODES)}")
    return MODES[wanted]


def tracking_project(config: TrackingConfig) -> str:
    """W&B's project: as configured, else as `WANDB_PROJECT` says, else ours."""
    return config.project or os.environ.get("WANDB_PROJECT") or PROJECT


# Whether W&B failed to start an earlier run of this process, as of a sweep's job.
failed_to_start = False


def start_run(
    run_dir: Path,
    mode: str,
    config: TrackingConfig,
    job_type: str,
    run_config: dict[str, Any],
    run_id: str | None = None,
) -> Any:
    """Start W&B's run; offline, if the server does not answer.

    Args:
        mode: see `tracking_mode`.
        run_id: if W&B has a run with this id already, it is written anew.

    Raises:
        UserError: W&B is to be online, and no API key is set up, or a malformed one.
    """
    global failed_to_start
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

    def start(mode: str) -> Any:
        return wandb.init(  # what is None is left to W&B's own variables
            mode=mode,  # type: ignore[arg-type]  # one of those that it knows
            project=tracking_project(config),
            entity=config.entity,
            group=config.group,
            name=config.name,
            tags=config.tags or None,
            job_type=os.environ.get("WANDB_JOB_TYPE") or job_type,
            config=run_config,
            id=run_id,
            dir=run_dir,
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=BEGIN,
                finish_timeout=DELIVER,
                finish_timeout_raises=True,
            ),
        )

    if failed_to_start and mode == "online" and not answers():
        log.warning("W&B still does not answer: this run is recorded offline")
        return start("offline")
    folders = run_dir / "wandb"
    there = set(folders.glob("run-*"))
    try:
        with _announced_wait("start", BEGIN):
            return start(mode)
    except (wandb.errors.Error, OSError) as error:
        if mode == "offline" or isinstance(error, wandb.errors.UsageError):
            raise UserError(
                f"tracking={mode}: Weights & Biases did not start ({first_line(error)}); "
                f"log in with `wandb login`, or use tracking=offline and `wandb sync` later"
            ) from error
        failed = set(folders.glob("run-*")) - there
        reason = _short(str(error))
        if reason == "<no message>":  # as where the server refuses the key
            reason = ", ".join(map(given_up, failed))
        log.warning("W&B cannot start this run now (%s): it is recorded offline", reason)
        wandb.teardown()  # else its process keeps the run's id
        for folder in failed:
            remove(folder)
        failed_to_start = True
        return start("offline")


def finish_run(run: Any, failed: bool) -> str | None:
    """Finish W&B's run; returns what the server did not receive in time."""
    try:
        with _announced_wait("receive the rest of the run", DELIVER):
            run.finish(exit_code=int(failed))
    except TimeoutError:
        return f"the rest of the run within {DELIVER} seconds"
    return None


def sync_command(folder: Path, *patterns: str) -> str:
    """The command that uploads a run that W&B does not have completely. Without its option, the client would
    skip runs that were online.

    Args:
        folder: the folder of a W&B run; or, with `patterns` for the shell such as `*/wandb/*run-*`, of many.
    """
    if patterns:
        paths = [f"{shlex.quote(str(folder))}/{pattern}" for pattern in patterns]
    else:
        paths = [shlex.quote(str(folder))]
    options = [] if folder.name.startswith("offline-") and not patterns else ["--include-online"]
    return " ".join(["wandb", "sync", *options, *paths])


@contextmanager
def _announced_wait(what: str, seconds: int) -> Iterator[None]:
    """Log what the run is waiting for, if it takes long."""
    timer = Timer(3, log.info, [f"waiting up to {seconds} seconds for W&B to {what}"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def answers() -> bool:
    """Whether the W&B server answers and accepts the key."""
    import wandb

    try:
        wandb.Api(timeout=ANSWER)
    except (wandb.errors.Error, OSError):
        return False
    return True


def given_up(folder: Path) -> str:
    """What the client gave up uploading of the run in a W&B folder, and why, according to its own log."""
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
