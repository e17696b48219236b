"""Run `experiments/NAME.py`, in this process or in one of its own, and get what it printed and its status.

To start Python and import torch takes longer than most of what tests ask of a script. So a script runs in the
tests' own process wherever no signal, crash or child process is at stake: `run_here` gives it what a new
process would have, and takes back all it leaves behind, so that tests may run in any order. A script that is
to be killed is a `ScriptProcess`, forked from a process that has imported torch already.
"""

import atexit
import copy
import io
import logging
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, chdir, contextmanager, redirect_stderr, redirect_stdout
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import hydra
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

import llm.training.plots
from llm import wandb_client
from llm.checkpoints import file_writer
from llm.config import PretrainConfig

ROOT = Path(__file__).parents[1]
OURS = (str(ROOT / "llm"), str(ROOT / "experiments"))  # and not a virtual environment inside the checkout
UNCHANGED = (str(ROOT / "conf"), str(Path(hydra.__file__).parent))  # by any test
# With this, Python processes skip what takes time and no test looks at.
BRIEF = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "children")])}
HANGS = 1800  # seconds after which a process is taken to hang; no test waits for this on any working machine

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["llm.commands.pretrain", "hydra.main"])

# What can ask for a sweep without -m. Hydra composes a config to find whether it does, and then once more.
MAY_SWEEP = re.compile(r"experiment|hydra\.mode|--config")

Result = subprocess.CompletedProcess[str]


def make_brief() -> None:
    """Skip, in this process, what takes time and no test looks at."""
    from llm import device  # imports torch, see `_torch`

    # What a device can do need not be precise.
    device.measure_matmul_flops.__defaults__ = (0.005,)  # seconds
    device.LARGE_PRODUCT["cpu"] = 256
    os.fsync = lambda fd: None  # no test cuts the power


def compose_quickly() -> None:
    """Let Hydra, in this process, read each file of its own and of conf/ once."""
    read = OmegaConf.load
    kept: dict[str, Any] = {}

    def load(file: Any) -> Any:
        if not (name := str(getattr(file, "name", file))).startswith(UNCHANGED):
            return read(file)
        if name not in kept:
            kept[name] = read(file)
        return copy.deepcopy(kept[name])

    setattr(OmegaConf, "load", load)  # noqa: B010


def fork_processes() -> None:
    """Let runs of this process fork the processes that share them."""
    import llm.processes  # imports torch, see `_torch`

    forked = SimpleNamespace(Process=ForkedProcess)
    llm.processes.mp = SimpleNamespace(get_context=lambda method: forked)  # type: ignore[assignment]


def skip_picture() -> None:
    """Skip, in this process, the picture of a run, which takes longer than a run of few updates."""
    llm.training.plots.plot_losses = lambda run_dir: run_dir


def script_path(name: str) -> str:
    return str(ROOT / "experiments" / f"{name}.py")


def run_python(folder: Path, environment: dict[str, str], *arguments: str, stdin: str = "") -> Result:
    """Run Python in a process of its own, in a folder, to its end."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=HANGS,
    )


def run_here(
    folder: Path, environment: dict[str, str], name: str, *arguments: str, stdin: str = ""
) -> Result:
    """Run a script in this process, in a folder, to its end."""
    path, stdout, stderr = script_path(name), io.StringIO(), io.StringIO()
    command = [path, *arguments]
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, environment, clear=True))
        stack.enter_context(patch.object(sys, "argv", command))
        stack.enter_context(patch.object(sys, "path", [str(ROOT / "experiments"), *sys.path]))
        stack.enter_context(patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()))))
        stack.enter_context(redirect_stdout(stdout))
        stack.enter_context(redirect_stderr(stderr))
        stack.enter_context(chdir(folder))
        if not any(map(MAY_SWEEP.search, arguments)):
            stack.enter_context(patch.object(Hydra, "get_mode", lambda *_, **__: None))
        stack.enter_context(patch("llm.checkpoints.staging.Staging.write", _write_here))
        stack.enter_context(patch("llm.training.lifecycle.forget_peak_memory", lambda: None))
        stack.enter_context(as_in_a_process())
        status = _run(path)
    return Result(command, status, stdout.getvalue(), stderr.getvalue())


def _write_here(staging: Any, files: Mapping[Path, tuple[int, int]]) -> dict[Path, str]:
    """Write a checkpoint's tensors without the process that does it while training continues: to start that
    takes longer than to write them."""
    answers = file_writer.answer(staging._descriptor, {str(path): place for path, place in files.items()})
    if "error" in answers:
        raise OSError(answers["error"])
    return {Path(path): checksum for path, checksum in answers.items()}


@contextmanager
def as_in_a_process() -> Iterator[None]:
    """Let a script find what a new process has, and leave nothing behind."""
    with ExitStack() as stack:
        for kept in (_warnings, _logging, _signals, _torch, _caches):
            stack.enter_context(kept())
        yield


class ForkedProcess(ForkServerProcess):
    """One of the processes that share a run: spawned but for its start, with torch imported already."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.environment = dict(os.environ)

    def run(self) -> None:
        """In the new process."""
        os.environ.clear()
        os.environ.update(self.environment)
        make_brief()
        super().run()


class ScriptProcess(ForkServerProcess):
    """`experiments/NAME.py` in a process of its own, at the head of a process group of its own.

    It begins with torch imported, and is a process like any other from there on.
    """

    def __init__(self, folder: Path, environment: dict[str, str], name: str, *arguments: str) -> None:
        super().__init__()
        self.folder, self.environment, self.command = folder, environment, [script_path(name), *arguments]
        pipes = [FORKED.Pipe(duplex=False) for _ in range(2)]
        self.streams = [writer for _, writer in pipes]
        self.start()
        for writer in self.streams:
            writer.close()
        readers = ThreadPoolExecutor(2)  # all the time, so that no pipe is ever full
        self._printed = [readers.submit(_read_to_the_end, reader) for reader, _ in pipes]
        readers.shutdown(wait=False)

    def run(self) -> None:
        """In the new process."""
        os.setsid()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under `nohup`
        os.chdir(self.folder)
        os.environ.clear()
        os.environ.update(self.environment)
        os.environ.update(BRIEF)
        for number, stream in enumerate(self.streams, 1):
            os.dup2(stream.fileno(), number)
            stream.close()
        sys.argv[:] = self.command
        sys.path.insert(0, str(Path(self.command[0]).parent))
        make_brief()
        fork_processes()
        skip_picture()
        status = _run(self.command[0])
        # End as Python does. `multiprocessing` would first wait for joblib's workers, which wait for work.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def send_signal(self, number: int, group: bool = False) -> None:
        """To the process, or to all of its group, as a terminal does."""
        assert self.pid
        (os.killpg if group else os.kill)(self.pid, number)

    def output(self) -> tuple[str, str]:
        """Wait for the end; what was printed on standard output and on standard error."""
        self.join(HANGS)
        stdout, stderr = (printed.result(HANGS) for printed in self._printed)
        return stdout, stderr


def run_until_killed(config: PretrainConfig, run_dir: Path, moment: str) -> None:
    """Train in a process of its own, which is killed when it comes to a function, as
    `llm.training.lifecycle.conclude`."""
    process = FORKED.Process(target=_train_until, args=(config, run_dir, moment))
    process.start()
    process.join(HANGS)
    assert process.exitcode == -signal.SIGKILL


def _train_until(config: PretrainConfig, run_dir: Path, moment: str) -> None:
    from llm.commands.pretrain import pretrain

    make_brief()
    fork_processes()
    with patch(moment, lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)):
        pretrain(config, run_dir)


def _read_to_the_end(reader: Connection) -> str:
    with reader, os.fdopen(os.dup(reader.fileno()), encoding="utf-8") as file:
        return file.read()


def _run(path: str) -> int:
    """Run a script as `__main__`, and return the status that its process would end with."""
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


@contextmanager
def _warnings() -> Iterator[None]:
    """Python's own filters, and warnings on standard error, rather than pytest's."""

    def show(message: Warning | str, category: type[Warning], file: str, line: int, *_: object) -> None:
        print(warnings.formatwarning(message, category, file, line), end="", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.resetwarnings()
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        warnings.showwarning = show  # type: ignore[assignment]  # restored by catch_warnings
        yield


@contextmanager
def _logging() -> Iterator[None]:
    """No handlers at the root; afterwards those that were there, without Hydra's."""

    def loggers() -> list[logging.Logger]:
        known = logging.root.manager.loggerDict.values()
        return [logging.root, *(each for each in known if isinstance(each, logging.Logger))]

    before = {each: (each.level, each.handlers[:], each.propagate, each.disabled) for each in loggers()}
    raises = logging.raiseExceptions
    logging.root.handlers.clear()
    try:
        yield
    finally:
        logging.raiseExceptions = raises
        for each in loggers():
            level, handlers, each.propagate, each.disabled = before.get(each, (0, [], True, False))
            for handler in set(each.handlers) - set(handlers):
                handler.close()
            each.handlers[:] = handlers
            if each.level != level:  # to set it takes long: all loggers then forget what they know of levels
                each.setLevel(level)


@contextmanager
def _signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _torch() -> Iterator[None]:
    import torch  # not above: conftest.py, which imports this module, limits torch's threads first

    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _caches() -> Iterator[None]:
    """Forget what Hydra, W&B and our own modules keep for the life of a process."""
    try:
        yield
    finally:
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None
        wandb_client.failed_to_start = False
        if wandb := sys.modules.get("wandb"):
            wandb.teardown()
        for module in [*sys.modules.values()]:
            if (getattr(module, "__file__", None) or "").startswith(OURS):
                for value in [*vars(module).values()]:
                    if hasattr(value, "cache_clear"):
                        value.cache_clear()
