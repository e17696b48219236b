"""What `experiments/export.py` does: weights in another program's format."""

import logging
from pathlib import Path

from llm.checkpoints.book import export_book
from llm.checkpoints.checkpoint import STATE, STATE_TENSORS, damage, read_training_state
from llm.checkpoints.huggingface import export_huggingface
from llm.checkpoints.opening import open_weights
from llm.checkpoints.weights import Weights, build_model
from llm.config import ExportConfig, OptimizerConfig, validate
from llm.errors import UserError
from llm.training.optimizers import OPTIMIZERS

log = logging.getLogger(__name__)


def export_checkpoint(config: ExportConfig, run_dir: Path) -> Path:
    """Write a checkpoint of ours, or any weights that can be opened, in another format; returns the folder.

    Raises:
        UserError: there are no such weights, the format cannot describe the model, or the target exists.
    """
    validate(config)
    target = Path(config.to) if config.to else run_dir / config.format
    if target.exists():
        raise UserError(f"to={target} already exists: give the name of a new folder")
    weights = open_weights(config.checkpoint)
    model = build_model(weights)
    if config.format == "huggingface":
        export_huggingface(model, weights.tokenizer, target)
        log.info('%s\nnow opens with AutoModelForCausalLM.from_pretrained("%s")', weights.origin, target)
    else:
        # Not with foreign weights: the learning rate and weight decay that belong to a state are not known.
        optimizer = weights.trained.optimizer if weights.trained else OptimizerConfig()
        state = _adamw_state(weights) if weights.trained else None
        export_book(model, target, state, optimizer)
        log.info("%s\nis now in %s", weights.origin, ", ".join(map(str, sorted(target.iterdir()))))
        if not state:
            log.info("model_and_optimizer.pth is not written: there is no AdamW state in %s", weights.origin)
    return target


def _adamw_state(weights: Weights) -> dict | None:
    """AdamW's state in a checkpoint of ours, if it is there.

    Raises:
        UserError: it is damaged.
    """
    folder, trained = weights.folder, weights.trained
    if not folder or not trained or not OPTIMIZERS[trained.optimizer.name].has_adamw_state:
        return None
    if not (folder / STATE_TENSORS).exists():  # the best checkpoint holds only weights
        return None
    if problem := damage(folder, (STATE_TENSORS, STATE)):
        raise UserError(f"{folder} is damaged: {problem}")
    return read_training_state(folder).optimizer
