"""Pretrain a GPT on raw text: `python experiments/pretrain.py --help`."""

from pathlib import Path

from launch import Interrupted, launch

from llm.config import PretrainConfig


def run(config: PretrainConfig, run_dir: Path) -> float:
    """Pretrain; the validation loss over the whole split is what sweeps compare."""
    from llm.training import pretrain  # imports torch, which --help need not wait for

    summary = pretrain(config, run_dir)
    if summary.val_loss is None:
        raise Interrupted
    return summary.val_loss


if __name__ == "__main__":
    launch("pretrain", PretrainConfig, run)
