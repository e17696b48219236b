"""Models loaded and prepared for generation and evaluation, with linear layers in the precision and memory
layout that multiply a few rows fastest."""

import copy
import functools
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.checkpoints.checkpoint import CHECKSUMS, step_of, trained_on
from llm.checkpoints.opening import is_ours, open_weights, tokenizer_of
from llm.checkpoints.weights import build_model
from llm.config import PretrainConfig
from llm.data.token_file import token_files
from llm.data.tokenizer import load_tokenizer
from llm.data.tokens import TokenFile
from llm.errors import UserError
from llm.model.attention import MultiHeadAttention
from llm.model.gpt import GPTModel
from llm.run_folder import checkpoint_folder, step_folders
from llm.runs import find_run, named_checkpoint, path_of
from llm.runtime import Runtime

NOT_FINITE = (
    "the model gives logits that are not finite: its weights are damaged, or too large to compute with"
)
INT8_KERNEL_ROWS = 16  # with more rows than this, int8 weights are widened to bf16 first
PADDED_TO = 64  # on a GPU, outputs are padded to a multiple of this
INT8_KERNEL_INPUTS = 16  # the kernel reads inputs in blocks of this, past their end if they are no multiple


@dataclass(frozen=True, eq=False)  # compared and hashed by identity
class Loaded:
    """A model ready for inference, and what is known about it."""

    model: GPTModel
    tokenizer: tiktoken.Encoding
    name: str  # the checkpoint's folder, or the name that foreign weights were asked for by
    trained: PretrainConfig | None  # the config of its run; None for foreign weights
    step: int | None  # the update, counted from 0, after which it was saved


def load_for_inference(
    checkpoint: str | Path, runtime: Runtime, n_heads: int | None = None, tokenizer: str | None = None
) -> Loaded:
    """Load the model of a run, a checkpoint or foreign weights (see `open_weights`), ready for inference.

    Args:
        n_heads: number of attention heads, for weights that do not tell.
        tokenizer: name of the tokenizer, for weights that do not tell; see `load_tokenizer`.

    Raises:
        UserError: the weights are missing or damaged, or their number of heads or tokenizer is unknown.
    """
    name = str(checkpoint)
    return _load(name, _newest(name), runtime, n_heads, tokenizer)


def _newest(name: str) -> Path | None:
    """The checkpoint that a name means at this moment, not yet verified; None for foreign weights."""
    if not is_ours(name):
        return None
    path = path_of(name)
    folder = named_checkpoint(path) or checkpoint_folder(path)
    return folder if (folder / CHECKSUMS).exists() else step_folders(find_run(name))[0]


@functools.lru_cache(maxsize=1)  # jobs of a sweep in one process load it once
def _load(
    name: str, newest: Path | None, runtime: Runtime, n_heads: int | None, tokenizer: str | None
) -> Loaded:
    source = open_weights(name, n_heads)
    encoding = load_tokenizer(tokenizer_of(source, tokenizer))
    model = build_model(source).to(runtime.device)
    return Loaded(
        for_inference(model, runtime),
        encoding,
        source.origin if source.folder else name,
        source.trained,
        step_of(source.folder) if source.folder else None,
    )


def splits_of(loaded: Loaded) -> tuple[TokenFile, TokenFile]:
    """The training and validation tokens of the run that trained a model; of no foreign weights.

    Raises:
        UserError: see `token_files`; or the text has changed since the run was trained on it.
    """
    assert loaded.trained
    data = loaded.trained.data
    files, known = token_files(data, loaded.tokenizer), trained_on(Path(loaded.name).resolve())
    if known and known != [file.fingerprint for file in files]:
        where = f"data.path={data.path}" if data.path else f"data={data.source}"
        raise UserError(f"{loaded.name} was trained on another text than is at {where} now: bring it back")
    return files


def for_inference(model: GPTModel, runtime: Runtime) -> GPTModel:
    """A copy of a model in evaluation mode, which shares all weights except those of its linear layers.

    Embeddings, norms and the residual stream stay in fp32; matrix products are in the precision of `runtime`,
    as under autocast in training.
    """
    shared = {id(parameter): parameter for parameter in model.parameters()}
    ready = copy.deepcopy(model, shared).eval()  # deepcopy takes what is in its memo as copied already
    if runtime.device.type != "cpu":
        _project_together(ready, runtime)
    for module in list(ready.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, InferenceLinear(child.weight, child.bias, runtime))
    if ready.out_head is None:  # tied: the embedding stays in fp32, so the head needs a copy
        ready.out_head = InferenceLinear(ready.tok_emb.weight, None, runtime)  # type: ignore[assignment]
    # Attention over a cache makes many small products, at which CPUs are several times slower in bf16.
    ready.cache_dtype = torch.float32 if runtime.device.type == "cpu" else runtime.dtype
    ready.captures_steps = runtime.graph != "off"
    ready.compiles_steps = runtime.compile
    return ready


def _project_together(model: GPTModel, runtime: Runtime) -> None:
    """Compute queries, keys and values by one product, which a GPU does faster than three."""
    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            layers = module.W_query, module.W_key, module.W_value
            weight = torch.cat(tuple(layer.weight for layer in layers))
            bias = None if layers[0].bias is None else torch.cat(tuple(layer.bias for layer in layers))
            module.W_together = InferenceLinear(weight, bias, runtime)
            del module.W_query, module.W_key, module.W_value


class InferenceLinear(nn.Module):
    """`F.linear` with a weight (out, in) that is never updated: (…, in) to (…, out)."""

    weight: Tensor
    scales: Tensor | None
    bias: Tensor | None

    @torch.no_grad()
    def __init__(self, weight: Tensor, bias: Tensor | None, runtime: Runtime) -> None:
        super().__init__()
        self.out_features = weight.shape[0]
        self.dtype = runtime.dtype
        scales = None
        self.packed = False
        if runtime.precision == "int8":
            weight, scales = quantise(weight)
        else:
            weight = weight.detach().to(self.dtype)
            self.packed = _packs(runtime)
            if self.packed:
                weight = torch.ops.mkldnn._reorder_linear_weight(weight)
            elif weight.is_cuda and self.out_features % PADDED_TO:
                weight, bias = padded(weight, bias)
        # Buffers, so that a CUDA graph reads them in place and does not copy them at each step.
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.to(self.dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(self.dtype)
        if self.packed:
            out = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], "")
        elif self.scales is None:
            out = F.linear(rows, self.weight, self.bias)[:, : self.out_features]
        elif len(rows) > INT8_KERNEL_ROWS or x.shape[-1] % INT8_KERNEL_INPUTS:
            out = F.linear(rows, self.weight.to(self.dtype) * self.scales[:, None], self.bias)
        else:
            out = torch._weight_int8pack_mm(rows.contiguous(), self.weight, self.scales)
            out = out if self.bias is None else out + self.bias
        return out.view(*x.shape[:-1], self.out_features)


def padded(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A weight (out, in) and its bias, padded with zeros to a multiple of `PADDED_TO` outputs: with GPT-2's
    50,257, cuBLAS could not use its fast kernels."""
    rows = -len(weight) % PADDED_TO
    return F.pad(weight, (0, 0, 0, rows)), None if bias is None else F.pad(bias, (0, rows))


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (out, in) as int8 and a bf16 scale for each output (out,): weight ≈ int8 · scale.

    Rounded to nearest, with the largest magnitude of each row at 127; LLM.int8() (Dettmers et al. 2022),
    section 2, without quantising the activations.
    """
    scales = (weight.abs().amax(dim=1) / 127).clamp_min(torch.finfo(torch.bfloat16).tiny).bfloat16()
    return (weight / scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scales


def _packs(runtime: Runtime) -> bool:
    """Whether oneDNN can repack weights into blocks. Products of a few rows are then as fast as memory can be
    read; with plain weights, `F.linear` reaches a half (one row) to a quarter (eight rows) of that speed."""
    if runtime.device.type != "cpu" or runtime.compile or not torch.backends.mkldnn.is_available():
        return False  # torch.compile cannot trace such weights
    return runtime.precision == "fp32" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
