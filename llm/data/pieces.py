"""Tokenisation of a text of any size, piece by piece on all cores, with exactly the ids of the whole.

Byte-level BPE divides a text into pre-tokens by a regular expression, and merges the bytes within each. So a
text may be cut between two pre-tokens, at a place where the text after it does not affect the pre-tokens
before it. A pre-token longer than a piece (a chromosome, a megabyte of spaces) is cut anywhere, and its
tokens are repaired where the parts meet.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice, takewhile

import numpy as np
import regex
import tiktoken
import torch

from llm.data.tokenizer import encode_to_numpy, special_in_texts

PIECE_CHARACTERS = 1 << 18  # encoded at a time by a thread
SEARCHED_CHARACTERS = 1_000  # for a place to cut, before the whole piece is divided into pre-tokens

# Characters on either side of a place that decide whether a text may be cut there, except in white space:
# more than any known pattern looks ahead.
CONTEXT = 32

KEPT_TOKENS = 4_096  # held back at the end of a part, as the next part may change some of them


@dataclass(frozen=True)
class Rules:
    """How a tokenizer divides a text."""

    pattern: "regex.Pattern | None"  # of pre-tokens; None if every token is a byte
    special: "regex.Pattern"  # of special tokens, such as the end of text, which always divide a text
    context: int = CONTEXT  # at least the length of the longest special token

    @classmethod
    def of(cls, tokenizer: tiktoken.Encoding) -> "Rules":
        special = special_in_texts(tokenizer)
        return cls(
            regex.compile(tokenizer._pat_str) if len(tokenizer._mergeable_ranks) > 256 else None,
            regex.compile("|".join(map(regex.escape, sorted(special))) or "(?!)"),
            max(CONTEXT, *map(len, special), 0),
        )


@dataclass(frozen=True)
class Piece:
    text: str
    is_part: bool = False  # whether it is part of a single pre-token
    continues: bool = False  # whether it continues the pre-token of the piece before


def encode_pieces(
    texts: Iterable[str], tokenizer: tiktoken.Encoding, whole: Callable[[str], np.ndarray] | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Encode a text as `llm.data.tokenizer.encode` would. Yields the number of characters done so far, and
    the next token ids (tokens,), uint32. Encodes in as many threads as torch has, as tiktoken releases the
    GIL.

    Args:
        texts: the text, in pieces that may end anywhere.
        whole: encodes pieces of whole pre-tokens, in place of tiktoken.
    """

    def encode(piece: Piece) -> np.ndarray:
        if piece.is_part:
            return np.array(tokenizer._encode_single_piece(piece.text), dtype=np.uint32)
        return whole(piece.text) if whole else encode_to_numpy(piece.text, tokenizer)

    pieces, threads, done = cut(texts, Rules.of(tokenizer)), torch.get_num_threads(), 0
    # The end of a part, which the next part may change, except its first token if that was yielded already.
    end_of_part, yielded = np.empty(0, dtype=np.uint32), 0
    with ThreadPoolExecutor(threads) as pool:
        while batch := list(islice(pieces, threads)):
            for piece, token_ids in zip(batch, pool.map(encode, batch), strict=True):
                if piece.continues:
                    token_ids = join(end_of_part, token_ids, tokenizer, keep=yielded)
                else:
                    yield done, end_of_part[yielded:]
                    yielded = 0
                done += len(piece.text)
                end = max(yielded, len(token_ids) - KEPT_TOKENS) if piece.is_part else len(token_ids)
                yield done, token_ids[yielded:end]
                yielded = min(end, 1)
                end_of_part = token_ids[end - yielded :]
    yield done, end_of_part[yielded:]


def join(left: np.ndarray, right: np.ndarray, tokenizer: tiktoken.Encoding, keep: int = 0) -> np.ndarray:
    """The tokens (tokens,) of a pre-token, from those of its two parts. The first `keep` must not change.

    Tokens are the BPE of their bytes if and only if every two neighbours are the BPE of theirs: merges go by
    rank and then from left to right, so the first merge across the border of two tokens in the whole would
    also happen in these two alone. So the tokens around the seam are encoded again, as many as it takes until
    they fit their neighbours on both sides.
    """

    def bpe(token_ids: list[int]) -> list[int]:
        return tokenizer._encode_single_piece(tokenizer.decode_bytes(token_ids))

    def fit(*pair: int) -> bool:
        return bpe([*pair]) == [*pair]

    width = 4
    while width < 2 * max(len(left), len(right)) + 4:
        start, end = max(keep, len(left) - width), min(width, len(right))
        middle = bpe([*left[start:].tolist(), *right[:end].tolist()])
        if (not start or fit(int(left[start - 1]), middle[0])) and (
            end == len(right) or fit(middle[-1], int(right[end]))
        ):
            return np.concatenate([left[:start], np.array(middle, dtype=left.dtype), right[end:]])
        width *= 2
    raise RuntimeError(f"a text changes tokens of {tokenizer.name} that are {KEPT_TOKENS} before it")


def cut(texts: Iterable[str], rules: Rules) -> Iterator[Piece]:
    """Cut a text into pieces of about PIECE_CHARACTERS that encode to the tokens of the whole, once parts of
    a pre-token are joined.

    A piece is longer only in longer white space whose end matters to the pattern, as with cl100k's but not
    GPT-2's.
    """
    least = PIECE_CHARACTERS + 2 * rules.context
    text, inside, enough = "", False, least
    for more in chain(_slices(texts), [None]):
        text += more or ""
        while len(text) >= enough or (more is None and text):
            end, goes_on = _piece_end(text, rules, inside, is_all=more is None)
            if not end:
                enough = 2 * len(text)  # or a text without a place to cut would be searched over and over
                break
            yield Piece(text[:end], is_part=inside or goes_on, continues=inside)
            text, inside, enough = text[end:], goes_on, least


def _slices(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for start in range(0, len(text), PIECE_CHARACTERS):
            yield text[start : start + PIECE_CHARACTERS]


def _piece_end(text: str, rules: Rules, inside: bool, is_all: bool) -> tuple[int, bool]:
    """Where the next piece ends (0 if more text is needed to tell), and whether that is within a pre-token.

    Args:
        text: the text after the piece before.
        inside: whether the piece before ended within a pre-token.
        is_all: whether the text ends here.
    """
    pattern, context = rules.pattern, rules.context
    special = rules.special.search(text)
    if special and not inside and special.end() <= PIECE_CHARACTERS + context:
        *_, last = rules.special.finditer(text, special.start(), PIECE_CHARACTERS + context)
        return last.end(), False
    if special:
        text, is_all = text[: special.start()], True
    if pattern is None:
        return min(PIECE_CHARACTERS, len(text)), False
    # How white space is divided may depend on what follows it.
    endings = [text] if is_all else [text, text + "x", text + "\n"]
    first = min(_match_end(pattern, each, 0, len(each)) for each in endings)
    if first >= PIECE_CHARACTERS + context:
        return PIECE_CHARACTERS, True
    if inside:
        return first if is_all or _is_decided(text, first, context) else 0, False
    if is_all and len(text) <= PIECE_CHARACTERS + 2 * context:
        return len(text), False
    for place in range(PIECE_CHARACTERS, max(0, PIECE_CHARACTERS - SEARCHED_CHARACTERS), -1):
        if _may_be_cut(text, place, pattern):
            return place, False
    limit = len(text) if is_all else len(text) - context
    spans = (match.span() for match in pattern.finditer(text))
    pre_tokens = [*takewhile(lambda span: span[1] <= limit, spans)]
    for last in reversed(range(len(pre_tokens))):
        place = pre_tokens[last][1]
        if (is_all or _is_decided(text, place, context)) and all(
            _match_end(pattern, text, start, place) == end
            for start, end in pre_tokens[max(0, last - CONTEXT) : last + 1]
        ):
            # Pieces far shorter than the text searched for each would make the time quadratic.
            if place >= PIECE_CHARACTERS // 2 or last == len(pre_tokens) - 1:
                return place, False
            break
    return len(text) if is_all else 0, False


def _may_be_cut(text: str, place: int, pattern: "regex.Pattern") -> bool:
    """Whether the pre-tokens before a place are the same if the text ends there, wherever the last one
    starts.

    Only the last CONTEXT characters are tried as starts: a longer pre-token that reaches beyond the place
    does so from there too, as pre-tokens of that length are runs of one kind of character.
    """
    if text[place - 1].isspace() and text[place].isspace():
        return False  # a pattern may look for the end of white space, however far away
    return all(
        _match_end(pattern, text, start, place) == _match_end(pattern, text, start, place + CONTEXT)
        for start in range(place - 1, max(0, place - CONTEXT) - 1, -1)
    )


def _is_decided(text: str, end: int, context: int) -> bool:
    """Whether a pre-token that ends here does so whatever follows."""
    is_open = text[end - 1].isspace() and text[end:].isspace()
    return end <= len(text) - context and not is_open


def _match_end(pattern: "regex.Pattern", text: str, start: int, end: int) -> int:
    """Where the pre-token that starts at `start` ends, in a text that ends at `end`. A character that starts
    no pre-token counts as one, though no token stands for it."""
    match = pattern.match(text, start, end)
    return match.end() if match else start + 1
