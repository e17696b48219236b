"""Every configuration key, with its default, unit and range: the schema of `conf/`.

Independent of Hydra and torch. The defaults are those of `conf/`, so `PretrainConfig()` in Python is what
`python experiments/pretrain.py` runs.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any


def key(
    default: Any,
    meaning: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    choices: tuple[str | bool, ...] = (),
    table: str = "",
) -> Any:
    """A dataclass field with its meaning, shown in errors, and its range, checked by `validate` in
    llm/config_rules.py. None is always in range where the type allows it.

    Args:
        table: in place of `choices`, the dotted name of a dict whose keys are the choices. It is imported
            only by `validate`, so that `--help` need not wait for torch.
    """
    bounds = {"above": above, "at least": at_least, "below": below, "at most": at_most}
    metadata = {
        "meaning": meaning,
        "choices": choices,
        "table": table,
        "bounds": {name: bound for name, bound in bounds.items() if bound is not None},
    }
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


# Bounds of every number: torch's integers have 64 bits, and floats below 1e30 can be multiplied in fp32. So
# no value is infinite or NaN.
LARGEST_WHOLE, LARGEST = 2**63 - 1, 1e30

AUTO = "auto"

RUN_STATES = ("running", "finished", "stopped", "interrupted", "failed", "killed")

WEIGHTS_MEANING = (
    "run folder, checkpoint folder, latest, best, a folder in Hugging Face's GPT-2 or Llama format, a name "
    "on its hub, or the book's .pth file"
)
IF_DONE = ("reuse", "again")
IF_DONE_MEANING = (
    "what to do if a run with the same config, code and data is done already: reuse it, or do it again. Such "
    "a run is looked for below outputs/; if hydra.run.dir is given, in that folder alone"
)


@dataclass
class ModelConfig:
    vocab_size: int = key(50257, "size of the vocabulary, in token ids", at_least=1, at_most=10**9)
    context_length: int = key(128, "tokens that the model sees at once", at_least=1, at_most=10**9)
    emb_dim: int = key(128, "width of the embeddings and the residual stream", at_least=1, at_most=10**6)
    n_heads: int = key(4, "attention heads; must divide emb_dim evenly", at_least=1)
    n_layers: int = key(4, "transformer blocks", at_least=1, at_most=10_000)
    drop_rate: float = key(0.0, "dropout probability", at_least=0, below=1)
    qkv_bias: bool = key(False, "whether query, key and value projections have a bias")
    tie_weights: bool = key(True, "whether the output head shares the token embedding's weights")
    init: str = key(
        "gpt2",
        "torch: torch's own defaults, as in the book; gpt2: normal with standard deviation 0.02; "
        "zero_projections: as gpt2, with zeros at the end of each residual branch and in an untied head",
        choices=("torch", "gpt2", "zero_projections"),
    )
    norm: str = key("layernorm", "normalisation of the residual stream", table="llm.model.parts.NORMS")
    position: str = key("learned", "how positions are encoded", table="llm.model.parts.POSITIONS")
    activation: str = key(
        "gelu", "activation of the feed-forward network", table="llm.model.parts.ACTIVATIONS"
    )
    bias: bool = key(True, "whether attention's output projection and the feed-forward layers have a bias")
    hidden_dim: int | None = key(
        None,
        "width of the feed-forward network between its layers; null: 4 times emb_dim, or two thirds of that "
        "if its activation is gated",
        at_least=1,
        at_most=10**7,
    )
    n_kv_heads: int | None = key(
        None, "key/value heads, each shared by a group of query heads; null: n_heads", at_least=1
    )
    qk_norm: bool = key(False, "whether queries and keys are normalised (RMSNorm) in each head")
    value_embeddings: bool = key(
        False, "whether every other block adds an embedding of each token to its values"
    )
    residual_scalars: bool = key(
        False, "whether each block reads a learnt mix of the residual stream and the first embedding"
    )
    smear: bool = key(
        False, "whether a learnt share of the previous token's embedding is added to each token's"
    )
    parallel_blocks: bool = key(
        False, "whether a block's feed-forward network runs in parallel with its attention, not after it"
    )
    logit_softcap: float | None = key(
        None, "bound of the logits: c · tanh(logits / c); null: none", at_least=1e-3
    )
    norm_eps: float = key(1e-5, "added to the variance or mean square in norms", above=0, at_most=1)
    rotary_base: float = key(10_000.0, "rotary positions: the slowest pair turns 1/base a token", above=1)
    mup_base_width: int | None = key(
        None,
        "the emb_dim that optimizer.lr was tuned at: initial weights, learning rates and weight decay are "
        "transferred from there to this one (µP); null: they are the same at any width",
        at_least=1,
        at_most=10**6,
    )

    @property
    def head_dim(self) -> int:
        """Dimensions per attention head."""
        return self.emb_dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.n_kv_heads or self.n_heads

    @property
    def width_ratio(self) -> float:
        """The model's width, relative to the width that its learning rate was tuned at."""
        return self.emb_dim / (self.mup_base_width or self.emb_dim)


@dataclass
class DataConfig:
    source: str = key("shakespeare", "where the text comes from", table="llm.data.corpus.SOURCES")
    path: str | None = key(
        None,
        "a UTF-8 file, a folder of *.txt and *.md files, or a glob; *.jsonl: one document per line; with "
        "data=shards: their folder",
    )
    train_ratio: float = key(0.9, "share of the text, in characters, to train on", above=0, below=1)
    if TYPE_CHECKING:
        batch_size: int = 16  # always a number by the time it is used: `build_run` replaces auto
    else:
        batch_size: int | str = key(
            16,
            "windows per batch, over all processes; auto: as many as fit the device's memory, in an update "
            "whose size suits the model, or is training.update_tokens",
            at_least=1,
        )
    stride: int | None = key(None, "tokens from one window to the next; null: context_length", at_least=1)
    order: str = key(
        "shuffled",
        "shuffled: by (seed, epoch, position), resumable; book: torch's DataLoader on the global generator",
        choices=("shuffled", "book"),
    )
    shift_windows: bool = key(
        False, "shuffled: whether each epoch after the first cuts its windows at another offset"
    )
    mixture: list[str] = key(
        [],
        "shards: FOLDER:WEIGHT of each folder to draw windows from, instead of path; weights of any sum",
    )
    shards: list[int] = key(
        [],
        "shards: how many to use of each folder, the first ones, with what is held out of the same text; "
        "[]: all. A run that begins while a folder is being written records how many there were",
        at_least=1,
    )
    cross_documents: bool = key(
        True,
        "shards: whether a window may hold the end of a document and the beginning of the next; false: "
        "windows lie within documents, and documents shorter than a window are skipped",
    )
    cache_dir: str | None = key(None, "folder for token files and downloads; null: the user's cache folder")


@dataclass
class TokenizerConfig:
    name: str = key(
        "gpt2",
        "gpt2, bytes, bpe (learnt from the training split), another encoding that tiktoken knows, or a "
        "folder with the files of a Hugging Face tokenizer",
    )
    vocab_size: int | None = key(
        None,
        "bpe: number of ids, including the 256 bytes and the end of text; a small text may give fewer",
        at_least=257,
        at_most=10**6,
    )


@dataclass
class OptimizerConfig:
    name: str = key(
        "muon",
        "adamw; or muon: Muon for the blocks' matrices, AdamW for the rest",
        table="llm.training.optimizers.OPTIMIZERS",
    )
    lr: float = key(0.01, "peak learning rate", above=0)
    weight_decay: float = key(0.1, "decoupled weight decay", at_least=0)
    decay_all: bool = key(False, "decay all parameters, as the book does, not only matrices")
    betas: list[float] = key(
        [0.9, 0.95],
        "AdamW's decay rates for the averages of gradients and their squares",
        at_least=0,
        below=1,
    )
    eps: float = key(1e-8, "added to AdamW's denominator", above=0)
    momentum: float = key(0.95, "Muon's Nesterov momentum", at_least=0, below=1)


@dataclass
class ScheduleConfig:
    name: str = key("wsd", "shape of the learning-rate schedule", table="llm.training.schedules.SCHEDULES")
    warmup: float = key(0.02, "share of the run for linear warmup from 0", at_least=0, at_most=1)
    decay: float = key(0.5, "wsd: share of the run, at its end, for linear decay", at_least=0, at_most=1)
    final: float = key(0.0, "learning rate at the end, as a share of lr", at_least=0, at_most=1)


@dataclass
class TrainingConfig:
    max_epochs: float | None = key(None, "passes over the training split", above=0)
    max_steps: int | None = key(None, "updates (optimizer steps)", at_least=1)
    max_minutes: float | None = key(2.5, "minutes of training, without evaluation and saving", above=0)
    eval_freq: int | None = key(
        25, "updates from one evaluation to the next; null: only at the end", at_least=1
    )
    eval_iter: int = key(5, "batches of each split per evaluation", at_least=1)
    grad_clip: float | None = key(1.0, "gradient clipping: largest global norm; null: none", above=0)
    accumulate: int = key(1, "micro-batches per optimizer step (gradient accumulation)", at_least=1)
    update_tokens: int | None = key(
        None,
        "data.batch_size=auto: tokens of an update; null: as many as suit the model",
        at_least=1,
    )
    max_skipped: int = key(
        0,
        "updates in a row to skip when loss or gradient is not finite; one more stops the run",
        at_least=0,
    )
    final_eval: str = key(
        "tenth",
        "windows of the validation split to evaluate at the end; full: all; tenth: only a half, a quarter, "
        "an eighth … if all would take more than a tenth of the work of training",
        choices=("tenth", "full"),
    )


@dataclass
class CheckpointConfig:
    every_steps: int | None = key(None, "updates from one checkpoint to the next", at_least=1)
    every_minutes: float | None = key(1.0, "minutes of training from one checkpoint to the next", above=0)
    keep: int = key(2, "checkpoints to keep, newest first, besides the best", at_least=1)


@dataclass
class EarlyStoppingConfig:
    rule: str = key(
        "none",
        "which jobs of a sweep stop early; median: those whose best validation loss is above the median of "
        "the others'; halving: all but the best 1/reduction, at 1/reduction, 1/reduction², … of the run",
        table="llm.training.early_stopping.RULES",
    )
    from_progress: float = key(0.1, "share of the run before which no job is stopped", above=0, below=1)
    min_jobs: int = key(3, "median: how many other jobs must have come as far", at_least=1)
    reduction: int = key(3, "halving: one in this many jobs continues", at_least=2)


@dataclass
class SamplingConfig:
    temperature: float = key(0.8, "divides the logits; 0: greedy, the likeliest token", at_least=0)
    top_k: int | None = key(50, "draw from the k likeliest tokens", at_least=1)
    top_p: float | None = key(
        None, "draw from the likeliest tokens that together hold this probability", at_least=0, at_most=1
    )
    min_p: float | None = key(
        None, "draw from tokens at least this fraction as likely as the likeliest", at_least=0, at_most=1
    )
    repetition_penalty: float = key(
        1.0,
        "lowers the logits of tokens that occurred before, prompt included; 1: off",
        at_least=1e-3,
        at_most=1e3,
    )


@dataclass
class SamplesConfig:
    prompt: str | None = key(
        None,
        "prompt of the samples drawn during training; null: one that suits the text, see docs/train.md",
    )
    max_new_tokens: int = key(200, "new tokens per sample", at_least=1, at_most=10**6)
    every_epoch: bool = key(False, "sample after each epoch too, not only at the end")
    every_minutes: float | None = key(None, "minutes of training from one sample to the next", above=0)


@dataclass
class TrackingConfig:
    mode: str | None = key(
        None,
        "Weights & Biases; offline: in the run's folder until `wandb sync`; null: WANDB_MODE, or offline",
        choices=("offline", "online", "disabled"),
    )
    project: str | None = key(None, "W&B project; null: WANDB_PROJECT, or gpt-experiment-runner")
    entity: str | None = key(None, "W&B user or team; null: WANDB_ENTITY, or your default")
    group: str | None = key(None, "W&B group; null: WANDB_RUN_GROUP, or the sweep's folder")
    name: str | None = key(None, "W&B run name; null: WANDB_NAME, or the overrides")
    tags: list[str] = key([], "W&B tags; none: WANDB_TAGS")


@dataclass
class RuntimeConfig:
    device: str = key(
        "auto", "auto: CUDA, else Apple's MPS, else the CPU", choices=("auto", "cpu", "cuda", "mps")
    )
    precision: str = key(
        "auto",
        "auto: bf16 where the device computes in it, else fp32; tf32: on NVIDIA, products of fp32 in 10 "
        "bits; int8: weights only, to generate on a CPU",
        choices=("auto", "fp32", "tf32", "bf16", "int8"),
    )
    threads: int | None = key(None, "CPU threads per process; null: torch's choice", at_least=1)
    processes: int = key(1, "processes that share each batch, one per GPU", at_least=1)
    sharding: str = key(
        "none",
        "fsdp: each process keeps only its part of the weights, gradients and optimizer state",
        choices=("none", "fsdp"),
    )
    checkpoint_activations: bool = key(
        False, "in training, recompute each block's activations in the backward pass, instead of keeping them"
    )
    compile: bool | str = key(
        "auto",
        "for GPUs: compile the blocks (training) or the decode step; slow to start; "
        "auto: where a training run on CUDA is long enough for that to pay, recorded as true or false",
        choices=("auto", True, False),
    )
    graph: str = key(
        "auto",
        "on CUDA, capture an update, or a step of generation, as one graph and replay it; auto: yes, but in "
        "training only one process, where a run is long enough and launching kernels takes the time",
        choices=("auto", "on", "off"),
    )
    deterministic: bool = key(
        False,
        "for training on CUDA: use only kernels that always give the same numbers, so that runs repeat and "
        "resume bit for bit; CPUs do so anyway",
    )


def modern_small() -> ModelConfig:
    """The default model. The fields' own defaults are GPT-2's, which is what records older than a key
    mean."""
    return ModelConfig(
        vocab_size=4096,
        n_heads=2,
        n_layers=3,
        norm="rmsnorm",
        position="rotary",
        bias=False,
        qk_norm=True,
        smear=True,
        parallel_blocks=True,
    )


def shifted_windows() -> DataConfig:
    """The default data."""
    return DataConfig(shift_windows=True)


def learnt_from_the_text() -> TokenizerConfig:
    """The default tokenizer."""
    return TokenizerConfig("bpe", vocab_size=4096)


def muon_for_minutes() -> OptimizerConfig:
    """The default optimizer: with short averages, which suit a run of a few thousand updates."""
    return OptimizerConfig("muon", lr=0.015, betas=[0.5, 0.99], momentum=0.9)


@dataclass
class PretrainConfig:
    model: ModelConfig = field(default_factory=modern_small)
    data: DataConfig = field(default_factory=shifted_windows)
    tokenizer: TokenizerConfig = field(default_factory=learnt_from_the_text)
    optimizer: OptimizerConfig = field(default_factory=muon_for_minutes)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    seed: int = key(123, "all randomness derives from it", at_least=0)
    init_from: str | None = key(None, f"initial weights: {WEIGHTS_MEANING}")
    resume: str | None = key(None, "run or checkpoint folder to resume, or latest")
    rerun: str | None = key(None, "run folder to repeat from its record and compare with, or latest")
    if_done: str = key(IF_DONE[0], IF_DONE_MEANING, choices=IF_DONE)


@dataclass
class ShardsConfig:
    path: str | None = key(
        None, "folder to write shards of tokens to, for data=shards; null: token files in data.cache_dir"
    )
    column: str = key("text", "key of the text in JSON lines, or its column in Parquet and datasets")
    validation: float = key(
        0.01, "share of the documents that is held out, by their hash", at_least=0, below=1
    )
    megabytes: int = key(128, "text of a shard, in 10^6 bytes", at_least=1, at_most=10**5)
    workers: int | None = key(None, "processes that tokenise; null: one for each core", at_least=1)
    dataset_config: str | None = key(
        None, "data=huggingface: configuration of the dataset, if it has several"
    )
    dataset_split: str = key("train", "data=huggingface: split of the dataset to read")


@dataclass
class PrepareConfig(PretrainConfig):
    shards: ShardsConfig = field(default_factory=ShardsConfig)


@dataclass
class PlanSettings:
    device: str | None = key(
        None, "plan for one of these, in place of this machine", table="llm.device.DEVICES"
    )
    price: float | None = key(None, "price of an hour of one process, in any currency", at_least=0)
    probe: bool = key(False, "measure the first 20 seconds of updates, and an evaluation, on this machine")
    flops: float | None = key(
        None,
        "compute to size a model for, in floating-point operations; null: that of the run, or of budget",
        above=0,
    )
    budget: float | None = key(
        None, "money to size a model for, at plan.price and the estimated speed", above=0
    )


@dataclass
class PlanConfig(PretrainConfig):
    plan: PlanSettings = field(default_factory=PlanSettings)


@dataclass
class UndescribedModelConfig:
    n_heads: int | None = key(
        None, "attention heads of a model whose weights do not say, such as the book's .pth file", at_least=1
    )


@dataclass
class UndescribedTokenizerConfig:
    name: str | None = key(
        None, "tokenizer of weights that bring none: gpt2, bytes, another of tiktoken's, or a folder"
    )


@dataclass
class GenerateConfig:
    checkpoint: str = key("latest", WEIGHTS_MEANING)
    model: UndescribedModelConfig = field(default_factory=UndescribedModelConfig)
    tokenizer: UndescribedTokenizerConfig = field(default_factory=UndescribedTokenizerConfig)
    prompt: str = key("Every effort moves you", "text to continue")
    prompt_file: str | None = key(
        None, "instead of prompt: a file, a folder or a glob, one prompt per file; -: standard input"
    )
    max_new_tokens: int = key(100, "new tokens per sample", at_least=1)
    num_samples: int | None = key(None, "samples per prompt; null: 1, or 32 in a study", at_least=1)
    batch_size: int = key(32, "samples generated side by side", at_least=1)
    stop: list[str] = key(
        [],
        r"texts that end a sample and are not part of it; in them \n is a newline, \t a tab, \\ a backslash",
    )
    eos: bool = key(True, "whether the end-of-text token ends a sample")
    past_context: str = key(
        "exact",
        "exact: recompute the last context_length tokens for each new token, as in the book; "
        "half: continue from the later half of a full context, many times faster; "
        "slide: with rotary positions, keep the cache and drop the oldest token; as cheap as half, but not "
        "the same as recomputing the window, as the cache still reflects dropped tokens",
        choices=("exact", "half", "slide"),
    )
    quiet: bool = key(
        False,
        "print only the texts, each ended by a newline, with a line of <|endoftext|> between any two",
    )
    study: bool | None = key(None, "measure the samples, for a report; null: only in a sweep")
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    seed: int = key(123, "sample i of prompt p has its own random stream (seed, p, i)", at_least=0)
    if_done: str = key(IF_DONE[0], IF_DONE_MEANING, choices=IF_DONE)


@dataclass
class EvaluateConfig:
    checkpoint: str = key("latest", WEIGHTS_MEANING)
    model: UndescribedModelConfig = field(default_factory=UndescribedModelConfig)
    tokenizer: UndescribedTokenizerConfig = field(default_factory=UndescribedTokenizerConfig)
    text: str | None = key(None, "evaluate this text token by token, and show what may come next")
    path: str | None = key(None, "evaluate these files instead of a split; as data.path")
    split: str = key(
        "validation", "of the text that the model was trained on", choices=("training", "validation")
    )
    batch_size: int = key(16, "windows in a batch", at_least=1)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    if_done: str = key(IF_DONE[0], IF_DONE_MEANING, choices=IF_DONE)


@dataclass
class ExportConfig:
    checkpoint: str = key("latest", WEIGHTS_MEANING)
    format: str = key(
        "huggingface",
        "huggingface: a folder that transformers can load; "
        "book: the book's model.pth and model_and_optimizer.pth",
        choices=("huggingface", "book"),
    )
    to: str | None = key(None, "new folder to write to; null: one in this export's run folder")
    model: UndescribedModelConfig = field(default_factory=UndescribedModelConfig)
    tokenizer: UndescribedTokenizerConfig = field(default_factory=UndescribedTokenizerConfig)


@dataclass
class GenerationBenchmarkConfig:
    prompt_tokens: int = key(4, "tokens per prompt", at_least=1)
    new_tokens: int | None = key(
        None, "tokens generated per row; null: as many as fit into the context, 200 at most", at_least=1
    )
    batch_sizes: list[int] = key([1, 8, 32], "rows generated side by side", at_least=1)
    rounds: int = key(3, "timed generations of each variant", at_least=1)


@dataclass
class BenchmarkConfig:
    measure: str = key(
        "training",
        "what is timed; device: whether the device computes right, and how fast; coordinates: instead, how "
        "activations grow with the width",
        choices=("training", "generation", "device", "coordinates"),
    )
    model: ModelConfig = field(default_factory=modern_small)
    tokenizer: TokenizerConfig = field(default_factory=learnt_from_the_text)
    optimizer: OptimizerConfig = field(default_factory=muon_for_minutes)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    generation: GenerationBenchmarkConfig = field(default_factory=GenerationBenchmarkConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    batch_size: int = key(16, "windows in a batch", at_least=1)
    steps: int = key(10, "timed updates of each variant; coordinates: updates of each model", at_least=1)
    widths: list[int] = key([64, 128, 256, 512], "coordinates: the emb_dim of each model", at_least=1)
    seed: int = key(123, "seed for weights and tokens", at_least=0)


@dataclass
class WorkspaceConfig:
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    name: str = key("GPT experiments", "the saved workspace's name")


@dataclass
class ReportConfig:
    sweep: Any = key("latest", "a sweep's folder, a run's, a list of these, or latest: the newest sweep")
    to: str | None = key(None, "folder for the report; null: the sweep's own, or for a list this script's")
    predict: float | None = key(
        None,
        "for a ladder: predict the loss of a run with this many times the compute of its largest job",
        above=1,
        at_most=100,
    )
    run: bool = key(False, "train the run that is predicted, and report how far the prediction was off")
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass
class CompareConfig:
    a: Any = key(
        "latest",
        "a setting: a sweep's folder; a run's, which as a job of a sweep stands for its setting with all "
        "seeds; a list of runs and sweeps; or latest: the newest sweep",
    )
    b: Any = key(None, "the other setting; null: a holds both")
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass
class RunsConfig:
    path: str = key("outputs", "folder below which runs are listed")
    state: str | None = key(None, "list only runs in this state", choices=RUN_STATES)
    limit: int | None = key(20, "runs to list, newest first; null: all", at_least=1)
