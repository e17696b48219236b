"""The decode loop with its KV cache: token ids in, token ids out."""

from functools import partial

import torch
from torch import Tensor

from llm.config import SamplingConfig
from llm.generation.sampling import draw_from, next_token
from llm.model.gpt import GPTModel
from llm.model.kv_cache import KVCache


def generate(
    model: GPTModel,
    idx: Tensor,
    max_new_tokens: int,
    context_size: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Go on from prompts idx (batch, time) for up to max_new_tokens: (batch, time + new).

    The book's call and semantics: the model sees the last context_size tokens, temperature 0 takes the
    likeliest token, top_k filters, and generation ends at eos_id, which is not part of the result. A row
    that ends before others is filled with eos_id.

    Draws from `generator`, or from torch's global stream as in the book if there is none.
    """
    config, draw = SamplingConfig(temperature=temperature, top_k=top_k), draw_from(generator)
    ended = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
    was_training = model.training
    decoding = Decoding(model.eval(), idx.tolist(), max_new_tokens, context_size)
    for _ in range(max_new_tokens):
        token = next_token(decoding.logits(), config, draw)
        if eos_id is not None:
            ended |= token == eos_id
            token = token.masked_fill(ended, eos_id)
            if ended.all():
                break
        decoding.append(token.tolist())
    model.train(was_training)
    return torch.tensor(decoding.token_ids, device=idx.device)


class Decoding:
    """Rows of token ids that grow a token at a time, and the logits of what may come next.

        while decoding.rows:
            tokens = next_token(decoding.logits(), …).tolist()
            decoding.append(tokens)
            decoding.end(those of decoding.rows that are done)

    The logits are those of the model over the last `context_size` tokens of a row. While a row is not
    longer than that, a step computes one new token. Past it every position shifts with each token, and as
    GPT-2's positions are absolute, nothing kept is right any more: the whole window is computed again at
    every step, as in the book. `past_context="half"` goes on with the later half of a full window instead, so
    that a step is cheap again and the model sees between half of the context and all of it.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: GPTModel,
        prompts: list[list[int]],
        max_new_tokens: int,
        context_size: int,
        past_context: str = "exact",
    ) -> None:
        """`prompts` may differ in length, and none is empty; equal ones are computed once. The model is one
        without dropout, as in evaluation mode."""
        self.model = model
        self.token_ids = [list(prompt) for prompt in prompts]
        self.rows = list(range(len(prompts)))  # those that go on, in the order of the logits
        self._window = context_size
        self._jump = max(1, context_size // 2) if past_context == "half" else 1
        longest = min(context_size, max(map(len, prompts)) + max_new_tokens)
        if model.compiled_features:
            longest = context_size  # one shape, whatever the prompts: each other one is compiled anew
        self._device = model.tok_emb.weight.device
        self._cache = KVCache(model.config, len(prompts), longest, self._device, model.cache_dtype)
        if model.compiled_features:  # for CUDA graphs, which else leave out a step that writes to its inputs
            for kept in (*self._cache.keys, *self._cache.values):
                torch._dynamo.mark_static_address(kept)
        self._starts = [-1] * len(prompts)  # where each cached window starts in its row; -1: nowhere yet

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Logits of the next token of each of `rows`: (rows, vocab_size), fp32."""
        starts = [self._start(len(self.token_ids[row])) for row in self.rows]
        stale = [slot for slot, start in enumerate(starts) if start != self._starts[slot]]
        if len(stale) < len(starts):
            features = self._extend(starts, stale)
            if stale:
                features[stale] = self._fill(starts, stale)
        else:
            features = self._fill(starts, stale)
        self._starts = starts
        return self.model.logits(features).float()

    def append(self, tokens: list[int]) -> None:
        """Add a token to each of `rows`."""
        for row, token in zip(self.rows, tokens, strict=True):
            self.token_ids[row].append(token)

    def end(self, rows: list[int]) -> None:
        """Take rows out of the batch. The last one takes the place of each, so `rows` changes its order."""
        for row in rows:
            slot = self.rows.index(row)
            self.rows[slot], self._starts[slot] = self.rows[-1], self._starts[-1]
            if slot < len(self.rows) - 1:
                self._cache.move(len(self.rows) - 1, to=slot)
            del self.rows[-1], self._starts[-1]

    def _start(self, length: int) -> int:
        """Where the window that the model sees starts in a row of so many tokens."""
        return -(-max(0, length - self._window) // self._jump) * self._jump

    def _fill(self, starts: list[int], slots: list[int]) -> Tensor:
        """Compute whole windows and keep them: features of their last tokens (slots, emb_dim)."""
        windows = [tuple(self.token_ids[self.rows[slot]][starts[slot] :]) for slot in slots]
        distinct = list(dict.fromkeys(windows))
        # Shorter windows are filled up at their end, where no real token sees it.
        longest = max(map(len, distinct))
        idx = torch.tensor([[*window, *[0] * (longest - len(window))] for window in distinct])
        source = torch.tensor([distinct.index(window) for window in windows], device=self._device)
        remember = partial(self._cache.fill, rows=torch.tensor(slots, device=self._device), source=source)
        features = self.model.features(idx.to(self._device), remember=remember)
        last = torch.tensor([len(window) - 1 for window in windows], device=self._device)
        return features[source, last]

    def _extend(self, starts: list[int], stale: list[int]) -> Tensor:
        """Compute the last token of each row over what is kept of it: (rows, emb_dim), to be overwritten
        for the slots in `stale`."""
        tokens = [self.token_ids[row][-1] for row in self.rows]
        positions = [
            len(self.token_ids[row]) - 1 - start for row, start in zip(self.rows, starts, strict=True)
        ]
        features, end = self.model.features, max(positions) + 1
        if self.model.compiled_features:
            # It knows one shape: room for the whole context, and rows that have ended are computed too.
            features, end = self.model.compiled_features, self._cache.length
            ended = [0] * (self._cache.rows - len(tokens))
            tokens, positions = tokens + ended, positions + ended
        where = torch.tensor(positions, device=self._device)
        idx = torch.tensor(tokens, device=self._device)
        remember = partial(self._cache.extend, where=where, end=end)
        if min(positions) + 1 == end and not self.model.compiled_features:
            remember = partial(self._cache.extend_together, position=end - 1)
        return features(idx[:, None], where[:, None], remember)[: len(self.rows), 0]
