"""A coordinate check: do activations keep their size as a model gets wider, with µP and without it?"""

import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm.config import BenchmarkConfig, ModelConfig
from llm.config_rules import validate
from llm.files import replacing, write_json
from llm.model.gpt import GPTModel, at_width
from llm.outcome import Outcome
from llm.progress import Progress
from llm.runtime import Runtime, start_runtime
from llm.sweeps.pictures import COLOURS
from llm.tables import format_table
from llm.training.optimizers import build_optimizers

log = logging.getLogger(__name__)

Sizes = dict[str, float]  # root mean squares of activations, by where they are


def benchmark_coordinates(config: BenchmarkConfig, run_dir: Path) -> Outcome:
    """Measure activations after `config.steps` updates at each of `config.widths`: a coordinate check (Yang
    et al. 2022, Tensor Programs V, appendix D.1). Print a table, and write `coordinates.json` and
    `coordinates.png` into `run_dir`.

    The learning rate is that of the base width, `model.mup_base_width` or else `model.emb_dim`. Heads keep
    their size. The tokens are a single batch, drawn with word-like frequencies (Zipf 1935): if all were
    equally frequent, there would be nothing in common with which updates could align.

    Raises:
        UserError: a width cannot be divided into heads of the model's size.
    """
    validate(config)
    runtime = start_runtime(config.runtime)
    base = config.model.mup_base_width or config.model.emb_dim
    rules = {f"with µP from width {base}": base, "with one rate for all widths": None}
    models = [
        (rule, width, replace(at_width(config.model, width), mup_base_width=of_rule))
        for rule, of_rule in rules.items()
        for width in config.widths
    ]
    progress, found = Progress("benchmark"), {rule: {} for rule in rules}  # type: ignore[var-annotated]
    for number, (rule, width, model) in enumerate(models, 1):
        found[rule][width] = _sizes_after_training(config, model, runtime)
        progress.update(number / len(models), f"model {number} of {len(models)}")
    progress.clear()
    for rule, by_width in found.items():
        heads = [f"{rule[0].upper()}{rule[1:]}", *map(str, by_width), "highest / lowest"]
        rows = [
            [place, *(sizes[place] for sizes in by_width.values())] for place in by_width[config.widths[0]]
        ]
        texts = [[row[0], *(f"{size:.3g}" for size in row[1:]), f"{spread(row[1:]):.1f}"] for row in rows]
        log.info("%s\n", format_table([heads, *texts], left=(0,)))
    write_json(run_dir / "coordinates.json", {"config": asdict(config), "activations": found})
    _draw(found, config, run_dir / "coordinates.png")
    log.info("picture     %s", run_dir / "coordinates.png")
    files = {"figures": run_dir / "coordinates.json", "picture": run_dir / "coordinates.png"}
    return Outcome({"activations": found}, files)


def spread(sizes: list[float]) -> float:
    """The ratio of the largest to the smallest."""
    return max(sizes) / min(sizes)


def _sizes_after_training(config: BenchmarkConfig, model_config: ModelConfig, runtime: Runtime) -> Sizes:
    torch.manual_seed(config.seed)
    model = GPTModel(model_config).to(runtime.device)
    optimizers = build_optimizers(model, config.optimizer, runtime)
    frequencies = 1 / torch.arange(1.0, model_config.vocab_size + 1)
    shape = config.batch_size, model_config.context_length + 1
    tokens = torch.multinomial(frequencies, shape[0] * shape[1], replacement=True).view(shape)
    tokens = tokens.to(runtime.device)
    optimizers.set_lr(config.optimizer.lr)
    for _ in range(config.steps):
        with runtime.autocast():
            model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizers.step()
        optimizers.zero_grad()
    return activations(model, tokens[:, :-1], runtime)


@torch.no_grad()
def activations(model: GPTModel, tokens: Tensor, runtime: Runtime) -> Sizes:
    """The root mean square of the outputs of a model's parts for tokens (batch, time); of blocks, the last
    one's."""
    found: Sizes = {}

    def noting(place: str) -> Callable[..., None]:
        def note(part: nn.Module, given: Any, made: Tensor) -> None:
            found[place] = root_mean_square(made)

        return note

    block = model.trf_blocks[-1]
    parts = {"embeddings": model.tok_emb, "attention": block.att, "feed-forward": block.ff, "residual": block}
    hooks = [part.register_forward_hook(noting(place)) for place, part in parts.items()]  # type: ignore[union-attr]
    with runtime.autocast():
        found["logits"] = root_mean_square(model.eval()(tokens))
    for hook in hooks:
        hook.remove()
    return {place: found[place] for place in (*parts, "logits")}


def root_mean_square(values: Tensor) -> float:
    return values.float().square().mean().sqrt().item()


def _draw(found: dict[str, dict[int, Sizes]], config: BenchmarkConfig, path: Path) -> None:
    from matplotlib.figure import Figure  # not pyplot, which would change a notebook's backend
    from matplotlib.ticker import NullLocator

    picture = Figure(figsize=(9, 4.2), dpi=130, layout="constrained")
    panels = picture.subplots(1, 2, sharey=True)
    for axes, (rule, by_width) in zip(panels, found.items(), strict=True):
        for place, colour in zip(by_width[config.widths[0]], COLOURS["light"]["kinds"], strict=False):
            sizes = [each[place] for each in by_width.values()]
            axes.plot([*by_width], sizes, "o-", color=colour, markersize=4, label=place)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks([*by_width], map(str, by_width))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("width")
        axes.set_title(rule[0].upper() + rule[1:], loc="left", fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"root mean square after {config.steps} updates")
    lines, places = panels[0].get_legend_handles_labels()
    picture.legend(lines, places, loc="outside right center", frameon=False, fontsize=8)  # over no line
    picture.suptitle(f"Activations of the last block, {config.optimizer.name}", fontsize=10)
    with replacing(path) as temporary:
        picture.savefig(temporary, format="png")
