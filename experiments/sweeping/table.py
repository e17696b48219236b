"""A sweep over a file of settings: each row is a job, or several if there is also a grid.

Such a file may come from somebody else. So its cells are data, like the record of a sweep: each sets a key of
the script's config to one value, and nothing in it is resolved.
"""

import csv
import io
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra_errors import no_such_key
from sweeping.recorded import config_groups, is_option

from llm.config_values import leaf_keys
from llm.errors import UserError
from llm.files import parse_json, read_content
from llm.overrides import as_override
from llm.records import RECORD_BYTES
from llm.sweeps.jobs import as_text

OF_ONE_RUN = ("resume", "rerun")  # keys that mean another run


def read_table(file: Path, schema: Any) -> list[list[str]]:
    """The overrides of each row of a CSV file, whose head names the keys, or of each JSON line. An empty
    cell, or a key that a line lacks, leaves the key at its default.

    Args:
        schema: that of the script's config.

    Raises:
        UserError: the file cannot be read, or a cell is no value of its key.
    """
    if not file.is_file():
        raise UserError(f"sweep.table={file}: there is no such file")
    try:
        text = read_content(file, RECORD_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: must be UTF-8 text, unlike its byte {error.start}") from error
    rows = _json_rows(file, text) if file.suffix == ".jsonl" else _csv_rows(file, text)
    if not rows:
        raise UserError(f"{file} has no rows: give a head of keys and a row for each setting")
    for key in dict.fromkeys(key for _, row in rows for key in row):
        _check_key(file, key, schema)
    return [
        [_override(f"{file}, line {line}", key, cell, schema) for key, cell in row.items() if cell]
        for line, row in rows
    ]


def _csv_rows(file: Path, text: str) -> list[tuple[int, dict[str, str]]]:
    """For each row, the line that it ends on, and its cells by key."""
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num}: {error}") from error
    filled = [(line, row) for line, row in lines if any(row)]
    if not filled:
        return []
    [(_, head), *rows] = filled
    if repeated := next((key for key in head if head.count(key) > 1), None):
        raise UserError(f"{file}: the head names {repeated!r} twice")
    for line, row in rows:
        if len(row) != len(head):
            raise UserError(f"{file}, line {line}: {len(row)} cells, but the head names {len(head)} keys")
    return [(line, dict(zip(head, row, strict=True))) for line, row in rows]


def _json_rows(file: Path, text: str) -> list[tuple[int, dict[str, str]]]:
    rows = []
    for line, content in enumerate(text.splitlines(), 1):
        if content.strip():
            row = parse_json(content.encode())
            if not isinstance(row, dict) or any(isinstance(cell, dict) for cell in row.values()):
                raise UserError(f"{file}, line {line}: must be an object of keys with dots and their values")
            rows.append((line, {key: as_text(cell) for key, cell in row.items()}))
    return rows


def _check_key(file: Path, key: str, schema: Any) -> None:
    if key.startswith(("hydra.", "hydra/", "sweep.")):
        raise UserError(f"{file}: {key} is not a key of jobs: give it on the command line")
    if key in OF_ONE_RUN:
        raise UserError(f"{file}: {key} is for a single run, not for the jobs of a sweep")
    if key not in leaf_keys(schema) and key not in config_groups():
        raise UserError(f"{file}: {no_such_key(key, schema)}")


def _override(place: str, key: str, cell: str, schema: Any) -> str:
    """The override that sets a key to a cell.

    Raises:
        UserError: the cell is not a single value, or has an interpolation.
    """
    item = leaf_keys(schema).get(key)
    if item and item.type in (str, str | None) and cell != "null":
        return as_override(key, cell)  # a text, in which nothing means anything else
    try:
        parsed = OverridesParser.create().parse_override(f"{key}={cell}")
    except HydraException as error:
        raise UserError(f"{place}: {key}={cell}: not a value") from error
    if parsed.is_sweep_override():
        raise UserError(f"{place}: {key}={cell}: a cell holds one value; give grids on the command line")
    if "${" in cell or not (item or is_option(parsed.value())):
        what = "a value" if item else "the name of an option"
        raise UserError(f"{place}: {key}={cell}: a cell holds {what}, and nothing in it is resolved")
    return f"{key}={cell}"
