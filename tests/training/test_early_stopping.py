"""Which jobs of a sweep stop early: the rules against independent versions, and a real sweep."""

import json
import math
import os
import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import optuna
import pytest
from drill import outcome
from launch import Interrupted, Invocation
from pretrain import run
from scripts import run_until_killed
from settings import changed, settings

from llm.commands.pretrain import pretrain
from llm.config import EarlyStoppingConfig, PretrainConfig, TrainingConfig
from llm.config_rules import validate
from llm.errors import UserError
from llm.files import append_json_lines, read_json_lines, write_text
from llm.run_folder import write_summary
from llm.training.early_stopping import (
    JUDGEMENTS,
    LOSS,
    CurveReader,
    EarlyStopping,
    Point,
    halving_rule,
    median_rule,
    read_judgements,
    rungs,
)
from llm.training.summary import Counters, Summary

optuna.logging.set_verbosity(optuna.logging.ERROR)

pytestmark = pytest.mark.usefixtures("no_pictures")


class Job:
    """A job that is not trained: it writes the metrics that a run would, and asks."""

    def __init__(
        self,
        folder: Path,
        stopping: EarlyStoppingConfig,
        max_steps: int,
        epoch_steps: int,
        tokenizer: str = "bytes-1",
        text: str = "text",
    ) -> None:
        config = PretrainConfig(early_stopping=stopping)
        config.training = TrainingConfig(max_steps=max_steps, max_epochs=4 * max_steps / epoch_steps)
        self.progress = 0.0
        data = [f"{tokenizer}-training", f"{tokenizer}-{text}"]
        run = SimpleNamespace(run_dir=folder, config=config, counters=Counters(), data=data)
        run.progress = lambda: self.progress
        self.run = cast(Any, run)
        self.metrics, self.max_steps, self.epoch_steps = folder / "metrics.jsonl", max_steps, epoch_steps
        self.judge = EarlyStopping(self.run)
        self.points: list[tuple[float, float]] = []
        folder.mkdir(parents=True)
        write_summary(folder, {"tokenizer": tokenizer, "validation_text": text})

    def evaluate(self, steps: int, loss: float, bits_per_byte: float = 1.0) -> str | None:
        """Record an evaluation after so many updates; the reason to stop, if there is one."""
        self.run.counters.steps, self.progress = steps, steps / self.max_steps
        position = {"step": steps - 1, "epoch": steps / self.epoch_steps, "seconds": 0.1 * steps}
        line = {**position, "val/loss": loss if math.isfinite(loss) else None}
        line["val/bits_per_byte"] = bits_per_byte
        append_json_lines(self.metrics, [{**position, "train/loss": 1.0}, line])
        self.points.append((self.progress, loss))
        return self.judge.reason_to_stop()


def random_loss(chance: random.Random) -> float:
    """Of few values, so that some are level, and now and then not finite."""
    return math.inf if chance.random() < 0.05 else chance.randint(20, 60) / 10


def test_the_median_rule_is_optunas_where_best_losses_are_reported(tmp_path: Path) -> None:
    chance = random.Random(0)
    stops = 0
    for sweep in range(30):
        min_jobs, from_step, length = chance.randint(1, 4), chance.randint(2, 6), 12
        pruner = optuna.pruners.MedianPruner(0, from_step, n_min_trials=min_jobs)
        study = optuna.create_study(pruner=pruner)
        stopping = EarlyStoppingConfig("median", from_progress=from_step / length, min_jobs=min_jobs)
        for number in range(6):
            job, trial, best = Job(tmp_path / f"{sweep}/{number}", stopping, length, 5), study.ask(), math.inf
            for steps in range(1, chance.randint(2, length) + 1):
                loss = chance.randint(20, 60) / 10
                best = min(best, loss)
                trial.report(best, steps)
                reason = job.evaluate(steps, loss)
                assert bool(reason) == (steps < length and trial.should_prune())
                stops += bool(reason)
            study.tell(trial, best)
    assert stops > 100


def test_halving_is_optunas_in_any_order_of_events(tmp_path: Path) -> None:
    chance = random.Random(1)
    rungs_seen = set()
    for sweep in range(30):
        reduction, levels = chance.choice([(2, 3), (3, 3), (4, 2)])
        length = reduction**levels
        study = optuna.create_study(
            pruner=optuna.pruners.SuccessiveHalvingPruner(1, reduction_factor=reduction)
        )
        stopping = EarlyStoppingConfig("halving", from_progress=1 / length, reduction=reduction)
        running = []
        for number in range(12):
            every = chance.randint(1, reduction)  # no two rungs fall on one evaluation, where they part
            job = Job(tmp_path / f"{sweep}/{number}", stopping, length, 7)
            running.append((job, study.ask(), range(1, length, every)))
        while running:
            job, trial, steps = running.pop(chance.randrange(len(running)))
            loss = chance.randint(20, 60) / 10
            trial.report(loss, steps[0])
            reason = job.evaluate(steps[0], loss)
            assert bool(reason) == trial.should_prune()
            if reason:
                rungs_seen.add(reason.partition("1/")[2].split()[0])
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            elif steps[1:]:
                running.append((job, trial, steps[1:]))
    assert rungs_seen == {"2", "3", "4", "8", "9", "16", "27"}


def median_by_hand(
    own: list[tuple[float, float]], others: list[list[tuple[float, float]]], least: int
) -> bool:
    now = own[-1][0]
    bests = []
    for other in others:
        until = [loss for progress, loss in other if progress <= now]
        if until and max(progress for progress, _ in other) >= now:
            bests.append(sorted(until)[0])
    worse = sum(sorted(loss for _, loss in own)[0] > best for best in bests)
    if len(bests) < least:
        return False
    if len(bests) % 2:
        return worse > len(bests) // 2
    middle = sorted(bests)[len(bests) // 2 - 1 : len(bests) // 2 + 1]
    return sorted(loss for _, loss in own)[0] > sum(middle) / 2


def halving_by_hand(
    own: list[tuple[float, float]], others: list[list[tuple[float, float]]], reduction: int, start: float
) -> bool:
    """Counts those that are better, rung by rung; exactly in rungs that are powers of two."""
    for power in range(1, 20):
        rung = float(reduction) ** -power
        at = [[loss for progress, loss in job if progress >= rung] for job in (own, *others)]
        if rung < start or len(at[0]) != 1:  # not this job's first evaluation there
            continue
        there = [losses[0] for losses in at if losses]
        if sum(loss < there[0] for loss in there) >= max(1, math.floor(len(there) / reduction)):
            return True
    return False


@pytest.mark.parametrize("rule", ["median", "halving"])
def test_jobs_of_other_lengths_are_judged_as_by_hand(tmp_path: Path, rule: str) -> None:
    """Jobs that start, evaluate, die and come to stops in any order, at positions of their own."""
    chance = random.Random(2)
    judged, stops = 0, 0
    for sweep in range(25):
        reduction, start, least = (
            chance.choice([2, 4]),
            chance.choice([0.03, 0.1, 0.25]),
            chance.randint(1, 5),
        )
        stopping = EarlyStoppingConfig(rule, from_progress=start, min_jobs=least, reduction=reduction)
        jobs: list[Job] = []
        ended: set[Job] = set()
        for _ in range(150):
            going = [job for job in jobs if job not in ended]
            if len(jobs) < 12 and (not going or chance.random() < 0.2):
                max_steps = 64  # the same for all, as the judging job's limits place everybody
                jobs.append(
                    Job(tmp_path / f"{sweep}/{len(jobs)}", stopping, max_steps, chance.choice([8, 16]))
                )
                continue
            if not going:
                break
            job = chance.choice(going)
            steps = job.run.counters.steps + chance.randint(1, 12)
            reason = job.evaluate(min(steps, 64), random_loss(chance))
            others = [other.points for other in jobs if other is not job and other.points]
            expected = start <= job.progress < 1 and (
                median_by_hand(job.points, others, least)
                if rule == "median"
                else halving_by_hand(job.points, others, reduction, start)
            )
            assert bool(reason) == expected
            judged, stops = judged + 1, stops + expected
            if reason or steps >= 64 or chance.random() < 0.03:
                ended.add(job)
    assert judged > 1000
    assert 50 < stops < judged / 2


def test_the_reason_says_what_was_compared() -> None:
    others = [[Point(0.1, 5.0), Point(0.5, loss), Point(1.0, 1.0)] for loss in (2.0, 3.0, 4.0, math.inf)]
    own = [Point(0.1, 5.0), Point(0.4, 4.75), Point(0.5, 6.0)]
    median = EarlyStoppingConfig("median", min_jobs=4)
    halving = EarlyStoppingConfig("halving", reduction=2, from_progress=0.5)
    assert median_rule(own, others, median) == (
        "best validation loss 4.7500 is above 3.5000, the median of 4 other jobs"
    )
    assert median_rule(own, others, replace(median, min_jobs=5)) is None
    assert median_rule([Point(0.5, 3.5)], others, median) is None  # level with it
    assert halving_rule(own, others, halving) == (
        "validation loss 6.0000 at 1/2 of the run is above 3.0000, the highest among the best 2 of 5 jobs"
    )
    assert halving_rule([*own, Point(0.6, 9.0)], others, halving) is None  # judged once a rung
    assert halving_rule(own, [], halving) is None
    assert (rungs(3, 0.1), rungs(3, 1 / 9), rungs(3, 1 / 3), rungs(2, 0.4)) == ([9, 3], [9, 3], [3], [2])


def test_metrics_are_placed_by_the_limits_of_who_reads_them(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    position = {"epoch": 0.5, "seconds": 12.0}
    lines: list[dict[str, Any]] = [
        {"step": 0, "val/loss": 5.0, "epoch": 0.01, "seconds": 0.5},
        {"step": 24, "train/loss": 4.0, **position},
        {"step": 24, "val/loss": None, **position},
    ]
    whole = "".join(json.dumps(line) + "\n" for line in lines)
    metrics.write_text(whole + '{"step": 49, "val/loss": 3.2, "epo')
    for training, progress in (
        (TrainingConfig(max_minutes=None, max_steps=100), [0.01, 0.25]),
        (TrainingConfig(max_minutes=None, max_steps=100, max_epochs=1.0), [0.01, 0.5]),
        (TrainingConfig(max_minutes=0.25, max_steps=100, max_epochs=1.0), [0.5 / 15, 0.8]),
    ):
        assert CurveReader(metrics, training, LOSS).curve() == [(progress[0], 5.0), (progress[1], math.inf)]


def test_each_line_of_metrics_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {n}, "epoch": {n}, "seconds": 1, "val/loss": {n}}}\n' for n in range(6)]
    reader = CurveReader(metrics, TrainingConfig(max_minutes=None, max_epochs=10.0), LOSS)
    read: list[bytes] = []
    points = CurveReader._points

    def watched(reader: CurveReader, lines: bytes) -> Iterator[Point]:
        read.append(lines)
        return points(reader, lines)

    monkeypatch.setattr(CurveReader, "_points", watched)
    assert reader.curve() == []
    metrics.write_text("".join(lines[:3]) + lines[3][:9])
    assert [loss for _, loss in reader.curve()] == [0, 1, 2]
    with metrics.open("a") as file:
        file.write(lines[3][9:] + lines[4])
    assert [loss for _, loss in reader.curve()] == [0, 1, 2, 3, 4]
    assert b"".join(read).decode() == "".join(lines[:5])
    write_text(metrics, "".join(lines[:2] + lines[5:]))  # resumed at an earlier checkpoint
    assert [loss for _, loss in reader.curve()] == [0, 1, 5]
    metrics.unlink()
    assert reader.curve() == []


def test_only_jobs_of_the_sweep_are_read_and_only_what_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping = EarlyStoppingConfig("median", min_jobs=1)
    for name, loss in (("notes", 1.0), ("0", 3.0), ("1", 3.0)):
        Job(tmp_path / name, stopping, 100, 10).evaluate(50, loss)
    (tmp_path / "2").mkdir()  # begun, with no metrics yet
    (tmp_path / "3").write_text("a file")
    own = Job(tmp_path / "10", stopping, 100, 10)
    read: list[str] = []

    points = CurveReader._points

    def watched(reader: CurveReader, lines: bytes) -> Iterator[Point]:
        if lines:
            read.append(reader.metrics.parent.name)
        return points(reader, lines)

    monkeypatch.setattr(CurveReader, "_points", watched)
    assert own.evaluate(40, 2.5) is None  # notes would have it stopped
    assert sorted(read) == ["0", "1", "10"]
    assert own.evaluate(45, 2.5) is None
    assert sorted(read) == ["0", "1", "10", "10"]
    append_json_lines(
        tmp_path / "1" / "metrics.jsonl", [{"step": 59, "val/loss": 1, "epoch": 6, "seconds": 9}]
    )
    assert own.evaluate(60, 2.5) == (
        "median rule at step 59: best validation loss 2.5000 is above 1.0000, the median of 1 other jobs"
    )
    assert sorted(read) == ["0", "1", "1", "10", "10", "10"]
    own.progress = 0.55
    assert own.judge.reason_to_stop() is None  # of an evaluation that a full disk kept out of the file
    own.run.config.rerun = "a run to be repeated as it was"
    assert own.evaluate(60, 9.0) is None
    alone = Job(tmp_path / "10-00-00", stopping, 100, 10)  # a single run's folder is named by the time
    assert alone.evaluate(60, 9.0) is None


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"rule": "asha"}, r"early_stopping.rule=asha: must be one of none, median, halving"),
        ({"from_progress": 0.0}, "early_stopping.from_progress=0.0: must be above 0 and below 1"),
        (
            {"rule": "halving", "from_progress": 0.4},
            "with early_stopping.reduction=3, halving stops jobs at 1/3",
        ),
        (
            {"rule": "median", "eval_freq": None},
            "early_stopping.rule=median compares .*: set training.eval_freq",
        ),
    ],
)
def test_settings_that_stop_nothing_are_refused(values: dict[str, Any], line: str) -> None:
    config = PretrainConfig()
    config.training.eval_freq = values.pop("eval_freq", 25)
    config.early_stopping = EarlyStoppingConfig(**values)
    with pytest.raises(UserError, match=line):
        validate(config)


RATES = (0.005, 0.01, 0.02, 1e-6, 0.03)  # each learns faster than those before, but for one
HOPELESS = 3


def sweep(folder: Path, rule: str) -> list[Summary]:
    """Train the jobs one after another, in folders as Hydra names them."""
    folder.mkdir()
    config = settings(folder.parent, max_steps=20)
    config.early_stopping = EarlyStoppingConfig(rule, from_progress=0.3, min_jobs=2, reduction=2)
    return [
        pretrain(changed(config, optimizer__lr=lr), folder / str(number)) for number, lr in enumerate(RATES)
    ]


def evaluations(run_dir: Path) -> list[tuple[int, float]]:
    lines = read_json_lines(run_dir / "metrics.jsonl")
    return [(line["step"], line["val/loss"]) for line in lines if "val/loss" in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, no_pictures: None) -> Path:
    """The sweep without early stopping."""
    folder = tmp_path_factory.mktemp("whole") / "sweep"
    summaries = sweep(folder, "none")
    assert [(each.status, each.stopped_early) for each in summaries] == 5 * [("finished", None)]
    return folder


def first_stop(whole: Path, rule: str) -> tuple[int, int]:
    """Which job stops first, and at which step, worked out from the files of the sweep without stopping."""
    points = [
        [((step + 1) / 20, loss) for step, loss in evaluations(whole / str(number))]
        for number in range(len(RATES))
    ]
    for number, own in enumerate(points):
        for index, (progress, _) in enumerate(own):
            until, earlier = own[: index + 1], points[:number]
            if progress >= 0.3 and (
                median_by_hand(until, earlier, 2)
                if rule == "median"
                else halving_by_hand(until, earlier, 2, 0.3)
            ):
                return number, evaluations(whole / str(number))[index][0]
    raise AssertionError("no job stops")


@pytest.mark.parametrize("rule", ["median", "halving"])
def test_the_hopeless_job_of_a_sweep_stops_and_the_others_come_out_the_same(
    tmp_path: Path, whole: Path, rule: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    number, step = first_stop(whole, rule)
    assert (number, step) == (HOPELESS, {"median": 8, "halving": 12}[rule])
    summaries = sweep(tmp_path / "sweep", rule)
    statuses = [(each.status, each.stopped_early is not None, each.val_loss is None) for each in summaries]
    assert statuses == [
        ("interrupted", True, True) if each == HOPELESS else ("finished", False, False) for each in range(5)
    ]
    stopped = tmp_path / "sweep" / str(HOPELESS)
    assert summaries[HOPELESS].steps == step + 1
    reason = summaries[HOPELESS].stopped_early
    assert reason
    assert reason.startswith(f"{rule} rule at step {step}: ")
    assert json.loads((stopped / "summary.json").read_text()) == summaries[HOPELESS].as_dict()
    assert f"stopped early: {reason}\n" in caplog.text
    assert f"resume={stopped} early_stopping.rule=none" in caplog.text
    assert (stopped / "checkpoints" / "last").readlink().name == f"step-{step + 1:08d}"
    assert evaluations(stopped) == [each for each in evaluations(whole / str(HOPELESS)) if each[0] <= step]
    for job in range(5):
        if job != HOPELESS:
            assert outcome(tmp_path / "sweep" / str(job)) == outcome(whole / str(job))
    config = changed(settings(tmp_path, max_steps=20), resume=str(stopped), optimizer__lr=RATES[HOPELESS])
    config.early_stopping = EarlyStoppingConfig(rule, from_progress=0.3, min_jobs=2, reduction=2)
    if rule == "median":  # halving has no rung after this one
        again = pretrain(config)
        assert again.stopped_early
        assert again.stopped_early.startswith(f"median rule at step {step + 4}: best validation loss 5.")
    finished = pretrain(changed(config, early_stopping__rule="none"), given={"early_stopping.rule"})
    assert (finished.status, finished.stopped_early) == ("finished", None)
    assert finished.resumed[-1]["changed"] == {"early_stopping.rule": [rule, "none"]}
    assert outcome(stopped) == outcome(whole / str(HOPELESS))


@pytest.mark.parametrize(
    ("rule", "moment"), [("median", "recorder.Recorder.finish_saving"), ("halving", "lifecycle.conclude")]
)
def test_a_stop_that_was_decided_outlives_a_kill(tmp_path: Path, whole: Path, rule: str, moment: str) -> None:
    """Killed before the state that it follows from is saved, or after that and before the summary."""
    _, step = first_stop(whole, rule)
    for number in range(HOPELESS):
        (tmp_path / "sweep" / str(number)).mkdir(parents=True)
        shutil.copy(whole / str(number) / "metrics.jsonl", tmp_path / "sweep" / str(number))
    stopped = tmp_path / "sweep" / str(HOPELESS)
    config = changed(settings(tmp_path, max_steps=20), optimizer__lr=RATES[HOPELESS])
    config.early_stopping = EarlyStoppingConfig(rule, from_progress=0.3, min_jobs=2, reduction=2)
    run_until_killed(config, stopped, f"llm.training.{moment}")
    assert json.loads((stopped / "summary.json").read_text())["status"] == "running"
    for number in range(HOPELESS):  # judged now, the job would continue
        shutil.rmtree(tmp_path / "sweep" / str(number))
    summary = pretrain(changed(config, resume=str(stopped)))
    assert (summary.status, summary.steps) == ("interrupted", step + 1)
    assert summary.stopped_early
    assert summary.stopped_early.startswith(f"{rule} rule at step {step}: ")
    again = pretrain(
        changed(config, resume=str(stopped))
    )  # whoever resumes a job that stopped wants it to go on
    assert (again.status, again.steps, again.stopped_early) == ("finished", 20, None)
    assert outcome(stopped) == outcome(whole / str(HOPELESS))


def test_a_job_is_judged_once_at_each_evaluation(tmp_path: Path) -> None:
    stopping = EarlyStoppingConfig("median", min_jobs=1)
    other = Job(tmp_path / "0", stopping, 100, 10)
    other.evaluate(40, 2.0)
    own = Job(tmp_path / "1", stopping, 100, 10)
    assert own.evaluate(40, 2.5)
    assert own.evaluate(50, 2.5) is None  # the other is not there yet
    other.evaluate(60, 2.0)
    lines = read_json_lines(own.metrics)
    own.metrics.unlink()  # it was killed, and begins again
    own.judge = EarlyStopping(own.run)
    append_json_lines(own.metrics, lines[:1])
    assert own.evaluate(40, 2.5) == own.evaluate(40, 2.5)
    assert own.evaluate(50, 2.5) is None
    assert own.evaluate(55, 2.5)
    own.judge = EarlyStopping(own.run)
    assert own.evaluate(50, 2.6)  # another course of the run, as with another learning rate
    with (own.run.run_dir / JUDGEMENTS).open("a") as file:
        file.write('{"step": 49, "rea\n[]\n{}\n')
    assert set(read_judgements(own.run.run_dir / JUDGEMENTS)) == {39, 49, 54}


def test_losses_of_other_tokenizers_and_texts_are_not_compared(tmp_path: Path) -> None:
    stopping = EarlyStoppingConfig("median", min_jobs=1)
    for name, loss, bits, text in (("0", 2.0, 2.9, "text"), ("1", 1.0, 1.0, "easier")):
        other = Job(tmp_path / name, stopping, 100, 10, "bytes-1", text)
        for steps in (40, 50):
            other.evaluate(steps, loss, bits)
    better = Job(tmp_path / "2", stopping, 100, 10, "gpt2-2")
    assert better.evaluate(40, 4.0, bits_per_byte=2.5) is None  # a higher loss per token, but fewer bits
    worse = Job(tmp_path / "3", stopping, 100, 10, "gpt2-2")
    better.evaluate(50, 4.0, bits_per_byte=2.5)
    assert worse.evaluate(40, 1.5, bits_per_byte=3.0) == (
        "median rule at step 39: best validation bits per byte 3.0000 is above 2.7000, "
        "the median of 2 other jobs"
    )
    halving = EarlyStoppingConfig("halving", from_progress=0.5, reduction=2)
    assert Job(tmp_path / "4", halving, 100, 10, "gpt2-2").evaluate(50, 1.5, bits_per_byte=3.0) == (
        "halving rule at step 49: validation bits per byte 3.0000 at 1/2 of the run is above 2.5000, "
        "the highest among the best 1 of 3 jobs"
    )
    assert Job(tmp_path / "5", stopping, 100, 10, text="hard").evaluate(40, 9.0) is None


def test_who_stops_by_hand_a_job_that_stops_early_has_stopped_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(judge: EarlyStopping) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        return "a reason"

    monkeypatch.setattr(EarlyStopping, "reason_to_stop", stop)
    summary = pretrain(settings(tmp_path), tmp_path / "run")
    assert (summary.status, summary.steps, summary.stopped_early) == ("interrupted", 1, None)
    assert summary.stopped_by == "SIGINT"


def test_a_job_stopped_early_does_not_end_its_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = Summary(run_dir="sweep/3", status="interrupted", best_val_loss=2.0, stopped_early="a reason")
    monkeypatch.setattr("llm.commands.pretrain.pretrain_in", lambda run_dir, config, given: summary)
    invocation = Invocation(tmp_path, frozenset())
    assert run(PretrainConfig(), invocation).result == math.inf  # worse than all that ran to their end
    summary.stopped_early, summary.stopped_by = None, "SIGTERM"
    with pytest.raises(Interrupted):
        run(PretrainConfig(), invocation)
    summary.validation = {"loss": 3.0}
    assert run(PretrainConfig(), invocation).result == 3.0
