"""Pretraining GPT models: `from llm import pretrain, PretrainConfig`."""

from typing import TYPE_CHECKING, Any

from llm.config import PretrainConfig

if TYPE_CHECKING:
    from llm.commands.pretrain import pretrain

__all__ = ["PretrainConfig", "pretrain"]


def __getattr__(name: str) -> Any:
    if name == "pretrain":  # only now: `--help` needs just llm.config and does not wait for torch
        from llm.commands.pretrain import pretrain

        return pretrain
    raise AttributeError(name)
