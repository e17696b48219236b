"""What this code needs to know of Hydra's launchers, and what a job of a sweep asks of Slurm."""

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
    submits: bool = False  # jobs run in processes of submitit, each with an outcome of its own
    death: str | None = None  # class of the error that means that a job's process was killed


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
    """What is known of the launcher that `hydra.launcher` configures; an unknown one counts as basic."""
    return LAUNCHERS.get(launcher._target_, BASIC)


def made_launcher(
    context: HydraContext, task: TaskFunction, config: DictConfig, n_jobs: int, tasks: int
) -> Launcher:
    """Hydra's launcher; joblib is told how many jobs run at once, and not how many share a GPU, and submitit
    how many tasks a job has on each node. The config of the sweep stays as it was given, which Hydra 1.4
    wants."""
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
    """Let submitit's jobs that died be results: the plugin would stop waiting for the others. A job's result
    is that of its first task, to which those of the others have lost their processes, if they have."""
    if not traits.submits:
        yield
        return
    import submitit

    # Of Slurm without accounting it says every few seconds that it cannot be asked for the state of a job.
    logging.getLogger("submitit").setLevel(logging.ERROR)
    # For 15 s it looks out for the result of a job that has ended, as another machine's file may come late.
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
    """Replace what the plugins have by default; a plugin that is not installed has nothing."""
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
    """Let a job ask for one GPU, and requeue it when it is preempted or out of time, for a run continues from
    its last checkpoint. The plugin's own defaults give up after an hour."""
    from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf

    @dataclass
    class RequeuedSlurmJob(SlurmQueueConf):
        timeout_min: int = 240
        cpus_per_task: int | None = 4
        gpus_per_node: int | None = 1
        array_parallelism: int = 16  # jobs at once
        max_num_timeout: int = 10  # times that a job is requeued
        # What is run before srun, which from Slurm 22.05 on no longer takes this over from sbatch by itself.
        setup: list[str] | None = field(default_factory=lambda: [GIVE_CORES])

    store("submitit_slurm", RequeuedSlurmJob, "hydra/launcher")
