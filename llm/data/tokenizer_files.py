"""Tokenizers in Hugging Face's files, in and out.

Read are those of byte-level BPE, GPT-2's method, for which tiktoken gives the same ids for every text; others
are refused. A tokenizer that was read keeps its files, for the checkpoints and exports of what is trained
with it.
"""

import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from llm.errors import UserError, first_line
from llm.files import as_json, as_typed, refuse_stand_in

END_OF_TEXT = "<|endoftext|>"

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_OF_OTHER_METHODS = ("vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json")
VOCABULARIES = (*TOKENIZER_FILES[:3], *_OF_OTHER_METHODS)

# The patterns that are read, by which a text is cut into the words that are encoded one by one. Each matches
# every character, and means the same in Hugging Face's regex library as in tiktoken's.
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
# GPT-2's for what is left of a text once its digits are cut out, one by one or number by number. White space
# before them is then followed by nothing.
_DIGIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
_DIGITS = _DIGIT.replace(r"|\p{N}|", r"|\p{N}+|")
_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|"
    r"\s*[\r\n]|\s+(?!\S)|\s"
)  # tiktoken's; Hugging Face's regexes read {1,3}+ otherwise, but only exports of ours have had it
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
_LARGEST_ID = 2**24  # so that no table of all ids is large because a file says so
_GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")  # the first is what a folder means that does not say
# Of what tokenizer.json says, and no more; the latter two where it is a byte-level BPE.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizer", "LlamaTokenizerFast")
# By a config.json's `model_type`: the class that transformers 5 takes where a folder says none, and whether
# it does so whatever the folder says.
_CLASS_OF_MODEL = {
    "llama": (_PLAIN_CLASSES[0], False),
    "mistral": (_PLAIN_CLASSES[0], True),
    "qwen2": ("Qwen2Tokenizer", True),
    "qwen3": ("Qwen2Tokenizer", False),
}
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_GPT2_ROLES = ("bos_token", "eos_token", "unk_token")  # of `<|endoftext|>`, unless a folder says otherwise


def _byte_characters() -> list[str]:
    """A visible character for each byte, as in GPT-2's vocabulary file: bytes that are not a visible Latin-1
    character are given the code points from 256 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte if byte in visible else 256 + hidden.index(byte)) for byte in range(256)]


_CHARACTERS = _byte_characters()
BYTE_OF = {character: byte for byte, character in enumerate(_CHARACTERS)}


class FileEncoding(tiktoken.Encoding):
    """A tokenizer that was read from files. Its special tokens count in texts, as they do in transformers,
    where of tiktoken's own only the end of text does."""

    def __init__(
        self,
        name: str,
        *,
        pat_str: str,
        mergeable_ranks: dict[bytes, int],
        special_tokens: dict[str, int],
        parsed: frozenset[str],
        end_of_text: str | None,
        files: dict[str, bytes],
    ) -> None:
        """
        Args:
            parsed: the special tokens that are found in texts; the others can only be decoded.
            end_of_text: the one of them that ends a text, if any.
            files: what it was read from, by name.
        """
        super().__init__(
            name, pat_str=pat_str, mergeable_ranks=mergeable_ranks, special_tokens=special_tokens
        )
        self.parsed, self.end_of_text, self.files = parsed, end_of_text, files


def holds_tokenizer(folder: Path) -> bool:
    """Whether there is a vocabulary among the files of a folder, readable here or not."""
    return any((folder / name).exists() for name in VOCABULARIES)


def kept_files(encoding: tiktoken.Encoding) -> dict[str, bytes]:
    """The files to keep with a model, so that its tokenizer is never lost; none if its name is enough."""
    return encoding.files if isinstance(encoding, FileEncoding) else {}


def with_class(files: dict[str, bytes], name: str = "", always: bool = False) -> dict[str, bytes]:
    """A tokenizer's files with a class in tokenizer_config.json, for where no config.json says by the model's
    type which it is: there already, or, if that is so `always`, in its place."""
    about = json.loads(files.get("tokenizer_config.json", b"{}"))
    if about.get("tokenizer_class") and not always:
        return files
    about["tokenizer_class"] = name or _GPT2_CLASSES[0]
    return {**files, "tokenizer_config.json": as_json(about).encode()}


def _class_of_model(files: dict[str, bytes], folder: Path) -> dict[str, bytes]:
    """The files of a folder, with the class that its model's type means."""
    config = folder / "config.json"
    if not config.is_file():
        return files
    refuse_stand_in(config)
    described = json.loads(config.read_bytes())
    name, always = _CLASS_OF_MODEL.get(described.get("model_type"), ("", False))
    said = described.get("tokenizer_class")
    return with_class(files, name if always else said or name, always) if name or said else files


def read_tokenizer(path: Path) -> FileEncoding:
    """The tokenizer in a folder of Hugging Face's files, or in a file like tokenizer.json.

    Raises:
        UserError: there is none, it is damaged, or tiktoken would not give the same ids for every text.
    """
    path = as_typed(path)
    try:
        if path.is_file():
            found = {"tokenizer.json": path}
        else:
            found = {name: path / name for name in TOKENIZER_FILES if (path / name).exists()}
        for file in found.values():
            refuse_stand_in(file)
        files = {name: file.read_bytes() for name, file in found.items()}
        files = _class_of_model(files, path)
    except _DAMAGE as error:
        raise _damage(path, error) from error
    return from_files(files, path)


def from_files(files: dict[str, bytes], path: Path) -> FileEncoding:
    """The tokenizer that files describe, by their names; `path` is what messages call them. See
    `read_tokenizer`."""
    try:
        parts = _read(files, path)
        ranks = _ranks(parts, path)
        special = _special_tokens(parts, ranks, path)
    except _DAMAGE as error:
        raise _damage(path, error) from error
    return FileEncoding(
        "bpe",
        pat_str=parts.pattern,
        mergeable_ranks=ranks,
        special_tokens=special,
        parsed=frozenset(parts.added),
        end_of_text=parts.end_of_text,
        files=files,
    )


_DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


def _damage(path: Path, error: Exception) -> UserError:
    reason = first_line(error) if isinstance(error, OSError | ValueError) else "unexpected content"
    return UserError(f"the tokenizer in {path} is damaged or of another format: {reason}")


@dataclass
class _Parts:
    """What files say of a tokenizer."""

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    pattern: str
    ignore_merges: bool = (
        False  # whether a word that is a token is that token, whatever the merges make of it
    )
    added: dict[str, int] = field(default_factory=dict)  # tokens that are found in texts before all else
    end_of_text: str | None = None


def _refusal(path: Path, what: str) -> UserError:
    return UserError(
        f"the tokenizer in {path} {what}, and only byte-level BPE of GPT-2's kind is read: if you have one "
        f"that gives the same ids, give it with tokenizer.name=gpt2, bytes or FOLDER"
    )


def _read(files: dict[str, bytes], path: Path) -> _Parts:
    about = json.loads(files.get("tokenizer_config.json", b"{}"))
    kind = about.get("tokenizer_class") or _GPT2_CLASSES[0]
    if "tokenizer.json" in files:
        if kind not in (*_GPT2_CLASSES, *_PLAIN_CLASSES):
            raise _refusal(path, f"is a {kind}")
        described = json.loads(files["tokenizer.json"])
        _check_steps(described, path)
        model = described["model"]
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        pattern = _pattern(described.get("pre_tokenizer"), path)
        if kind in _GPT2_CLASSES and pattern != r50k_pat_str:
            raise UserError(
                f"{path}: tokenizer.json cuts words otherwise than {kind}, which transformers takes it for: "
                f'if it is right, write "tokenizer_class": "{_PLAIN_CLASSES[0]}" to its tokenizer_config.json'
            )
        merges, ignore_merges = [(one, other) for one, other in pairs], bool(model.get("ignore_merges"))
        parts = _Parts(dict(model["vocab"]), merges, pattern, ignore_merges)
        added = {token["content"]: token for token in described.get("added_tokens") or []}
    elif "vocab.json" in files and "merges.txt" in files:
        if kind not in _GPT2_CLASSES:
            raise _refusal(path, f"is a {kind} without a tokenizer.json")
        lines = files["merges.txt"].decode().split("\n")
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        vocab = dict(json.loads(files["vocab.json"]))
        parts, added = _Parts(vocab, [(one, other) for one, other in pairs], r50k_pat_str), {}
    else:
        missing = "no tokenizer.json, and no vocab.json with its merges.txt"
        if other := [name for name in _OF_OTHER_METHODS if (path / name).exists()]:
            raise _refusal(path, f"is {other[0]}, of another method than byte-level BPE")
        raise UserError(f"{path} holds {missing}: give a tokenizer with tokenizer.name=gpt2, bytes or FOLDER")
    for flag in ("add_prefix_space", "add_bos_token", "add_eos_token", "split_special_tokens"):
        if about.get(flag):
            raise _refusal(path, f"has {flag}=true")
    _add_tokens(parts, added, files, about, kind in _GPT2_CLASSES, path)
    return parts


def _check_steps(described: dict[str, Any], path: Path) -> None:
    """
    Raises:
        UserError: a step of a tokenizer.json would give other ids than tiktoken.
    """
    model = described["model"]
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise _refusal(path, f"is {model.get('type')}, not byte-level BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            raise _refusal(path, f"has {name}={model[name]}")
    if described.get("normalizer"):
        raise _refusal(path, f"changes texts first ({described['normalizer'].get('type')})")
    if (decoder := described.get("decoder")) and decoder.get("type") != "ByteLevel":
        raise _refusal(path, f"is decoded by {decoder.get('type')}")
    last = described.get("post_processor") or {"type": "ByteLevel"}
    for step in last["processors"] if last["type"] == "Sequence" else [last]:
        adds_nothing = step["type"] == "ByteLevel" or (
            step["type"] == "TemplateProcessing" and all("Sequence" in piece for piece in step["single"])
        )
        if not adds_nothing:
            raise _refusal(path, f"adds tokens to each text ({step['type']})")


def _pattern(steps: dict[str, Any] | None, path: Path) -> str:
    """The pattern that tiktoken is to cut words by."""
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
    if pattern is None or pattern not in _OTHER_PATTERNS:
        raise _refusal(path, "cuts texts into words by none of the known patterns")
    return pattern


def _add_tokens(
    parts: _Parts,
    added: dict[str, dict[str, Any]],
    files: dict[str, bytes],
    about: dict[str, Any],
    as_gpt2: bool,
    path: Path,
) -> None:
    """Find the tokens of `parts` that count wherever they stand in a text, and which of them ends it.

    Args:
        added: those of tokenizer.json, by their content.
    """
    numbered = [(content, token["id"], token) for content, token in added.items()]
    numbered += [
        (token["content"], int(number), token)
        for number, token in (about.get("added_tokens_decoder") or {}).items()
    ]
    numbered += [
        (content, number, {}) for content, number in json.loads(files.get("added_tokens.json", b"{}")).items()
    ]
    roles: dict[str, Any] = dict.fromkeys(_GPT2_ROLES, END_OF_TEXT) if as_gpt2 else {}
    roles |= json.loads(files.get("special_tokens_map.json", b"{}")) | about
    extra = [roles.get(name) or [] for name in ("additional_special_tokens", "extra_special_tokens")]
    named = [roles[role] for role in _ROLES if roles.get(role)]
    for each in extra:
        named += each.values() if isinstance(each, dict) else each
    flags = [token for _, _, token in numbered] + [token for token in named if isinstance(token, dict)]
    for token in flags:
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise _refusal(path, f"takes the space beside {token['content']} as part of it")
    for content, number, _ in numbered:
        if parts.added.setdefault(content, number) != number or parts.vocab.get(content, number) != number:
            raise _refusal(path, f"has two ids for {content}")
    for token in named:
        content = _content(token)
        if content not in parts.added:  # a new one gets the id that Hugging Face's library gives it
            after = max([len(parts.vocab) - 1, *parts.added.values()]) + 1
            parts.added[content] = parts.vocab.get(content, after)
    for one, other in pairwise(sorted(parts.added)):
        if other.startswith(one):
            raise _refusal(path, f"has an added token {one!r} that begins another one, {other!r}")
    if broken := [content for content in parts.added if content != "".join(content.split())]:
        raise _refusal(path, f"has an added token with a space, {broken[0]!r}")
    if roles.get("eos_token"):
        parts.end_of_text = _content(roles["eos_token"])
    elif END_OF_TEXT in parts.added:
        parts.end_of_text = END_OF_TEXT


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else token


def _ranks(parts: _Parts, path: Path) -> dict[bytes, int]:
    """The ids of all tokens that texts are merged into, by their bytes, in order.

    tiktoken merges any two pieces that make a token, the one of the lowest id first. That is what the list of
    merges says if ids are in its order, and if each token's merge is of those two pieces that are left of it
    after the merges before: then no other two pieces that make it are ever left side by side.
    """
    vocab = parts.vocab
    if any(type(number) is not int or not 0 <= number < _LARGEST_ID for number in vocab.values()):
        raise ValueError("an id is no number, or out of range")
    if len(set(vocab.values())) < len(vocab):
        raise ValueError("two tokens have one id")
    if missing := [character for character in _CHARACTERS if character not in vocab]:
        raise _refusal(path, f"has no token for {len(missing)} of the 256 bytes")
    ranks = {bytes([byte]): vocab[character] for byte, character in enumerate(_CHARACTERS)}
    merges: dict[bytes, list[bytes]] = {}
    before = -1
    for pair in parts.merges:
        number = vocab["".join(pair)]
        if number <= before:
            raise _refusal(path, "has ids in another order than its merges")
        before = number
        pieces = [bytes(BYTE_OF[character] for character in piece) for piece in pair]
        merges[b"".join(pieces)] = pieces
    ranks |= {token: vocab["".join(pair)] for token, pair in zip(merges, parts.merges, strict=True)}
    for token, pieces in merges.items():
        if merge_of(token, ranks[token], ranks) != pieces:
            raise _refusal(path, f"has a merge, of {pieces}, that the merges before it prevent")
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def _special_tokens(parts: _Parts, ranks: dict[bytes, int], path: Path) -> dict[str, int]:
    """The ids of tokens that no merge makes: those added, and what else the vocabulary lists."""
    taken = {*ranks.values(), *parts.added.values()}
    rest = {content: number for content, number in parts.vocab.items() if number not in taken}
    if rest and parts.ignore_merges:
        raise _refusal(path, f"has a token that no merge makes, {min(rest)!r}")
    special = dict(parts.added)
    for content, number in rest.items():
        spelled = set(content) <= BYTE_OF.keys()
        text = bytes(BYTE_OF[each] for each in content).decode(errors="replace") if spelled else content
        special.setdefault(text, number)
    if any(type(number) is not int or not 0 <= number < _LARGEST_ID for number in special.values()):
        raise ValueError("an id is no number, or out of range")
    if len({*ranks.values(), *special.values()}) < len(ranks) + len(special) or "" in special:
        raise _refusal(path, "has two tokens of one id, or an empty one")
    return special


def merge_of(token: bytes, rank: int, ranks: dict[bytes, int]) -> list[bytes]:
    """The two pieces that a token is merged from: those left after all merges of lower rank. More are left of
    what is no token of BPE."""
    pieces = [bytes([byte]) for byte in token]
    while len(pieces) > 2:
        pairs = [ranks.get(one + other, rank) for one, other in pairwise(pieces)]
        if (lowest := min(pairs)) >= rank:
            break
        place = pairs.index(lowest)
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    return pieces


def as_files(encoding: tiktoken.Encoding) -> dict[str, dict[str, Any]]:
    """What transformers opens as the same tokenizer: the content of each file, by its name."""
    ends = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    about = {"tokenizer_class": _PLAIN_CLASSES[0], "clean_up_tokenization_spaces": False, **ends}
    return {"tokenizer.json": as_huggingface(encoding), "tokenizer_config.json": about}


def as_huggingface(encoding: tiktoken.Encoding) -> dict[str, Any]:
    """The content of a Hugging Face `tokenizer.json` that gives the same token ids."""
    ranks = encoding._mergeable_ranks
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {
        "type": "Split",
        # As nothing follows this count, it need not be possessive, which Hugging Face would read otherwise.
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
    return "".join(_CHARACTERS[byte] for byte in token)
