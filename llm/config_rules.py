"""Checks of a config: values in range, and keys that have to go together."""

from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any, get_args

from llm.config import (
    AUTO,
    LARGEST,
    LARGEST_WHOLE,
    BenchmarkConfig,
    DataConfig,
    EarlyStoppingConfig,
    EvaluateConfig,
    GenerateConfig,
    ModelConfig,
    OptimizerConfig,
    PlanSettings,
    PretrainConfig,
    RuntimeConfig,
    TrainingConfig,
)
from llm.config_values import plain_types
from llm.errors import UserError


def validate(config: Any, prefix: str = "") -> None:
    """Check every value against its type and its range, and keys against each other.

    Raises:
        UserError: names the first key that is wrong, its value and what was expected.
    """
    for item in fields(config):
        value, name = getattr(config, item.name), prefix + item.name
        if is_dataclass(value):
            validate(value, f"{name}.")
            continue
        if isinstance(value, str) and not _is_unicode(value):
            raise UserError(f"{name}={value!a}: must be UTF-8 text ({item.metadata['meaning']})")
        if item.type is not Any and not _is_of_type(value, item.type):
            wanted = getattr(item.type, "__name__", item.type)
            raise UserError(f"{name}={value!r}: must be {wanted} ({item.metadata['meaning']})")
        if value == "" and item.type == (str | None):
            raise UserError(f"{name} is empty: give a value, or null ({item.metadata['meaning']})")
        for element in value if isinstance(value, list) else [value]:
            _check_range(name, element, item.metadata)
    match config:
        case ModelConfig(emb_dim=width, n_heads=heads) if width % heads:
            raise UserError(
                f"{prefix}emb_dim={width} cannot be divided evenly among {prefix}n_heads={heads} heads: "
                f"make emb_dim a multiple of {heads}"
            )
        case ModelConfig(n_heads=heads, n_kv_heads=int(shared)) if heads % shared:
            raise UserError(
                f"{prefix}n_kv_heads={shared} must divide {prefix}n_heads={heads} evenly: each serves "
                f"a group of query heads"
            )
        case OptimizerConfig(betas=betas) if len(betas) != 2:
            raise UserError(f"{prefix}betas={betas}: two numbers are needed, as in [0.9,0.95]")
        case DataConfig(source="text", path=None) | DataConfig(path=""):
            raise UserError(f"{prefix}path is not set: data=text needs data.path=FILE, FOLDER or GLOB")
        case DataConfig(source="huggingface", path=None):
            raise UserError(f"{prefix}path is not set: data=huggingface needs data.path=NAME or FOLDER")
        case DataConfig(source="shards", path=None, mixture=[]):
            raise UserError(f"{prefix}path is not set: data=shards needs data.path=FOLDER or data.mixture")
        case DataConfig(path=str(path), mixture=[_, *_]):
            raise UserError(f"{prefix}path={path} and {prefix}mixture are both set: give one of them")
        case DataConfig(source=source, mixture=[_, *_]) if source != "shards":
            raise UserError(f"{prefix}mixture is of shards: give data=shards too")
        case DataConfig(source=source, cross_documents=False) if source != "shards":
            raise UserError(f"{prefix}cross_documents=false is for data=shards, whose documents are known")
        case DataConfig(source="shards", order="book", mixture=[_, *_]):
            raise UserError(f"{prefix}order=book knows one text: give {prefix}order=shuffled with a mixture")
        case TrainingConfig(max_epochs=None, max_steps=None, max_minutes=None):
            raise UserError(
                f"{prefix}max_epochs, max_steps and max_minutes are all null: set one to end the run"
            )
        case EarlyStoppingConfig("halving", from_progress=start, reduction=reduction) if (
            start > 1 / reduction
        ):
            raise UserError(
                f"{prefix}from_progress={start}: with {prefix}reduction={reduction}, halving stops jobs at "
                f"1/{reduction} of the run or earlier; make it at most 1/{reduction}"
            )
        case PretrainConfig(training=TrainingConfig(eval_freq=None), early_stopping=stopping) if (
            stopping.rule != "none"
        ):
            raise UserError(
                f"early_stopping.rule={stopping.rule} compares evaluations during the run: "
                f"set training.eval_freq"
            )
        case PretrainConfig(resume=None, data=DataConfig(source=source, shards=[_, *_] as counts)) if (
            source != "shards"
        ):
            raise UserError(f"data.shards={counts} is of shards: give data=shards too")
        case DataConfig(batch_size=size) if isinstance(size, str) and size != AUTO:
            raise UserError(f"{prefix}batch_size={size}: must be a whole number or {AUTO}")
        case PlanSettings(probe=True, device=str(device)):
            raise UserError(f"plan.device={device}: plan.probe=true measures this machine; remove one")
        case PlanSettings(budget=float() | int(), price=None | 0):
            raise UserError("plan.budget buys hours: give what one costs, as plan.price")
        case PlanSettings(budget=float() | int(), flops=float() | int()):
            raise UserError("plan.budget and plan.flops both say how much compute there is: remove one")
        case GenerateConfig(stop=stop) if "" in stop:
            raise UserError("stop contains an empty text, which would end every sample at once: remove it")
        case GenerateConfig(quiet=True, study=True):
            raise UserError("quiet=true prints texts, and a study prints none: remove it")
        case EvaluateConfig(text=str(), path=str()):
            raise UserError("text and path are both set: give the text itself, or the files that hold it")
        case PretrainConfig(runtime=RuntimeConfig(precision="int8")):
            raise UserError("runtime.precision=int8 is for generation: train in auto, bf16, tf32 or fp32")
        case (
            GenerateConfig(runtime=RuntimeConfig(deterministic=True))
            | EvaluateConfig(runtime=RuntimeConfig(deterministic=True))
            | BenchmarkConfig(measure="generation" | "device", runtime=RuntimeConfig(deterministic=True))
        ):
            raise UserError("runtime.deterministic=true is for training: remove it")
        case (
            GenerateConfig(runtime=RuntimeConfig(checkpoint_activations=True))
            | EvaluateConfig(runtime=RuntimeConfig(checkpoint_activations=True))
            | BenchmarkConfig(
                measure="generation" | "device", runtime=RuntimeConfig(checkpoint_activations=True)
            )
        ):
            raise UserError("runtime.checkpoint_activations=true is for training: remove it")
        case PretrainConfig(runtime=RuntimeConfig(checkpoint_activations=True, graph="on")):
            raise UserError(
                "runtime.graph=on: what runtime.checkpoint_activations=true computes again cannot be "
                "captured; use runtime.graph=auto or off"
            )
        case PretrainConfig(runtime=RuntimeConfig(sharding="fsdp", compile=True)):
            raise UserError("runtime.sharding=fsdp does not go with runtime.compile=true: use auto or false")
        case PretrainConfig(data=DataConfig(order="book"), runtime=runtime) if runtime.processes > 1:
            raise UserError("data.order=book draws from one generator, so it needs runtime.processes=1")


_OUT_OF_BOUNDS = {
    "above": lambda value, bound: not value > bound,
    "at least": lambda value, bound: not value >= bound,
    "below": lambda value, bound: not value < bound,
    "at most": lambda value, bound: not value <= bound,
}  # written as `not …`, so that NaN is out of all bounds


def _check_range(name: str, value: Any, metadata: Any) -> None:
    if value is None or not metadata:
        return
    choices, bounds = metadata["choices"] or _names_in(metadata["table"]), metadata["bounds"]
    if choices and value not in choices:
        listed = ", ".join(str(each).lower() if isinstance(each, bool) else each for each in choices)
        raise UserError(f"{name}={value}: must be one of {listed} ({metadata['meaning']})")
    if isinstance(value, int | float) and value > (most := LARGEST_WHOLE if type(value) is int else LARGEST):
        bounds = {"at most": most, **bounds}
    if isinstance(value, str):  # such as auto, in place of a number
        return
    if any(_OUT_OF_BOUNDS[kind](value, bound) for kind, bound in bounds.items()):
        wanted = " and ".join(f"{kind} {bound:g}" for kind, bound in bounds.items())
        raise UserError(f"{name}={value}: must be {wanted} ({metadata['meaning']})")


def _is_unicode(text: str) -> bool:
    """Whether a text can be encoded; bytes on the command line that are not UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_of_type(value: Any, annotation: Any) -> bool:
    """Whether a field of this type may hold a value. An int is also a float; a bool is neither."""
    types = plain_types(annotation)
    if isinstance(value, bool):
        return bool in types
    if isinstance(value, list) and list in types:
        return all(_is_of_type(each, get_args(annotation)[0]) for each in value)
    return isinstance(value, tuple(types))


def _names_in(table: str) -> tuple[str, ...]:
    module, _, name = table.rpartition(".")
    return tuple(getattr(import_module(module), name)) if module else ()
