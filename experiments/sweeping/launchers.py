"""Hydra's launchers: what this code needs to know about them, and the defaults of jobs on Slurm."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from hydra_versions import store
from omegaconf import DictConfig, open_dict, read_write

GIVE_CORES = '[ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK'


@dataclass(frozen=True)
class Traits:
    side_by_side: bool = False  # jobs run in worker processes of this machine, `n_jobs` of them at once
    submits: bool = False  # jobs run in processes of submitit, each with its own outcome
    death: str | None = None  # class of the error for a job whose process was killed


BASIC = Traits()  # jobs run one by one in the sweep's own process
SUBMITIT = Traits(submits=True, death="UncompletedJobError")
LAUNCHERS = {
    "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher": Traits(
        side_by_side=True, death="TerminatedWorkerError"
    ),
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher": SUBMITIT,
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher": SUBMITIT,
}


def traits_of(launcher: DictConfig) -> Traits:
    """The traits of the launcher that `hydra.launcher` configures; an unknown one counts as basic."""
    return LAUNCHERS.get(launcher._target_, BASIC)


def made_launcher(
    context: HydraContext, task: TaskFunction, config: DictConfig, n_jobs: int, tasks: int
) -> Launcher:
    """Hydra's launcher. joblib is told how many jobs run at once, but not how many share a GPU, which it does
    not know; submitit is told how many tasks a job has on each node. The config of the sweep stays unchanged,
    as Hydra 1.4 demands."""
    told = config.copy()
    launcher, traits = told.hydra.launcher, traits_of(told.hydra.launcher)
    with read_write(launcher), open_dict(launcher):
        if traits.side_by_side:
            launcher.n_jobs = n_jobs
            launcher.pop("jobs_per_device", None)
        if traits.submits:
            launcher.tasks_per_node = tasks
    made = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=told)
    made.setup(hydra_context=context, task_function=task, config=config)
    return made


@contextmanager
def deaths_as_results(traits: Traits) -> Iterator[None]:
    """Let submitit return errors of jobs that died as their results, where the plugin would stop waiting for
    the others. A job's result is that of its first task, which reports it if another task's process is
    lost."""
    if not traits.submits:
        yield
        return
    import submitit

    # Without Slurm's accounting, it warns every few seconds that it cannot query the state of a job.
    logging.getLogger("submitit").setLevel(logging.ERROR)
    # By default it waits 15 s for the result of a job that has ended, as another machine's file may come
    # late.
    submitit.LocalJob._results_timeout_s = 0
    results = submitit.Job.results

    def results_or_error(job: Any) -> list[Any]:
        try:
            return results(job.task(0))
        except Exception as error:
            return [error]

    setattr(submitit.Job, "results", results_or_error)  # noqa: B010
    try:
        yield
    finally:
        setattr(submitit.Job, "results", results)  # noqa: B010


def configure_launchers() -> None:
    """Replace the defaults of the plugins that are installed."""
    Plugins.instance()  # stores the plugins' defaults
    with suppress(ImportError):
        _configure_joblib()
    with suppress(ImportError):
        _configure_slurm()


def _configure_joblib() -> None:
    from hydra_plugins.hydra_joblib_launcher.config import JobLibLauncherConf

    @dataclass
    class JobsSharingGpus(JobLibLauncherConf):
        jobs_per_device: int = 1  # how many jobs share a GPU, see machine.py

    store("joblib", JobsSharingGpus, "hydra/launcher")


def _configure_slurm() -> None:
    """By default, request one GPU for a job, and requeue it when it is preempted or out of time, as a run
    continues from its last checkpoint. The plugin's own defaults end a job after an hour."""
    from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf

    @dataclass
    class RequeuedSlurmJob(SlurmQueueConf):
        timeout_min: int = 240
        cpus_per_task: int | None = 4
        gpus_per_node: int | None = 1
        array_parallelism: int = 16  # jobs at once
        max_num_timeout: int = 10  # times that a job is requeued
        # Run before srun, which since Slurm 22.05 no longer inherits the cores from sbatch.
        setup: list[str] | None = field(default_factory=lambda: [GIVE_CORES])

    store("submitit_slurm", RequeuedSlurmJob, "hydra/launcher")
