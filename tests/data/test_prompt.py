"""The prompt that is taken from a text."""

import numpy as np
import pytest

from llm.data.prompt import first_line
from llm.data.tokenizer import bytes_encoding, encode


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("nd of a line\n\n  The next one\nand more\n", "The next one"),
        ("cut\n---\n| a | b |\n", "| a | b |"),  # the first that says something
        ("cut\nA line that is so long that it has to end before it does\n", "A line that is so long that it"),
        ("ut word and then no line ends at all, for ever", "word and then no line ends at"),
        ("end of one<|endoftext|>Another document\n", "Another document"),
        ("天地玄黄" * 20, "天地玄黄" * 8),
        ("Все счастливые\nсемьи похожи", "семьи похожи"),
        ("acgt" * 20, "acgt" * 8),
        ("!?\n😀😁", "😀😁"),
        (" \n\t", " "),
    ],
)
def test_it_is_the_beginning_of_a_line(text: str, prompt: str) -> None:
    tokenizer = bytes_encoding()
    assert first_line(np.array(encode(text, tokenizer)), tokenizer) == prompt
