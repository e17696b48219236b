"""How the GPUs and cores of this machine are divided among jobs that run side by side."""

import os

from omegaconf import DictConfig, read_write


def divide_machine(config: DictConfig, at_once: int) -> list[str]:
    """Let joblib run a job per GPU, or per core without one, if `hydra.launcher.n_jobs` does not say how
    many, but no more than there are. Jobs of several processes each run one by one. Joblib itself divides the
    cores evenly among the jobs that run at once.

    Args:
        config: the sweep's, with joblib as its launcher; `n_jobs` is set.
        at_once: jobs that the sweeper has ready at once, at most.

    Returns:
        The GPUs to hand out, as CUDA_VISIBLE_DEVICES takes them.
    """
    from joblib import cpu_count

    runtime = config.get("runtime", {})  # scripts that do not compute have none
    alone = runtime.get("processes", 1) == 1
    gpus = visible_gpus() if alone and runtime.get("device") != "cpu" else []
    fitting = (len(gpus) or cpu_count()) if alone else 1
    launcher = config.hydra.launcher
    with read_write(config.hydra):
        launcher.n_jobs = min(at_once, launcher.n_jobs if launcher.n_jobs > 0 else fitting)
    return gpus


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, NVIDIA's by the names that CUDA_VISIBLE_DEVICES takes."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name and name != "-1"]
    import torch

    if torch.backends.mps.is_available():
        return ["Apple's"]
    return [str(number) for number in range(torch.cuda.device_count())]
