"""What an update takes of a CPU's memory, as planned and as measured.

    python tests/memory.py OVERRIDES… WINDOWS…

For each number of windows, two processes make three updates each: one that returns freed memory to the system
at once, so that what it takes is what it holds; and one that keeps it, as runs do because that is faster.
With `runtime.processes`, each is the first of so many, and the windows are each one's own.
"""

import ctypes
import gc
import multiprocessing as mp
import sys
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from llm.config import ModelConfig, PretrainConfig
from llm.config_values import own_defaults
from llm.device import Device
from llm.model.gpt import GPTModel
from llm.processes import processes
from llm.runtime import Runtime
from llm.training.memory import memory_of
from llm.training.optimizers import build_optimizers
from llm.training.sharding import clip_gradients, shard

ROOT = Path(__file__).parents[1]
M_MMAP_THRESHOLD = -3  # of malloc.h


def grown(overrides: list[str], rows: int, keeps: bool, result: mp.Queue) -> None:
    config = composed(overrides).runtime
    with processes(replace(config, device="cpu"), growth, overrides, rows, keeps) as runtime:
        result.put((runtime.precision, growth(overrides, rows, keeps, runtime)))


def growth(overrides: list[str], rows: int, keeps: bool, runtime: Runtime) -> int:
    config = composed(overrides)
    shards = config.runtime.sharding == "fsdp"
    if not keeps:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)

    def update(size: ModelConfig, rows: int, times: int) -> None:
        model = GPTModel(size).train()
        trained: nn.Module = model
        if shards:
            shard(model, runtime)
        elif runtime.processes > 1:
            trained = DistributedDataParallel(model)
        optimizers = build_optimizers(model, config.optimizer, runtime)
        optimizers.set_lr(1e-3)
        for _ in range(times):
            tokens = torch.randint(size.vocab_size, (rows, size.context_length + 1))
            with runtime.autocast():
                trained(tokens[:, :-1], tokens[:, 1:]).backward()
            if shards:
                clip_gradients(model, 1.0, runtime)
            else:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers.step()
            optimizers.zero_grad()

    # What libraries take when they are first used is the process's, not the update's.
    tiny = replace(config.model, vocab_size=64, n_layers=1)
    update(tiny if keeps else config.model, 1 if keeps else rows, 1)
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    update(config.model, rows, 3)
    return status("VmHWM") - before


def status(name: str) -> int:
    """A line of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def composed(overrides: list[str]) -> PretrainConfig:
    ConfigStore.instance().store("pretrain_schema", own_defaults(PretrainConfig))
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("pretrain", overrides)
    return cast(PretrainConfig, OmegaConf.to_object(config))


if __name__ == "__main__":
    overrides = [each for each in sys.argv[1:] if "=" in each]
    print(f"{'windows':>7}  {'planned':>8}  {'held':>15}  {'with what is kept':>17}")
    for rows in (int(each) for each in sys.argv[1:] if each.isdecimal()):
        figures = []
        for keeps in (False, True):
            queue = mp.get_context("spawn").Queue()
            process = mp.get_context("spawn").Process(target=grown, args=(overrides, rows, keeps, queue))
            process.start()
            precision, measured = queue.get()
            process.join()
            figures.append(measured)
        planned = memory_of(composed(overrides), rows, precision, Device("cpu", 0)).update
        held, kept = figures
        print(
            f"{rows:7}  {planned / 1e6:6.0f}MB  {held / 1e6:6.0f}MB ({held / planned:.2f})  "
            f"{kept / 1e6:8.0f}MB ({kept / planned:.2f})",
            flush=True,
        )
