"""Each part of the model against its formula, written out one token and one head at a time."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from parts import EVERY_PART, random_model
from torch import Tensor

from llm.config import ModelConfig
from llm.config_rules import validate
from llm.errors import UserError
from llm.model.attention import MultiHeadAttention
from llm.model.gpt import GPTModel, description, parameter_count, parameters_of
from llm.model.loss import CHUNK_TOKENS, linear_cross_entropy
from llm.model.parts import Rotary, hidden_dim, turns_of
from llm.model.parts import turned as turned_heads

BASE = ModelConfig(vocab_size=61, context_length=12, emb_dim=24, n_heads=4, n_layers=3)
MODERN = replace(BASE, **EVERY_PART)
EACH_PART = {
    "base": {},
    "rmsnorm": {"norm": "rmsnorm", "norm_eps": 1e-2},
    "rotary": {"position": "rotary", "rotary_base": 50.0},
    "relu2": {"activation": "relu2"},
    "swiglu": {"activation": "swiglu"},
    "no biases": {"bias": False},
    "hidden width": {"hidden_dim": 40},
    "QK-norm": {"qk_norm": True},
    "one head of keys and values": {"n_kv_heads": 1},
    "value embeddings": {"value_embeddings": True},
    "residual scalars": {"residual_scalars": True},
    "smear": {"smear": True},
    "parallel blocks": {"parallel_blocks": True},
    "capped logits": {"logit_softcap": 1.5},
}
CONFIGS = {name: replace(BASE, **keys) for name, keys in EACH_PART.items()} | {"all": MODERN}  # type: ignore[arg-type]


def norm_by_hand(x: list[float], weights: dict[str, Tensor], name: str, eps: float) -> list[float]:
    mean = sum(x) / len(x) if f"{name}.shift" in weights else 0.0
    power = sum((value - mean) ** 2 for value in x) / len(x)
    scale = weights[f"{name}.scale"].tolist()
    shift = weights[f"{name}.shift"].tolist() if f"{name}.shift" in weights else [0.0] * len(x)
    return [
        (value - mean) / math.sqrt(power + eps) * by + to
        for value, by, to in zip(x, scale, shift, strict=True)
    ]


def linear_by_hand(x: list[float], weights: dict[str, Tensor], name: str) -> list[float]:
    out = [sum(w * v for w, v in zip(row, x, strict=True)) for row in weights[f"{name}.weight"].tolist()]
    bias = weights[f"{name}.bias"].tolist() if f"{name}.bias" in weights else [0.0] * len(out)
    return [value + add for value, add in zip(out, bias, strict=True)]


def turned(head: list[float], position: int, base: float) -> list[float]:
    """Pairs of the first and the second half as complex numbers, times e^(i · angle)."""
    half = len(head) // 2
    pairs = [
        complex(head[i], head[half + i])
        * complex(math.cos(position * base ** (-i / half)), math.sin(position * base ** (-i / half)))
        for i in range(half)
    ]
    return [pair.real for pair in pairs] + [pair.imag for pair in pairs]


def activated(config: ModelConfig, x: list[float]) -> list[float]:
    if config.activation == "relu2":
        return [max(value, 0.0) ** 2 for value in x]
    if config.activation == "swiglu":
        half = len(x) // 2
        return [g / (1 + math.exp(-g)) * v for g, v in zip(x[:half], x[half:], strict=True)]
    root = math.sqrt(2 / math.pi)
    return [0.5 * v * (1 + math.tanh(root * (v + 0.044715 * v**3))) for v in x]


def logits_by_hand(model: GPTModel, idx: list[int]) -> list[list[float]]:
    """The logits of one row, from the weights and the config, with lists of numbers."""
    config = model.config
    weights = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}
    heads, kv_heads = config.n_heads, config.n_kv_heads or config.n_heads
    head_dim = config.emb_dim // heads
    stream = [weights["tok_emb.weight"][token] for token in idx]
    if config.smear:
        last = [torch.zeros(config.emb_dim), *stream[:-1]]
        stream = [vector + weights["smear"] * other for vector, other in zip(stream, last, strict=True)]
    if config.position == "learned":
        stream = [vector + weights["pos_emb.weight"][p] for p, vector in enumerate(stream)]
    first = [vector.tolist() for vector in stream]
    xs = [list(vector) for vector in first]
    for layer in range(config.n_layers):
        block = f"trf_blocks.{layer}"
        if config.residual_scalars:
            keep, back = weights[f"{block}.residual_scalars"].tolist()
            xs = [
                [keep * a + back * b for a, b in zip(x, start, strict=True)]
                for x, start in zip(xs, first, strict=True)
            ]
        queries: list[list[list[float]]] = []
        keys: list[list[list[float]]] = []
        values: list[list[list[float]]] = []
        attended = []
        for position, x in enumerate(xs):
            normed = norm_by_hand(x, weights, f"{block}.norm1", config.norm_eps)
            q, k, v = (
                linear_by_hand(normed, weights, f"{block}.att.W_{n}") for n in ("query", "key", "value")
            )
            if config.value_embeddings and (config.n_layers - 1 - layer) % 2 == 0:
                extra = weights[f"value_embs.{layer}.weight"][idx[position]].tolist()
                v = [a + b for a, b in zip(v, extra, strict=True)]
            split = [
                [numbers[h * head_dim : (h + 1) * head_dim] for h in range(count)]
                for numbers, count in ((q, heads), (k, kv_heads), (v, kv_heads))
            ]
            for which, name in ((0, "query_norm"), (1, "key_norm")):
                if config.qk_norm:
                    split[which] = [
                        norm_by_hand(head, weights, f"{block}.att.{name}", config.norm_eps)
                        for head in split[which]
                    ]
                if config.position == "rotary":
                    split[which] = [turned(head, position, config.rotary_base) for head in split[which]]
            queries.append(split[0])
            keys.append(split[1])
            values.append(split[2])
            context: list[float] = []
            for h in range(heads):
                shared = h * kv_heads // heads
                scores = [
                    sum(a * b for a, b in zip(queries[-1][h], key[shared], strict=True)) / math.sqrt(head_dim)
                    for key in keys
                ]
                shares = torch.softmax(torch.tensor(scores, dtype=torch.float64), dim=0).tolist()
                context += [
                    sum(share * value[shared][i] for share, value in zip(shares, values, strict=True))
                    for i in range(head_dim)
                ]
            out = linear_by_hand(context, weights, f"{block}.att.out_proj")
            attended.append([a + b for a, b in zip(x, out, strict=True)])
        read, xs = xs if config.parallel_blocks else attended, []
        for x, source in zip(attended, read, strict=True):
            normed = norm_by_hand(source, weights, f"{block}.norm2", config.norm_eps)
            inner = linear_by_hand(normed, weights, f"{block}.ff.layers.0")
            out = linear_by_hand(activated(config, inner), weights, f"{block}.ff.layers.2")
            xs.append([a + b for a, b in zip(x, out, strict=True)])
    head = "tok_emb" if config.tie_weights else "out_head"
    logits = [
        linear_by_hand(norm_by_hand(x, weights, "final_norm", config.norm_eps), weights, head) for x in xs
    ]
    cap = config.logit_softcap
    return [[cap * math.tanh(v / cap) for v in row] for row in logits] if cap else logits


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_formulas(name: str) -> None:
    model = random_model(CONFIGS[name])
    idx = torch.randint(61, (2, 7))
    with torch.no_grad():
        logits = model(idx)
    expected = torch.tensor([logits_by_hand(model, row) for row in idx.tolist()])
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_and_dropout_by_hand_agree_with_fp32(name: str) -> None:
    model = random_model(CONFIGS[name])
    idx, targets = torch.randint(61, (2, 12)), torch.randint(61, (2, 12))
    expected = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(idx, targets), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(idx, targets), expected, atol=0.05, rtol=0.02)
    for module in model.modules():  # so little that nothing is dropped, and the book's steps are taken
        if isinstance(module, MultiHeadAttention):
            module.dropout.p = 1e-12
    torch.testing.assert_close(model(idx, targets), expected)


def test_rotary_products_depend_on_distances_alone() -> None:
    rotary = Rotary(MODERN)
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 4, 1, 6)

    def at(position: int, head: Tensor) -> Tensor:
        return turned_heads(head, turns_of(rotary(torch.tensor([position]))))

    products = [(at(position, query) * at(position - 3, key)).sum(-1) for position in (3, 17, 400)]
    torch.testing.assert_close(products[1], products[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(products[2], products[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_of_capped_logits_and_its_gradients(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(CHUNK_TOKENS + 50, 16, requires_grad=True)
    weight = torch.randn(101, 16, requires_grad=True)
    targets = torch.randint(101, (len(hidden),))
    plain = 3.0 * torch.tanh(hidden @ weight.T / 3.0)
    expected = torch.autograd.grad(2 * F.cross_entropy(plain, targets), (hidden, weight))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = linear_cross_entropy(hidden, weight, targets, softcap=3.0)
    found = torch.autograd.grad(2 * loss, (hidden, weight))
    atol, rtol = (1e-6, 1e-4) if dtype == torch.float32 else (2e-4, 0.05)
    torch.testing.assert_close(loss, F.cross_entropy(plain, targets), atol=1e-2, rtol=1e-2)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=rtol)


def test_projections_from_zero() -> None:
    model = GPTModel(replace(MODERN, init="zero_projections"))
    idx, targets = torch.randint(61, (2, 12)), torch.randint(61, (2, 12))
    assert model(idx, targets).item() == pytest.approx(math.log(61), rel=1e-6)  # all tokens are as likely
    tied = GPTModel(replace(BASE, init="zero_projections"))
    embedded = tied.tok_emb(idx) + tied.pos_emb(torch.arange(12))  # type: ignore[misc]
    torch.testing.assert_close(
        tied(idx), tied.logits(tied.final_norm(embedded))
    )  # each block changes nothing
    assert tied.tok_emb.weight.std().item() == pytest.approx(0.02, rel=0.1)
    model(idx, targets).backward()  # the head has a gradient, so all that feeds it soon has one
    assert model.head_weight.grad is not None
    assert model.head_weight.grad.abs().max() > 0


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 7])
def test_parameters_are_counted_without_the_model(layers: int) -> None:
    for config in (BASE, MODERN):
        config = replace(config, n_layers=layers)
        assert parameters_of(config) == parameter_count(GPTModel(config))


def test_a_gated_network_has_as_many_weights() -> None:
    config = replace(BASE, emb_dim=96, n_heads=4)
    gated = replace(config, activation="swiglu")
    assert hidden_dim(gated) == 256  # 4 · 96 · 2 / 3
    counts = [parameter_count(GPTModel(each).trf_blocks) for each in (config, gated)]
    assert counts[1] - counts[0] == 3 * (2 * 256 - 4 * 96)  # biases apart
    assert hidden_dim(replace(gated, emb_dim=128)) == 352  # 341⅓, up to a multiple of 16


def test_what_a_model_is_in_a_line() -> None:
    assert description(BASE) == "3 layers, width 24, 4 heads, context 12"
    assert description(replace(MODERN, init="zero_projections", hidden_dim=50)) == (
        "3 layers, width 24, 4 heads, 2 of keys and values, context 12, rotary, rmsnorm, relu2, "
        "hidden width 50, QK-norm, value embeddings, residual scalars, smeared embeddings, "
        "parallel blocks, logits capped at 5, projections from zero, no biases"
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(BASE, n_kv_heads=3), "model.n_kv_heads=3 must divide model.n_heads=4 evenly"),
        (replace(BASE, n_kv_heads=0), "model.n_kv_heads=0: must be at least 1"),
        (replace(BASE, logit_softcap=0.0), "model.logit_softcap=0.0: must be at least 0.001"),
        (replace(BASE, norm="batchnorm"), "model.norm=batchnorm: must be one of layernorm, rmsnorm"),
        (replace(BASE, position="alibi"), "model.position=alibi: must be one of learned, rotary"),
        (replace(BASE, activation="relu"), "model.activation=relu: must be one of gelu, relu2, swiglu"),
    ],
)
def test_parts_that_do_not_exist_or_fit(config: ModelConfig, message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(config, "model.")
    assert str(caught.value).startswith(message)


def test_rotary_needs_pairs() -> None:
    with pytest.raises(UserError, match="gives each 5, which has to be even"):
        GPTModel(replace(BASE, emb_dim=20, position="rotary"))
