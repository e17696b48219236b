"""From prompts to texts: many samples side by side, each with its own random stream and end."""

import codecs
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tiktoken
import torch

from llm.config import SamplingConfig
from llm.data.pieces import encode_pieces
from llm.data.tokenizer import bytes_of, end_of_text_id
from llm.errors import NotFinite, UserError
from llm.generation.inference import NOT_FINITE
from llm.generation.sampling import uniform_stream
from llm.generation.steps import decodes_ahead, drawn_ahead, drawn_in_turn
from llm.model.gpt import GPTModel
from llm.progress import Progress


@dataclass
class Sample:
    """A generated text, with figures for each of its tokens."""

    prompt: str
    prompt_index: int
    index: int  # among the samples of this prompt
    seed: int
    continuation: str = ""  # without the stop text
    # New tokens only, including those of a stop text but not the end-of-text token.
    token_ids: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)  # of each under the model itself, nats
    entropies: list[float] = field(default_factory=list)  # of the distribution each was drawn from, nats
    stop_reason: str = ""  # length, eos or stop

    @property
    def text(self) -> str:
        return self.prompt + self.continuation

    def line(self) -> dict[str, Any]:
        """The sample as a line of `samples.jsonl`; `log_probability` is the whole continuation's, in nats."""
        return {
            "prompt": self.prompt,
            "text": self.text,
            "seed": self.seed,
            "prompt_index": self.prompt_index,
            "sample": self.index,
            "token_ids": self.token_ids,
            "log_probability": sum(self.log_probabilities),
            "stop_reason": self.stop_reason,
        }


def generate_texts(
    model: GPTModel,
    tokenizer: tiktoken.Encoding,
    prompts: list[str],
    sampling: SamplingConfig,
    max_new_tokens: int | list[int],
    num_samples: int = 1,
    seed: int = 123,
    batch_size: int = 32,
    stop: list[str] | None = None,
    eos: bool = True,
    past_context: str = "exact",
    show: Callable[[str], None] | None = None,
    names: list[str] | None = None,
) -> Iterator[Sample]:
    """Generate `num_samples` continuations of each prompt, in the order of the prompts.

    Sample i of prompt p draws from the random stream (seed, p, i), so it does not depend on what else is
    generated; torch's global random stream is not touched.

    Args:
        max_new_tokens: one limit for all prompts, or one for each.
        stop: texts that end a sample when they appear, and are not part of it.
        eos: whether the end-of-text token ends a sample.
        past_context: see `llm.generation.decoding.Decoding`.
        show: called with each piece of text as it is generated, including prompts; for a batch size of 1.
        names: names of the prompts, for errors.

    Raises:
        UserError: a prompt is empty, or contains a token id outside the model's vocabulary; or the model
            does not support `past_context`.
        NotFinite: the model's logits are not finite.
    """
    names = names or ["prompt"] * len(prompts)
    limits = max_new_tokens if isinstance(max_new_tokens, list) else [max_new_tokens] * len(prompts)
    token_ids = [
        prompt_ids(prompt, tokenizer, model.config.vocab_size, name)
        for prompt, name in zip(prompts, names, strict=True)
    ]
    rows = [
        _Row(Sample(prompt, index, number, seed), ids, limit, tokenizer, stop or [], eos)
        for index, (prompt, ids, limit) in enumerate(zip(prompts, token_ids, limits, strict=True))
        for number in range(num_samples)
    ]
    progress = Progress("generating")
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        if show:
            show(batch[0].sample.prompt)
        for share, piece in _generate_batch(model, batch, sampling, past_context):
            if show:
                show(piece)
            else:
                last = start + len(batch)
                which = f"sample {last}" if len(batch) == 1 else f"samples {start + 1} to {last}"
                progress.update((start + share * len(batch)) / len(rows), f"{which} of {len(rows)}")
        if not show:  # what was shown must stay on the terminal
            progress.clear()
        yield from (row.sample for row in batch)


def prompt_ids(prompt: str, tokenizer: tiktoken.Encoding, vocab_size: int, name: str = "prompt") -> list[int]:
    """The token ids of a prompt.

    Args:
        name: the key or file that it came from, for errors.

    Raises:
        UserError: it is empty, or contains a token id outside the vocabulary.
    """
    token_ids = [int(token_id) for _, ids in encode_pieces([prompt], tokenizer) for token_id in ids]
    if not token_ids:
        raise UserError(
            f"{name} is empty: give some text to continue, or '<|endoftext|>' to begin a new text"
        )
    if (largest := max(token_ids)) >= vocab_size:
        raise UserError(f"{name} contains token id {largest}, but the model knows {vocab_size} tokens")
    return token_ids


def _generate_batch(
    model: GPTModel, rows: list["_Row"], sampling: SamplingConfig, past_context: str
) -> Iterator[tuple[float, str]]:
    """Generate the samples of `rows`. After each step, yields the share of the longest row's token limit that
    is spent, and the new text."""
    longest = max(row.limit for row in rows)
    streams = [
        uniform_stream(row.sample.seed, (row.sample.prompt_index, row.sample.index), longest) for row in rows
    ]
    draw_all = drawn_ahead if decodes_ahead(model) else drawn_in_turn
    steps = draw_all(
        model,
        [row.prompt_ids for row in rows],
        torch.from_numpy(np.stack(streams, axis=1)),
        sampling,
        past_context,
        lambda number: bool(rows[number].sample.stop_reason),
    )
    for step, drawn in enumerate(steps):
        if not all(math.isfinite(log_probability) for _, _, log_probability, _ in drawn):
            raise NotFinite(NOT_FINITE)
        pieces = [rows[number].add(token, *figures) for number, token, *figures in drawn]
        yield (step + 1) / longest, "".join(pieces)


class _Row:
    """A sample being generated."""

    def __init__(
        self,
        sample: Sample,
        prompt_ids: list[int],
        limit: int,
        tokenizer: tiktoken.Encoding,
        stop: list[str],
        eos: bool,
    ) -> None:
        self.sample = sample
        self.prompt_ids = prompt_ids
        self.limit = limit
        self._tokenizer = tokenizer
        self._stop = stop
        self._eos_id = end_of_text_id(tokenizer) if eos else None
        # A token may end inside a UTF-8 character. Its bytes are held back until the character is complete,
        # and dropped if it never is.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._shown = 0

    def add(self, token: int, log_probability: float, entropy: float) -> str:
        """Add a token and decide whether it is the last. Returns the new text that can be shown, as it cannot
        be the beginning of a stop text."""
        sample = self.sample
        if token == self._eos_id:
            sample.stop_reason = "eos"
        else:
            sample.token_ids.append(token)
            sample.log_probabilities.append(log_probability)
            sample.entropies.append(entropy)
            known = len(sample.continuation)
            sample.continuation += self._decoder.decode(bytes_of(token, self._tokenizer))
            ends = [sample.continuation.find(text, max(0, known - len(text) + 1)) for text in self._stop]
            if found := [end for end in ends if end >= 0]:
                sample.continuation = sample.continuation[: min(found)]
                sample.stop_reason = "stop"
            elif len(sample.token_ids) == self.limit:
                sample.stop_reason = "length"
        certain = len(sample.continuation)
        if not sample.stop_reason:
            certain -= self._perhaps_stop()
        piece = sample.continuation[self._shown : certain]
        self._shown = certain
        return piece

    def _perhaps_stop(self) -> int:
        """How many characters at the end may be the beginning of a stop text."""
        text = self.sample.continuation
        return max(
            (length for stop in self._stop for length in range(1, len(stop)) if text.endswith(stop[:length])),
            default=0,
        )
