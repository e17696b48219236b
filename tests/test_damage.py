"""Every reader against every damage: whatever a folder holds, the answer is a result, or one line.

A run, a sweep, a study and three exports are made once. Each example damages one of their files and runs one
script that reads it. `DAMAGE_EXAMPLES=2000 pytest -s -n 0 tests/test_damage.py` tries that many, not the same
each time, and prints what came of them.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Script
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pages import data_of
from scripts import Result, run_here

from llm.checkpoints.huggingface import export_huggingface
from llm.config import ModelConfig
from llm.model.gpt import GPTModel

EXAMPLES = int(os.environ.get("DAMAGE_EXAMPLES", 0))  # 0: few, and the same at each run
HANGS = 600  # seconds; no reader takes two on a fast machine
SECRET = "s3cret-of-the-environment"

RUN = "outputs/pretrain/2026-01-01/00-00-00"
SWEEP = "outputs/pretrain/sweeps/2026-01-01/00-00-00"
STUDY = "outputs/generate/sweeps/2026-01-01/00-00-00"
EXPORT, LLAMA, BOOK = "export", "llama", "book"
SHORT = ("max_new_tokens=3", "runtime.precision=fp32")
TRAIN = (
    "model=tiny",
    "model.n_layers=1",
    "model.emb_dim=16",
    "model.n_heads=2",
    "model.context_length=16",
    "tokenizer=bytes",
    "tracking=disabled",
    "runtime.precision=fp32",
    "training.max_minutes=null",
    "training.max_steps=4",
    "training.eval_freq=2",
    "samples.max_new_tokens=3",
    "data=text",
    "data.path=text.txt",
    "data.batch_size=2",
)
SWEPT = ("optimizer.lr=1e-3,1e-2", "early_stopping.rule=median", "early_stopping.min_jobs=1")
# By the folder that they read: scripts and their arguments.
READERS = {
    RUN: [
        ("report", f"sweep={RUN}"),
        ("report", f"sweep=[{RUN},{SWEEP}]"),
        ("generate", "checkpoint=latest", *SHORT),
        ("evaluate", f"checkpoint={RUN}", "text=Every effort"),
        ("export", f"checkpoint={RUN}", "to=new"),
        ("export", f"checkpoint={RUN}", "to=new", "format=book"),
        ("pretrain", *TRAIN, f"init_from={RUN}", "training.max_steps=1"),
        ("pretrain", f"resume={RUN}", "training.max_steps=6"),
        ("pretrain", "resume=latest"),
        ("pretrain", f"rerun={RUN}", "tracking=disabled"),
        ("pretrain", *TRAIN, f"hydra.run.dir={RUN}"),  # done already
        ("generate", "-m", f"checkpoint={RUN}", *SHORT, "sampling.temperature=0.5", "tracking=disabled"),
    ],
    SWEEP: [
        ("report",),
        ("report", f"sweep=[{SWEEP},{RUN}]"),
        ("report", f"sweep={SWEEP}/0"),
        ("compare", f"a={SWEEP}/0", f"b={RUN}"),
        ("pretrain", "-m", f"sweep.resume={SWEEP}"),
        ("pretrain", f"resume={SWEEP}/1"),
        ("pretrain", "-m", *TRAIN, *SWEPT),  # whose first job is done already
    ],
    STUDY: [
        ("report", f"sweep={STUDY}"),
        ("generate", "-m", "sweep.resume=latest", "tracking=disabled"),
    ],
    EXPORT: [
        ("generate", f"checkpoint={EXPORT}", *SHORT),
        ("pretrain", *TRAIN, f"init_from={EXPORT}", "training.max_steps=1"),
    ],
    LLAMA: [
        ("generate", f"checkpoint={LLAMA}", *SHORT),
        ("export", f"checkpoint={LLAMA}", "to=new"),
    ],
    BOOK: [
        ("generate", f"checkpoint={BOOK}/model.pth", *SHORT),
        ("export", f"checkpoint={BOOK}/model_and_optimizer.pth", "to=new"),
    ],
}

# What means something to HTML, a terminal, a terminal's table, a shell, a resolver, Hydra, YAML or Python.
HOSTILE = [
    "</script><script>alert(1)</script><!--<b onclick=alert(1)>",
    "\x1b[2J\x1b]8;;http://a.b\x07x\x1b]52;c;eA==\x07\r\b\x9b31m\u202e\u200b\x00",
    "[bold red]x[/] [link=http://a.b]y[/link] [/nothing",
    "'; touch pwned; $(touch pwned) `touch pwned` \" #",
    f"${{oc.env:{SECRET.upper()}}}",
    "${oc.env:SECRET}",
    "hydra.job.env_set.SECRET=1",
    "+hydra.job.env_set.GIT_SSH_COMMAND=touch pwned",
    "!!python/object/apply:os.system ['touch pwned']",
    "__import__('os').system('touch pwned')",
    "${", "$", "%s %d {0} {", "NaN", "nan", "-inf", "1e999", "null", "~", "0x", "1_0", "2026-99-99",
    "..", "../outside", "/", "", " ", "\n", "a\nb", "\ud800", "é\u2028", "x" * 70_000,
]  # fmt: skip
NUMBERS = [0, -1, 1, 2, 3, 7, 2**31, 2**63, 2**64, -(2**70), 10**400, 0.0, -0.5, 1e-320, 1e38, 1e308]
NUMBERS += [float("nan"), float("inf"), -float("inf")]
NESTED = [None, True, False, [], {}, [None], [[1, [2]]], {"a": {"b": [1]}}, [1, "a", None], [["a=1"]]]
VALUES = st.sampled_from([*HOSTILE, *NUMBERS, *NESTED])

# Whole contents that are nobody's record.
CONTENTS = [
    b"",
    b"\n",
    b"\0" * 5000,
    b"\xff\xfe\x80",
    b"[" * 200_000,
    b'{"a":' * 200_000,
    b"- " * 3000 + b"x",
    b"[" * 2000 + b"]" * 2000,
    b'{"step": ' + b"9" * 6000 + b"}\n",
    b"null",
    b"3",
    b'"text"',
    b"[]",
    b"[1, 2, 3]\n",
    b"{}\n",
    b'{"a": 1}\n' * 3,
    b'{"status": "finished", "status": 7}',
    b"a: &a [x, x]\nb: &b [*a, *a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b, *b]\nd: &d [*c, *c, *c, *c]\n",
    b"- !!python/object/apply:os.system ['touch pwned']\n",
    b"- hydra.job.env_set.PATH=x\n- +hydra.job.env_set.PYTHONPATH=.\n- '${oc.env:SECRET}'\n",
    b"training: {max_steps: '${oc.env:SECRET}'}\nseed: ${oc.env:SECRET}\n",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    b"x" * 3_000_000,
    b'{"text": "' + b"a" * 3_000_000 + b'"}\n',
]

CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


# What is read, made once


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that a reader reads, undamaged."""
    home = tmp_path_factory.mktemp("home")
    text = "".join(f"{number} bottles of beer on the wall\n" for number in range(60))
    (home / "text.txt").write_text(text, encoding="utf-8")
    quiet = [f"data.cache_dir={home}/cache"]
    sweep = [*SWEPT, f"hydra.sweep.dir={SWEEP}"]
    study = ["sampling.temperature=0.5,1", "num_samples=2", f"hydra.sweep.dir={STUDY}"]
    for command in (
        ("pretrain", *TRAIN, *quiet, f"hydra.run.dir={RUN}"),
        ("pretrain", "-m", *TRAIN, *quiet, *sweep),
        ("generate", "-m", f"checkpoint={RUN}", *SHORT, *study, "tracking=disabled"),
        ("export", f"checkpoint={RUN}", f"to={EXPORT}"),
        ("export", f"checkpoint={RUN}", f"to={BOOK}", "format=book"),
    ):
        done = run(home, *command)
        assert done.returncode == 0, done.stderr
    parts = ModelConfig(
        257, 16, 32, 4, 2, norm="rmsnorm", position="rotary", activation="swiglu", n_kv_heads=2
    )
    export_huggingface(GPTModel(parts), "bytes", home / LLAMA)
    # The last job of each sweep was killed: `sweep.resume` runs it again, beside the result of the other.
    (home / SWEEP / "1" / "summary.json").unlink()
    (home / STUDY / "1" / "summary.json").unlink()
    for folder in ("outputs/export", "outputs/evaluate"):
        shutil.rmtree(home / folder, ignore_errors=True)
    return home


def run(folder: Path, name: str, *arguments: str) -> Result:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {"XDG_CACHE_HOME": str(folder.parent / "cache"), "SECRET": SECRET, "COLUMNS": "200"}
    return run_here(folder, environment, name, *arguments)


# Damage


def damage(data: st.DataObject, file: Path) -> str:
    """Damage a file in one of many ways; returns which."""
    kinds: dict[str, Callable[[st.DataObject, Path], None]] = {
        "a wrong value": _wrong_value,
        "a wrong content": lambda data, file: _write(file, data.draw(st.sampled_from(CONTENTS))),
        "cut off": lambda data, file: _write(file, file.read_bytes()[: data.draw(_place(file))]),
        "a flipped bit": _flipped_bit,
        "a lost byte": _lost_byte,
        "lost": lambda data, file: file.unlink(),
        "a folder in its place": _folder,
        "a link to nothing": lambda data, file: _link(file, "nowhere"),
        "a link to itself": lambda data, file: _link(file, file.name),
        "a link to another's file": lambda data, file: _link(file, _outside(file) / "kept.txt"),
        "a FIFO in its place": _fifo,
    }
    if os.geteuid():
        kinds["no permission"] = lambda data, file: file.chmod(0)
    if file.suffix not in (".json", ".jsonl", ".yaml"):
        del kinds["a wrong value"]
    names = [*kinds, *["a wrong value"] * 12] if "a wrong value" in kinds else [*kinds]
    kind = data.draw(st.sampled_from(names), label="damage")
    kinds[kind](data, file)
    if (file.parent / "SHA256SUMS").is_file() and data.draw(st.booleans(), label="with its checksum"):
        _seal(file.parent)
        kind += ", with its checksum"
    return kind


def _outside(file: Path) -> Path:
    """The folder beside the one that is damaged, in which nothing may change."""
    return next(parent / "outside" for parent in file.parents if (parent / "outside").is_dir())


def _place(file: Path) -> st.SearchStrategy[int]:
    return st.integers(0, max(0, file.stat().st_size - 1))


def _write(file: Path, content: bytes) -> None:
    file.unlink()  # it may be a hard link to the undamaged one
    file.write_bytes(content)


def _flipped_bit(data: st.DataObject, file: Path) -> None:
    content = bytearray(file.read_bytes())
    assume(content)
    content[data.draw(_place(file))] ^= 1 << data.draw(st.integers(0, 7))
    _write(file, bytes(content))


def _lost_byte(data: st.DataObject, file: Path) -> None:
    content, place = file.read_bytes(), data.draw(_place(file))
    _write(file, content[:place] + content[place + 1 :])


def _folder(data: st.DataObject, file: Path) -> None:
    file.unlink()
    file.mkdir()


def _link(file: Path, target: str | Path) -> None:
    file.unlink()
    file.symlink_to(target)


def _fifo(data: st.DataObject, file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _wrong_value(data: st.DataObject, file: Path) -> None:
    """One value of JSON, of a line of it or of YAML becomes another, or a key."""
    text = file.read_text("utf-8")
    assume(text.strip())
    if file.suffix == ".jsonl":
        lines = text.splitlines()
        number = data.draw(st.integers(0, len(lines) - 1))
        lines[number] = json.dumps(_changed(data, json.loads(lines[number])))
        written = "\n".join(lines) + "\n"
    elif file.suffix == ".json":
        written = json.dumps(_changed(data, json.loads(text)))
    else:
        changed = _changed(data, yaml.safe_load(text))
        with suppress(yaml.YAMLError):
            text = yaml.safe_dump(changed, allow_unicode=True)
        written = text
    _write(file, written.encode("utf-8", "surrogatepass"))


def _changed(data: st.DataObject, value: Any) -> Any:
    """A copy of a nested value with one place in it changed."""
    if isinstance(value, dict | list) and value and data.draw(st.integers(0, 9)):
        places = [*value] if isinstance(value, dict) else [*range(len(value))]
        place = data.draw(st.sampled_from(places))
        copy = value.copy()
        match data.draw(st.integers(0, 12)):
            case 0:
                del copy[place]
            case 1 if isinstance(copy, dict):
                copy[data.draw(st.sampled_from(HOSTILE))] = copy.pop(place)
            case 2 if isinstance(copy, list):
                copy.insert(place, data.draw(VALUES))
            case 3 if isinstance(copy[place], str):
                copy[place] += data.draw(st.sampled_from(HOSTILE))
            case 4 if isinstance(copy[place], str) and "=" in copy[place]:
                copy[place] = copy[place].split("=")[0] + "=" + data.draw(st.sampled_from(HOSTILE))
            case _:
                copy[place] = _changed(data, copy[place])
        return copy
    return data.draw(VALUES)


def _seal(folder: Path) -> None:
    """Let a checkpoint's checksums fit what lies there, as a stranger can."""
    lines = []
    for line in (folder / "SHA256SUMS").read_text("utf-8", "replace").splitlines():
        name = line.partition("  ")[2]
        if name and "\0" not in name and (folder / name).is_file():
            lines.append(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n")
    (folder / "SHA256SUMS").unlink()
    (folder / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")


# What may come of it


TALLY: Counter[str] = Counter()


class Hang(BaseException):
    """Raised in what hangs. Nothing catches it."""


@contextmanager
def no_hang() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(HANGS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def wrong_with(done: Result, folder: Path, outside: Path, before: float) -> Iterator[str]:
    """What is neither a result nor one line."""
    printed = done.stdout + done.stderr
    logs = [file for file in folder.rglob("*.log") if file.is_file() and not file.is_symlink()]
    logged = "".join(log.read_text("utf-8", "replace") for log in logs if log.stat().st_mtime >= before)
    if "Traceback (most recent call last)" in printed + logged:
        yield "a traceback"
    if done.returncode not in (0, 1):
        yield f"status {done.returncode}"
    said = [line for line in done.stderr.splitlines() if not line.startswith("error: job ")]
    said = [line for line in said if ": done already, with the same config" not in line]
    if not (len(said) <= 1 and all(line.startswith("error: ") for line in said)):
        yield "more or other than one line"
    if done.returncode == 1 and not done.stderr and "failed" not in done.stdout:
        yield "status 1 without a line"
    if CONTROLS.search(printed) or CONTROLS.search(re.sub("\ufffd", "", logged)):
        yield "control characters on the terminal"
    if [path.name for path in outside.iterdir()] != ["kept.txt"]:
        yield "a file outside"
    if (outside / "kept.txt").read_bytes() != b"kept\n" or (outside / "kept.txt").stat().st_mtime != 1e9:
        yield "a file outside was changed"
    if any(folder.rglob("pwned")):
        yield "code was run"
    if SECRET in printed or any(SECRET.encode() in file.read_bytes() for file in written(folder, before)):
        yield "the environment was read"
    for page in folder.rglob("report.html"):
        if page.is_file() and page.stat().st_mtime >= before:
            with suppress(ValueError):
                data_of(page, parse_constant=float)
                continue
            yield "a page that cannot be read"


def written(folder: Path, since: float) -> Iterator[Path]:
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink() and file.stat().st_mtime >= since:
            yield file


CASES = [(folder, reader) for folder, readers in READERS.items() for reader in readers]


@settings(
    max_examples=EXAMPLES or 8,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=[*HealthCheck],
    print_blob=False,
)
@given(data=st.data())
def check(data: st.DataObject, home: Path, place: Path) -> None:
    folder, reader = data.draw(st.sampled_from(CASES), label="reader")
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(home, place / "home", symlinks=True)
    outside = place / "outside"
    outside.mkdir()
    (outside / "kept.txt").write_bytes(b"kept\n")
    os.utime(outside / "kept.txt", (1e9, 1e9))
    files = sorted(path for path in (place / "home" / folder).rglob("*") if path.is_file())
    files = [path for path in files if path.suffix != ".png" and not path.is_symlink()]
    records = [path for path in files if path.suffix in (".json", ".jsonl", ".yaml")]
    outside_checkpoints = [path for path in records if "checkpoints" not in path.parts]
    pools = (outside_checkpoints, records, files)
    file = data.draw(st.one_of(*map(st.sampled_from, [each for each in pools if each])))
    kind = damage(data, file)
    mark = place / "mark"
    mark.touch()
    before = mark.stat().st_mtime
    done, hangs = Result(reader, 1, "", ""), True
    with no_hang(), suppress(Hang), warnings.catch_warnings():
        done, hangs = run(place / "home", *reader), False
    problems = [*wrong_with(done, place / "home", outside, before)] if not hangs else ["a hang"]
    what = f"{reader[0]} {' '.join(each for each in reader[1:] if each not in TRAIN)}"
    where = file.relative_to(place / "home")
    TALLY["a result" if done.returncode == 0 else "one line"] += not problems
    TALLY.update(problems)
    TALLY["neither"] += bool(problems)
    TALLY["examples"] += 1
    if EXAMPLES and TALLY["examples"] % 50 == 0:
        print(dict(TALLY), file=sys.stderr, flush=True)
    assert not problems, f"{problems} {what}: {where}, {kind}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_every_reader_answers_any_damage_with_a_result_or_one_line(
    home: Path, tmp_path: Path, no_pictures: None
) -> None:
    try:
        check(home=home, place=tmp_path)
    finally:
        if EXAMPLES:
            print(f"\n{dict(TALLY)}", file=sys.stderr)


def test_an_error_of_the_file_system_is_one_line(script: Script) -> None:
    done = script("generate", f"checkpoint={300 * 'x'}")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith(": File name too long\n")
