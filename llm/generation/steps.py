"""Steps of generation: tokens drawn for all rows of a batch, one after the other or ahead of what is read.

A CPU decodes one step at a time. It attends to what is cached and no more, and computes no row that has
ended. A GPU would wait for the launch of each of a step's some 200 kernels, and then for the host to look at
what was drawn. So there a step is a function of tensors that stay where they are (`StaticStep`), captured as
one CUDA graph, and the host reads the tokens of some steps while the next are computed.
"""

from collections.abc import Callable, Iterator
from dataclasses import astuple
from functools import partial
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from llm.config import SamplingConfig
from llm.cuda_graph import captured
from llm.generation.decoding import Decoding, check_past_context
from llm.generation.sampling import draw_at, next_distribution, penalise_repetition
from llm.model.gpt import GPTModel
from llm.model.kv_cache import KVCache
from llm.runtime import Late

STEPS_AHEAD = 8  # that the host launches before it looks at those launched before
ROUNDED_TO = 128  # cache lengths, so that batches of about the same length share a graph

# What a step drew: for each row that goes on, its number, the token, the token's log-probability under the
# model and the entropy of the distribution that it was drawn from, both in nats.
Drawn = list[tuple[int, int, float, float]]
# Waits for some steps that were launched: figures (steps, 3, rows), see `draw`.
Figures = Callable[[], list[list[list[float]]]]


def decodes_ahead(model: GPTModel) -> bool:
    """Whether `drawn_ahead` is to generate with this model. Compiled steps too are of one shape."""
    return model.tok_emb.weight.is_cuda or model.compiles_steps


@torch.no_grad()
def drawn_in_turn(
    model: GPTModel,
    prompts: list[list[int]],
    uniforms: Tensor,
    sampling: SamplingConfig,
    past_context: str,
    ended: Callable[[int], bool],
) -> Iterator[Drawn]:
    """What each step draws, until all rows have ended, or the numbers are used up.

    Args:
        uniforms: in [0, 1), to draw each row's tokens with: (steps, rows), on the CPU.
        ended: whether a row is to get no more tokens; asked again after each step.
    """
    decoding = Decoding(model, prompts, len(uniforms), model.config.context_length, past_context)
    device = model.tok_emb.weight.device
    seen = None
    if sampling.repetition_penalty != 1:
        seen = _seen(prompts, model.config.vocab_size).to(device)
    going = torch.tensor(decoding.rows, device=device)
    for uniform in uniforms.to(device):
        logits = decoding.logits()
        tokens, figures = draw(logits, uniform[going], None if seen is None else seen[going], sampling)
        if seen is not None:
            seen[going, tokens] = True
        ids, *rest = figures.tolist()  # waits for the device
        new = [int(token) for token in ids]
        drawn = [*zip(decoding.rows, new, *rest, strict=True)]
        decoding.append(new)
        yield drawn
        if done := [row for row in decoding.rows if ended(row)]:
            decoding.end(done)
            going = torch.tensor(decoding.rows, device=device)
        if not decoding.rows:
            return


@torch.no_grad()
def drawn_ahead(
    model: GPTModel,
    prompts: list[list[int]],
    uniforms: Tensor,
    sampling: SamplingConfig,
    past_context: str,
    ended: Callable[[int], bool],
) -> Iterator[Drawn]:
    """The same as `drawn_in_turn`, from a device that works on while the host reads what it drew some steps
    ago. What a row draws after its end is dropped. Where a window moves, it is computed anew in between."""
    check_past_context(model, past_context)
    window, steps = model.config.context_length, len(uniforms)
    longest = -(-(max(map(len, prompts)) + steps) // ROUNDED_TO) * ROUNDED_TO
    static = _static_step(model, len(prompts), min(window, longest), past_context == "slide", sampling)
    decoding = Decoding(model, prompts, steps, window, past_context, static.cache)
    if static.seen is not None:
        static.seen.copy_(_seen(prompts, model.config.vocab_size))
    if static.uniforms.is_cuda:
        uniforms = uniforms.pin_memory()  # so that copies of it do not wait for what the GPU is doing
    launched = read = 0

    def moved(ahead: int) -> dict[int, int]:
        return {row: start for row, start in decoding.moved(ahead).items() if not ended(row)}

    def reading(figures: Figures) -> Iterator[Drawn]:
        nonlocal read
        for ids, *rest in figures():
            drawn = [
                (row, int(token), log_probability, entropy)
                for row, token, log_probability, entropy in zip(decoding.rows, ids, *rest, strict=True)
                if not ended(row)
            ]
            if not drawn:
                return
            for row, token, *_ in drawn:
                decoding.token_ids[row].append(token)
            read += 1
            yield drawn

    unread: Figures | None = None
    try:
        while launched < steps and not all(map(ended, decoding.rows)):
            if moved(launched - read):
                if unread:
                    yield from reading(unread)
                    unread = None
                if stale := moved(0):  # those of rows that have not ended since
                    static.begin(stale, decoding)
            count = 1
            while count < min(STEPS_AHEAD, steps - launched) and not moved(launched + count - read):
                count += 1
            newer = static.launch(model, uniforms[launched : launched + count])
            launched += count
            if unread:
                yield from reading(unread)
            unread = newer
        if unread and not all(map(ended, decoding.rows)):
            yield from reading(unread)
    finally:
        if static.made_for:
            _kept[model] = static


def draw(
    logits: Tensor, uniform: Tensor, seen: Tensor | None, sampling: SamplingConfig
) -> tuple[Tensor, Tensor]:
    """Draw a token for each row of logits (rows, vocab): token ids (rows,), and figures (3, rows) in fp32,
    which represents token ids exactly: the ids, log-probabilities and entropies of `Drawn`.

    Args:
        uniform: in [0, 1), see `draw_at`: (rows,).
        seen: tokens to penalise, bool (rows, vocab).
    """
    wanted = logits if seen is None else penalise_repetition(logits, seen, sampling.repetition_penalty)
    probabilities = next_distribution(wanted, sampling)
    tokens = draw_at(uniform)(probabilities)
    if logits.is_cuda:  # one kernel, where logsumexp starts nine
        log_probabilities = logits.log_softmax(dim=-1).gather(-1, tokens[:, None]).squeeze(-1)
    else:
        log_probabilities = logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(dim=-1)
    entropies = torch.special.entr(probabilities).sum(dim=-1)
    return tokens, torch.stack([tokens.float(), log_probabilities, entropies])


def _seen(prompts: list[list[int]], vocab_size: int) -> Tensor:
    """Which tokens occur in the prompts, bool (rows, vocab), on the CPU."""
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        seen[row, prompt] = True
    return seen


class StaticStep:
    """A step for a batch of rows, over tensors that stay where they are. It does not hold the model.

    Drawing comes first: from `logits`, which the step before left, or the prompts. Then the model reads what
    was drawn.
    """

    def __init__(
        self, model: GPTModel, rows: int, length: int, slides: bool, sampling: SamplingConfig
    ) -> None:
        device, vocab = model.tok_emb.weight.device, model.config.vocab_size
        self.sampling = sampling
        # A row whose window is full is computed anew before it goes on, or has ended; until then it must not
        # reach for positions that there are not.
        self.last = None if slides else length - 1
        self.cache = KVCache(model.config, rows, length, device, model.cache_dtype)
        self.logits = torch.zeros(rows, vocab, device=device)  # of the next tokens
        self.positions = torch.zeros(rows, dtype=torch.long, device=device)  # of the next tokens
        self.seen = None
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(rows, vocab, dtype=torch.bool, device=device)
        # Of the steps launched together:
        self.uniforms = torch.zeros(STEPS_AHEAD, rows, device=device)
        self.figures = torch.zeros(STEPS_AHEAD, 3, rows, device=device)  # see `draw`
        self.number = torch.zeros(1, dtype=torch.long, device=device)  # of the step among these
        self.replay: Callable[[GPTModel], None] | None = None  # does what `step` does, faster
        self.made_for: tuple[Any, ...] | None = None  # what may use `replay` again

    def step(self, model: GPTModel) -> None:
        """Draw a token for each row, and compute the logits of the next one."""
        uniform = self.uniforms.index_select(0, self.number)[0]
        tokens, figures = draw(self.logits, uniform, self.seen, self.sampling)
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        self.figures.index_copy_(0, self.number, figures[None])
        self.number.add_(1)
        where = self.positions if self.last is None else self.positions.clamp(max=self.last)
        remember = self.cache.extending(where, self.cache.length)
        features = model.features(tokens[:, None], where[:, None], remember)
        self.logits.copy_(model.logits(features[:, 0]))
        self.positions.add_(1)

    def begin(self, moved: dict[int, int], decoding: Decoding) -> None:
        """Compute rows from where their windows start now, see `Decoding.moved`."""
        rows = torch.tensor([*moved], device=self.logits.device)
        self.logits[rows] = decoding.refill(moved)
        self.positions[rows] = torch.tensor(
            [decoding.position(row) for row in moved], device=self.logits.device
        )

    def launch(self, model: GPTModel, uniforms: Tensor) -> Figures:
        """Launch as many steps as there are rows of numbers (steps, rows)."""
        count = len(uniforms)
        self.uniforms[:count].copy_(uniforms, non_blocking=True)
        self.number.zero_()
        for _ in range(count):
            (self.replay or self.step)(model)
        return Late(self.figures[:count]).read


# The step captured last over each model, where no batch uses it: for the next one of its shape.
_kept: WeakKeyDictionary[GPTModel, StaticStep] = WeakKeyDictionary()


def _static_step(
    model: GPTModel, rows: int, length: int, slides: bool, sampling: SamplingConfig
) -> StaticStep:
    # A graph reads weights where they lie: it sees new values, but new places call for a new one.
    places = tuple(tensor.data_ptr() for tensor in chain(model.parameters(), model.buffers()))
    wanted = rows, length, slides, astuple(sampling), places
    static = _kept.pop(model, None)
    if static is not None and static.made_for == wanted:
        return static
    del static  # so that its memory is free
    static = StaticStep(model, rows, length, slides, sampling)
    if model.compiles_steps:
        static.replay = torch.compile(static.step, dynamic=False)
        # To dynamo, steps of all shapes are one function, and by default it gives up after eight.
        with torch._dynamo.config.patch(recompile_limit=256):
            static.replay(model)
    if static.logits.is_cuda and model.captures_steps:
        replay = captured(partial(static.replay or static.step, model), "a step of generation")
        static.replay = lambda model: replay()
    if static.replay:
        static.made_for = wanted
    return static
