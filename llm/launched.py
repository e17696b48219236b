"""Whether this process was launched (by torchrun or Slurm) as one of several of a run, and which of them it
is."""

import os

# Set by torchrun for each process. experiments/sweeping/tasks.py sets the same for Slurm's tasks.
VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}

PROCESSES = "runtime.processes"  # the key that says how many there are


def launched_rank() -> int | None:
    """This process's rank; None if it was not launched as one of several."""
    return int(os.environ["RANK"]) if os.environ.keys() >= VARIABLES else None


def launched_processes() -> int | None:
    """How many processes were launched, on all machines; None if this one was not launched as one of
    several."""
    return int(os.environ["WORLD_SIZE"]) if os.environ.keys() >= VARIABLES else None
