"""What `experiments/export.py` does: weights in another program's format."""

import logging
from pathlib import Path

from llm.checkpoints.checkpoint import (
    STATE_TENSORS,
    find_checkpoint,
    load_checkpoint,
    load_optimizer_state,
    model_of_weights,
)
from llm.checkpoints.pretrained import export_book, export_huggingface, is_ours, open_weights
from llm.config import ExportConfig, OptimizerConfig, validate
from llm.errors import UserError
from llm.files import as_typed

log = logging.getLogger(__name__)


def export_checkpoint(config: ExportConfig, run_dir: Path) -> Path:
    """What `experiments/export.py` does: a checkpoint of ours, or any weights that can be opened, in another
    format. Returns the new folder.

    Raises:
        UserError: there are no such weights, or the target is there already.
    """
    validate(config)
    target = Path(config.to) if config.to else run_dir / config.format
    if target.exists():
        raise UserError(f"to={target} is there already: give the name of a new folder")
    if not is_ours(config.checkpoint):
        source = open_weights(config.checkpoint)
        model, origin = model_of_weights(source.model, source.weights, source.origin), source.origin
        # without the optimizer's state: its learning rate and weight decay are not known here
        tokenizer, state, optimizer = source.tokenizer, None, OptimizerConfig()
    else:
        folder = as_typed(find_checkpoint(config.checkpoint))
        model, trained = load_checkpoint(folder)
        origin, tokenizer, optimizer = str(folder), trained.tokenizer.name, trained.optimizer
        has_state = optimizer.name == "adamw" and (folder / STATE_TENSORS).exists()
        state = load_optimizer_state(folder) if has_state else None
    if config.format == "huggingface":
        export_huggingface(model, tokenizer, target)
        log.info('%s\nnow opens with AutoModelForCausalLM.from_pretrained("%s")', origin, target)
    else:
        export_book(model, target, state, optimizer)
        log.info("%s\nis now in %s", origin, ", ".join(str(file) for file in sorted(target.iterdir())))
        if not state:
            log.info("model_and_optimizer.pth is not written: there is no AdamW state in %s", origin)
    return target
