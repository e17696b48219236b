"""Datasets of Hugging Face's library `datasets`, and other libraries that only some text formats need."""

import functools
import importlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """A Hugging Face dataset: a name on the hub, a local folder with its files, or one saved by
    `save_to_disk`."""

    path: str
    config: str | None
    split: str


def optional(module: str, purpose: str) -> Any:
    """Import a module that only some text formats need.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise UserError(
            f"{purpose} needs the package {name}: pip install 'gpt-experiment-runner[data]', or {name} alone"
        ) from error


@functools.lru_cache(maxsize=1)
def load_dataset(dataset: Dataset) -> Any:
    """Load a dataset from disk or from the hub.

    Raises:
        UserError: it does not exist, has several configurations or splits, or cannot be downloaded.
    """
    library = optional("datasets", "data=huggingface")
    library.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # without a network it warns of each attempt
    if dataset.path.startswith((".", "/")) and not Path(dataset.path).exists():
        raise UserError(f"data.path={dataset.path}: no such folder")
    try:
        if Path(dataset.path, "state.json").is_file() or Path(dataset.path, "dataset_dict.json").is_file():
            found = library.load_from_disk(dataset.path)
            if isinstance(found, dict):
                return found[dataset.split]
            if dataset.split not in ("train", str(found.split)):
                raise UserError(
                    f"shards.dataset_split={dataset.split}: {dataset.path} was saved as one split: remove it"
                )
            return found
        if not Path(dataset.path).exists():
            log.info("asking Hugging Face's hub for %s", dataset.path)
        return library.load_dataset(dataset.path, dataset.config, split=dataset.split)
    except UserError:
        raise
    except ConnectionError as error:
        raise UserError(
            f"data.path={dataset.path}: no such folder here, and Hugging Face's hub cannot be reached: "
            f"without a network, give a folder with the dataset's files"
        ) from error
    except KeyError as error:
        there = ", ".join(found)
        raise UserError(f"shards.dataset_split={dataset.split}: {dataset.path} has {there}") from error
    except Exception as error:  # many libraries are involved, with many types of errors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"data.path={dataset.path}: cannot load this dataset: {reason}") from error
