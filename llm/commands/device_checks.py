"""Checks whether a device computes correctly: the list `CHECKS`, which `benchmark.py measure=device` runs.

Each is a small function that returns how far the device is from a reference, which is computed on the CPU in
fp64, or in a plainer way.
"""

import math
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llm.config import ModelConfig, OptimizerConfig
from llm.generation.decoding import generate
from llm.generation.sampling import draw_at
from llm.model.gpt import GPTModel
from llm.model.loss import linear_cross_entropy
from llm.runtime import Runtime, use_deterministic_kernels
from llm.training.muon import orthogonalised
from llm.training.optimizers import build_optimizers
from llm.training.state import generator_states, restore_generators

CPU = Runtime(torch.device("cpu"), "fp32")

ROWS, VOCAB, WIDTH, CONTEXT = 4, 1000, 128, 128
GPT2, TODAYS = "GPT-2's parts", "today's parts"
GPT2_PARTS = ModelConfig(VOCAB, CONTEXT, WIDTH, n_heads=2, n_layers=2)
MODELS = {
    GPT2: GPT2_PARTS,
    TODAYS: replace(
        GPT2_PARTS,
        norm="rmsnorm",
        position="rotary",
        activation="relu2",
        bias=False,
        n_kv_heads=1,
        qk_norm=True,
        value_embeddings=True,
        residual_scalars=True,
        smear=True,
        parallel_blocks=True,
        logit_softcap=15.0,
        tie_weights=False,
    ),
}
UPDATES = 20


# The checks: functions of a runtime that return its deviation, or None if they do not apply to the device


def products(runtime: Runtime) -> float:
    """A product of matrices (256, 2048) and (2048, 256)."""
    left, right = _numbers(256, 2048), _numbers(2048, 256)
    found = left.to(runtime.device, runtime.dtype) @ right.to(runtime.device, runtime.dtype)
    return deviation(found, left.double() @ right.double())


def gradients(parts: str, runtime: Runtime) -> float:
    """Loss and gradients of a model; the worst parameter counts."""
    wanted = _reference_gradients(parts)
    return max(map(deviation, _loss_and_gradients(parts, runtime), wanted))


def chunked_loss(runtime: Runtime) -> float:
    """The chunked loss, which never holds all logits, and its gradients, compared with the plain loss."""
    hidden, weight = _numbers(3000, WIDTH), _numbers(VOCAB, WIDTH, seed=1) / 10
    targets = torch.arange(len(hidden)) % VOCAB

    def with_gradients(loss: Callable[..., Tensor], *tensors: Tensor, on: torch.device) -> list[Tensor]:
        leaves = [tensor.to(on).requires_grad_() for tensor in tensors]
        value = loss(*leaves, targets.to(on))
        return [value, *torch.autograd.grad(value, leaves)]

    def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(hidden @ weight.T, targets)

    wanted = with_gradients(plain, hidden.double(), weight.double(), on=CPU.device)
    with runtime.autocast():
        found = with_gradients(linear_cross_entropy, hidden, weight, on=runtime.device)
    return max(map(deviation, found, wanted))


def attention(kernel: SDPBackend, runtime: Runtime) -> float | None:
    """Causal attention by one of torch's kernels, and its gradients."""
    heads = [_numbers(2, 4, 256, 64, seed=seed) for seed in range(4)]

    def with_gradients(*heads: Tensor) -> list[Tensor]:
        queries, keys, values, upstream = (tensor.clone().requires_grad_() for tensor in heads)
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return [attended, *torch.autograd.grad(attended, (queries, keys, values), upstream)]

    here = [tensor.to(runtime.device, runtime.dtype) for tensor in heads]
    with sdpa_kernel(SDPBackend.MATH):
        wanted = with_gradients(*(tensor.double() for tensor in heads))
    try:
        with sdpa_kernel(kernel), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # why a kernel cannot be used
            found = with_gradients(*here)
    except RuntimeError as error:
        if re.search("No available kernel|No viable backend", str(error)):
            return None
        raise
    return max(map(deviation, found, wanted))


def newton_schulz(runtime: Runtime) -> float:
    """Muon's iterations, over a stack of square and one of long matrices."""
    stacks = [_numbers(3, 128, 128), _numbers(3, 128, 512)]
    return max(
        deviation(orthogonalised(stack.to(runtime.device, runtime.dtype)), orthogonalised(stack.double()))
        for stack in stacks
    )


def training(optimizer: str, runtime: Runtime) -> float:
    """The losses of a short training; the worst update counts."""
    wanted = _reference_losses(optimizer)
    return max(
        abs(one - other) / other for one, other in zip(_losses(optimizer, runtime), wanted, strict=True)
    )


def dropout(runtime: Runtime) -> float:
    """The mean of ones, after dropout and after attention with dropout; both keep it."""
    ones = torch.ones(1 << 20, device=runtime.device, dtype=runtime.dtype)
    alike = torch.zeros(16, 4, 128, 64).to(ones)  # each token attends to all before it, as little to each
    attended = F.scaled_dot_product_attention(
        alike, alike, torch.ones_like(alike), dropout_p=0.1, is_causal=True
    )
    return max(abs(tensor.float().mean().item() - 1) for tensor in (F.dropout(ones, 0.1), attended))


def greedy_text(parts: str, runtime: Runtime) -> float:
    """The share of tokens that differ from those of the book's loop, which has no KV cache."""
    idx = torch.arange(ROWS * 3).view(ROWS, 3)
    model, wanted = _model(parts).eval(), idx
    with torch.no_grad():
        for _ in range(CONTEXT // 2):
            wanted = torch.cat([wanted, model(wanted)[:, -1].argmax(-1, keepdim=True)], dim=1)
    model.to(runtime.device)
    found = generate(model, idx.to(runtime.device), CONTEXT // 2, CONTEXT).cpu()
    return (found != wanted).float().mean().item()


def draws(runtime: Runtime) -> float:
    """The share of tokens drawn that differ from those that a CPU draws at the same random numbers."""
    probabilities = _numbers(64, VOCAB).softmax(-1)
    uniform = torch.rand(64, generator=torch.Generator().manual_seed(0))
    here = draw_at(uniform.to(runtime.device))(probabilities.to(runtime.device))
    return (here.cpu() != draw_at(uniform)(probabilities)).float().mean().item()


def random_streams(runtime: Runtime) -> float:
    """The share of dropout's draws that differ once the random streams are put back, as resuming does."""
    ones, states = torch.ones(1 << 16, device=runtime.device), generator_states(runtime)
    first = F.dropout(ones, 0.5)
    restore_generators(states)
    return (F.dropout(ones, 0.5) != first).float().mean().item()


def copies(runtime: Runtime) -> float:
    """The share of token ids that differ once a batch is on the device."""
    batches = [torch.arange(number, number + 64 * 1024).view(64, 1024) for number in range(8)]
    here = [runtime.share(batch) for batch in batches]  # none waits for the one before
    return max((one.cpu() != other).float().mean().item() for one, other in zip(here, batches, strict=True))


def repeated(runtime: Runtime) -> float | None:
    """Gradients with `runtime.deterministic`, computed twice and compared."""
    if runtime.device.type == "mps":
        return None
    before = torch.are_deterministic_algorithms_enabled()
    if runtime.device.type == "cuda":
        use_deterministic_kernels(True)
    try:
        first, second = (_loss_and_gradients(TODAYS, runtime, rows=32) for _ in range(2))
    finally:
        use_deterministic_kernels(before)
    return max(map(deviation, second, first))


@dataclass(frozen=True)
class Check:
    """What is compared, in which precisions, and how far off a device may be in each."""

    name: str
    deviation: Callable[[Runtime], float | None]
    limits: dict[str, float]
    why: str


# The limits are several times what rounding makes of these sizes: fp32 rounds to 6e-8 of a number, tf32 to
# 5e-4, bf16 to 4e-3, and errors of many roundings partly cancel. In fp32 on a CPU, products are off by 3e-7,
# gradients by 2e-6 (one by 2e-5, as it is small beside its terms), trainings by 1e-6 with AdamW and 5e-5 with
# Muon; in bf16 by 3e-3, 2e-2, 1e-3 and 4e-4.
EXACT = {"fp32": 0.0}
ROUNDED = {"fp32": 1e-5, "tf32": 2e-3, "bf16": 2e-2}
THROUGH_A_MODEL = {"fp32": 3e-4, "tf32": 2e-2, "bf16": 1e-1}
ADAMW = {"fp32": 5e-5, "tf32": 1e-3, "bf16": 1e-2}
MUON = {"fp32": 1e-3, "tf32": 2e-3, "bf16": 1e-2}
STEPS = "a rate wrong by 1 % gives 2e-3"
CHECKS: list[Check] = [
    Check("products of matrices", products, ROUNDED, "TF32 where fp32 is asked for gives 3e-4"),
    *(
        Check(f"gradients, {parts}", partial(gradients, parts), THROUGH_A_MODEL, "many roundings in a row")
        for parts in MODELS
    ),
    Check("loss in chunks", chunked_loss, ROUNDED, "a few roundings"),
    *(
        Check(f"attention, {name}", partial(attention, kernel), ROUNDED, "a few roundings")
        for name, kernel in (
            ("flash", SDPBackend.FLASH_ATTENTION),
            ("memory-efficient", SDPBackend.EFFICIENT_ATTENTION),
            ("cuDNN", SDPBackend.CUDNN_ATTENTION),
            ("math", SDPBackend.MATH),
        )
    ),
    Check("Newton-Schulz", newton_schulz, {"fp32": 1e-4, "bf16": 6e-2}, "15 products in a row"),
    Check(f"{UPDATES} updates, AdamW", partial(training, "adamw"), ADAMW, STEPS),
    Check(
        f"{UPDATES} updates, Muon", partial(training, "muon"), MUON, f"{STEPS}; its products may be in bf16"
    ),
    Check("dropout's mean", dropout, {"fp32": 5e-3, "bf16": 1e-2}, "chance gives 1e-3; bf16 rounds 1 / 0.9"),
    *(
        Check(f"greedy text, {parts}", partial(greedy_text, parts), EXACT, "no two logits are close")
        for parts in MODELS
    ),
    Check("tokens drawn", draws, EXACT, "sums of probabilities are in fp64"),
    Check("random streams, put back", random_streams, EXACT, "resuming depends on it"),
    Check("batches copied", copies, EXACT, "copies round nothing"),
    Check(
        "gradients, repeated", repeated, {"fp32": 0.0, "bf16": 0.0}, "deterministic kernels were asked for"
    ),
]


# What they share


def deviation(found: Tensor, wanted: Tensor) -> float:
    """The size of the difference of two tensors over the size of `wanted`; infinite if it is undefined."""
    found, wanted = found.detach().cpu().double(), wanted.detach().cpu().double()
    share = ((found - wanted).norm() / wanted.norm()).item()
    return math.inf if math.isnan(share) else share


def _numbers(*shape: int, seed: int = 0) -> Tensor:
    """Normal random numbers on the CPU, the same everywhere."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _model(parts: str) -> GPTModel:
    """A model whose weights are so large that each part matters, and no two logits are close."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPTModel(MODELS[parts])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def _tokens(seed: int, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Inputs and targets (rows, CONTEXT)."""
    tokens = torch.randint(VOCAB, (rows, CONTEXT + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def _loss_and_gradients(parts: str, runtime: Runtime, rows: int = ROWS) -> list[Tensor]:
    return _of(_model(parts).to(runtime.device), _tokens(0, rows), runtime)


def _of(model: GPTModel, batch: Iterable[Tensor], runtime: Runtime) -> list[Tensor]:
    with runtime.autocast():
        loss = model(*map(runtime.share, batch))
    return [loss, *torch.autograd.grad(loss, [*model.parameters()])]


@cache
def _reference_gradients(parts: str) -> list[Tensor]:
    return _of(_model(parts).double(), _tokens(0), CPU)


def _losses(optimizer: str, runtime: Runtime, dtype: torch.dtype = torch.float32) -> list[float]:
    """The losses of a model that is trained on the same few batches repeatedly, with weights of type
    `dtype`."""
    model, found = _model(GPT2).to(runtime.device, dtype), []
    optimizers = build_optimizers(model, OptimizerConfig(optimizer, lr=3e-3), runtime)
    for update in range(UPDATES):
        with runtime.autocast():
            loss = model(*map(runtime.share, _tokens(update % 4)))
        loss.backward()
        optimizers.step()
        optimizers.zero_grad()
        found.append(loss.item())
    return found


@cache
def _reference_losses(optimizer: str) -> list[float]:
    return _losses(optimizer, CPU, torch.float64)
