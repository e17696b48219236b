"""Downloading folders of weights by name from Hugging Face's hub."""

import re
from pathlib import Path

from llm.checkpoints.huggingface import shards
from llm.data.tokenizer_files import TOKENIZER_FILES, VOCABULARIES
from llm.errors import UserError, first_line
from llm.files import sha256
from llm.runs import newest_runs

# OpenAI's weights on the hub: the revision, and the SHA-256 of model.safetensors where it is known here. The
# revision fixes the others too, through what the hub states for it.
GPT2_ON_HUB = {
    "openai-community/gpt2": (
        "607a30d783dfa663caf39e06633721c8d4cfcd7e",
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    ),
    "openai-community/gpt2-medium": ("6dcaa7a952f72f9298047fd5137cd6e4f05f41da", None),
    "openai-community/gpt2-large": ("32b71b12589c2f8d625668d2335a01cac3249519", None),
    "openai-community/gpt2-xl": (
        "15ea56dee5df4983c59b2538573817e1667135e2",
        "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
    ),
}


def download(name: str) -> tuple[Path, str, str | None]:
    """Download a repository from the hub, unless it is in the hub's cache. Returns its folder, where it comes
    from, and its tokenizer for `load_tokenizer`, if known.

    Raises:
        UserError: the hub cannot be reached, has no such repository, or a file is not what it should be.
    """
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, _, asked = name.partition("@")
    if f"openai-community/{repository}" in GPT2_ON_HUB:
        repository = f"openai-community/{repository}"
    revision, checksum = GPT2_ON_HUB.get(repository, (None, None))
    if asked:
        revision, checksum = asked, checksum if asked == revision else None

    cached_only = not _hub_answers()
    instead = "" if repository in GPT2_ON_HUB else newest_runs(saved=True)

    def fetch(file: str) -> Path:
        return Path(hf_hub_download(repository, file, revision=revision, local_files_only=cached_only))

    def may_have(file: str) -> bool:
        """Whether a repository has a file; True if that cannot be found out."""
        try:
            fetch(file)
        except LocalEntryNotFoundError:
            return try_to_load_from_cache(repository, file, revision=revision) is not _CACHED_NO_EXIST
        except EntryNotFoundError:
            return False
        return True

    try:
        folder = fetch("config.json").parent
        # One commit for all files, even if the name is that of a branch that moves.
        revision = folder.name
        try:
            files = [fetch("model.safetensors")]
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            index = fetch("model.safetensors.index.json")
            files = [fetch(file) for file in shards(index)]
        tokenizer = "gpt2" if repository in GPT2_ON_HUB and not asked else None
        if tokenizer is None:
            found = [file for file in (*TOKENIZER_FILES, *VOCABULARIES) if may_have(file)]
            tokenizer = str(folder) if set(found) & set(VOCABULARIES) else None
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{name} is no file or folder here, and Hugging Face's hub cannot be reached: give a local "
            f"folder that holds config.json and model.safetensors{instead}"
        ) from error
    except UserError:
        raise
    except Exception as error:  # a lost connection is an error of some HTTP library
        raise UserError(
            f"{name} is not available from Hugging Face's hub: {first_line(error)}{instead}"
        ) from error
    for file in files:
        # The hub's cache keeps a large file under the SHA-256 that the hub states for it.
        kept = file.resolve()  # deleting a link to it would not help
        expected = checksum or kept.name
        if re.fullmatch("[0-9a-f]{64}", expected) and sha256(kept) != expected:
            raise UserError(f"{kept} is not what the hub has (its SHA-256 differs): delete it and try again")
    return folder, f"{repository} at revision {revision}", tokenizer


def _hub_answers() -> bool:
    """Whether the hub can be reached, by a single request; its library would retry for half a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=constants.DEFAULT_ETAG_TIMEOUT)
    except Exception:  # of whichever HTTP library it uses
        return False
    return True
