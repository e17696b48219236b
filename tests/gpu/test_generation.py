"""Generation by a captured graph against the same steps called plainly, and against the loop of CPUs."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from parts import EVERY_PART, RAGGED, SAMPLINGS, assert_drawn, drawn_with, random_model

from llm.config import ModelConfig, RuntimeConfig, SamplingConfig
from llm.data.tokenizer import load_tokenizer
from llm.device import device_errors_in_one_line
from llm.errors import UserError
from llm.generation import steps
from llm.generation.inference import for_inference
from llm.generation.steps import STEPS_AHEAD, drawn_ahead, drawn_in_turn
from llm.generation.texts import Sample, generate_texts
from llm.model.gpt import GPTModel
from llm.runtime import start_runtime

pytestmark = pytest.mark.gpu

LEARNED = ModelConfig(vocab_size=257, context_length=24, emb_dim=64, n_heads=4, n_layers=2)
ROTARY = replace(LEARNED, **EVERY_PART)
PAST = [(LEARNED, "exact"), (LEARNED, "half"), (ROTARY, "exact"), (ROTARY, "half"), (ROTARY, "slide")]
BYTES = load_tokenizer("bytes")


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was captured."""
    made: list[object] = []
    capture = steps.captured

    def counted(work: Callable[[], None], what: str) -> Callable[[], None]:
        made.append(work)
        return capture(work, what)

    monkeypatch.setattr(steps, "captured", counted)
    return made


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    yield
    steps._kept.clear()


def on_gpu(config: ModelConfig) -> GPTModel:
    return random_model(config).cuda()


def compare(
    model: GPTModel, prompts: list[list[int]], limits: list[int], sampling: SamplingConfig, past_context: str
) -> None:
    """A graph, plain calls of the step, and the loop of CPUs."""
    asked = model, prompts, limits, sampling, past_context
    graph = drawn_with(drawn_ahead, *asked)
    assert [len(row) for row in graph] == limits
    model.captures_steps = False
    assert_drawn(graph, drawn_with(drawn_ahead, *asked), 1e-5)
    model.captures_steps = True
    assert_drawn(graph, drawn_with(drawn_in_turn, *asked), 1e-3)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize(
    ("config", "past_context"), PAST, ids=[f"{config.position}, {past}" for config, past in PAST]
)
def test_a_graph_draws_what_plain_calls_draw(
    config: ModelConfig, past_context: str, sampling: SamplingConfig, captures: list[object]
) -> None:
    """In fp32, with rows of different lengths that end at different steps, past the context too."""
    compare(on_gpu(config), RAGGED, [60, 3, 25, 8, 9, 41], sampling, past_context)
    assert len(captures) == 1


@pytest.mark.parametrize("length", [1, 22, 23, 24, 25, 60])
@pytest.mark.parametrize("past_context", ["half", "slide"])
def test_prompts_of_any_length_and_batches_of_any_size(length: int, past_context: str) -> None:
    model = on_gpu(ROTARY if past_context == "slide" else LEARNED)
    for rows in (1, 2, 33):
        prompts = [[*range(length)]] * rows
        limits = [2 * STEPS_AHEAD + 1] * rows
        compare(model, prompts, limits, SAMPLINGS["plain"], past_context)


@pytest.mark.parametrize(("config", "past_context"), PAST)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_models_made_ready(config: ModelConfig, past_context: str, precision: str) -> None:
    """With one product for queries, keys and values, and in bf16, the graph gives what plain calls give."""
    runtime = start_runtime(RuntimeConfig(device="cuda", precision=precision))
    ready = for_inference(on_gpu(config), runtime)
    asked = RAGGED, [60, 3, 25, 8, 9, 41], SAMPLINGS["filters and penalty"], past_context
    graph = drawn_with(drawn_ahead, ready, *asked)
    ready.captures_steps = False
    assert_drawn(graph, drawn_with(drawn_ahead, ready, *asked), 1e-5)
    idx = torch.randint(257, (3, 24), device="cuda")
    with torch.no_grad():
        found, wanted = ready(idx).float(), on_gpu(config)(idx).float()
    assert (found - wanted).norm() < (0.05 if precision == "bf16" else 1e-4) * wanted.norm()


def texts(model: GPTModel, **more: object) -> list[Sample]:
    more = {"num_samples": 6, "batch_size": 4, "stop": ["a", "zq"], **more}
    prompts = ["To be", "O", "or not to be, that is the question"]
    sampling = SamplingConfig(temperature=4.0)
    return list(generate_texts(model, BYTES, prompts, sampling, [40, 3, 50], **more))  # type: ignore[arg-type]


@pytest.mark.parametrize("past_context", ["exact", "half", "slide"])
def test_texts_are_those_of_a_cpu(past_context: str) -> None:
    """They stop where they do there: at a stop text, at a limit, perhaps at the end-of-text token."""
    wanted = texts(random_model(ROTARY), past_context=past_context)
    assert {sample.stop_reason for sample in wanted} >= {"stop", "length"}
    model = on_gpu(ROTARY)
    for batch_size in (4, 18):
        found = texts(model, past_context=past_context, batch_size=batch_size)
        for one, other in zip(found, wanted, strict=True):
            assert (one.text, one.token_ids, one.stop_reason) == (
                other.text,
                other.token_ids,
                other.stop_reason,
            )
    shown: list[str] = []
    texts(model, past_context=past_context, batch_size=1, show=shown.append)
    assert "".join(shown) == "".join(sample.text for sample in wanted)


def test_a_graph_serves_the_next_batch_and_weights_that_change(captures: list[object]) -> None:
    model, plain = on_gpu(LEARNED), on_gpu(LEARNED)
    plain.captures_steps = False

    def check(graphs: int) -> None:
        found, wanted = texts(model, batch_size=6, stop=["zq"]), texts(plain, batch_size=6, stop=["zq"])
        assert [sample.token_ids for sample in found] == [sample.token_ids for sample in wanted]
        assert len(captures) == graphs

    check(1)  # three batches
    with torch.no_grad():
        for weight in (*model.parameters(), *plain.parameters()):
            weight.mul_(0.9)
    check(1)  # in place, as an optimizer does
    for weight in (*model.parameters(), *plain.parameters()):
        weight.data = weight.detach() * 0.9
    check(2)


def test_a_graph_and_its_cache_go_with_the_model() -> None:
    model = on_gpu(LEARNED)
    runtime = start_runtime(RuntimeConfig(device="cuda", precision="bf16"))
    allocated = []
    for _ in range(4):  # as samples during training: what the libraries keep, they have after the first
        texts(for_inference(model, runtime))
        torch.cuda.synchronize()
        allocated.append(torch.cuda.memory_allocated())
    assert allocated[1] == allocated[2] == allocated[3]


def test_to_launch_steps_waits_for_nothing() -> None:
    model, sampling = on_gpu(ROTARY), SAMPLINGS["filters and penalty"]
    uniforms = torch.rand(STEPS_AHEAD, 3).pin_memory()
    with torch.no_grad():
        static = steps._static_step(model, 3, 24, True, sampling)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            figures = static.launch(model, uniforms)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(figures()) == STEPS_AHEAD


def test_training_s_random_stream_is_left_alone() -> None:
    model = on_gpu(LEARNED)
    before = torch.cuda.get_rng_state()
    texts(model)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_a_compiled_step_is_captured_too(captures: list[object]) -> None:
    runtime = start_runtime(RuntimeConfig(device="cuda", precision="fp32", compile=True))
    ready = for_inference(on_gpu(LEARNED), runtime)
    asked = RAGGED, [30, 3, 25, 8, 9, 30], SAMPLINGS["plain"], "half"
    found = drawn_with(drawn_ahead, ready, *asked)
    assert len(captures) == 1
    assert_drawn(found, drawn_with(drawn_in_turn, on_gpu(LEARNED), *asked), 1e-3)


def test_out_of_memory_is_one_line() -> None:
    model = on_gpu(replace(LEARNED, context_length=4096))
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.02)
    try:
        with (
            pytest.raises(UserError, match=r"^out of memory .*: lower batch_size$"),
            device_errors_in_one_line(lambda: "lower batch_size"),
        ):
            drawn_with(drawn_ahead, model, [[1]] * 4096, [4000] * 4096, SAMPLINGS["plain"], "half")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert texts(model)
