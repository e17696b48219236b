"""The work of `experiments/export.py`: writing weights in another program's format."""

import logging
from pathlib import Path

from llm.checkpoints.book import export_book
from llm.checkpoints.checkpoint import STATE, STATE_TENSORS, damage, holds, read_training_state
from llm.checkpoints.huggingface import export_huggingface
from llm.checkpoints.opening import open_weights, tokenizer_of
from llm.checkpoints.weights import Weights, build_model
from llm.config import ExportConfig, OptimizerConfig
from llm.config_rules import validate
from llm.errors import UserError
from llm.outcome import Outcome
from llm.training.optimizers import OPTIMIZERS, State

log = logging.getLogger(__name__)


def export_checkpoint(config: ExportConfig, run_dir: Path) -> Outcome:
    """Write a checkpoint, or any weights that can be opened, in another format.

    Raises:
        UserError: there are no such weights, the format cannot describe the model, or the target exists.
    """
    validate(config)
    target = Path(config.to) if config.to else run_dir / config.format
    if target.exists():
        raise UserError(f"to={target} already exists: give the name of a new folder")
    weights = open_weights(config.checkpoint, config.model.n_heads)
    tokenizer = tokenizer_of(weights, config.tokenizer.name)
    model = build_model(weights)
    if config.format == "huggingface":
        described = export_huggingface(model, tokenizer, target)
        log.info(
            '%s\nnow opens with AutoModelForCausalLM.from_pretrained("%s"), as %s',
            weights.origin,
            target,
            described["architectures"][0],
        )
        if "zero_biases" in described or (described["model_type"] == "gpt2" and not model.config.qkv_bias):
            log.info("which has biases that this model does not have: they are 0")
    else:
        optimizer = weights.trained.optimizer if weights.trained else OptimizerConfig()
        state, omitted = _adamw_state(weights)
        export_book(model, tokenizer, target, state, optimizer)
        log.info("%s\nis now in %s", weights.origin, ", ".join(map(str, sorted(target.iterdir()))))
        log.info(
            "a .pth file holds neither the number of heads (%d) nor dropout, tied weights or the tokenizer: "
            "keep the .json with it, which does",
            model.config.n_heads,
        )
        if omitted:
            log.info("model_and_optimizer.pth is not written: %s", omitted)
        elif not optimizer.decay_all:
            log.info("the book's AdamW decays all parameters; in this run, only matrices were decayed")
    return Outcome({"format": config.format, "weights": weights.origin}, {"folder": target})


def _adamw_state(weights: Weights) -> tuple[State | None, str]:
    """AdamW's state in one of our checkpoints; or None, and why it is omitted.

    Raises:
        UserError: it is damaged.
    """
    folder, trained = weights.folder, weights.trained
    if not folder or not trained:
        return None, f"with what learning rate and weight decay {weights.origin} was trained is not known"
    if not OPTIMIZERS[trained.optimizer.name].has_adamw_state:
        return None, f"the book's is AdamW, and this run was trained with {trained.optimizer.name}"
    if not holds(folder, STATE_TENSORS):  # the best checkpoint holds only weights
        return None, f"{weights.origin} holds no optimizer state; the run's last checkpoint does"
    if problem := damage(folder, (STATE_TENSORS, STATE)):
        raise UserError(f"{folder} is damaged: {problem}")
    return read_training_state(folder).optimizer, ""
