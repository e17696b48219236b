"""Steps drawn ahead of what is read, as on a GPU, against the loop that reads each before the next one. The
graph is replaced by plain calls; tests/gpu/test_generation.py has the real one."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from parts import EVERY_PART, RAGGED, SAMPLINGS, assert_drawn, drawn_with, random_model
from torch import Tensor

from llm.config import ModelConfig, RuntimeConfig, SamplingConfig
from llm.data.tokenizer import load_tokenizer
from llm.generation import decoding, steps
from llm.generation.inference import _project_together, for_inference
from llm.generation.steps import STEPS_AHEAD, Drawn, drawn_ahead, drawn_in_turn
from llm.generation.texts import Sample, generate_texts
from llm.model.gpt import GPTModel
from llm.runtime import start_runtime

LEARNED = ModelConfig(vocab_size=257, context_length=24, emb_dim=24, n_heads=4, n_layers=2)
ROTARY = replace(LEARNED, **EVERY_PART)
BYTES = load_tokenizer("bytes")


def compare(
    model: GPTModel,
    prompts: list[list[int]],
    limits: list[int],
    sampling: SamplingConfig,
    past_context: str,
) -> None:
    asked = model, prompts, limits, sampling, past_context
    wanted, found = drawn_with(drawn_in_turn, *asked), drawn_with(drawn_ahead, *asked)
    assert [len(row) for row in found] == limits
    assert_drawn(found, wanted, 1e-5)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize(
    ("config", "past_context"),
    [(LEARNED, "exact"), (LEARNED, "half"), (ROTARY, "exact"), (ROTARY, "half"), (ROTARY, "slide")],
    ids=["learned, exact", "learned, half", "rotary, exact", "rotary, half", "rotary, slide"],
)
def test_steps_ahead_draw_what_steps_in_turn_draw(
    config: ModelConfig, past_context: str, sampling: SamplingConfig
) -> None:
    """Rows of different lengths that end at different steps, within the context and far past it."""
    compare(random_model(config), RAGGED, [60, 3, 25, 8, 9, 41], sampling, past_context)


@pytest.mark.parametrize("length", [1, 22, 23, 24, 25, 60])
@pytest.mark.parametrize("past_context", ["half", "slide"])
def test_prompts_of_any_length(length: int, past_context: str) -> None:
    model = random_model(ROTARY if past_context == "slide" else LEARNED)
    for limit in (1, STEPS_AHEAD, 2 * STEPS_AHEAD + 1):
        compare(model, [[*range(length)]] * 2, [limit, 1], SAMPLINGS["plain"], past_context)


@pytest.mark.parametrize("context", [1, 2])
def test_the_smallest_windows(context: int) -> None:
    for config, past_context in ((LEARNED, "half"), (LEARNED, "exact"), (ROTARY, "slide")):
        model = random_model(replace(config, context_length=context))
        compare(model, RAGGED, [20, 1, 7, 20, 13, 20], SAMPLINGS["plain"], past_context)


def test_slide_counts_from_anew_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "COUNTED_POSITIONS", 0)
    model = random_model(replace(ROTARY, context_length=4))
    compare(model, [[1, 2], [3] * 7], [90, 70], SAMPLINGS["plain"], "slide")


def texts(model: GPTModel, sampling: SamplingConfig, **more: object) -> list[Sample]:
    more = {"num_samples": 6, "batch_size": 4, "stop": ["a", "zq"], **more}
    prompts = ["To be", "O", "or not to be, that is the question"]
    return list(generate_texts(model, BYTES, prompts, sampling, [40, 3, 50], **more))  # type: ignore[arg-type]


@pytest.mark.parametrize("past_context", ["exact", "half", "slide"])
def test_texts_stop_where_they_do_without(past_context: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a stop text, at the end-of-text token, at a limit; what was drawn beyond that is dropped."""
    model, sampling = random_model(ROTARY), SamplingConfig(temperature=4.0, top_k=None)
    plain = texts(model, sampling, past_context=past_context)
    monkeypatch.setattr("llm.generation.texts.decodes_ahead", lambda model: True)
    ahead = texts(model, sampling, past_context=past_context)
    assert {sample.stop_reason for sample in plain} == {"stop", "eos", "length"}
    for one, other in zip(plain, ahead, strict=True):
        assert (one.text, one.token_ids, one.stop_reason) == (other.text, other.token_ids, other.stop_reason)
        assert one.log_probabilities == pytest.approx(other.log_probabilities, abs=1e-5)
    shown: list[str] = []
    texts(model, sampling, past_context=past_context, batch_size=1, show=shown.append)
    assert "".join(shown) == "".join(sample.text for sample in plain)
    assert len(shown) > 100  # a piece a token


def test_no_more_is_launched_than_two_bundles_past_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model, launched = random_model(LEARNED), []
    step = steps.StaticStep.step

    def counted(self: steps.StaticStep, model: GPTModel) -> None:
        launched.append(1)
        step(self, model)

    monkeypatch.setattr(steps.StaticStep, "step", counted)
    drawn_with(drawn_ahead, model, [[1], [2]], [100, 5], SAMPLINGS["plain"], "half")
    assert len(launched) == 100  # never more than the numbers that were given
    launched.clear()
    uniforms = torch.rand(100, 1)
    rows: list[Drawn] = []
    for drawn in drawn_ahead(model, [[1]], uniforms, SAMPLINGS["plain"], "half", lambda row: len(rows) > 4):
        rows.append(drawn)
    assert len(rows) == 5
    assert len(launched) == 2 * STEPS_AHEAD


@pytest.fixture
def compiled_by_name_only(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was given to the compiler, which leaves it as it is."""
    given: list[object] = []

    def compiled(step: object, dynamic: bool) -> object:
        given.append(step)
        return step

    monkeypatch.setattr(torch, "compile", compiled)
    return given


def test_a_step_is_made_once_for_batches_of_a_shape(compiled_by_name_only: list[object]) -> None:
    model, plain = random_model(LEARNED), random_model(LEARNED)
    model.compiles_steps = True

    def check(made: int, **more: object) -> None:
        sampling, more = SamplingConfig(temperature=1.5, repetition_penalty=1.2), {**more, "stop": ["zq"]}
        found, wanted = (texts(each, sampling, past_context="half", **more) for each in (model, plain))
        assert [sample.token_ids for sample in found] == [sample.token_ids for sample in wanted]
        assert len(compiled_by_name_only) == made

    check(2, batch_size=12)  # of twelve rows, and of six
    check(2, batch_size=6)  # the last is kept
    with torch.no_grad():
        for weight, other in zip(model.parameters(), plain.parameters(), strict=True):
            weight.mul_(0.9)
            other.mul_(0.9)
    check(2, batch_size=6)  # over weights that change in place
    for parameters in (model.parameters(), plain.parameters()):
        for weight in parameters:
            weight.data = weight.detach() * 0.9
    check(3, batch_size=6)  # but not over others, in other places


def test_batches_at_the_same_time_have_steps_of_their_own(compiled_by_name_only: list[object]) -> None:
    model, uniforms = random_model(LEARNED), torch.rand(20, 1)
    model.compiles_steps = True

    def tokens() -> Iterator[int]:
        for [(_, token, *_)] in drawn_ahead(
            model, [[1, 2]], uniforms, SAMPLINGS["plain"], "half", lambda row: False
        ):
            yield token

    wanted = [*tokens()]  # its step is kept
    assert [*zip(tokens(), tokens(), strict=True)] == [*zip(wanted, wanted, strict=True)]
    assert len(compiled_by_name_only) == 2


def test_a_compiled_step_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced alone, as machine code takes long to make."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, dynamic: compile(step, backend="eager", dynamic=False))
    model = random_model(ROTARY)
    model.compiles_steps = True
    compare(model, RAGGED, [40, 3, 25, 8, 9, 41], SAMPLINGS["filters and penalty"], "slide")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
def test_models_made_ready_for_a_gpu_draw_the_likeliest(cache_dtype: torch.dtype) -> None:
    """bf16, and queries, keys and values from one product: near to the plain model's distribution."""
    model, prompts = random_model(replace(ROTARY, qkv_bias=True)), [[1, 2, 3], [4, 5]]
    runtime = start_runtime(RuntimeConfig(device="cpu", precision="bf16", compile=True))
    ready = for_inference(model, runtime)
    ready.cache_dtype = cache_dtype
    ready.compiles_steps = False
    [found, _] = drawn_with(drawn_ahead, ready, prompts, [20, 20], SAMPLINGS["plain"], "slide")
    ids = torch.tensor([[*prompts[0], *(token for _, token, *_ in found)]])
    with torch.no_grad():
        wanted = model(ids[:, :-1]).log_softmax(-1)[0, 2:].gather(-1, ids[0, 3:, None]).squeeze(-1)
    assert Tensor([each[2] for each in found]) == pytest.approx(wanted, abs=0.2)


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("n_kv_heads", [None, 2])
def test_queries_keys_and_values_of_one_product(qkv_bias: bool, n_kv_heads: int | None) -> None:
    model = random_model(replace(LEARNED, qkv_bias=qkv_bias, n_kv_heads=n_kv_heads))
    runtime, idx = start_runtime(RuntimeConfig(device="cpu", precision="fp32")), torch.randint(257, (2, 20))
    ready = for_inference(model, runtime)
    together = random_model(replace(LEARNED, qkv_bias=qkv_bias, n_kv_heads=n_kv_heads))
    _project_together(together, runtime)
    with torch.no_grad():
        torch.testing.assert_close(together(idx), ready(idx), atol=1e-5, rtol=1e-5)
    assert len(together.state_dict()) < len(model.state_dict())
