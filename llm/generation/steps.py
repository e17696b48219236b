"""Generation steps: drawing a token for each row of a batch, step by step or several steps ahead of the host.

A CPU decodes one step at a time, attending only to what is cached and skipping rows that have ended. A GPU
would spend most of its time waiting: for the launch of each of a step's 200 or so kernels, and for the host
to read what was drawn. So on a GPU a step is a function of tensors at fixed addresses (`StaticStep`),
captured as one CUDA graph, and the host reads the tokens of earlier steps while later steps are computed.
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

STEPS_AHEAD = 8  # launched by the host before it reads the tokens of those launched earlier
ROUNDED_TO = 128  # tokens, for cache lengths, so that batches of similar length share a graph

# What a step drew, for each row that has not ended: its number, the token, the token's log-probability under
# the model, and the entropy of the distribution it was drawn from, both in nats.
Drawn = list[tuple[int, int, float, float]]
# Waits for launched steps, and returns their figures (steps, 3, rows), see `draw`.
Figures = Callable[[], list[list[list[float]]]]


def decodes_ahead(model: GPTModel) -> bool:
    """Whether to generate with `drawn_ahead`: on CUDA, or with compiled steps, whose shapes are fixed too."""
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
    """Yield what each step draws, until all rows have ended or all numbers are used.

    Args:
        uniforms: numbers in [0, 1) to draw each row's tokens with, (steps, rows), on the CPU.
        ended: tells whether a row gets no more tokens; called after each step.
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
    """The same as `drawn_in_turn`, but the device computes the next steps while the host reads earlier ones.
    Tokens drawn after a row's end are dropped. Windows that have moved are recomputed in between."""
    check_past_context(model, past_context)
    window, steps = model.config.context_length, len(uniforms)
    longest = -(-(max(map(len, prompts)) + steps) // ROUNDED_TO) * ROUNDED_TO
    static = _static_step(model, len(prompts), min(window, longest), past_context == "slide", sampling)
    decoding = Decoding(model, prompts, steps, window, past_context, static.cache)
    if static.seen is not None:
        static.seen.copy_(_seen(prompts, model.config.vocab_size))
    if static.uniforms.is_cuda:
        uniforms = uniforms.pin_memory()  # so that copying them does not wait for the GPU
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
                if stale := moved(0):  # some rows may have ended since
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
    """Draw a token for each row of logits (rows, vocab): token ids (rows,), and figures (3, rows): the ids,
    log-probabilities and entropies of `Drawn`, all in fp32, which represents token ids exactly.

    Args:
        uniform: in [0, 1), see `draw_at`: (rows,).
        seen: tokens to penalise, bool (rows, vocab).
    """
    wanted = logits if seen is None else penalise_repetition(logits, seen, sampling.repetition_penalty)
    probabilities = next_distribution(wanted, sampling)
    tokens = draw_at(uniform)(probabilities)
    if logits.is_cuda:  # log_softmax is one kernel, logsumexp nine
        log_probabilities = logits.log_softmax(dim=-1).gather(-1, tokens[:, None]).squeeze(-1)
    else:
        log_probabilities = logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(dim=-1)
    entropies = torch.special.entr(probabilities).sum(dim=-1)
    return tokens, torch.stack([tokens.float(), log_probabilities, entropies])


def _seen(prompts: list[list[int]], vocab_size: int) -> Tensor:
    """The tokens that occur in each prompt, bool (rows, vocab), on the CPU."""
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        seen[row, prompt] = True
    return seen


class StaticStep:
    """A step for a batch of rows, using tensors at fixed addresses. It keeps no reference to the model.

    A step first draws from `logits`, left by the previous step or by the prompts. Then the model reads the
    drawn tokens.
    """

    def __init__(
        self, model: GPTModel, rows: int, length: int, slides: bool, sampling: SamplingConfig
    ) -> None:
        device, vocab = model.tok_emb.weight.device, model.config.vocab_size
        self.sampling = sampling
        # A row with a full window has ended or is about to be recomputed. Until then its position must stay
        # within the cache.
        self.last = None if slides else length - 1
        self.cache = KVCache(model.config, rows, length, device, model.cache_dtype)
        self.logits = torch.zeros(rows, vocab, device=device)  # of the next tokens
        self.positions = torch.zeros(rows, dtype=torch.long, device=device)  # of the next tokens
        self.newest = torch.zeros(rows, dtype=torch.long, device=device)  # the tokens read last
        self.seen = None
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(rows, vocab, dtype=torch.bool, device=device)
        # For the steps launched together:
        self.uniforms = torch.zeros(STEPS_AHEAD, rows, device=device)
        self.figures = torch.zeros(STEPS_AHEAD, 3, rows, device=device)  # see `draw`
        self.number = torch.zeros(1, dtype=torch.long, device=device)  # of the current step among these
        self.replay: Callable[[GPTModel], None] | None = None  # a faster equivalent of `step`
        self.made_for: tuple[Any, ...] | None = None  # the conditions under which `replay` can be reused

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
        features = model.features(tokens[:, None], where[:, None], remember, self.newest)
        self.newest.copy_(tokens)
        self.logits.copy_(model.logits(features[:, 0]))
        self.positions.add_(1)

    def begin(self, moved: dict[int, int], decoding: Decoding) -> None:
        """Recompute rows whose windows have moved, see `Decoding.moved`."""
        rows = torch.tensor([*moved], device=self.logits.device)
        self.logits[rows] = decoding.refill(moved)
        positions = [decoding.position(row) for row in moved]
        self.positions[rows] = torch.tensor(positions, device=self.logits.device)
        newest = [decoding.token_ids[row][-1] for row in moved]
        self.newest[rows] = torch.tensor(newest, device=self.logits.device)

    def launch(self, model: GPTModel, uniforms: Tensor) -> Figures:
        """Launch one step for each row of `uniforms` (steps, rows)."""
        count = len(uniforms)
        self.uniforms[:count].copy_(uniforms, non_blocking=True)
        self.number.zero_()
        for _ in range(count):
            (self.replay or self.step)(model)
        return Late(self.figures[:count]).read


# The step captured last for each model, while no batch uses it, for the next batch of the same shape.
_kept: WeakKeyDictionary[GPTModel, StaticStep] = WeakKeyDictionary()


def _static_step(
    model: GPTModel, rows: int, length: int, slides: bool, sampling: SamplingConfig
) -> StaticStep:
    # A graph reads weights at their addresses: it sees new values, but new addresses need a new graph.
    places = tuple(tensor.data_ptr() for tensor in chain(model.parameters(), model.buffers()))
    wanted = rows, length, slides, astuple(sampling), places
    static = _kept.pop(model, None)
    if static is not None and static.made_for == wanted:
        return static
    del static  # frees its memory
    static = StaticStep(model, rows, length, slides, sampling)
    if model.compiles_steps:
        static.replay = torch.compile(static.step, dynamic=False)
        # To dynamo, steps of all shapes are one function, which by default it stops compiling after eight.
        with torch._dynamo.config.patch(recompile_limit=256):
            static.replay(model)
    if static.logits.is_cuda and model.captures_steps:
        replay = captured(partial(static.replay or static.step, model), "a step of generation")
        static.replay = lambda model: replay()
    if static.replay:
        static.made_for = wanted
    return static
