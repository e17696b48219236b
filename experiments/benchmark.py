"""Measure training speed, variants side by side: `python experiments/benchmark.py --help`."""

from pathlib import Path

from launch import launch

from llm.config import BenchmarkConfig


def run(config: BenchmarkConfig, run_dir: Path) -> None:
    from llm.benchmark import benchmark_training  # imports torch, which --help need not wait for

    benchmark_training(config, run_dir)


if __name__ == "__main__":
    launch("benchmark", BenchmarkConfig, run)
