"""The fault drill: runs that are killed, damaged and starved of disk must end like a run without faults.

    python tests/drill.py 40            forty seeds; tests/test_drill.py runs a few
    python tests/drill.py 16 ranks      sixteen of runs of two processes, one of which is killed

Each seed decides the settings of a run and its faults. Compared at the end, bit for bit: each line of metrics
(except timings), every sample, the weights, the optimizer's state and the random states.
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from scripts import ScriptProcess

from llm.files import read_json_lines
from llm.run_folder import is_claimed, step_folders, steps_of

STEPS = 48
COMMON = (
    f"training.max_steps={STEPS}",
    "training.max_minutes=null",
    "training.eval_freq=5",
    "checkpoint.every_steps=3",
    "checkpoint.every_minutes=null",
    "model=tiny",
    "model.drop_rate=0.1",
    "data=text",
    "data.batch_size=2",
    "data.cache_dir=cache",
    "samples.max_new_tokens=5",
    "samples.every_epoch=true",
    "tracking=disabled",
)
VARIANTS = (
    ("optimizer=muon", "tokenizer=bytes"),
    ("optimizer=adamw", "tokenizer=bytes", "data.order=book", "runtime.precision=fp32"),
    ("optimizer=muon", "tokenizer=bytes", "training.accumulate=2", "data.order=book"),
    ("optimizer=adamw", "tokenizer=gpt2", "schedule=cosine", "model.tie_weights=false"),
    ("optimizer=muon", "tokenizer=bytes", "runtime.precision=fp32", "model.qkv_bias=true"),
    ("optimizer=adamw", "tokenizer=bytes", "training.accumulate=3", "schedule=constant"),
)
# Of several processes. The first two are compared bit for bit; the others, without dropout and with AdamW in
# fp32, are also resumed by another number of processes, and are then the same up to rounding.
RANKS = (
    ("optimizer=muon", "runtime.sharding=fsdp"),
    ("optimizer=muon", "training.accumulate=2"),
    ("optimizer=adamw", "runtime.sharding=fsdp", "runtime.precision=fp32", "model.drop_rate=0"),
    ("optimizer=adamw", "runtime.precision=fp32", "model.drop_rate=0"),
)
OF_RANKS = ("runtime.processes=2", "tokenizer=bytes", "data.batch_size=6", "training.max_steps=24")
ENDED_SECONDS = 20.0  # for all processes of a run, once one is killed, on a machine that is busy
TEXT = "".join(f"{number} bottles of beer on the wall, {number} bottles of beer\n" for number in range(150))
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
RECORDS = ("metrics.jsonl", "samples.jsonl", "summary.json", "run-id.txt", ".hydra/overrides.yaml")
DAMAGES = ("cut", "bit", "empty", "format", "swapped", "missing")
TIMED = ("seconds", "tokens_per_second")


@dataclass
class Drill:
    """Where a drill works, and what has happened in it so far."""

    folder: Path
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    arguments: tuple[str, ...] = ()  # of every run, besides those of its seed
    counts: Counter[str] = field(default_factory=Counter)
    longest: float = 0.0  # seconds, until all processes of a run that has lost one had ended

    def __post_init__(self) -> None:
        (self.folder / "text.txt").write_text(TEXT, encoding="utf-8")

    def start(self, *arguments: str) -> ScriptProcess:
        return ScriptProcess(self.folder, self.environment, "pretrain", *arguments)

    def begin(self, variant: int, name: str) -> ScriptProcess:
        settings = (*COMMON, *VARIANTS[variant], *self.arguments)
        return self.start(*settings, "data.path=text.txt", f"hydra.run.dir={name}")

    def reference(self, variant: int) -> Path:
        """A run of these settings without faults."""
        folder = self.folder / f"reference-{variant}"
        if not folder.exists():
            finish(self.begin(variant, folder.name))
        return folder


def finish(process: ScriptProcess) -> str:
    output = "".join(process.output())
    assert process.exitcode == 0, output
    return output


def numbers(run: Path) -> list[dict[str, float]]:
    """The lines of metrics, without timings."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key not in TIMED} for line in metrics]


def outcome(run: Path) -> dict[str, object]:
    """Everything in a run folder that must not depend on its faults."""
    sums = (run / "checkpoints" / "last" / "SHA256SUMS").read_text().splitlines()
    return {
        "metrics": numbers(run),
        "samples": (run / "samples.jsonl").read_text(),
        "tensors": [line for line in sums if line.endswith(".safetensors")],
        "best": (run / "checkpoints" / "best" / "SHA256SUMS").read_text().splitlines()[-1],
    }


def drill(work: Drill, seed: int) -> str:
    """Let one run suffer faults, and compare; returns the faults.

    Raises:
        AssertionError: the run did not end like one without faults.
    """
    chance, more = random.Random(seed), random.Random(f"{seed}, more")
    variant = seed % len(VARIANTS)
    reference = work.reference(variant)
    run = work.folder / f"run-{seed}"
    process = work.begin(variant, run.name)
    faults = []
    damaged, to_find = False, False
    for _ in range(chance.randint(1, 3)):
        starve = chance.random() < 0.3
        if more.random() < 0.2 and (rival := _rival(process, run, work, variant)):
            faults.append(rival)
        if more.random() < 0.3:
            faults.append(_stop(process, run, work, more))
        else:
            faults.append(_starve(process, run, chance) if starve else _kill(process, run, work, chance))
        to_find = _check_output("".join(process.output()), damaged, to_find, work)
        if process.exitcode == 0:
            break
        if chance.random() < 0.6 and (damage := _damage(run, work, chance, reference)):
            faults.append(damage)
            damaged = to_find = True
        elif not damaged and (back := _go_back(run, work, seed)):
            faults.append(back)
        if more.random() < 0.5 and (meddling := _meddle(run, work, more)):
            faults.append(meddling)
        begun = bool(list(run.glob("checkpoints/st*-*")))
        process = work.start(f"resume={run.name}") if begun else work.begin(variant, run.name)
    _check_output(finish(process), damaged, to_find, work)
    expected, found = outcome(reference), outcome(run)
    for what, value in expected.items():
        assert found[what] == value, f"seed {seed}: {what} differ after {', '.join(faults)}"
    assert not list(run.rglob(".*.tmp"))
    shutil.rmtree(run)
    work.counts["runs"] += 1
    return f"{' '.join(VARIANTS[variant])}: {', '.join(faults)}"


def drill_ranks(work: Drill, seed: int) -> str:
    """Let a run of two processes lose one of them, or the one that writes checkpoints for one; and compare.

    Raises:
        AssertionError: the run did not end like one without faults, or not with one line, or not soon.
    """
    chance = random.Random(seed)
    settings, exact = RANKS[seed % len(RANKS)], seed % len(RANKS) < 2
    common = (*COMMON, *OF_RANKS, *settings, "data.path=text.txt", *work.arguments)
    reference, run = work.folder / f"reference-of-ranks-{seed % len(RANKS)}", work.folder / f"run-{seed}"
    if not reference.exists():
        finish(work.start(*common, f"hydra.run.dir={reference.name}"))
    process = work.start(*common, f"hydra.run.dir={run.name}")
    faults = []
    for _ in range(chance.randint(1, 3)):
        faults.append(_kill_rank(process, run, work, chance))
        if process.exitcode == 0:
            break
        arguments = [f"resume={run.name}"]
        if not list(run.glob("checkpoints/st*-*")):
            arguments = [*common, f"hydra.run.dir={run.name}"]
        elif not exact and chance.random() < 0.5:
            count = chance.choice((1, 3))
            arguments.append(f"runtime.processes={count}")
            if "runtime.sharding=fsdp" in settings:
                arguments.append(f"runtime.sharding={'none' if count == 1 else 'fsdp'}")
            faults.append(f"resumed by {count}")
            work.counts["resumed by another number"] += 1
        process = work.start(*arguments)
    assert "Traceback" not in finish(process)
    expected, found = outcome(reference), outcome(run)
    if exact or not any("resumed" in fault for fault in faults):
        for what, value in expected.items():
            assert found[what] == value, f"seed {seed}: {what} differ after {', '.join(faults)}"
    else:
        for one, other in zip(numbers(reference), numbers(run), strict=True):
            for key, value in one.items():
                assert abs(other[key] - value) <= 2e-4 * abs(value), f"seed {seed}: {one}, {other}"
    assert not list(run.rglob(".*.tmp"))
    shutil.rmtree(run)
    work.counts["runs"] += 1
    return f"{' '.join(settings)}: {', '.join(faults)}"


def _children(process: int) -> list[int]:
    """The processes that one has begun, and those that they have; Linux tells."""
    found = []
    with suppress(OSError):
        for thread in Path(f"/proc/{process}/task").iterdir():
            for child in map(int, (thread / "children").read_text().split()):
                found += [child, *_children(child)]
    return found


def _command(process: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_text()
    return ""


def _kill_rank(process: ScriptProcess, run: Path, work: Drill, chance: random.Random) -> str:
    """`kill -9` of the first or the second process, or one that writes a checkpoint for it, while they start,
    at a random update or inside the write of a checkpoint."""
    kind = chance.choice(("start", "update", "write", "write", "write"))
    who = (
        chance.choice(("first", "second", "second", "writer"))
        if kind == "write"
        else chance.choice(("first", "second", "second"))
    )
    step, delay = chance.randrange(24), chance.uniform(0, 0.05)
    assert process.pid
    victim, writing = None, False
    if kind == "start":
        time.sleep(chance.uniform(0, 1))
    while process.is_alive():
        writing = bool(list((run / "checkpoints").glob(".*.tmp")))
        if kind == "start" or (_steps(run) >= step and (kind == "update" or writing)):
            pattern = {"first": "", "second": "spawn_main", "writer": "file_writer"}[who]
            found = [each for each in _children(process.pid) if pattern in _command(each)]
            victim = process.pid if who == "first" else chance.choice(sorted(found)) if found else None
            if victim:
                break
        time.sleep(0.0005)
    if victim is None:
        process.join()
        return "nothing: it was done"
    if not writing:
        time.sleep(delay)
    others = _children(process.pid)
    with suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    work.counts["kills"] += 1
    work.counts["kills inside a write"] += writing
    if who == "writer":
        printed = process.output()
        assert "Traceback" not in printed[1], printed
        assert (
            process.exitcode == 0
            or "error: the process that writes checkpoints" in printed[1]
            or ("error: cannot write" in printed[1])
        ), printed
    else:
        process.join(ENDED_SECONDS)
        while any(map(_is_training, others)) and time.monotonic() < killed + ENDED_SECONDS:
            time.sleep(0.01)
        took = time.monotonic() - killed
        work.longest = max(work.longest, took)
        assert not process.is_alive()
        assert not [each for each in others if _is_training(each)], f"a process lives after {took:.1f} s"
        printed = process.output()
        if who == "second" and process.exitcode != 0:
            assert re.match(r"error: process \d of \d was killed by SIGKILL, ", printed[1]), printed
            assert printed[1].count("\n") == 1, printed
    moment = "inside a write" if writing else f"after {_steps(run)} lines"
    return f"{who} killed {moment}"


def _is_training(process: int) -> bool:
    return any(each in _command(process) for each in ("spawn_main", "file_writer"))


def _check_output(output: str, damaged: bool, to_find: bool, work: Drill) -> bool:
    """Compare what a process printed with the run's faults; returns whether damage is still undetected."""
    assert "Traceback" not in output, output
    found = "is skipped" in output
    assert not found or damaged, output
    assert found or not to_find or "resumed after" not in output, output
    work.counts["damages found"] += to_find and found
    work.counts["full disks"] += "cannot write" in output
    return to_find and not found


def _kill(process: ScriptProcess, run: Path, work: Drill, chance: random.Random) -> str:
    """`kill -9` while it starts, at a random update, or inside the write of a checkpoint."""
    kind = chance.choice(("start", "update", "update", "write", "write"))
    step, delay = chance.randrange(STEPS), chance.uniform(0, 0.05)
    if kind == "start":
        time.sleep(chance.uniform(0, 1))
    while process.is_alive() and kind != "start":
        reached = _steps(run) >= step
        if reached and (kind == "update" or list((run / "checkpoints").glob(".*.tmp"))):
            time.sleep(delay if kind == "update" else delay / 10)
            break
        time.sleep(0.0005)
    if not process.is_alive():
        return "nothing: it was done"
    process.kill()
    process.join()
    inside = bool(list((run / "checkpoints").glob(".*.tmp")))
    work.counts["kills"] += 1
    work.counts["kills inside a write"] += inside
    return f"killed after {_steps(run)} updates{' inside a write' if inside else ''}"


def _stop(process: ScriptProcess, run: Path, work: Drill, chance: random.Random) -> str:
    """Ask it to stop, as Ctrl-C, a scheduler or a closed terminal does: it saves, and its status says so."""
    step, number = chance.randrange(1, STEPS), chance.choice(SIGNALS)
    while process.is_alive() and not (_steps(run) >= step and is_claimed(run)):
        time.sleep(0.001)
    if process.is_alive():
        process.send_signal(number)
    process.join()
    if process.exitcode == 0:
        return "nothing: it was done"
    # The second is that of a process that has not begun to train, and has nothing to save.
    assert process.exitcode in (128 + number, -number), process.output()
    work.counts["stops"] += 1
    return f"stopped by {number.name} after {_steps(run)} lines"


def _rival(process: ScriptProcess, run: Path, work: Drill, variant: int) -> str | None:
    """While it trains, begin another run in its folder, and resume it."""
    while process.is_alive() and not (_steps(run) and is_claimed(run)):
        time.sleep(0.001)
    for rival in (work.begin(variant, run.name), work.start(f"resume={run.name}")):
        output = "".join(rival.output())
        if not process.is_alive():  # the rival came too late, and may have trained
            return None
        assert rival.exitcode == 1, output
        assert "is being written by another process" in output, output
        work.counts["rivals refused"] += 1
    return "two rivals refused"


def _meddle(run: Path, work: Drill, chance: random.Random) -> str | None:
    """Damage what a resume does not need: records outside the checkpoints, and the cache."""
    cached = [path for path in (work.folder / "cache").rglob("*") if path.suffix in (".npy", ".json")]
    records = [run / name for name in RECORDS if (run / name).exists()]
    if not records or not list(run.glob("checkpoints/st*-*")):
        return None
    file, kind = chance.choice(sorted(records + cached)), chance.choice(DAMAGES)
    if kind == "swapped":
        file.write_text(json.dumps(["+hydra.job.env_set.A=b", "seed=7"]), encoding="utf-8")
    else:
        damage_file(file, kind, file, chance)
    work.counts["records and caches damaged"] += 1
    return f"{file.name} {kind}"


def _starve(process: ScriptProcess, run: Path, chance: random.Random) -> str:
    """Let no file grow past some size for a while: writes fail as on a full disk, and succeed again later."""
    step = chance.randrange(STEPS // 2)
    while process.is_alive() and not (_steps(run) >= step and is_claimed(run)):
        time.sleep(0.001)
    if not process.is_alive():
        return "nothing: it was done"
    size = chance.choice((0, 2_000, 100_000))
    assert process.pid
    all_processes = [process.pid, *_children(process.pid)]  # one writes checkpoints
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit, seconds in (size, chance.uniform(0.1, 0.6)), (unlimited[0], 0.0):
        for each in all_processes:
            with suppress(ProcessLookupError):  # it may end meanwhile
                resource.prlimit(each, resource.RLIMIT_FSIZE, (limit, unlimited[1]))
        time.sleep(seconds)
    return f"no file over {size} bytes for a while from step {step}"


def _steps(run: Path) -> int:
    """Lines of metrics so far; about the updates done."""
    with suppress(FileNotFoundError):  # a run that is resumed may replace it meanwhile
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


def _damage(run: Path, work: Drill, chance: random.Random, other: Path) -> str | None:
    """Damage a file of the newest checkpoint, if there is one before it to fall back to."""
    folders = sorted((run / "checkpoints").glob("step-*")) if (run / "checkpoints").exists() else []
    if len(folders) < 2:
        return None
    file = chance.choice(sorted(folders[-1].iterdir()))
    kind = chance.choice(DAMAGES)
    damage_file(file, kind, other / "checkpoints" / "last" / file.name, chance)
    return f"{file.name} {kind}"


def _go_back(run: Path, work: Drill, seed: int) -> str | None:
    """Resume from the checkpoint before the newest, if there are two, and kill that run as soon as the newest
    is set aside. The run is not to return to it."""
    folders, chance = step_folders(run), random.Random(f"{seed} {_steps(run)}")
    if len(folders) < 2:
        return None
    aside = run / "checkpoints" / f"abandoned-{folders[0].name}"
    process = work.start(f"resume={run.name}/checkpoints/{folders[1].name}")
    while process.is_alive() and not aside.exists():
        time.sleep(0.0005)
    time.sleep(chance.uniform(0, 0.02))
    process.kill()
    _check_output("".join(process.output()), False, False, work)
    newest, recorded = steps_of(step_folders(run)[0]), read_json_lines(run / "metrics.jsonl")
    assert newest <= recorded[-1]["step"] + 1, f"back at {folders[1].name}, but {newest} updates are saved"
    assert json.loads((run / "summary.json").read_text())["status"] == "running"
    work.counts["returns to an older checkpoint"] += 1
    return f"killed after a return to {steps_of(folders[1])} updates"


def damage_file(file: Path, kind: str, of_other_run: Path, chance: random.Random) -> None:
    content = file.read_bytes()
    match kind:
        case "cut":
            file.write_bytes(content[: len(content) // 2] if content else b"\0")
        case "bit":
            place = chance.randrange(len(content)) if content else 0
            flipped = bytes([content[place] ^ 1 << chance.randrange(8)]) if content else b"\0"
            file.write_bytes(content[:place] + flipped + content[place + 1 :])
        case "empty":
            file.write_bytes(b"" if content else b"\0")
        case "format":
            file.write_bytes(b"PK\x03\x04 this is something else\n" * 20)
        case "swapped":
            shutil.copyfile(of_other_run, file)
        case "missing":
            file.unlink()


def main(seeds: int, ranks: bool) -> None:
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        work = Drill(Path(folder))
        for seed in range(seeds):
            print(f"seed {seed}: {(drill_ranks if ranks else drill)(work, seed)}: the same", flush=True)
    figures = ", ".join(f"{count} {what}" for what, count in work.counts.items())
    if ranks:
        figures += f", all ended within {work.longest:.1f} s"
    print(f"{figures}: nothing lost; {(time.monotonic() - begin) / 60:.1f} minutes")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40, "ranks" in sys.argv)
