"""Shards: token ids in many files, with an index of what they are, read as one array that is never in memory.

A folder of `experiments/prepare.py` has an index. Folders of nanoGPT (`train.bin`, `val.bin`) and
modded-nanogpt (`*_train_*.bin`, `*_val_*.bin`) have none; which tokenizer they are of, only the user knows.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from llm.config import DataConfig, TokenizerConfig
from llm.data.cache import read_record
from llm.data.tokenizer import LEARNT, fingerprint_of_ids, identity_of, load_tokenizer
from llm.data.tokens import Shard, ShardedTokens, TokenFile
from llm.errors import UserError
from llm.files import expanded

INDEX, FORMAT = "index.json", "shards-1"
SETTINGS = "settings"  # of whoever writes here: from then on it is a folder of shards
TOKENIZER = "tokenizer"  # folder of the tokenizer's files
SPLITS = ("training", "validation")

# The header of modded-nanogpt's files, as llm.c's: 256 int32, of which the first three are a number that
# tells them, the version and how many tokens follow, as uint16.
HEADER_BYTES, MAGIC, VERSION = 1024, 20240520, 1


def shard_files(data: DataConfig, tokenizer: tiktoken.Encoding) -> tuple[TokenFile, TokenFile]:
    """The tokens of the training and of the validation split of `data.path`, or of all folders of a mixture,
    one after the other. No token is read, so that it takes no longer for more of them.

    Raises:
        UserError: there are no shards, they are damaged, or of another tokenizer.
    """
    opened = [open_folder(folder, tokenizer) for folder, _ in weighted_folders(data)]
    about = repr([weight for _, weight in weighted_folders(data)]) if data.mixture else ""
    return tuple(  # type: ignore[return-value]
        _joined([folder[split] for folder in opened], tokenizer, (about, "")[split]) for split in range(2)
    )


def _joined(files: list[TokenFile], tokenizer: tiktoken.Encoding, about: str) -> TokenFile:
    if len(files) == 1 and not about:
        return files[0]
    shards = [shard for file in files for shard in sharded(file).shards]
    dtypes = {sharded(file).dtype for file in files}
    if len(dtypes) > 1:
        raise UserError("data.mixture: its folders hold integers of different sizes; prepare them alike")
    digest = hashlib.sha256("".join([about, *(file.fingerprint for file in files)]).encode())
    sizes = [file.bytes for file in files]
    return TokenFile(
        ShardedTokens(shards, dtypes.pop(), tokenizer.n_vocab),
        fingerprint_of_ids(tokenizer, digest.hexdigest()),
        None if None in sizes else sum(filter(None, sizes)),
        files[0].path,
    )


def sharded(file: TokenFile) -> ShardedTokens:
    assert isinstance(file.ids, ShardedTokens)
    return file.ids


def weighted_folders(data: DataConfig) -> list[tuple[Path, float]]:
    """The folders of shards and their weights.

    Raises:
        UserError: an entry of `data.mixture` has no weight above 0.
    """
    if not data.mixture:
        return [(expanded(data.path or ""), 1.0)]
    found = []
    for entry in data.mixture:
        folder, _, weight = entry.rpartition(":")
        try:
            found.append((expanded(folder), float(weight)))
        except ValueError:
            weight = ""
        if not folder or not weight or not 0 < found[-1][1] < float("inf"):
            raise UserError(
                f"data.mixture: {entry} must be FOLDER:WEIGHT, with a weight above 0, as in web:0.7"
            )
    if len({folder for folder, _ in found}) < len(found):
        raise UserError("data.mixture: a folder comes twice: give each one weight")
    return found


def folder_tokenizer(data: DataConfig, config: TokenizerConfig) -> tiktoken.Encoding:
    """The tokenizer that a run on shards asks for: by its name, or the one learnt when they were prepared.

    Raises:
        UserError: none was learnt, or one of another size; see `load_tokenizer`.
    """
    folder = weighted_folders(data)[0][0]
    if config.name != LEARNT or config.vocab_size is None:
        return load_tokenizer(config.name)
    index = read_record(folder / INDEX, FORMAT)
    if index is None or index["tokenizer"]["asked"] != [LEARNT, config.vocab_size]:
        raise _other_tokenizer(folder, index, f"a learnt one of {config.vocab_size:,} tokens")
    return load_tokenizer(str(folder / TOKENIZER))


def _other_tokenizer(folder: Path, index: dict[str, Any] | None, wanted: str) -> UserError:
    if index is None:
        if not folder.exists() or any(folder.glob("*.json")):
            return _no_shards(folder)
        return UserError(f"{folder} does not say its tokenizer: give it, as in tokenizer=gpt2")
    name, size = index["tokenizer"]["asked"]
    right = f"tokenizer=bpe tokenizer.vocab_size={size}" if name == LEARNT else f"tokenizer.name={name}"
    if name in ("gpt2", "bytes"):
        right = f"tokenizer={name}"
    return UserError(f"{folder} holds tokens of another tokenizer than {wanted}: give {right}")


def _no_shards(folder: Path) -> UserError:
    if (folder / SETTINGS).exists():
        return UserError(
            f"{folder}: its shards are not complete, or its index is damaged; run the experiments/prepare.py "
            f"that made them once more"
        )
    return UserError(
        f"data.path={folder}: no shards there; make them with experiments/prepare.py shards.path={folder}, "
        f"or give a folder with nanoGPT's train.bin and val.bin, or modded-nanogpt's"
    )


def open_folder(folder: Path, tokenizer: tiktoken.Encoding) -> tuple[TokenFile, TokenFile]:
    """The training and the validation tokens of a folder; see `shard_files`."""
    try:
        return _indexed(folder, tokenizer) if (folder / INDEX).exists() else _foreign(folder, tokenizer)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or folder}: {error.strerror}") from error


def _indexed(folder: Path, tokenizer: tiktoken.Encoding) -> tuple[TokenFile, TokenFile]:
    index = read_record(folder / INDEX, FORMAT)
    if index is None:
        raise _no_shards(folder)
    if index["tokenizer"]["identity"] != identity_of(tokenizer):
        raise _other_tokenizer(folder, index, tokenizer.name)
    dtype, files = np.dtype(index["dtype"]), []
    for split in SPLITS:
        digest, shards = hashlib.sha256(), []
        for entry in index[split]:
            path = folder / entry["file"]
            if path.stat().st_size != entry["tokens"] * dtype.itemsize:
                raise UserError(f"{path} is damaged: its size is not that of the index; prepare it once more")
            shards.append(Shard(path, entry["tokens"], documents=path.with_suffix(".documents")))
            digest.update(entry["sha256"].encode())
        tokens = ShardedTokens(shards, dtype, tokenizer.n_vocab)
        fingerprint = fingerprint_of_ids(tokenizer, digest.hexdigest())
        files.append(TokenFile(tokens, fingerprint, sum(entry["bytes"] for entry in index[split]), folder))
    return files[0], files[1]


def _foreign(folder: Path, tokenizer: tiktoken.Encoding) -> tuple[TokenFile, TokenFile]:
    """Of nanoGPT's or modded-nanogpt's files, by their names."""
    files = []
    for part in ("train", "val"):
        paths = sorted(path for path in folder.glob("*.bin") if part in path.stem.split("_"))
        if not paths:
            raise _no_shards(folder)
        shards = [_foreign_shard(path) for path in paths]
        digest = hashlib.sha256()
        for shard in shards:  # not of all, as that takes minutes: of the beginning and the end
            with shard.path.open("rb") as content:
                digest.update(f"{shard.path.name} {shard.tokens} ".encode() + content.read(1 << 16))
                content.seek(max(0, shard.begin + 2 * shard.tokens - (1 << 16)))
                digest.update(content.read())
        tokens = ShardedTokens(shards, np.dtype("<u2"), tokenizer.n_vocab)
        fingerprint = fingerprint_of_ids(tokenizer, digest.hexdigest())
        files.append(TokenFile(tokens, fingerprint, None, folder))
    return files[0], files[1]


def _foreign_shard(path: Path) -> Shard:
    size = path.stat().st_size
    with path.open("rb") as content:
        header = np.frombuffer(content.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"), "<i4")
    if header[0] != MAGIC:
        if size % 2:
            raise UserError(f"{path} is damaged: a file of uint16 has an even number of bytes")
        return Shard(path, size // 2)
    if header[1] != VERSION:
        raise UserError(f"{path}: version {header[1]} of its format is unknown; version {VERSION} is read")
    if size != HEADER_BYTES + 2 * int(header[2]):
        raise UserError(
            f"{path} is damaged: its header says {header[2]:,} tokens, and its size says otherwise"
        )
    return Shard(path, int(header[2]), HEADER_BYTES)
