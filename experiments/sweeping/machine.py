"""How the GPUs and cores of this machine are divided among jobs that run side by side."""

import gc
import os
import sys

from omegaconf import DictConfig

from llm.errors import UserError


def divide_machine(config: DictConfig, at_once: int) -> tuple[int, list[str]]:
    """Decide how many jobs joblib runs at once: as `hydra.launcher.n_jobs` says, or one per GPU, or one per
    core if there is no GPU; but no more than there are. `jobs_per_device` jobs share each GPU. Jobs with
    several processes run one at a time. joblib itself divides the cores evenly among the jobs that run at
    once.

    Args:
        config: the sweep's, with joblib as its launcher.
        at_once: the most jobs that the sweeper has ready at once.

    Returns:
        How many jobs run at once, and the GPUs to hand out, as values of CUDA_VISIBLE_DEVICES, each as often
        as jobs share it.

    Raises:
        UserError: jobs are to share GPUs and cannot.
    """
    from joblib import cpu_count

    runtime = config.get("runtime", {})  # scripts that do not compute have none
    alone = runtime.get("processes", 1) == 1
    gpus = visible_gpus() if alone and runtime.get("device") != "cpu" else []
    n_jobs, sharing = config.hydra.launcher.n_jobs, config.hydra.launcher.get("jobs_per_device", 1)
    if sharing != 1:
        _check_sharing(sharing, n_jobs, alone, gpus)
    gpus *= sharing
    fitting = (len(gpus) or cpu_count()) if alone else 1
    return min(at_once, n_jobs if n_jobs > 0 else fitting), gpus


def _check_sharing(jobs_per_device: int, n_jobs: int, alone: bool, gpus: list[str]) -> None:
    given = f"hydra.launcher.jobs_per_device={jobs_per_device}"
    if jobs_per_device < 1:
        raise UserError(f"{given}: must be at least 1")
    if not alone:
        raise UserError(f"{given}: jobs of several processes have all GPUs: set runtime.processes=1")
    if not gpus:
        raise UserError(f"{given}: jobs share GPUs, and there is none to use; set hydra.launcher.n_jobs")
    if n_jobs > 0:
        raise UserError(f"{given}: hydra.launcher.n_jobs={n_jobs} says too how many jobs run: remove one")


def visible_gpus() -> list[str]:
    """The GPUs that this process may use; NVIDIA's as values of CUDA_VISIBLE_DEVICES."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name and name != "-1"]
    import torch

    if torch.backends.mps.is_available():
        return ["Apple's"]
    return [str(number) for number in range(torch.cuda.device_count())]


def give_back_memory() -> None:
    """Free the memory of a job that has ended. Its process would keep it: the next job's peak would include
    it, and other jobs that share the GPU could not use it."""
    gc.collect()  # a run holds reference cycles
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
