"""How fast a run trains, measured on its first updates."""

import time
from dataclasses import dataclass

from llm.runtime import Runtime
from llm.training.acceleration import accelerate, choose
from llm.training.loop import finish, launch
from llm.training.run import build_run
from llm.training.start import Start
from llm.training.validation import evaluate_splits

SECONDS = 20.0
LEAST_UPDATES = 3  # the first takes longer and is not counted


@dataclass(frozen=True)
class Probe:
    updates: int
    tokens_per_second: float
    evaluation_seconds: float  # of one evaluation during training


def probe(start: Start, runtime: Runtime) -> Probe:
    """Start a run as pretrain.py would, for `SECONDS`, and keep nothing. All processes have to call it."""
    run = build_run(start, runtime)
    choose(run, start)
    run.model.train()
    accelerate(run)
    tokens, seconds, begin = 0, 0.0, time.perf_counter()
    while runtime.agree(run.counters.steps < LEAST_UPDATES or time.perf_counter() - begin < SECONDS):
        run.in_flight.append(launch(run, 0.0))
        while len(run.in_flight) > run.optimizers.can_queue:
            update = run.in_flight[0].tokens
            speed = finish(run)["tokens_per_second"]
            if run.counters.steps > 1:
                tokens, seconds = tokens + update, seconds + update / speed
    begin = time.perf_counter()
    if run.takes_part(wanted=True):
        evaluate_splits(run)
    return Probe(run.counters.steps, tokens / seconds, time.perf_counter() - begin)
