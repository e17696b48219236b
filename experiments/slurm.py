"""What a job of a sweep asks of Slurm: `hydra/launcher=submitit_slurm`."""

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins


def configure_slurm() -> None:
    """Let a job ask for one GPU, and to be queued again when it is preempted or out of time, for a run goes
    on from its last checkpoint. The plugin's own defaults give up after an hour."""
    Plugins.instance()  # stores the plugin's defaults, which these replace
    try:
        from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf
    except ImportError:
        return

    @dataclass
    class RequeuedSlurmJob(SlurmQueueConf):
        timeout_min: int = 240
        cpus_per_task: int | None = 4
        gpus_per_node: int | None = 1
        array_parallelism: int = 16  # jobs at once
        max_num_timeout: int = 10  # times that a job is queued again

    ConfigStore.instance().store(group="hydra/launcher", name="submitit_slurm", node=RequeuedSlurmJob)
