"""Tokenizers read from Hugging Face's files.

Supported are tokenizers of byte-level BPE, GPT-2's method, for which tiktoken gives the same ids for every
text; others are refused. A tokenizer keeps the files that it was read from, for checkpoints and exports of
models that are trained with it.
"""

import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from llm.data.byte_level import BYTE_OF, CHARACTERS, END_OF_TEXT, PLAIN_CLASS, merge_of
from llm.data.tokenizer_patterns import pattern_of
from llm.errors import UserError, first_line
from llm.files import as_json, as_typed, refuse_stand_in

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

_LARGEST_ID = 2**24  # so that a file cannot make tables of all ids arbitrarily large
_GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")  # the first is the default of a folder that names none
# Classes that do exactly what tokenizer.json says; the latter two if it is a byte-level BPE.
_PLAIN_CLASSES = (PLAIN_CLASS, "TokenizersBackend", "LlamaTokenizer", "LlamaTokenizerFast")
# By a config.json's `model_type`: the class that transformers 5 uses if a folder names none, and whether it
# does so even if the folder names one.
_CLASS_OF_MODEL = {
    "llama": (PLAIN_CLASS, False),
    "mistral": (PLAIN_CLASS, True),
    "qwen2": ("Qwen2Tokenizer", True),
    "qwen3": ("Qwen2Tokenizer", False),
}
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_GPT2_ROLES = ("bos_token", "eos_token", "unk_token")  # of `<|endoftext|>`, unless a folder says otherwise


class FileEncoding(tiktoken.Encoding):
    """A tokenizer that was read from files. Its special tokens are recognised in texts, as in transformers;
    of tiktoken's own encodings, only the end of text is."""

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
            parsed: the special tokens that are recognised in texts; the others can only be decoded.
            end_of_text: which of them ends a text, if any.
            files: contents of the files that it was read from, by name.
        """
        super().__init__(
            name, pat_str=pat_str, mergeable_ranks=mergeable_ranks, special_tokens=special_tokens
        )
        self.parsed, self.end_of_text, self.files = parsed, end_of_text, files


def holds_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer's vocabulary, supported or not."""
    return any((folder / name).exists() for name in VOCABULARIES)


def kept_files(encoding: tiktoken.Encoding) -> dict[str, bytes]:
    """The files to keep with a model, so that its tokenizer is never lost; none if its name is enough."""
    return encoding.files if isinstance(encoding, FileEncoding) else {}


def with_class(files: dict[str, bytes], name: str = "", always: bool = False) -> dict[str, bytes]:
    """A tokenizer's files with its class in tokenizer_config.json, so that they mean the same without the
    model's config.json. A class that is named there already is kept, or replaced if `always`."""
    about = json.loads(files.get("tokenizer_config.json", b"{}"))
    if about.get("tokenizer_class") and not always:
        return files
    about["tokenizer_class"] = name or _GPT2_CLASSES[0]
    return {**files, "tokenizer_config.json": as_json(about).encode()}


def _class_of_model(files: dict[str, bytes], folder: Path) -> dict[str, bytes]:
    """The files of a folder, with the class that the model's type in its config.json implies."""
    config = folder / "config.json"
    if not config.is_file():
        return files
    refuse_stand_in(config)
    described = json.loads(config.read_bytes())
    name, always = _CLASS_OF_MODEL.get(described.get("model_type"), ("", False))
    said = described.get("tokenizer_class")
    return with_class(files, name if always else said or name, always) if name or said else files


def read_tokenizer(path: Path) -> FileEncoding:
    """Read the tokenizer in a folder with Hugging Face's files, or in a file like tokenizer.json.

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
    """The tokenizer described by files, given as contents by name. `path` is for messages. See
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
    """What files say about a tokenizer."""

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    pattern: str
    ignore_merges: bool = False  # whether a word that is a token skips the merges
    added: dict[str, int] = field(default_factory=dict)  # tokens that are recognised in texts first
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
        if (pattern := pattern_of(described.get("pre_tokenizer"))) is None:
            raise _refusal(path, "cuts texts into words by none of the known patterns")
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
    """Check that tiktoken does the same as each step of a tokenizer.json.

    Raises:
        UserError: a step would give other ids.
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


def _add_tokens(
    parts: _Parts,
    added: dict[str, dict[str, Any]],
    files: dict[str, bytes],
    about: dict[str, Any],
    as_gpt2: bool,
    path: Path,
) -> None:
    """Add to `parts` the tokens that are recognised anywhere in a text, and which of them ends it.

    Args:
        added: the added tokens of tokenizer.json, by content.
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
        if content not in parts.added:  # a new token gets the id that Hugging Face's library would give it
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
    """The ids of all tokens that merges can make, by their bytes, in order of id.

    tiktoken merges any two adjacent pieces that make a token, lowest id first. That is the same as the list
    of merges if ids are in its order, and if each token's merge joins the two pieces that are left of it
    after all merges before: then no other two pieces that make the token are ever adjacent.
    """
    vocab = parts.vocab
    if any(type(number) is not int or not 0 <= number < _LARGEST_ID for number in vocab.values()):
        raise ValueError("an id is no number, or out of range")
    if len(set(vocab.values())) < len(vocab):
        raise ValueError("two tokens have one id")
    if missing := [character for character in CHARACTERS if character not in vocab]:
        raise _refusal(path, f"has no token for {len(missing)} of the 256 bytes")
    ranks = {bytes([byte]): vocab[character] for byte, character in enumerate(CHARACTERS)}
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
    """The ids of tokens that no merge makes: the added ones, and any others in the vocabulary."""
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
