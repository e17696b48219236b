"""Measure the speed of training or generation: `python experiments/benchmark.py --help`."""

from pathlib import Path

from launch import launch

from llm.config import BenchmarkConfig


def run(config: BenchmarkConfig, run_dir: Path) -> None:
    # These import torch, which --help need not wait for.
    if config.measure == "generation":
        from llm.commands.benchmark_generation import benchmark_generation

        benchmark_generation(config, run_dir)
    else:
        from llm.commands.benchmark_training import benchmark_training

        benchmark_training(config, run_dir)


if __name__ == "__main__":
    launch("benchmark", BenchmarkConfig, run)
