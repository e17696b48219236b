"""Tokenizers from Hugging Face's files, against transformers' with the same files; others are refused."""

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import ByteLevelBPETokenizer, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from llm.data.token_file import encode_pieces
from llm.data.tokenizer import (
    bytes_of_tokens,
    encode,
    end_of_text_id,
    fingerprint,
    load_tokenizer,
    token_ids_to_text,
)
from llm.data.tokenizer_patterns import _GPT2_PATTERNS, _OTHER_PATTERNS
from llm.errors import UserError

TRAINED_ON = [
    Path(__file__).read_text("utf-8"),
    "It's 12345 o'clock, ain't it? naïve café — 日本語 🙂 don't WE'LL we'll \n\n\n \t x\r\n" * 20,
]
SPECIAL = ["<s>", "<pad>", "</s>", "<|endoftext|>"]
PATTERNS = [pattern for pattern in (*_GPT2_PATTERNS, *_OTHER_PATTERNS) if "{1,3}+" not in pattern]


def texts() -> list[str]:
    draw = random.Random(0)
    letters = [chr(code) for code in range(0x20, 0x3000, 7)] + [*" \n\t\r'sdmtlvre12345 "] * 60
    drawn = ["".join(draw.choice(letters) for _ in range(draw.randint(1, 60))) for _ in range(300)]
    hard = [
        "",
        " ",
        "\n\n ",
        "<s>Hello</s><|endoftext|><pad> x",
        "'S 's ſ'ſ",
        "\x00\x1c\x85\u180e\u2028x \x0b",
    ]
    return [*drawn, *hard, *TRAINED_ON]


def bpe(special: list[str]) -> ByteLevelBPETokenizer:
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(TRAINED_ON, vocab_size=500, special_tokens=special, show_progress=False)
    return tokenizer


def write(folder: Path, name: str, value: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def vocabulary_alone(folder: Path, special: list[str]) -> None:
    folder.mkdir()
    bpe(special).save_model(str(folder))


def one_file(folder: Path, **about: Any) -> None:
    folder.mkdir()
    bpe(SPECIAL).save(str(folder / "tokenizer.json"))
    if about:
        write(folder, "tokenizer_config.json", about)


def as_transformers_saves(folder: Path) -> None:
    vocabulary_alone(folder, SPECIAL)
    write(folder, "config.json", {"model_type": "gpt2"})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<user>", "(R)"])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    for file in folder.iterdir():
        file.unlink()
    tokenizer.save_pretrained(folder)


def with_pattern(folder: Path, pattern: str) -> None:
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TRAINED_ON, trainer)
    write(folder, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    "make",
    [
        partial(vocabulary_alone, special=SPECIAL),
        partial(vocabulary_alone, special=[]),  # transformers adds an end of text
        one_file,
        partial(one_file, tokenizer_class="PreTrainedTokenizerFast", eos_token="</s>"),
        as_transformers_saves,
        *(partial(with_pattern, pattern=pattern) for pattern in PATTERNS),
    ],
)
def test_ids_and_texts_are_transformers(tmp_path: Path, make: Callable[[Path], None]) -> None:
    folder = tmp_path / "theirs"
    make(folder)
    ours = load_tokenizer(str(folder))
    write(folder, "config.json", {"model_type": "gpt2"})
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in texts():
        if theirs.eos_token == "<|endoftext|>" or "<|endoftext|>" not in text:
            ids = theirs.encode(text)
            assert encode(text, ours) == ids, text
            assert token_ids_to_text(torch.tensor(ids, dtype=torch.long), ours) == theirs.decode(ids)
    if theirs.eos_token_id is not None:  # named or not, `<|endoftext|>` ends a text here
        assert end_of_text_id(ours) == theirs.eos_token_id
    for token_id in range(len(theirs)):
        assert token_ids_to_text(torch.tensor([token_id]), ours) == theirs.decode([token_id])


def test_an_end_of_text_of_another_name_ends_texts(tmp_path: Path) -> None:
    one_file(tmp_path / "theirs", tokenizer_class="PreTrainedTokenizerFast", eos_token="</s>")
    write(tmp_path / "theirs", "tokenizer.json", _without_end(tmp_path / "theirs"))
    ours = load_tokenizer(str(tmp_path / "theirs"))
    assert encode("a<|endoftext|>b", ours) == [*encode("a", ours), 2, *encode("b", ours)]
    ids = np.concatenate([ids for _, ids in encode_pieces(["a<|endoftext|>b"], ours)])
    assert ids.tolist() == encode("a<|endoftext|>b", ours)
    lengths = bytes_of_tokens(ours, ours.n_vocab)
    assert lengths[encode("é<|endoftext|> <pad>", ours)].sum() == len("é <pad>".encode())


def _without_end(folder: Path) -> dict[str, Any]:
    described = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    described["added_tokens"] = [each for each in described["added_tokens"] if each["content"] != SPECIAL[3]]
    del described["model"]["vocab"][SPECIAL[3]]
    return described


def test_other_tokenizers_have_other_fingerprints(tmp_path: Path) -> None:
    one_file(tmp_path / "one")
    one_file(tmp_path / "same")
    one_file(tmp_path / "other", eos_token="</s>")
    one, same, other = (
        fingerprint(load_tokenizer(str(tmp_path / name))) for name in ("one", "same", "other")
    )
    assert one == same
    assert one != other


def _edited(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    one_file(folder)
    described = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    edit(described)
    write(folder, "tokenizer.json", described)


def _swap_ids(described: dict[str, Any]) -> None:
    vocab = described["model"]["vocab"]
    one, other = ("".join(described["model"]["merges"][number]) for number in (3, 7))
    vocab[one], vocab[other] = vocab[other], vocab[one]


def _swap_merges(described: dict[str, Any]) -> None:
    """The same ids in order of the merges, and a merge whose pieces an earlier one joins."""
    model = described["model"]
    model["merges"] += [["Q", "X"], ["X", "Z"], ["Q", "XZ"]]
    model["vocab"] |= {
        token: len(model["vocab"]) + number for number, token in enumerate(["QX", "XZ", "QXZ"])
    }


ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (lambda d: d["model"].update(type="WordPiece"), "is WordPiece, not byte-level BPE"),
        (lambda d: d["model"].update(type="Unigram", vocab=[["a", 0.5]]), "is Unigram, not byte-level BPE"),
        (lambda d: d["model"].update(dropout=0.1), "has dropout=0.1"),
        (lambda d: d["model"].update(byte_fallback=True), "has byte_fallback=True"),
        (lambda d: d["model"].update(end_of_word_suffix="</w>"), "has end_of_word_suffix=</w>"),
        (lambda d: d.update(normalizer={"type": "NFC"}), r"changes texts first \(NFC\)"),
        (lambda d: d.update(pre_tokenizer={"type": "Whitespace"}), "by none of the known patterns"),
        (lambda d: d.update(pre_tokenizer=None), "by none of the known patterns"),
        (lambda d: d["pre_tokenizer"].update(add_prefix_space=True), "by none of the known patterns"),
        (lambda d: d.update(decoder={"type": "WordPiece"}), "is decoded by WordPiece"),
        (
            lambda d: d.update(
                post_processor={"type": "TemplateProcessing", "single": [{"SpecialToken": {}}]}
            ),
            r"adds tokens to each text \(TemplateProcessing\)",
        ),
        (_swap_ids, "has ids in another order than its merges"),
        (_swap_merges, "that the merges before it prevent"),
        (lambda d: d["model"]["vocab"].pop("Q"), "has no token for 1 of the 256 bytes"),
        (lambda d: d["added_tokens"].append({"id": 9, "content": "<s>", **ADDED}), "has two ids for <s>"),
        (lambda d: d["added_tokens"].append({"id": 9, "content": "<x>", **ADDED}), "two tokens of one id"),
        (
            lambda d: d["added_tokens"].append({"id": 900, "content": "<pad>>", **ADDED}),
            "'<pad>' that begins another one, '<pad>>'",
        ),
        (lambda d: d["added_tokens"].append({"id": 900, "content": "a b", **ADDED}), "with a space, 'a b'"),
        (lambda d: d["added_tokens"][0].update(lstrip=True), "takes the space beside <s> as part of it"),
        (lambda d: d["model"]["vocab"].update(a=10**9), "an id is no number, or out of range"),
        (lambda d: d["model"]["vocab"].update(a="7"), "an id is no number, or out of range"),
        (lambda d: d["model"]["vocab"].update(a=7), "two tokens have one id"),
        (lambda d: d["model"].update(merges=[["Q"]]), "is damaged or of another format"),
        (lambda d: d["model"].update(merges=[["Q", "QQQ"]]), "is damaged or of another format"),
        (lambda d: d.update(model=5), "is damaged or of another format"),
    ],
)
def test_what_tiktoken_would_not_do_is_refused(
    tmp_path: Path, edit: Callable[[dict[str, Any]], Any], line: str
) -> None:
    _edited(tmp_path / "theirs", edit)
    with pytest.raises(UserError, match=line) as error:
        load_tokenizer(str(tmp_path / "theirs"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("about", "line"),
    [
        ({"tokenizer_class": "RobertaTokenizer"}, "is a RobertaTokenizer"),
        ({"add_bos_token": True}, "has add_bos_token=true"),
        ({"add_prefix_space": True}, "has add_prefix_space=true"),
    ],
)
def test_what_its_config_asks_for_is_refused(tmp_path: Path, about: dict[str, Any], line: str) -> None:
    one_file(tmp_path / "theirs", **about)
    with pytest.raises(UserError, match=line):
        load_tokenizer(str(tmp_path / "theirs"))


def test_other_files_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    with_pattern(folder, PATTERNS[-1])
    (folder / "tokenizer_config.json").unlink()  # transformers 5 then takes GPT-2's pattern, and 4 the file's
    with pytest.raises(UserError, match="cuts words otherwise than GPT2Tokenizer"):
        load_tokenizer(str(folder))
    (folder / "tokenizer.json").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1")
    with pytest.raises(UserError, match=r"tokenizer\.json is a git-LFS pointer"):
        load_tokenizer(str(folder))
    (folder / "tokenizer.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match="is damaged or of another format"):
        load_tokenizer(str(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"holds no tokenizer\.json, and no vocab\.json with its merges\.txt"):
        load_tokenizer(str(folder))
    (folder / "spiece.model").touch()
    with pytest.raises(UserError, match=r"is spiece\.model, of another method than byte-level BPE"):
        load_tokenizer(str(folder))


def test_its_special_tokens_are_never_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a text that is encoded in pieces, wherever they end: also one longer than what is looked at."""
    special = ["<s>", "</s>", "(R)", f"<|{'long' * 20}|>"]
    one = tmp_path / "one"
    one.mkdir()
    bpe(special).save(str(one / "tokenizer.json"))
    write(one, "tokenizer_config.json", {"eos_token": "</s>"})
    tokenizer = load_tokenizer(str(one))
    draw = random.Random(1)
    words = [*special, "<|endoftext|>", " a", "b", ")", "(", "<", "|>", "\n", "  ", "0"]
    for size in (20, 300):
        monkeypatch.setattr("llm.data.pieces.PIECE_CHARACTERS", size)
        for _ in range(20):
            text = "".join(draw.choices(words, k=400))
            in_pieces = [int(token_id) for _, ids in encode_pieces([text], tokenizer) for token_id in ids]
            assert in_pieces == encode(text, tokenizer)
