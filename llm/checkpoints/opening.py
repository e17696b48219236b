"""Opening weights by name: our own, Hugging Face's (also from the hub), or the book's."""

import re
from pathlib import Path

from llm.checkpoints.book import read_book
from llm.checkpoints.checkpoint import CHECKSUMS, CONFIG, find_checkpoint, read_weights
from llm.checkpoints.hub import download
from llm.checkpoints.huggingface import WHAT_TO_GIVE, read_huggingface
from llm.checkpoints.weights import Weights, refuse_not_finite
from llm.data.tokenizer import LEARNT, fingerprint, load_tokenizer
from llm.errors import UserError
from llm.files import as_typed
from llm.run_folder import CHECKPOINTS, checkpoint_folder
from llm.runs import BEST, LATEST, OUTPUTS, find_run, newest_runs


def open_weights(name: str, n_heads: int | None = None) -> Weights:
    """Read and verify weights by name: one of our run or checkpoint folders, `latest`, `best` (see
    llm/runs.py), a folder in Hugging Face's GPT-2 or Llama layout, a name on its hub, such as gpt2-medium or
    user/name@revision, or one of the book's .pth files.

    Args:
        n_heads: number of attention heads, for weights that do not tell.

    Raises:
        UserError: there are no such weights, they are damaged or not finite, or they are those of a model
            that our parts cannot build, or that has another number of heads.
    """
    weights = _open(name, n_heads)
    if n_heads not in (None, weights.model.n_heads):
        raise UserError(
            f"model.n_heads={n_heads}: the weights of {weights.origin} have {weights.model.n_heads}; "
            f"remove it"
        )
    return weights


def _open(name: str, n_heads: int | None) -> Weights:
    path = Path(name)
    if is_ours(name):
        weights = read_weights(find_checkpoint(name))
        refuse_not_finite(weights.tensors, weights.origin)
        return weights
    if path.is_file():
        return read_book(path, n_heads)
    if as_typed(path).is_relative_to(OUTPUTS) and not (path / CONFIG).exists():  # a mistyped run
        find_run(name)
    if path.is_dir():
        return read_huggingface(path, name)
    if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?(@[\w.-]+)?", name):
        return read_huggingface(*download(name))
    raise UserError(f"{name}: no such file or folder; {WHAT_TO_GIVE}{newest_runs(saved=True)}")


def tokenizer_of(weights: Weights, given: str | None = None) -> str:
    """The tokenizer of given weights, for `load_tokenizer`: the one that comes with them; else the one that
    was asked for; else GPT-2's, if the vocabulary has its size.

    Raises:
        UserError: the tokenizer is unknown, or another one was asked for than comes with the weights.
    """
    known, size = weights.tokenizer, weights.model.vocab_size
    if given is None and (known or size == 50257):
        return known or "gpt2"
    if given == LEARNT and known and weights.trained and weights.trained.tokenizer.name == LEARNT:
        return known
    if given is None:
        raise UserError(
            f"{weights.origin} does not say which tokenizer it was trained with, and its {size} tokens are "
            f"not GPT-2's: give it with tokenizer.name=bytes, the name of another one, or FOLDER"
        )
    if known in (None, given) or _same(known, given, weights):
        return given
    theirs = as_typed(Path(known)) if known and Path(known).is_absolute() else known
    raise UserError(f"tokenizer.name={given}: the weights of {weights.origin} have {theirs}; remove it")


def _same(known: str, given: str, weights: Weights) -> bool:
    if not any(Path(each).is_absolute() or Path(each).exists() for each in (known, given)):
        return False  # both are names of encodings; to compare them, they might have to be downloaded
    if given == LEARNT and not Path(given).exists():
        return False
    try:
        theirs = load_tokenizer(known)
    except UserError:
        if weights.trained:  # our own checkpoint is damaged
            raise
        return True  # its files are not supported here, and the user has named a tokenizer with the same ids
    return fingerprint(theirs) == fingerprint(load_tokenizer(given))


def is_ours(name: str) -> bool:
    """Whether a name means one of this program's runs or checkpoints."""
    path, place = checkpoint_folder(Path(name)), Path(name).parent
    if name in ("", LATEST, BEST) or (place.name == CHECKPOINTS and place.exists()):
        return True
    return (path / CHECKPOINTS).exists() or (path / CHECKSUMS).exists()
