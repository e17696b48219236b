"""Reading records of runs, sweeps and studies, which may be half written, damaged, or from a stranger.

So each value is read as the kind that it should be: a figure, a count, a text. A value of another kind counts
as absent. Texts stay as they are: no interpolation is resolved.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from llm.files import parse_json, read_content, read_json_lines

RECORD_BYTES = 64_000_000  # largest JSON record; a larger one is damaged
YAML_BYTES = 200_000  # YAML is slow to parse; ours has a few thousand bytes
LARGEST = 1e100  # bound of figures, so that sums and squares of them are finite too

Record = dict[str, Any]  # a null is kept as None, whatever the kind


# Kinds: a value, or None if it is of another kind


def figure(value: Any) -> float | None:
    """A finite number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) <= LARGEST else None


def figure_in(value: str) -> float | None:
    """The figure that a text spells; None if it spells none."""
    try:
        return figure(float(value))
    except ValueError:
        return None


def count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**64 else None


def text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def list_of(kind: Callable[[Any], Any]) -> Callable[[Any], list[Any] | None]:
    """The kind of lists whose elements are all of a kind."""

    def read(value: Any) -> list[Any] | None:
        is_whole = isinstance(value, list) and all(kind(each) is not None for each in value)
        return value if is_whole else None

    return read


def _texts_by_name(value: Any) -> dict[str, str] | None:
    return value if isinstance(value, dict) and all(map(_is_text, value.values())) else None


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _settings(value: Any) -> Record | None:
    return value if isinstance(value, dict) else None


def _change(value: Any) -> Record | None:
    """After how many updates a run was resumed, and what changed: pairs of old and new values, by key."""
    match value:
        case {"steps": int(), "changed": dict(changed)}:
            pairs = all(isinstance(each, list) and len(each) == 2 for each in changed.values())
            return value if pairs else None
    return None


# Kinds by name; anything else in a record is a figure, as all metrics are.
_TEXTS = (
    *(
        "run_dir",
        "status",
        "stopped_early",
        "taken_from",
        "stopped_by",
        "error",
        "device",
        "precision",
        "machine",
        "git_commit",
    ),
    *("tokenizer", "validation_text", "init_from", "wandb_folder", "checkpoint"),
    *("prompt", "text", "stop_reason", "longest_copy_text"),
)
_COUNTS = (
    *("step", "steps", "tokens_seen", "best_step", "skipped", "grad_norm_spikes", "peak_memory_bytes"),
    *("evaluated_windows", "validation_windows"),
    *("parameters", "seed", "num_samples", "new_tokens", "prompt_index", "sample"),
    "longest_copy_token",
)
KINDS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(_TEXTS, text),
    **dict.fromkeys(_COUNTS, count),
    "git_clean": flag,
    "versions": _texts_by_name,
    "sampling": _settings,
    "resumed": list_of(_change),
    "token_ids": list_of(count),
}


def typed(values: Any) -> Record:
    """The values of a summary, or of a line of metrics or samples, without those of a wrong kind."""
    if not isinstance(values, dict):
        return {}
    read = {name: KINDS.get(name, figure)(value) for name, value in values.items()}
    return {name: value for name, value in read.items() if value is not None or values[name] is None}


def read_record(file: Path) -> Record:
    """A JSON record, such as `summary.json`; empty if it does not exist or is damaged."""
    return typed(parse_json(read_content(file, RECORD_BYTES)))


def read_lines(file: Path) -> list[Record]:
    """The lines of `metrics.jsonl` or `samples.jsonl`, without damaged ones."""
    return [typed(line) for line in read_json_lines(file)]


def lines_from_end(file: Path, size: int) -> Iterator[Record]:
    """The whole lines in the last `size` bytes of such a file, last first; none if it does not exist."""
    try:
        with file.open("rb") as content:
            start = max(0, content.seek(0, os.SEEK_END) - size)
            content.seek(start)
            lines = content.read().split(b"\n")[:-1]
    except OSError:
        return
    for line in reversed(lines[1:] if start else lines):  # the first may be cut
        yield typed(parse_json(line))


def read_samples(file: Path) -> list[Record]:
    """The lines of `samples.jsonl` that hold a prompt and a text."""
    lines = [{"prompt": None, "text": None, **line} for line in read_lines(file)]
    return [line for line in lines if line["prompt"] is not None and line["text"] is not None]


def tokenizer_and_text(fingerprint: str) -> tuple[str, str]:
    """The tokenizer's and the text's part of a fingerprint of tokens; see `fingerprint_of_ids` in
    llm/data/tokenizer.py."""
    tokenizer, _, text = fingerprint.rpartition("-")
    return tokenizer, text


# Hydra's record


def read_overrides(run_dir: Path) -> list[str]:
    """The overrides with which a run, or a job of a sweep, was started."""
    found = _yaml(run_dir / ".hydra" / "overrides.yaml")
    return [each for each in found if isinstance(each, str)] if isinstance(found, list) else []


def read_config_text(run_dir: Path, key: str) -> str | None:
    """The text of a dotted key in the config that Hydra recorded; None for null."""
    place = _value_of(_yaml(run_dir / ".hydra" / "config.yaml"), key)
    return place if isinstance(place, str) and place != "null" else None


def read_choices(run_dir: Path) -> dict[str, str]:
    """The chosen option of each config group, as Hydra recorded it: `model` to `tiny`, `model/part` to
    `[rotary,rmsnorm]`, and `null` for none."""
    place = _yaml(run_dir / ".hydra" / "hydra.yaml")
    for name in ("hydra", "runtime", "choices"):
        place = place.get(name) if isinstance(place, dict) else None
    choices = place if isinstance(place, dict) else {}
    return {
        group: f"[{','.join(map(str, option))}]" if isinstance(option, list) else str(option)
        for group, option in choices.items()
        if isinstance(group, str)
    }


def read_settings(run_dir: Path, keys: Iterable[str]) -> dict[str, str]:
    """The values of dotted keys in the config that Hydra recorded, spelled as in overrides: `null`, or a list
    as `[0.9,0.95]`. Keys without a value are omitted."""
    config = _yaml(run_dir / ".hydra" / "config.yaml")  # once, as reading it takes 10 ms
    found = {}
    for key in keys:
        value = _value_of(config, key)
        texts = list_of(text)(value)
        setting = text(value) if texts is None else f"[{','.join(texts)}]"
        if setting is not None:
            found[key] = setting
    return found


def read_config_texts(run_dir: Path, key: str) -> list[str]:
    """`read_config_text` for a key whose value is a list."""
    return list_of(text)(_value_of(_yaml(run_dir / ".hydra" / "config.yaml"), key)) or []


def _value_of(config: Any, key: str) -> Any:
    place = config
    for name in key.split("."):
        place = place.get(name) if isinstance(place, dict) else None
    return place


def _yaml(file: Path) -> Any:
    """The content of a YAML file, with all scalars as texts; None if it cannot be read. Tags are ignored, so
    the result is made of texts, lists and dicts only."""
    try:
        return yaml.load(read_content(file, YAML_BYTES), yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
