"""The regular expressions by which tokenizers divide a text into words, which are encoded one by one."""

from typing import Any

from tiktoken_ext.openai_public import r50k_pat_str

# The supported patterns. Each matches every character, and means the same in Hugging Face's regex library as
# in tiktoken's.
_GPT2_PATTERNS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r50k_pat_str,
)  # as OpenAI wrote it, and as tiktoken does
BYTES_PATTERN = r"[\s\S]"  # any character, newlines included, in every regex dialect
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
# GPT-2's pattern, after digits have been cut out one by one, or number by number. White space before a number
# is then at the end of a text.
_DIGIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
_DIGITS = _DIGIT.replace(r"|\p{N}|", r"|\p{N}+|")
_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|"
    r"\s*[\r\n]|\s+(?!\S)|\s"
)  # tiktoken's; Hugging Face's regexes read {1,3}+ differently, but only our own old exports have it
_OTHER_PATTERNS = (
    BYTES_PATTERN,
    _DIGIT,
    _DIGITS,
    rf"{_ENDINGS}|{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}",  # Llama 3's
    rf"{_ENDINGS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}",  # Qwen 2's
    _CL100K,
    _CL100K.replace("{1,3}+", "{1,3}"),
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}?|"
    rf"\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}",  # tiktoken's o200k_base
)


def pattern_of(steps: dict[str, Any] | None) -> str | None:
    """The pattern for tiktoken that does the same as the pre_tokenizer of a tokenizer.json; None if it is not
    a supported one."""
    pattern: str | None
    byte_level, pattern = steps or {}, _GPT2_PATTERNS[0]
    if byte_level.get("type") == "Sequence" and len(byte_level["pretokenizers"]) == 2:
        split, byte_level = byte_level["pretokenizers"]
        plain = (split.get("type"), split.get("behavior"), split.get("invert")) == (
            "Split",
            "Isolated",
            False,
        )
        if split.get("type") == "Digits" and byte_level.get("use_regex", True):
            pattern = _DIGIT if split["individual_digits"] else _DIGITS
        elif plain and byte_level.get("use_regex") is False:
            pattern = split["pattern"].get("Regex")
        else:
            pattern = None
    elif not byte_level.get("use_regex", True):
        pattern = None
    if byte_level.get("type") != "ByteLevel" or byte_level.get("add_prefix_space"):
        pattern = None
    if pattern in _GPT2_PATTERNS:
        return r50k_pat_str
    return pattern if pattern in _OTHER_PATTERNS else None
