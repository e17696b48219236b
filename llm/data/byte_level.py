"""Byte-level BPE, GPT-2's method, converted from tiktoken's form to that of Hugging Face's files."""

from itertools import pairwise
from typing import Any

import tiktoken

END_OF_TEXT = "<|endoftext|>"
PLAIN_CLASS = "PreTrainedTokenizerFast"  # transformers' class that adds nothing to tokenizer.json


def _byte_characters() -> list[str]:
    """A visible character for each byte, as in GPT-2's vocabulary file: bytes that are no visible Latin-1
    character get the code points from 256 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte if byte in visible else 256 + hidden.index(byte)) for byte in range(256)]


CHARACTERS = _byte_characters()
BYTE_OF = {character: byte for byte, character in enumerate(CHARACTERS)}


def merge_of(token: bytes, rank: int, ranks: dict[bytes, int]) -> list[bytes]:
    """The two pieces that a token is merged from: those left after all merges of lower rank. If BPE cannot
    produce the token, more than two are left."""
    pieces = [bytes([byte]) for byte in token]
    while len(pieces) > 2:
        pairs = [ranks.get(one + other, rank) for one, other in pairwise(pieces)]
        if (lowest := min(pairs)) >= rank:
            break
        place = pairs.index(lowest)
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    return pieces


def as_files(encoding: tiktoken.Encoding) -> dict[str, dict[str, Any]]:
    """Files from which transformers loads the same tokenizer: their contents, by name."""
    ends = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    about = {"tokenizer_class": PLAIN_CLASS, "clean_up_tokenization_spaces": False, **ends}
    return {"tokenizer.json": as_huggingface(encoding), "tokenizer_config.json": about}


def as_huggingface(encoding: tiktoken.Encoding) -> dict[str, Any]:
    """The content of a Hugging Face `tokenizer.json` that gives the same token ids."""
    ranks = encoding._mergeable_ranks
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {
        "type": "Split",
        # Hugging Face reads a possessive count differently. Nothing follows this one, so it need not be one.
        "pattern": {"Regex": encoding._pat_str.replace("{1,3}+", "{1,3}")},
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
            "vocab": {_spelled(token): rank for token, rank in ranks.items()},
            "merges": [
                [_spelled(piece) for piece in merge_of(token, rank, ranks)]
                for token, rank in sorted(ranks.items(), key=lambda item: item[1])
                if len(token) > 1
            ],
        },
    }


def _spelled(token: bytes) -> str:
    return "".join(CHARACTERS[byte] for byte in token)
