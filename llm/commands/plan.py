"""The work of `experiments/plan.py`: estimating what a run takes before it starts."""

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from llm.config import PlanConfig, PretrainConfig
from llm.config_rules import validate
from llm.device import DEVICES, Device, device_name, device_of, measure_matmul_flops
from llm.errors import UserError
from llm.files import write_json
from llm.model.gpt import description, parameter_count, parameters_of, training_flops_per_token
from llm.outcome import Outcome
from llm.processes import processes
from llm.progress import format_count, format_seconds, format_times
from llm.runtime import Runtime, device_kind, start_runtime
from llm.tables import format_table, terminal_width
from llm.training.budget import EXPECTED_MFU, LAYER_SECONDS, Budget, estimate_budget, expected_speed
from llm.training.compute_optimal import FLOPS_PER_PARAMETER, LAWS, SMALLEST_FITTED, model_of_about
from llm.training.memory import (
    KEPT,
    USED_SHARE,
    Memory,
    fits,
    largest_that_fits,
    memory_of,
    needed,
    sharded,
)
from llm.training.probe import Probe, probe
from llm.training.run import Run, build_run
from llm.training.start import find_start
from llm.training.update_size import refuse_uneven
from llm.training.validation import FORWARD_SHARE

MOST_ROWS = 4096  # windows in the largest micro-batch that is considered
SHARDED_OVER = 2, 4, 8  # processes
REPEATED = 4.0  # epochs up to which repeated text is nearly as good as new (Muennighoff et al. 2023)

Rows = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class Plan:
    """A run that has not started, and what it would take."""

    run: Run  # with shapes, and no data
    device: Device
    name: str  # of the device
    memory: Memory
    largest: int  # windows of a micro-batch that the device has memory for; 0: not even 1
    probed: Probe | None
    budget: Budget
    tokens_per_second: float
    price: float | None

    @property
    def processes(self) -> int:
        return self.run.config.runtime.processes

    @property
    def rows(self) -> int:
        """Windows in a micro-batch of one process."""
        return self.run.config.data.batch_size // self.processes

    @property
    def update_seconds(self) -> float:
        return self.budget.update_tokens / self.tokens_per_second

    @property
    def updates(self) -> float:
        return self.budget.tokens_left / self.budget.update_tokens

    @property
    def evaluations(self) -> int:
        """How many evaluations there are during training, including that after the last update."""
        frequency, updates = self.run.config.training.eval_freq, max(1, round(self.updates))
        if frequency is None:
            return 1
        return -(-updates // frequency) + bool((updates - 1) % frequency)

    @property
    def evaluation_seconds(self) -> float:
        if self.probed:
            return self.probed.evaluation_seconds
        config = self.run.config
        tokens = 2 * config.training.eval_iter * config.data.batch_size * config.model.context_length
        return FORWARD_SHARE * tokens * self.processes / self.tokens_per_second  # one process evaluates

    @property
    def seconds(self) -> float:
        """Seconds of training, evaluations and the validation at the end."""
        along_the_way = self.evaluations * self.evaluation_seconds
        return self.budget.seconds_left + along_the_way + self.budget.validation_seconds

    @property
    def cost(self) -> float | None:
        return None if self.price is None else self.price * self.processes * self.seconds / 3600

    @property
    def flops(self) -> float:
        """Floating-point operations of training."""
        return self.budget.tokens_left * training_flops_per_token(self.run.model)


def plan(config: PlanConfig, run_dir: Path, given: Collection[str] = ()) -> Outcome:
    """Print what a run with this config would take, and write `plan.json` into `run_dir`.

    Args:
        given: see llm/commands/pretrain.py.

    Raises:
        UserError: pretrain.py would refuse the config too, or the run would not be a new one.
    """
    validate(config)
    for name in ("resume", "rerun"):
        if value := getattr(config, name):
            raise UserError(f"{name}={value}: a run that is to begin is planned; remove it")
    found = _planned(config, run_dir, given)
    rows = [*_model(found), *_memory(found), *_batch(found), *_time(found), *_text(found)]
    rows += [*_sharding(found), *_compute_optimal(config, found)]
    cells = [list(row) for row in rows]
    print(format_table(cells, left={0, 1}, wrapped=1, width=terminal_width()))
    figures = _figures(found)
    write_json(run_dir / "plan.json", figures)
    return Outcome(figures, {"plan": run_dir / "plan.json"})


def _planned(config: PlanConfig, run_dir: Path, given: Collection[str]) -> Plan:
    settings = config.plan
    asked = PretrainConfig(**{item.name: getattr(config, item.name) for item in fields(PretrainConfig)})
    start = find_start(asked, run_dir, given)
    validate(start.config)
    kind = DEVICES[settings.device].kind if settings.device else device_kind(start.config.runtime)
    refuse_uneven(start.config, start.undecided, kind)
    asked_for, probed = start.config.runtime, None
    count = asked_for.processes
    if settings.device:
        device, name = DEVICES[settings.device], settings.device
        precision = "bf16" if asked_for.precision == "auto" else asked_for.precision
    else:
        here = start_runtime(replace(asked_for, processes=1, sharding="none"))
        device, name, precision = device_of(here, count), device_name(here.device), here.precision
    run = build_run(start, Runtime(torch.device("cpu"), precision, processes=count), planned_for=device)
    if settings.probe:
        with processes(start.config.runtime, probe, start) as everyone:
            probed = probe(start, everyone)
    speed = probed.tokens_per_second if probed else None
    if speed is None:
        flops = count * (device.bf16_flops or measure_matmul_flops(here))
        speed = expected_speed(run, flops, device.kind)
    rows = run.config.data.batch_size // count
    return Plan(
        run=run,
        device=device,
        name=f"{count} processes on {name}" if count > 1 else name,
        memory=memory_of(run.config, rows, precision, device),
        largest=_largest(run, device),
        probed=probed,
        budget=estimate_budget(run, speed),
        tokens_per_second=speed,
        price=settings.price,
    )


def _largest(run: Run, device: Device) -> int:
    """The largest power of two of windows in a micro-batch of one process that fits the device's memory; 0 if
    none does.

    The memory per window is estimated from two micro-batches, and is no less in larger ones, so the search
    goes down from there.
    """
    config, precision = run.config, run.runtime.precision
    one, two = (memory_of(config, rows, precision, device) for rows in (8, 16))
    if not fits(memory_of(config, 1, precision, device), device):
        return 0
    window = (two.peak - one.peak) / 8
    most = min(MOST_ROWS, max(8.0, device.memory_bytes / max(1.0, window)))
    powers = [1 << power for power in range(int(most).bit_length() - 1, -1, -1)]
    return largest_that_fits(powers, config, precision, device)


def _bytes(count: float) -> str:
    return f"{format_count(count)}B"


def _model(plan: Plan) -> Rows:
    parameters, config = parameter_count(plan.run.model), plan.run.config
    yield "model", f"{format_count(parameters)} parameters: {description(config.model)}"
    yield "planned for", f"{plan.name}, {plan.run.runtime.precision}, {config.optimizer.name}"


def _memory(plan: Plan) -> Rows:
    memory, on_gpu = plan.memory, plan.device.kind == "cuda"
    yield "weights", _bytes(memory.weights)
    yield "gradients", _bytes(memory.gradients)
    yield "state", f"{_bytes(memory.optimizer)}, of the optimizer"
    yield "activations", f"{_bytes(memory.activations)}, of {plan.rows} windows"
    yield "logits", f"{_bytes(memory.logits)}, of a chunk of tokens, with the gradient of the head"
    yield "step", f"{_bytes(memory.step)}, of the optimizer as it steps"
    yield "an update", f"{_bytes(memory.update)} at once, at most"
    yield "evaluation", _bytes(memory.evaluation)
    where = ", in the computer's memory" if on_gpu else ""
    yield "copies", f"{_bytes(memory.copies)}, of the weights and of a checkpoint that is written{where}"
    limit = f"{USED_SHARE:.0%} of {_bytes(plan.device.memory_bytes)}"
    verdict = "fits" if fits(memory, plan.device) else "does not fit"
    kept = "" if on_gpu else f" at most, {KEPT:g} times what is held at once, copies and the process itself"
    yield "together", f"{_bytes(needed(memory, plan.device))}{kept}: {verdict} in {limit}"


def _batch(plan: Plan) -> Rows:
    data, training = plan.run.config.data, plan.run.config.training
    tokens = format_count(plan.budget.update_tokens)
    yield "update", f"{data.batch_size} windows × {training.accumulate}: {tokens} tokens"
    if not plan.largest:
        yield "largest", "not even one window fits: a smaller model, or sharding"
        return
    size, windows = plan.largest * plan.processes, data.batch_size * training.accumulate
    fitting = max(each for each in range(1, min(size, windows) + 1) if windows % each == 0)
    yield "largest", f"data.batch_size={size}"
    yield "same update", f"data.batch_size={fitting} training.accumulate={windows // fitting}"


def _time(plan: Plan) -> Rows:
    if plan.probed:
        how = f"measured, over {plan.probed.updates} updates"
    elif plan.device.bf16_flops:
        how = (
            f"if it reaches {EXPECTED_MFU:.0%} of {format_count(plan.device.bf16_flops)}FLOP/s, "
            f"and a layer takes at least {1000 * LAYER_SECONDS:g} ms"
        )
    else:
        how = f"if it reaches {EXPECTED_MFU:.0%} of large products; plan.probe=true measures"
    budget = plan.budget
    speed = format_count(plan.tokens_per_second)
    seconds = plan.update_seconds
    update = f"{1000 * seconds:,.0f} ms" if seconds < 10 else format_seconds(seconds)
    yield "speed", f"{update} an update, {speed} tokens/s, {how}"
    yield (
        "training",
        (
            f"{plan.updates:,.0f} updates, {format_count(budget.tokens_left)} tokens: "
            f"{format_seconds(budget.seconds_left)} (training.{budget.limit})"
        ),
    )
    evaluations = plan.evaluations * plan.evaluation_seconds
    yield "evaluations", f"{plan.evaluations:,.0f} in {format_seconds(evaluations)}"
    yield "validation", f"{format_seconds(budget.validation_seconds)}, of {budget.windows:,} windows"
    yield "total", f"{format_seconds(plan.seconds)}, besides samples and the start"
    if plan.cost is not None:
        yield "cost", f"{plan.cost:,.2f} at {plan.price:g} an hour of a process"


def _text(plan: Plan) -> Rows:
    epochs, tokens = plan.budget.epochs_left, len(plan.run.training_windows.tokens)
    enough = "it suffices" if epochs <= 1 else "it is repeated, nearly as good as new"
    if epochs > REPEATED:
        enough = f"above {REPEATED:g}, repeating adds ever less (Muennighoff et al. 2023)"
    yield "text", f"{format_count(tokens)} tokens: {format_times(epochs)} epochs; {enough}"


def _sharding(plan: Plan) -> Rows:
    config = plan.run.config
    if config.runtime.sharding != "none":
        yield "sharded", f"over {plan.processes} processes, as all of this is told"
        return
    yield "sharded", "(runtime.sharding=fsdp), a process would hold of weights, gradients and state:"
    for count in SHARDED_OVER:
        each = sharded(plan.memory, plan.run.model, plan.run.runtime.dtype, count)
        held = each.weights + each.gradients + each.optimizer
        yield f"over {count}", f"{_bytes(held)}; an update {_bytes(each.update)}"


def _compute_optimal(config: PlanConfig, plan: Plan) -> Rows:
    settings = config.plan
    flops = settings.flops or plan.flops
    if settings.budget is not None and settings.price:
        seconds = 3600 * settings.budget / settings.price
        flops = seconds / plan.processes * plan.tokens_per_second * training_flops_per_token(plan.run.model)
    what = "this run" if flops == plan.flops else "the budget" if settings.budget else "plan.flops"
    yield "compute", f"{flops:.3g} floating-point operations, of {what}; best spent on:"
    for law in LAWS:
        parameters, tokens = law.parameters(flops), law.tokens(flops)
        small = ", below what was fitted" if parameters < SMALLEST_FITTED else ""
        amount = f"{format_count(parameters)} parameters, {format_count(tokens)} tokens"
        yield "", f"{amount}: {law.name} ({law.source}{small})"
    parameters = LAWS[0].parameters(flops)
    model = model_of_about(plan.run.config.model, parameters)
    steps = flops / FLOPS_PER_PARAMETER / parameters_of(model) / plan.budget.update_tokens
    sizes = [f"model.{name}={getattr(model, name)}" for name in ("n_layers", "emb_dim", "n_heads")]
    sizes += [f"model.n_kv_heads={model.n_kv_heads}"] * (model.n_kv_heads is not None)
    sizes += [f"model.hidden_dim={model.hidden_dim}"] * (model.hidden_dim is not None)
    yield "by the first", " ".join([*sizes, f"training.max_steps={max(1, round(steps))}"])


def _figures(plan: Plan) -> dict[str, Any]:
    """The content of `plan.json`: bytes, seconds, tokens."""
    memory = {**asdict(plan.memory), "peak": plan.memory.peak, "fits": fits(plan.memory, plan.device)}
    return {
        "parameters": parameter_count(plan.run.model),
        "memory": memory,
        "device": {"name": plan.name, **asdict(plan.device)},
        "largest_micro_batch": plan.largest,
        "chosen": plan.run.chosen,
        "update_tokens": plan.budget.update_tokens,
        "update_seconds": plan.update_seconds,
        "tokens_per_second": plan.tokens_per_second,
        "probe": plan.probed and asdict(plan.probed),
        "updates": plan.updates,
        "tokens": plan.budget.tokens_left,
        "epochs": plan.budget.epochs_left,
        "seconds": plan.seconds,
        "cost": plan.cost,
        "flops": plan.flops,
    }
