"""Shards: token ids in many files, read as one array that is never in memory as a whole.

Folders written by `experiments/prepare.py` have an index. Those of nanoGPT (`train.bin`, `val.bin`) and
modded-nanogpt (`*_train_*.bin`, `*_val_*.bin`) have none, and only the user knows which tokenizer they are
for.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from llm.progress import format_count

log = logging.getLogger(__name__)

INDEX, FORMAT = "index.json", "shards-1"
SETTINGS = "settings"  # fingerprint of what is written here; it marks a folder of shards
TOKENIZER = "tokenizer"  # folder with the tokenizer's files
SPLITS = ("training", "validation")

# The header of modded-nanogpt's files, as in llm.c: 256 int32, of which the first three are a magic number,
# the version, and how many uint16 tokens follow.
HEADER_BYTES, MAGIC, VERSION = 1024, 20240520, 1
UINT16 = np.dtype("<u2")


def shard_files(data: DataConfig, tokenizer: tiktoken.Encoding) -> tuple[TokenFile, TokenFile]:
    """The training and validation tokens of `data.path`, or of all folders of a mixture, one after the other.
    No token is read yet, so it takes no longer for more of them.

    Raises:
        UserError: there are no shards, or they are damaged or for another tokenizer.
    """
    folders = folders_of(data)
    opened = [open_folder(folder, tokenizer) for folder in folders]
    about = repr([folder.weight for folder in folders]) if data.mixture else ""
    return tuple(  # type: ignore[return-value]
        _joined([folder[split] for folder in opened], tokenizer, (about, "")[split]) for split in range(2)
    )


def _joined(files: list[TokenFile], tokenizer: tiktoken.Encoding, about: str) -> TokenFile:
    if len(files) == 1 and not about:
        return files[0]
    shards = [shard for file in files for shard in sharded(file).shards]
    digest = hashlib.sha256("".join([about, *(file.fingerprint for file in files)]).encode())
    sizes = [file.bytes for file in files]
    return TokenFile(
        ShardedTokens(shards, tokenizer.n_vocab),
        fingerprint_of_ids(tokenizer, digest.hexdigest()),
        None if None in sizes else sum(filter(None, sizes)),
        files[0].path,
    )


def sharded(file: TokenFile) -> ShardedTokens:
    assert isinstance(file.ids, ShardedTokens)
    return file.ids


@dataclass(frozen=True)
class Folder:
    path: Path
    weight: float
    count: int | None  # use only its first training shards; None: all


def folders_of(data: DataConfig) -> list[Folder]:
    """The folders of shards that `data.path` or `data.mixture` names.

    Raises:
        UserError: an entry of `data.mixture` has no weight above 0, or `data.shards` does not have one count
            per folder.
    """
    weighted = [_weighted(entry) for entry in data.mixture] or [(expanded(data.path or ""), 1.0)]
    if len({path for path, _ in weighted}) < len(weighted):
        raise UserError("data.mixture: a folder comes twice: give each one weight")
    if data.shards and len(data.shards) != len(weighted):
        raise UserError(
            f"data.shards={data.shards}: give one count for each folder, of which there are {len(weighted)}"
        )
    counts: Sequence[int | None] = data.shards or [None] * len(weighted)
    return [Folder(path, weight, count) for (path, weight), count in zip(weighted, counts, strict=True)]


def _weighted(entry: str) -> tuple[Path, float]:
    folder, _, weight = entry.rpartition(":")
    try:
        if folder and 0 < float(weight) < float("inf"):
            return expanded(folder), float(weight)
    except ValueError:
        pass
    raise UserError(f"data.mixture: {entry} must be FOLDER:WEIGHT, with a weight above 0, as in web:0.7")


def with_shards_there(data: DataConfig) -> DataConfig:
    """The config with the number of shards that exist now, if a folder is still being written, which is then
    logged. So all processes of a run, and resumed runs and reruns, use the same shards."""
    if data.source != "shards" or data.shards:
        return data
    counts, growing = [], False
    for folder in folders_of(data):
        index = read_record(folder.path / INDEX, FORMAT)
        counts.append(len(index["training"] if index else _foreign_files(folder.path, "train")))
        if index and not index.get("complete", True):
            growing = True
            tokens = format_count(sum(entry["tokens"] for entry in index["training"]))
            share = f", of about {index['share']:.0%} of the text" if index["share"] >= 0.01 else ""
            first = f"first {counts[-1]} shards" if counts[-1] > 1 else "first shard"
            log.info(
                "%s is still being written: %s training tokens in the %s are used%s",
                folder.path,
                tokens,
                first,
                share,
            )
    return replace(data, shards=counts) if growing and all(counts) else data


def folder_tokenizer(data: DataConfig, config: TokenizerConfig) -> tiktoken.Encoding:
    """The tokenizer of a run on shards: loaded by its name, or the one learnt when the shards were prepared.

    Raises:
        UserError: none was learnt, or one of another size; see `load_tokenizer`.
    """
    folder = folders_of(data)[0].path
    if config.name != LEARNT or config.vocab_size is None:
        return load_tokenizer(config.name)
    index = read_record(folder / INDEX, FORMAT)
    if index is None or index["tokenizer"]["asked"] != [LEARNT, config.vocab_size]:
        raise _other_tokenizer(folder, index, f"a learnt one of {config.vocab_size:,} tokens")
    return load_tokenizer(str(folder / TOKENIZER))


def _other_tokenizer(folder: Path, index: dict[str, Any] | None, wanted: str) -> UserError:
    if index is None:
        if not folder.exists() or (folder / SETTINGS).exists() or (folder / INDEX).exists():
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
            f"{folder} has no shard yet, or its index is damaged: wait for the first shard, or run the "
            f"experiments/prepare.py that makes them once more"
        )
    return UserError(
        f"data.path={folder}: no shards there; make them with experiments/prepare.py shards.path={folder}, "
        f"or give a folder with nanoGPT's train.bin and val.bin, or modded-nanogpt's"
    )


def open_folder(folder: Folder, tokenizer: tiktoken.Encoding) -> tuple[TokenFile, TokenFile]:
    """The training and the validation tokens of a folder; see `shard_files`."""
    try:
        is_ours = (folder.path / INDEX).exists()
        return _indexed(folder, tokenizer) if is_ours else _foreign(folder, tokenizer)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or folder.path}: {error.strerror}") from error


def _indexed(folder: Folder, tokenizer: tiktoken.Encoding) -> tuple[TokenFile, TokenFile]:
    index = read_record(folder.path / INDEX, FORMAT)
    if index is None:
        raise _no_shards(folder.path)
    if index["tokenizer"]["identity"] != identity_of(tokenizer):
        raise _other_tokenizer(folder.path, index, tokenizer.name)
    dtype, files = np.dtype(index["dtype"]), []
    for split in SPLITS:
        digest, shards = hashlib.sha256(), []
        entries = _used(folder, index, split)
        for entry in entries:
            path = folder.path / entry["file"]
            if path.stat().st_size != entry["tokens"] * dtype.itemsize:
                raise UserError(f"{path} is damaged: its size is not that of the index; prepare it once more")
            shards.append(Shard(path, entry["tokens"], dtype, documents=path.with_suffix(".documents")))
            digest.update(entry["sha256"].encode())
        tokens = ShardedTokens(shards, tokenizer.n_vocab)
        fingerprint = fingerprint_of_ids(tokenizer, digest.hexdigest())
        files.append(TokenFile(tokens, fingerprint, sum(entry["bytes"] for entry in entries), folder.path))
    return files[0], files[1]


def _used(folder: Folder, index: dict[str, Any], split: str) -> list[dict[str, Any]]:
    """The shards of a split that are used: the first `folder.count` for training, and for validation those
    held out of the same text."""
    if folder.count is None:
        return index[split]
    _refuse_more(folder, len(index["training"]))

    def place(entry: dict[str, Any]) -> list[int]:
        return [*map(int, Path(entry["file"]).stem.split("-")[1:])]

    last = place(index["training"][folder.count - 1])
    return [entry for entry in index[split] if place(entry) <= last]


def _refuse_more(folder: Folder, there: int) -> None:
    if (folder.count or 0) > there:
        raise UserError(f"data.shards: {folder.path} has {there} of the {folder.count} shards asked for")


def _foreign(folder: Folder, tokenizer: tiktoken.Encoding) -> tuple[TokenFile, TokenFile]:
    """The training and validation tokens of nanoGPT's or modded-nanogpt's files, found by their names."""
    files = []
    for part in ("train", "val"):
        paths = _foreign_files(folder.path, part)
        if not paths:
            raise _no_shards(folder.path)
        if part == "train" and folder.count:
            _refuse_more(folder, len(paths))
            paths = paths[: folder.count]
        shards = [_foreign_shard(path) for path in paths]
        digest = hashlib.sha256()
        for shard in shards:  # hash only its beginning and end, as all of it takes minutes
            with shard.path.open("rb") as content:
                digest.update(f"{shard.path.name} {shard.tokens} ".encode() + content.read(1 << 16))
                content.seek(max(0, shard.begin + 2 * shard.tokens - (1 << 16)))
                digest.update(content.read())
        tokens = ShardedTokens(shards, tokenizer.n_vocab)
        fingerprint = fingerprint_of_ids(tokenizer, digest.hexdigest())
        files.append(TokenFile(tokens, fingerprint, None, folder.path))
    return files[0], files[1]


def _foreign_files(folder: Path, part: str) -> list[Path]:
    return sorted(path for path in folder.glob("*.bin") if part in path.stem.split("_"))


def _foreign_shard(path: Path) -> Shard:
    size = path.stat().st_size
    with path.open("rb") as content:
        header = np.frombuffer(content.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"), "<i4")
    if header[0] != MAGIC:
        if size % 2:
            raise UserError(f"{path} is damaged: a file of uint16 has an even number of bytes")
        if header[0] and size > HEADER_BYTES and not header[4:].any():
            raise UserError(
                f"{path} begins with a header of another format (number {header[0]}): modded-nanogpt's has "
                f"{MAGIC}, and nanoGPT's files have none"
            )
        return Shard(path, size // 2, UINT16)
    if header[1] != VERSION:
        raise UserError(f"{path}: version {header[1]} of its format is unknown; version {VERSION} is read")
    if size != HEADER_BYTES + 2 * int(header[2]):
        raise UserError(
            f"{path} is damaged: its header says {header[2]:,} tokens, and its size says otherwise"
        )
    return Shard(path, int(header[2]), UINT16, HEADER_BYTES)
