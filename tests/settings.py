"""The config of a run that takes a second, and changed copies of it."""

import dataclasses
from pathlib import Path
from typing import Any

from drill import TEXT

from llm.config import ModelConfig, PretrainConfig


def settings(tmp_path: Path, **training: Any) -> PretrainConfig:
    config = PretrainConfig(model=ModelConfig(257, 16, 16, 2, 1, drop_rate=0.1))
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    config.data.source, config.data.path = "text", str(tmp_path / "text.txt")
    config.data.cache_dir, config.data.batch_size = str(tmp_path / "cache"), 2
    config.tokenizer.name = "bytes"
    config.training.max_minutes, config.training.max_steps, config.training.eval_freq = None, 12, 4
    config.checkpoint.every_steps = 5
    config.samples.max_new_tokens = 4
    config.tracking.mode = "disabled"
    config.runtime.device, config.runtime.precision = "cpu", "fp32"
    for name, value in training.items():
        setattr(config.training, name, value)
    return config


def changed(config: PretrainConfig, **values: Any) -> PretrainConfig:
    """A config with other values; `model__emb_dim=8` sets model.emb_dim."""
    config = dataclasses.replace(
        config, **{name: value for name, value in values.items() if "__" not in name}
    )
    for name, value in values.items():
        if "__" in name:
            group, key = name.split("__")
            setattr(config, group, dataclasses.replace(getattr(config, group), **{key: value}))
    return config
