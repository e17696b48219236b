"""The decode loop with its KV cache: token ids in, token ids out."""

from functools import partial

import torch
from torch import Tensor

from llm.config import SamplingConfig
from llm.errors import UserError
from llm.generation.sampling import draw_from, next_token
from llm.model.attention import Remember
from llm.model.gpt import GPTModel
from llm.model.kv_cache import KVCache

# How far positions go on counting with `past_context="slide"`, at least, before the window is computed anew:
# in fp32, the angles of rotary positions are wrong by 1e-4 here, by 2e-3 at 100,000, by 0.2 at 10 million.
COUNTED_POSITIONS = 4096


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
    """Continue prompts idx (batch, time) by up to max_new_tokens: (batch, time + new).

    The book's call and semantics: the model sees the last context_size tokens, temperature 0 takes the
    likeliest token (greedy decoding), top_k filters, and generation stops at eos_id, which is not part of
    the result. A row that stops before the others is padded with eos_id.

    Draws from `generator`; without one, from torch's global random stream, as in the book.
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
    """Rows of token ids that grow a token at a time, and the logits of their next tokens.

        while decoding.rows:
            tokens = next_token(decoding.logits(), …).tolist()
            decoding.append(tokens)
            decoding.end(those of decoding.rows that are done)

    The model sees the last `context_size` tokens of a row. While a row is shorter than that, the KV cache
    reduces a step to the work of one token. Beyond it, the window slides, and each token shifts all positions
    by one. GPT-2's absolute positions are part of every cached key and value. And with any positions, keys
    and values after the first block depend on tokens that have left the window. So the cache is stale, and
    by default the whole window is recomputed at every step, as in the book. There are two cheaper ways:

    `past_context="half"` drops the first half of a full window. Steps are then cheap until the window is full
    again, and the model sees between half of its context and all of it.

    `past_context="slide"` keeps the cache and drops only the oldest token, so a step is always one token's
    work. Each block attends to the last `context_size` positions, also within long prompts (sliding-window
    attention, Beltagy et al. 2020). Through the cache, the model still sees traces of tokens that have left
    the window, up to as many windows back as it has blocks, for which it was not trained. This needs relative
    positions, such as rotary ones.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: GPTModel,
        prompts: list[list[int]],
        max_new_tokens: int,
        context_size: int,
        past_context: str = "exact",
        cache: KVCache | None = None,
    ) -> None:
        """
        Args:
            model: in evaluation mode.
            prompts: may differ in length, but must not be empty. Equal prompts are computed once.
            cache: a cache to reuse, with as many rows, and long enough.

        Raises:
            UserError: the window cannot slide, as the model's positions are absolute.
        """
        check_past_context(model, past_context)
        self.model = model
        self.token_ids = [list(prompt) for prompt in prompts]
        self.rows = list(range(len(prompts)))  # that have not ended, in the order of the logits
        self._window = context_size
        self._jump = max(1, context_size // 2) if past_context == "half" else 1
        self._slides = past_context == "slide"
        longest = min(context_size, max(map(len, prompts)) + max_new_tokens)
        self._device = model.tok_emb.weight.device
        self._cache = cache or KVCache(model.config, len(prompts), longest, self._device, model.cache_dtype)
        self._starts = [-1] * len(prompts)  # where each cached window starts in its row; -1: nothing cached

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Logits of the next token of each of `rows`: (rows, vocab_size), fp32."""
        moved = self.moved()
        if len(moved) == len(self.rows):
            return self.refill(moved)
        stale = self._restart(moved)
        features = self._extend()
        if stale:
            features[stale] = self._fill(stale)
        return self._logits(features)

    def moved(self, ahead: int = 0) -> dict[int, int]:
        """The slots whose window will have moved after `ahead` more tokens, so that their cache is stale, and
        the new starts of their windows."""
        starts = {
            slot: self._start(len(self.token_ids[row]) + ahead, self._starts[slot])
            for slot, row in enumerate(self.rows)
        }
        return {slot: start for slot, start in starts.items() if start != self._starts[slot]}

    @torch.no_grad()
    def refill(self, moved: dict[int, int]) -> Tensor:
        """Recompute and cache windows that have moved: logits of their next tokens (slots, vocab_size),
        fp32."""
        return self._logits(self._fill(self._restart(moved)))

    def position(self, slot: int) -> int:
        """The position of a row's next token in its window."""
        return len(self.token_ids[self.rows[slot]]) - self._starts[slot]

    def append(self, tokens: list[int]) -> None:
        """Append a token to each of `rows`."""
        for row, token in zip(self.rows, tokens, strict=True):
            self.token_ids[row].append(token)

    def end(self, rows: list[int]) -> None:
        """Remove rows from the batch. The last row takes the slot of each, so the order of `rows` changes."""
        for row in rows:
            slot = self.rows.index(row)
            self.rows[slot], self._starts[slot] = self.rows[-1], self._starts[-1]
            if slot < len(self.rows) - 1:
                self._cache.move(len(self.rows) - 1, to=slot)
            del self.rows[-1], self._starts[-1]

    def _start(self, length: int, cached: int) -> int:
        """Where the window of a row starts.

        Args:
            length: of the row, in tokens.
            cached: where its cached window starts, or -1.
        """
        if self._slides:
            # The last token's logits depend on no earlier token: each block reaches window - 1 tokens back,
            # and a smeared embedding one.
            config = self.model.config
            reach = config.n_layers * (self._window - 1) + 1 + int(config.smear)
            if cached >= 0 and length - cached <= max(COUNTED_POSITIONS, 4 * reach):
                return cached
            return max(0, length - reach)
        return -(-max(0, length - self._window) // self._jump) * self._jump

    def _restart(self, moved: dict[int, int]) -> list[int]:
        """Note the new starts of windows; returns their slots."""
        for slot, start in moved.items():
            self._starts[slot] = start
        return [*moved]

    def _logits(self, features: Tensor) -> Tensor:
        # From here on in fp32: bf16's 8 bits are too few for softmax and cumulative sums over 50,257 tokens.
        return self.model.logits(features).float()

    def _fill(self, slots: list[int]) -> Tensor:
        """Compute rows from their starts and cache them: features of their last tokens (slots, emb_dim)."""
        wholes = [tuple(self.token_ids[self.rows[slot]][self._starts[slot] :]) for slot in slots]
        windows = [whole[: self._window] for whole in wholes]
        distinct = list(dict.fromkeys(windows))
        # Shorter windows are padded at their end, where the causal mask hides the padding from real tokens.
        longest = max(map(len, distinct))
        idx = torch.tensor([[*window, *[0] * (longest - len(window))] for window in distinct])
        source = torch.tensor([distinct.index(window) for window in windows], device=self._device)
        remember = partial(self._cache.fill, rows=torch.tensor(slots, device=self._device), source=source)
        features = self.model.features(idx.to(self._device), remember=remember)
        last = torch.tensor([len(window) - 1 for window in windows], device=self._device)
        features = features[source, last]
        for whole in dict.fromkeys(wholes):  # with past_context=slide, rows can be longer than the window
            if len(whole) > self._window:
                alike = [number for number, each in enumerate(wholes) if each == whole]
                features[alike] = self._fill_on(whole, [slots[number] for number in alike])
        return features

    def _fill_on(self, whole: tuple[int, ...], slots: list[int]) -> Tensor:
        """Compute the rest of rows whose first window is cached, a window at a time: features of their last
        token (1, emb_dim)."""
        remember = partial(self._cache.fill_on, rows=torch.tensor(slots, device=self._device))
        for begin in range(self._window, len(whole), self._window):
            idx = torch.tensor([whole[begin : begin + self._window]], device=self._device)
            positions = torch.arange(begin, begin + idx.shape[1], device=self._device)
            before = torch.tensor([whole[begin - 1]], device=self._device)
            features = self.model.features(idx, positions, remember, before)
        return features[:, -1]

    def _extend(self) -> Tensor:
        """Compute the last token of each row, using the cache: features (rows, emb_dim), meaningless for rows
        whose cache is stale."""
        tokens = [self.token_ids[row][-2:] for row in self.rows]
        positions = [self.position(slot) - 1 for slot in range(len(self.rows))]
        end = max(positions) + 1
        where = torch.tensor(positions, device=self._device)
        before, idx = torch.tensor(tokens, device=self._device).unbind(dim=1)
        if min(positions) + 1 == end:
            remember: Remember = partial(self._cache.extend_together, position=end - 1)
        else:
            remember = self._cache.extending(where, end)
        return self.model.features(idx[:, None], where[:, None], remember, before)[:, 0]


def check_past_context(model: GPTModel, past_context: str) -> None:
    """
    Raises:
        UserError: the window cannot slide, as the model's positions are absolute.
    """
    if past_context == "slide" and model.pos_emb is not None:
        raise UserError(
            f"past_context=slide needs relative positions, as model.position=rotary has; with "
            f"model.position={model.config.position}, what is cached holds the position that it was "
            f"computed at: take past_context=half, or exact"
        )
