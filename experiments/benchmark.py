"""Measure training or generation, or check a device: `python experiments/benchmark.py --help`."""

from launch import Invocation, launch

from llm.config import BenchmarkConfig
from llm.outcome import Outcome


def run(config: BenchmarkConfig, invocation: Invocation) -> Outcome:
    # These import torch, which --help need not wait for.
    if config.measure == "generation":
        from llm.commands.benchmark_generation import benchmark_generation

        return benchmark_generation(config, invocation.run_dir)
    elif config.measure == "device":
        from llm.commands.benchmark_device import benchmark_device

        return benchmark_device(config, invocation.run_dir)
    elif config.measure == "coordinates":
        from llm.commands.benchmark_coordinates import benchmark_coordinates

        return benchmark_coordinates(config, invocation.run_dir)
    else:
        from llm.commands.benchmark_training import benchmark_training

        return benchmark_training(config, invocation.run_dir)


if __name__ == "__main__":
    launch("benchmark", BenchmarkConfig, run)
