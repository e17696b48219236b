"""Jobs of submitit that are a run on several GPUs, perhaps of several machines: each process of the run is a
task, whose environment is set as torchrun would set it."""

import os

from hydra.conf import HydraConf
from omegaconf import DictConfig
from sweeping.launchers import traits_of

from llm.errors import UserError
from llm.launched import PROCESSES
from llm.overrides import split_override

PORTS = range(10_000, 30_000)  # below Linux's ephemeral ports


def divide_job(config: DictConfig, jobs: list[list[str]]) -> tuple[int, int]:
    """How many nodes a job has, and how many tasks on each: one per GPU, or as many as were asked for.

    Args:
        config: the sweep's, with one of submitit's launchers.
        jobs: the overrides of each job.

    Raises:
        UserError: what was asked for does not go together.
    """
    launcher, script = config.hydra.launcher, config.hydra.job.config_name
    nodes, gpus, tasks = launcher.nodes, launcher.gpus_per_node, launcher.tasks_per_node
    for key in ("nodes", "tasks_per_node"):
        if launcher[key] < 1:
            raise UserError(f"hydra.launcher.{key}={launcher[key]}: must be at least 1")
        if launcher[key] > 1 and script != "pretrain":
            raise UserError(
                f"hydra.launcher.{key}={launcher[key]}: only pretrain.py takes several processes; remove it"
            )
    if nodes > 1 and launcher._target_.endswith("LocalLauncher"):
        raise UserError(
            f"hydra.launcher.nodes={nodes}: this launcher has one machine; use hydra/launcher=submitit_slurm"
        )
    if tasks > 1 and gpus not in (None, 0, tasks):
        raise UserError(
            f"hydra.launcher.tasks_per_node={tasks}: a task is a process of the run and needs a GPU, and "
            f"hydra.launcher.gpus_per_node={gpus}: remove it, or set gpus_per_node=null to train on CPUs"
        )
    if script == "pretrain" and tasks == 1:
        tasks = gpus or 1
    if nodes * tasks > 1:
        _check(config, jobs, nodes, tasks)
    return nodes, tasks


def _check(config: DictConfig, jobs: list[list[str]], nodes: int, tasks: int) -> None:
    if config.hydra.launcher.get("gpus_per_task"):
        raise UserError(
            "hydra.launcher.gpus_per_task: a process finds its GPU among all of the node's; set gpus_per_node"
        )
    typed = [split_override(each) for job in jobs for each in job]
    asked = {value for key, value in typed if key == PROCESSES}
    if config.runtime.processes != 1:
        asked.add(str(config.runtime.processes))
    for value in asked - {str(nodes * tasks)}:
        raise UserError(
            f"{PROCESSES}={value}: {nodes} × {tasks} tasks of a job (hydra.launcher.nodes and gpus_per_node) "
            f"are {nodes * tasks} processes; remove it"
        )


def task_of_run(hydra: HydraConf) -> int:
    """The rank of this process. If it is one of several tasks of a job, the environment variables of torchrun
    are set.

    Raises:
        UserError: this is the first task, and the others did not arrive.
    """
    if not traits_of(hydra.launcher).submits:
        return 0
    import submitit

    job = submitit.JobEnvironment()
    if job.num_tasks == 1:
        return 0
    number = int(job.raw_job_id)  # unique also in a job array, so that no two jobs share a port
    os.environ.update(
        RANK=str(job.global_rank),
        WORLD_SIZE=str(job.num_tasks),
        LOCAL_RANK=str(job.local_rank),
        LOCAL_WORLD_SIZE=str(job.num_tasks // job.num_nodes),
        MASTER_ADDR=job.hostnames[0],
        MASTER_PORT=str(PORTS[number % len(PORTS)]),
    )
    if job.global_rank == 0:
        from llm.processes import meet  # imports torch

        meet()  # before anything else, so that the others notice if this process ends before the run begins
    return job.global_rank
