"""Tokenisation by gigatoken, if it is installed: many times as fast as tiktoken.

It is young, so some of its ids are compared with tiktoken's while it is used, and it is abandoned if they
differ.
"""

import json
import threading
from collections.abc import Callable

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from llm.data.byte_level import END_OF_TEXT, as_huggingface
from llm.data.pieces import PIECE_CHARACTERS, encode_pieces
from llm.data.tokenizer import encode_to_numpy, special_in_texts

CHECKED_CHARACTERS = 1 << 15  # at the beginning of a text
CHECKED_SHARE = 1 / 256  # of the characters after these

Encode = Callable[[str], np.ndarray]


class DifferentIds(Exception):
    """gigatoken failed, or its ids for a text are not tiktoken's."""


def accelerated(tokenizer: tiktoken.Encoding) -> Encode | None:
    """A function from a text to the token ids (tokens,), uint32, of tiktoken's `encode`; None if gigatoken is
    not installed or does not support the tokenizer."""
    if special_in_texts(tokenizer) != {END_OF_TEXT} or {*tokenizer._special_tokens} != {END_OF_TEXT}:
        return None  # it recognises all special tokens in texts
    try:
        from gigatoken import Tokenizer

        described = as_huggingface(tokenizer)
        if tokenizer._pat_str == r50k_pat_str:  # gigatoken knows this pattern by another name
            described["pre_tokenizer"] = described["decoder"] | {"use_regex": True}
        as_json = json.dumps(described)
        Tokenizer.from_json(as_json)
    except (ImportError, RuntimeError, ValueError, TypeError):
        return None
    of_thread = threading.local()  # a gigatoken tokenizer refuses two threads at once

    def encode(text: str) -> np.ndarray:
        if not hasattr(of_thread, "tokenizer"):
            of_thread.tokenizer = Tokenizer.from_json(as_json)
        return of_thread.tokenizer.encode(text)

    return encode


class Checked:
    """Encodes a text that comes as many documents, by gigatoken. The ids of the first documents, and then of
    some evenly spread ones, are compared with tiktoken's."""

    def __init__(self, tokenizer: tiktoken.Encoding, fast: Encode | None) -> None:
        self.tokenizer, self.fast = tokenizer, fast
        self.begin()

    def begin(self) -> None:
        """Start another text."""
        self._encoded = self._compared = 0  # characters

    def __call__(self, text: str) -> np.ndarray:
        """The token ids (tokens,), uint32.

        Raises:
            DifferentIds: gigatoken's are not tiktoken's.
        """
        if not self.fast:
            return self._by_tiktoken(text)
        try:
            ids = self.fast(text)
        except Exception as error:
            raise DifferentIds from error
        self._encoded += len(text)
        wanted = min(self._encoded, CHECKED_CHARACTERS) + CHECKED_SHARE * self._encoded
        if self._compared < wanted:
            self._compared += len(text)
            if not np.array_equal(ids, self._by_tiktoken(text)):
                raise DifferentIds
        return ids

    def _by_tiktoken(self, text: str) -> np.ndarray:
        if len(text) <= 2 * PIECE_CHARACTERS:
            return encode_to_numpy(text, self.tokenizer)
        return np.concatenate([ids for _, ids in encode_pieces([text], self.tokenizer)])
