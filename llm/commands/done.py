"""Recognising runs that need not be made again, as they were made with the same config, code and data."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Collection
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llm
from llm.checkpoints.checkpoint import CHECKSUMS, find_checkpoint
from llm.checkpoints.opening import is_ours
from llm.config import AUTO, EvaluateConfig, GenerateConfig, PretrainConfig
from llm.config_rules import validate
from llm.data.bpe import find_tokenizer
from llm.data.corpus import find_splits
from llm.data.decoding import is_jsonl
from llm.data.text_files import find_files
from llm.data.token_file import token_files
from llm.files import as_typed, parse_json, read_content, remove, replacing, sha256, write_json
from llm.launched import launched_processes
from llm.run_folder import FINGERPRINT, LOCK, SUMMARY, read_summary, write_summary
from llm.runs import OUTPUTS, folders_with
from llm.runtime import device_kind
from llm.training.update_size import DEVICE_KEYS

RECORD_BYTES = 10_000  # more is no such record

# Keys that do not change what comes out. The text counts by its content, and weights by theirs.
IRRELEVANT = ("if_done", "tracking", "quiet", "resume", "checkpoint", "init_from", "prompt_file", "path")
OF_WEIGHTS = "model", "model.context_length", "model.n_heads", "tokenizer", "tokenizer.name"
OF_DATA = ("source", "path", "cache_dir")
# Not copied from a run's folder: what says where and how it was started, and what is unfinished.
NOT_TAKEN, NOT_TAKEN_SUFFIXES = (LOCK, ".hydra", "wandb"), (".log", ".tmp")

log = logging.getLogger(__name__)

Repeatable = PretrainConfig | GenerateConfig | EvaluateConfig


def fingerprint(config: Repeatable, given: Collection[str] = ()) -> str | None:
    """A hash of everything that determines the outcome of a run: all keys, this package's code, torch's
    version, the kind of device, the number of processes, and the content of texts and weights. None if that
    is not known in advance.

    Args:
        given: see llm/commands/pretrain.py. A value that was not given may be left to the device or to given
            weights, and then does not count.

    Raises:
        UserError: a value is out of range, or a text or a checkpoint does not exist.
    """
    validate(config)
    about = {name: value for name, value in asdict(config).items() if name not in IRRELEVANT}
    read: list[str] = []
    match config:
        case PretrainConfig():
            about["data"] = {key: value for key, value in about["data"].items() if key not in OF_DATA}
            about["checkpoint"] = asdict(config.checkpoint)
            about["given"] = sorted({*given} & _left_open(config))
            read = _text(config)
            read += [_weights(config.init_from)] if config.init_from else []
        case GenerateConfig(prompt_file="-") | EvaluateConfig(text=str()):
            return None  # standard input can be read only once; and a text is evaluated in no time
        case GenerateConfig():
            read = [_weights(config.checkpoint), *_content(config.prompt_file, "prompt_file")]
        case EvaluateConfig():
            read = [_weights(config.checkpoint), *_content(config.path, "path")]
    if config.tokenizer.name:
        read.append(_weights(config.tokenizer.name))  # perhaps a folder
    made_with = [_code(), version("torch"), device_kind(config.runtime), launched_processes()]
    described = json.dumps([type(config).__name__, about, read, made_with], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


def _left_open(config: PretrainConfig) -> set[str]:
    """The keys and groups whose values in the config do not count unless they were given."""
    by_device = config.data.batch_size == AUTO or device_kind(config.runtime) == "cuda"
    return {*(DEVICE_KEYS if by_device else ()), *(OF_WEIGHTS if config.init_from else ())}


@cache
def _code() -> str:
    files = sorted(Path(llm.__file__).parent.rglob("*.py"))
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


def _weights(name: str) -> str:
    """Identifies the weights or the tokenizer of a name. Those of other programs count as unchanged as long
    as their files have the same sizes and times."""
    if is_ours(name):
        return sha256(find_checkpoint(name) / CHECKSUMS)
    if not (path := Path(name)).exists():
        return name  # on the hub
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return repr([(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files])


def _text(config: PretrainConfig) -> list[str]:
    """Identifies the content of both splits."""
    if config.data.source != "shards":
        return [split.sha256 for split in find_splits(config.data)]
    tokenizer, _ = find_tokenizer(config.tokenizer, config.data)
    return [file.fingerprint for file in token_files(config.data, tokenizer)]


def _content(path: str | None, key: str) -> list[str]:
    """Fingerprints of files: their content, and whether it is read as JSON lines."""
    if path is None:
        return []
    return [f"{sha256(file)}, JSON lines: {is_jsonl(file)}" for file in find_files(path, key)]


def begin(run_dir: Path, identity: str) -> None:
    """Record a run's fingerprint, before it begins."""
    _write(run_dir, identity, is_done=False)


def end(run_dir: Path) -> None:
    """Record that a run is done, unless its summary says that it was stopped early."""
    if (recorded := _recorded(run_dir)) and read_summary(run_dir).get("status", "finished") == "finished":
        _write(run_dir, recorded["fingerprint"], is_done=True)


def resume(run_dir: Path, is_changed: bool) -> None:
    """Record that a run is resumed. With another config or code, its fingerprint no longer holds."""
    recorded = _recorded(run_dir)
    if not recorded or is_changed or recorded["code"] != _code():
        remove(run_dir / FINGERPRINT)


def _write(run_dir: Path, identity: str, is_done: bool) -> None:
    write_json(run_dir / FINGERPRINT, {"fingerprint": identity, "code": _code(), "done": is_done})


def _recorded(run_dir: Path) -> dict[str, Any]:
    record = parse_json(read_content(run_dir / FINGERPRINT, RECORD_BYTES))
    kinds = {"fingerprint": str, "code": str, "done": bool}
    is_whole = isinstance(record, dict) and all(type(record.get(key)) is kind for key, kind in kinds.items())
    return record if is_whole else {}


def find_done(identity: str, root: Path = OUTPUTS) -> Path | None:
    """The newest finished run below a folder with this fingerprint; None if there is none."""
    found = []
    for folder in folders_with(root, FINGERPRINT):
        recorded = _recorded(folder)
        if recorded and recorded["done"] and recorded["fingerprint"] == identity:
            found.append(folder)
    return max(found, key=lambda folder: (folder / FINGERPRINT).stat().st_mtime, default=None)


def copy_run(done: Path, run_dir: Path) -> None:
    """Copy a finished run into another folder, and record that in its summary. Checkpoints, which are never
    written again, share their files on disk if the file system supports that.

    They are copied after everything else, and the summary comes last, so that a job which is killed meanwhile
    starts again or is resumed like any other.
    """
    for entry in sorted(done.iterdir(), key=lambda entry: (entry.is_dir(), entry.name)):
        if entry.name in (*NOT_TAKEN, SUMMARY) or entry.suffix in NOT_TAKEN_SUFFIXES:
            continue
        with replacing(run_dir / entry.name) as temporary:
            if entry.is_dir():
                shutil.copytree(entry, temporary, symlinks=True, copy_function=_link_or_copy)
            else:
                shutil.copyfile(entry, temporary)
    origin = str(as_typed(done))
    log.info("%s is done already, with the same config, code and data: this is what came of it", origin)
    if summary := read_summary(done):
        summary.pop("wandb_folder", None)
        write_summary(run_dir, {**summary, "run_dir": str(run_dir), "taken_from": origin})


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
