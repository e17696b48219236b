"""A prompt that suits the text: the beginning of one of its lines."""

import numpy as np
import tiktoken

from llm.data.tokenizer import bytes_of, end_of_text_id
from llm.data.tokens import ShardedTokens

SEARCHED_TOKENS = 4096  # at the beginning of the split
PROMPT_CHARACTERS = 32  # longest prompt


def first_line(tokens: np.ndarray | ShardedTokens, tokenizer: tiktoken.Encoding) -> str:
    """The beginning of the first line, or document, that starts within a split (tokens,) and has a letter or
    digit. Not that of the split itself, which mostly starts within a line; unless the text is a single line,
    where it is the first whole word and what follows.
    """
    end = end_of_text_id(tokenizer)
    pieces = (
        b"\n" if token == end else bytes_of(token, tokenizer) for token in tokens[:SEARCHED_TOKENS].tolist()
    )
    text = b"".join(pieces).decode("utf-8", "ignore")  # the last character may be cut
    cut_line, *lines = text.split("\n")
    after_word = cut_line.lstrip().partition(" ")[2]
    candidates = [line.strip() for line in [*lines, after_word, cut_line]]
    said = [line for line in candidates if any(map(str.isalnum, line))] or [*filter(None, candidates)]
    return _beginning(said[0]) if said else text[:1]


def _beginning(line: str) -> str:
    """At most PROMPT_CHARACTERS of a line, ending after a whole word if possible."""
    if len(line) <= PROMPT_CHARACTERS:
        return line
    words, _, _ = line[: PROMPT_CHARACTERS + 1].rpartition(" ")
    return words.rstrip() or line[:PROMPT_CHARACTERS]
