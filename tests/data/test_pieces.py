"""The tokens of a text in pieces against those of the whole, which tiktoken encodes at once."""

import base64
import random
from collections.abc import Iterator

import numpy as np
import pytest
import tiktoken

from llm.config import DataConfig
from llm.data import pieces
from llm.data.corpus import find_corpus
from llm.data.pieces import encode_pieces, join
from llm.data.tokenizer import END_OF_TEXT, encode, load_tokenizer
from llm.data.tokenizer_patterns import _DIGIT

GPT2 = load_tokenizer("gpt2")


def with_pattern(name: str, pattern: str) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        name, pat_str=pattern, mergeable_ranks=GPT2._mergeable_ranks, special_tokens=GPT2._special_tokens
    )


def with_slashes_after_newlines() -> tiktoken.Encoding:
    """As in GPT-4o's encoding, which is not to be had here: `!`, a newline and a slash may be one token."""
    vocabulary = [*(bytes([byte]) for byte in range(256)), b"th", b"!\n", b"!\n/", b" t", b" th"]
    return tiktoken.Encoding(
        "slashes",
        pat_str=r" ?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n/]*|\p{N}|\s+(?!\S)|\s+",
        mergeable_ranks={token: rank for rank, token in enumerate(vocabulary)},
        special_tokens={END_OF_TEXT: 300},
    )


TOKENIZERS = [
    GPT2,
    load_tokenizer("bytes"),
    with_slashes_after_newlines(),
    # What other encodings do: digits in threes from the left, upper case apart, marks among letters, white
    # space up to its last newline, and no white space within a word at all.
    with_pattern(
        "threes",
        r"'(?i:s|ll)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    with_pattern("cases", r" ?\p{Lu}*[\p{Ll}\p{Lo}\p{M}]+('s)?| ?\p{Lu}+|\p{N}+| ?[^\s\p{L}\p{N}]+|\s++$|\s"),
    with_pattern("words", r"\S+|\s+"),
    with_pattern("digits", _DIGIT),  # white space before a digit is all one, and before a letter it is not
]


@pytest.fixture(params=TOKENIZERS, ids=lambda tokenizer: tokenizer.name)
def tokenizer(request: pytest.FixtureRequest) -> tiktoken.Encoding:
    return request.param


def anywhere(text: str, generator: random.Random) -> Iterator[str]:
    """A text, cut anywhere."""
    start = 0
    while start < len(text):
        length = generator.choice([1, 2, 3, 10, 37, 100, 1000])
        yield text[start : start + length]
        start += length


def assert_same_as_whole(text: str, tokenizer: tiktoken.Encoding, generator: random.Random) -> int:
    done, token_ids = zip(*encode_pieces(anywhere(text, generator), tokenizer), strict=True)
    assert np.concatenate(token_ids).tolist() == encode(text, tokenizer), text
    assert done[-1] == len(text)
    return len({*done})


def many(words: list[str], count: int, between: str = "") -> str:
    return between.join(random.Random(1).choices(words, k=count))


SCRIPTS = {
    "Shakespeare": "".join(find_corpus(DataConfig()).pieces())[:9_000],
    "Chinese": many([*"春江潮水连海平海上明月共生滟随波千万里何处无，。"], 3_000),
    "Japanese": many([*"春はあけぼのやうやう白くなりゆく山ぎはスコシアカリテ、。ー"], 3_000),
    "Korean": many(["나랏말싸미", "듕귁에", "달아", "문자와로", "서르."], 900, " "),
    "Russian": many(["все", "счастливые", "СЕМЬИ", "похожи,", "друг—", "«на»", "друга.\n"], 900, " "),
    "upper case": many(["TO", "BE", "OR", "NOT", "DON'T", "'LL", "THAT'S"], 900, " "),
    "Greek": many(["μῆνιν", "ἄειδε", "θεὰ", "Πηληϊάδεω", "\u0391\u0313χιλῆος;"], 900, " "),
    "Thai": many(["สวัสดี", "ครับ", "น้ำ", "ที่นี่", "เก้า"], 900),
    "Arabic": many(["السَّلَامُ", "عَلَيْكُم", "كتاب،", "١٢٣", "؟"], 900, " "),
    "Hindi": many(["नमस्ते", "दुनिया", "हिन्दी।", "१२३", "क्षत्रिय"], 900, " "),
    "emoji": many(["😀", "👩\u200d👩\u200d👧", "🏴", "❤\ufe0f", "🇩🇪"], 2_000),
    "DNA": many([*"ACGT"], 4_000),
    "base64": base64.b64encode(random.Random(1).randbytes(4_000)).decode(),
    "digits": many([*"0123456789"], 3_000),
    "one letter": "a" * 3_000,
    "CRLF": many(["To be", "or not.", "To be!", "", "  x"], 900, "\r\n"),
    "blank lines": many(["\n", " ", "\t", "\n\n", "\r\n", "\u3000", "\x85", "x", "!"], 3_000),
    "spaces": "x" + " " * 3_000 + "y",
    "newline and spaces": "x\n" + " " * 3_000 + "\n" + " " * 500 + "y",
    "quotes": "'" * 1_000 + "s'll" + "''s" * 500,
    "documents": many([END_OF_TEXT, "<|", "|>", "endoftext", "a  ", "  "], 2_000),
}


@pytest.mark.parametrize("size", [20, 700])
@pytest.mark.parametrize("script", SCRIPTS)
def test_pieces_encode_as_the_whole(
    monkeypatch: pytest.MonkeyPatch, tokenizer: tiktoken.Encoding, script: str, size: int
) -> None:
    text = SCRIPTS[script]
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", size)
    count = assert_same_as_whole(text, tokenizer, random.Random(size))
    if tokenizer is GPT2 or tokenizer.name == "bytes":  # the others look for the end of white space or words
        assert count > len(text) / (size + 80)


KINDS = [
    *(
        "a",
        "A",
        "ACGT",
        "word ",
        " the",
        "0",
        "123456",
        "½",
        "x²",
        "中文",
        "，。",
        "привет",
        "สวัสดี",
        "नमस्ते",
        "😀",
    ),
    *(
        "'",
        "'s",
        "'ll",
        "!",
        "/",
        "=",
        "_",
        "e\u0301",
        "\u200d",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\u3000",
        "\x1c",
    ),
    *(END_OF_TEXT, "<|endof", "|>"),
]


def test_any_text_encodes_in_pieces_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "KEPT_TOKENS", 40)
    for seed in range(40):
        generator = random.Random(seed)
        kinds = [
            "".join(generator.choices(KINDS, k=generator.randint(1, 3)))
            * generator.choice([1, 2, 7, 30, 200])
            for _ in range(generator.randint(1, 12))
        ]
        monkeypatch.setattr(pieces, "PIECE_CHARACTERS", generator.choice([5, 20, 100]))
        for tokenizer in TOKENIZERS:
            assert_same_as_whole("".join(kinds), tokenizer, generator)


def test_tokens_are_mended_where_parts_of_a_pre_token_meet() -> None:
    for seed in range(100):
        generator = random.Random(seed)
        letters = generator.choice(["a", "ab", "ACGT", "the"])
        text = "".join(generator.choices(letters, k=generator.randint(2, 400)))
        place = generator.randint(1, len(text) - 1)
        left, right = GPT2.encode_to_numpy(text[:place]), GPT2.encode_to_numpy(text[place:])
        assert join(left, right, GPT2).tolist() == GPT2.encode(text)


def test_more_white_space_than_tiktoken_can_take() -> None:
    text = " " * 1_100_000 + "x"
    with pytest.raises(ValueError, match="stack size"):
        encode(text, GPT2)
    token_ids = np.concatenate([ids for _, ids in encode_pieces([text], GPT2)])
    assert token_ids.tolist() == [220] * 1_099_999 + [2124]  # GPT-2 merges no spaces; 2124 is " x"


@pytest.mark.parametrize("script", SCRIPTS)
def test_little_text_is_held(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(pieces, "KEPT_TOKENS", 20)
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    text, read, longest = SCRIPTS[script], 0, 0

    def texts() -> Iterator[str]:
        nonlocal read
        for start in range(0, len(text), 10):
            read = min(start + 10, len(text))
            yield text[start:read]

    for done, _ in encode_pieces(texts(), GPT2):
        longest = max(longest, read - done)
    assert longest < 400
