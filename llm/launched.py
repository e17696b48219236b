"""Whether this process was launched beside others of the same run, and which of them it is."""

import os

# What torchrun tells each process. Tasks of Slurm are told the same, see experiments/sweeping/tasks.py.
VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}

PROCESSES = "runtime.processes"  # the key that says how many there are


def launched_rank() -> int | None:
    """This process's number among those launched; None: it was begun by itself."""
    return int(os.environ["RANK"]) if os.environ.keys() >= VARIABLES else None


def launched_processes() -> int | None:
    """How many processes were launched, on all machines together; None: this one was begun by itself."""
    return int(os.environ["WORLD_SIZE"]) if os.environ.keys() >= VARIABLES else None
