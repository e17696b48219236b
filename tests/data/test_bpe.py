"""A tokenizer learnt from a text, against BPE by brute force and against `tokenizers` with the same files."""

import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import regex
import tiktoken
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scripts import FORKED, HANGS
from tiktoken_ext.openai_public import r50k_pat_str
from tokenizers import Tokenizer

from llm.config import DataConfig, TokenizerConfig
from llm.data import bpe
from llm.data.bpe import WORDS, find_tokenizer, learn, usable
from llm.data.byte_level import as_files, merge_of
from llm.data.corpus import Corpus, Split, find_splits
from llm.data.tokenizer import END_OF_TEXT, encode
from llm.data.tokenizer_files import kept_files
from llm.errors import UserError

TEXT = Path(__file__).read_text("utf-8") + "naïve café — 日本語 🙂\r\n\n  \t'll we'll 12345 " * 5


@dataclass(frozen=True)
class Written(Corpus):
    """A text in memory, which is read in blocks of any size."""

    text: str = ""
    block: int = 1 << 20

    def pieces(self) -> Iterator[str]:
        for start in range(0, len(self.text), self.block):
            yield self.text[start : start + self.block]


def split(text: str, block: int = 1 << 20) -> Split:
    return Split(Written([], text=text, block=block), 0, len(text), str(hash(text)))


def merged(word: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """BPE of a word as Sennrich et al. say it: all of one pair in all of a word, the first learnt first."""
    pieces = [bytes([byte]) for byte in word]
    while pairs := [pair for pair in pairwise(pieces) if b"".join(pair) in ranks]:
        first = min(pairs, key=lambda pair: ranks[b"".join(pair)])
        joined: list[bytes] = []
        for piece in pieces:
            if joined and (joined[-1], piece) == first:
                joined[-1] += piece
            else:
                joined.append(piece)
        pieces = joined
    return pieces


def words(text: str) -> list[bytes]:
    return [word.encode() for word in regex.findall(r50k_pat_str, text)]


def check_ids(encoding: tiktoken.Encoding, text: str) -> None:
    """tiktoken, `tokenizers` with the file, and brute force give the same ids."""
    ids = encode(text, encoding)
    described = Tokenizer.from_str(json.dumps(as_files(encoding)["tokenizer.json"]))
    assert described.encode(text).ids == ids
    ranks = encoding._mergeable_ranks
    by_hand: list[int] = []
    for number, part in enumerate(text.split(END_OF_TEXT)):
        by_hand += [encoding.n_vocab - 1] * (number > 0)
        by_hand += [ranks[piece] for word in words(part) for piece in merged(word, ranks)]
    assert by_hand == ids


def test_each_token_was_the_most_frequent_pair() -> None:
    encoding = learn(split(TEXT), 700)
    assert (encoding.n_vocab, encoding._special_tokens) == (700, {END_OF_TEXT: 699})
    assert sorted(encoding._mergeable_ranks.values()) == [*range(699)]
    assert [encoding._mergeable_ranks[bytes([byte])] for byte in range(256)] == [*range(256)]
    counted = [([bytes([byte]) for byte in word], count) for word, count in Counter(words(TEXT)).items()]
    ranks: dict[bytes, int] = {}
    for token, rank in encoding._mergeable_ranks.items():
        if rank >= 256:
            pairs = Counter[tuple[bytes, bytes]]()
            for pieces, count in counted:
                for pair in pairwise(pieces):
                    pairs[pair] += count
            one, other = merge_of(token, rank, encoding._mergeable_ranks)
            assert pairs[one, other] == max(pairs.values()) >= 2
            ranks[token] = rank
            counted = [(merged(b"".join(pieces), ranks), count) for pieces, count in counted]
    check_ids(encoding, TEXT)


# Runs of a letter, repeated patterns, and what is between ends of text.
HOSTILE = st.lists(
    st.tuples(
        st.sampled_from(["a", "ab", "aab", "aba", " a", "é", "  ", "\n", "1", END_OF_TEXT]), st.integers(1, 9)
    ),
    max_size=40,
).map(lambda runs: "".join(text * count for text, count in runs))


@hypothesis_settings(deadline=None, max_examples=40)
@given(HOSTILE, HOSTILE)
@example("aaaaaaaaaaaa aaaaaaa aaaaa aaa aaaaaaaaaaaa", "a" * 50)
def test_ids_are_those_of_tokenizers_and_of_brute_force(text: str, other: str) -> None:
    ranks = usable(bpe._merged(split(text), 400), 10**6)
    encoding = bpe._encoding(ranks)
    check_ids(encoding, text)
    check_ids(encoding, other)
    assert not any(b"endof" in token for token in ranks)


@hypothesis_settings(deadline=None, max_examples=60)
@given(st.lists(st.text("ab", min_size=1, max_size=7), max_size=30), st.text("ab ", max_size=60))
@example(["aa", "ab", "aab", "aaa", "aaab"], "aaaab aaab aaaaaab")
def test_tokens_in_any_order_give_ids_that_all_agree_on(tokens: list[str], text: str) -> None:
    check_ids(bpe._encoding(usable((token.encode() for token in tokens), 10**6)), text)


def test_tokens_that_cannot_be_used_are_replaced_by_those_that_come_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, library, asked = learn(split(TEXT), 400), bpe._merged, []

    def merged(training: Split, vocab_size: int) -> list[bytes]:
        """As if the library had merged three pieces at once."""
        asked.append(vocab_size)
        return [*(bytes([200 + number, 1, 2]) for number in range(50)), *library(training, vocab_size)][
            : vocab_size - 256
        ]

    monkeypatch.setattr(bpe, "_merged", merged)
    monkeypatch.setattr(bpe, "SPARE", 2)
    encoding = learn(split(TEXT), 400)
    assert len(asked) > 1
    assert {*encoding._mergeable_ranks} == {*plain._mergeable_ranks}
    check_ids(encoding, TEXT)


@pytest.mark.parametrize("sampled", [10**6, 4_000])
def test_how_a_text_is_read_changes_nothing(sampled: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm.data.pieces.PIECE_CHARACTERS", 500)
    monkeypatch.setattr(bpe, "BLOCK_CHARACTERS", 300)
    monkeypatch.setattr(bpe, "SAMPLED_CHARACTERS", sampled)
    text = (
        TEXT.replace("\n\n\n", END_OF_TEXT)
        + "x" * 3_000
        + " " * 2_000
        + ("w" * 510 + " ab" * 40) * 20
        + "end"
    )
    read = [[*bpe.sample(split(text, block))] for block in (1, 7, 499, 10**6)]
    assert all(each == read[0] for each in read)
    learnt_from = Counter(word for _, some in read[0] for part in some for word in words(part))
    if sampled > len(text):
        assert "".join(END_OF_TEXT.join(some) for _, some in read[0]) == text
        # Words of more than a piece come in parts; all others are those of the whole.
        whole = Counter(word for part in text.split(END_OF_TEXT) for word in words(part))
        assert all(len(word) > 100 for word in learnt_from - whole)
    else:
        taken = sum(len(END_OF_TEXT.join(some)) for _, some in read[0])
        assert 0.7 < taken / sampled < 1.3
        where = [done for done, some in read[0] if some]
        assert max(end - begin for begin, end in pairwise([0, *where])) < 2.5 * len(text) / len(where)


@given(st.text(st.sampled_from("ab1 \n\t.'stévll🙂\u2028"), max_size=60))
def test_words_are_gpt2s(text: str) -> None:
    assert regex.findall(WORDS, text) == regex.findall(r50k_pat_str, text)
    long = regex.findall(WORDS, text + " " + "a" * 300 + " " * 300 + "x")
    assert {"a" * 44, " " * 256} <= {*long}


def test_a_small_text_makes_fewer_tokens_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    most = learn(split(TEXT), 50_000).n_vocab
    assert f"learnt a tokenizer of {most:,} tokens" in caplog.text
    assert caplog.text.count("nothing else in it occurs twice") == 1
    assert learn(split(TEXT), most).n_vocab == learn(split(TEXT), most + 1).n_vocab == most
    assert learn(split(TEXT), most - 1).n_vocab == most - 1
    assert caplog.text.count("nothing else in it occurs twice") == 2
    for text in ("", "abcdefg"):  # a pair that occurs once is none
        assert learn(split(text), 300).n_vocab == 257


def data(tmp_path: Path) -> DataConfig:
    (tmp_path / "text.txt").write_text(TEXT * 3, encoding="utf-8")
    return DataConfig(source="text", path=str(tmp_path / "text.txt"), cache_dir=str(tmp_path / "cache"))


def test_it_is_learnt_once_and_kept_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, wanted = data(tmp_path), TokenizerConfig("bpe", 300)
    encoding, splits = find_tokenizer(wanted, config)
    assert splits is not None
    files = kept_files(encoding)
    assert [*files] == ["tokenizer.json", "tokenizer_config.json"]
    with monkeypatch.context() as patched:
        patched.setattr(bpe, "learn", None)
        assert kept_files(find_tokenizer(wanted, config)[0]) == files
    [kept] = (tmp_path / "cache" / "tokenizers").iterdir()
    kept.write_text(kept.read_text("utf-8").replace("ByteLevel", "WordLevel", 1), encoding="utf-8")
    with caplog.at_level(logging.INFO):
        assert kept_files(find_tokenizer(wanted, config)[0]) == files
    assert "is damaged, or of another version: learning a tokenizer again" in caplog.text
    assert kept_files(find_tokenizer(TokenizerConfig("bpe", 301), config)[0]) != files
    other = replace(config, train_ratio=0.5)
    assert find_splits(other)[0].sha256 != splits[0].sha256
    assert kept_files(find_tokenizer(wanted, other)[0]) != files


def test_another_process_with_another_number_of_threads_learns_the_same(tmp_path: Path) -> None:
    config, wanted = data(tmp_path), TokenizerConfig("bpe", 600)
    process = FORKED.Process(target=_learn_with_one_thread, args=(config, wanted, tmp_path / "there"))
    process.start()
    here = kept_files(find_tokenizer(wanted, replace(config, cache_dir=str(tmp_path / "other")))[0])
    process.join(HANGS)
    assert (tmp_path / "there").read_bytes() == here["tokenizer.json"]


def _learn_with_one_thread(config: DataConfig, wanted: TokenizerConfig, to: Path) -> None:
    os.environ["RAYON_NUM_THREADS"] = "1"
    to.write_bytes(kept_files(find_tokenizer(wanted, config)[0])["tokenizer.json"])


def test_an_error_of_the_text_is_raised_and_stops_the_learner() -> None:
    @dataclass(frozen=True)
    class Unreadable(Written):
        def pieces(self) -> Iterator[str]:
            yield from super().pieces()
            raise UserError("the file changed")

    threads = threading.active_count()
    with pytest.raises(UserError, match="the file changed"):
        learn(Split(Unreadable([], text=TEXT), 0, len(TEXT), ""), 300)
    while threading.active_count() > threads:
        time.sleep(0.01)
