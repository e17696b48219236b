"""Tokens to windows to batches, in an order that can be resumed."""

from collections.abc import Iterator

import numpy as np
import tiktoken
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llm.config import DataConfig, PretrainConfig
from llm.data.token_file import TokenFile
from llm.errors import UserError

Batch = tuple[Tensor, Tensor]  # inputs and targets, both (batch, time), int64


class Windows(Dataset[Batch]):
    """Windows of `context_length` tokens, each `stride` after the one before; the book's GPTDatasetV1.

    Item i is (inputs, targets), both (context_length,), the targets one token later. With an offset, all
    windows begin so many tokens later, and the last ones begin at the front again.
    """

    def __init__(self, tokens: np.ndarray, context_length: int, stride: int, offset: int = 0) -> None:
        self.tokens = tokens
        self.context_length = context_length
        self.stride = stride
        self.offset = offset

    def __len__(self) -> int:
        return max(0, -(-(len(self.tokens) - self.context_length) // self.stride))

    def __getitem__(self, index: int) -> Batch:
        start = (self.offset + index * self.stride) % (len(self.tokens) - self.context_length)
        window = torch.from_numpy(self.tokens[start : start + self.context_length + 1].astype(np.int64))
        return window[:-1], window[1:]

    def batch(self, indices: Tensor) -> Batch:
        """Windows by index (batch,) as one batch: two tensors (batch, context_length)."""
        starts = (self.offset + indices.numpy() * self.stride) % (len(self.tokens) - self.context_length)
        windows = torch.from_numpy(
            self.tokens[starts[:, None] + np.arange(self.context_length + 1)].astype(np.int64)
        )
        return windows[:, :-1], windows[:, 1:]


class TrainingBatches:
    """Endless batches of a training split, epoch after epoch, that can start at any position.

    The shuffled order depends only on (seed, epoch, position). The book's order is that of torch's
    DataLoader, which draws from the global generator at the start of each epoch; to resume inside an
    epoch, the generator's state at that start is kept.
    """

    def __init__(self, windows: Windows, config: DataConfig, seed: int) -> None:
        self.windows = windows
        self.batch_size = config.batch_size
        self.book_order = config.order == "book"
        self.shift = config.shift_windows
        self.seed = seed
        self.epoch = 0
        self.position = 0  # batches of this epoch already used; the next epoch begins with its first batch
        self._epoch_generator_state: Tensor | None = None
        self._batches: Iterator[Batch] | None = None

    def __len__(self) -> int:
        """Batches in an epoch; a last one that is not full is dropped."""
        return len(self.windows) // self.batch_size

    @property
    def used(self) -> int:
        """Batches used so far, over all epochs."""
        return self.epoch * len(self) + self.position

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._start_epoch()
        batch = next(self._batches, None)
        if batch is None:
            self.epoch, self.position, self._epoch_generator_state = self.epoch + 1, 0, None
            self._batches = self._start_epoch()
            batch = next(self._batches)
        self.position += 1
        return batch

    def _start_epoch(self) -> Iterator[Batch]:
        if not self.book_order:
            return shuffled_batches(
                self._windows_of_epoch(), self.batch_size, (self.seed, self.epoch), self.position
            )
        now = torch.get_rng_state()
        if self._epoch_generator_state is None:
            self._epoch_generator_state = now
            return book_batches(self.windows, self.batch_size, training=True)
        torch.set_rng_state(self._epoch_generator_state)
        batches = book_batches(self.windows, self.batch_size, training=True)
        for _ in range(self.position):
            next(batches)
        torch.set_rng_state(now)
        return batches

    def _windows_of_epoch(self) -> Windows:
        """The windows. If they are shifted, each epoch after the first cuts them elsewhere: a token is then
        met with another context, and no window can be learnt by heart."""
        if not (self.shift and self.epoch):
            return self.windows
        windows = self.windows
        stream = (self.seed, self.epoch, 2)  # one more number than the order's, and another than evaluations'
        offset = int(np.random.default_rng(stream).integers(windows.stride))
        return Windows(windows.tokens, windows.context_length, windows.stride, offset)

    def state(self) -> tuple[dict[str, int], Tensor | None]:
        """The position of the next batch; in the book's order, the generator's state when its epoch began."""
        return {"epoch": self.epoch, "position": self.position}, self._epoch_generator_state

    def load_state(self, place: dict[str, int], epoch_generator_state: Tensor | None) -> None:
        """The inverse of `state`."""
        self.epoch, self.position = place["epoch"], place["position"]
        self._epoch_generator_state = epoch_generator_state
        self._batches = None


def shuffled_batches(
    windows: Windows, batch_size: int, stream: tuple[int, ...], position: int = 0, drop_last: bool = True
) -> Iterator[Batch]:
    """The batches of one epoch from `position` on, in a random order that the numbers of `stream` decide."""
    order = torch.from_numpy(np.random.default_rng(stream).permutation(len(windows)))
    end = len(windows) // batch_size * batch_size if drop_last else len(windows)
    for start in range(position * batch_size, end, batch_size):
        yield windows.batch(order[start : min(start + batch_size, end)])


def ordered_batches(windows: Windows, batch_size: int) -> Iterator[Batch]:
    """Every window once, in order; the last batch may be smaller."""
    for start in range(0, len(windows), batch_size):
        yield windows.batch(torch.arange(start, min(start + batch_size, len(windows))))


def whole_batches(token_ids: np.ndarray, context_length: int, batch_size: int) -> Iterator[Batch]:
    """Every token (tokens,) but the first once a target: whole windows, and a last batch of what is left."""
    windows = Windows(token_ids, context_length, context_length)
    yield from ordered_batches(windows, batch_size)
    rest = torch.from_numpy(token_ids[len(windows) * context_length :].astype(np.int64))[None]
    if rest.shape[1] > 1:
        yield rest[:, :-1], rest[:, 1:]


def book_batches(windows: Windows, batch_size: int, training: bool) -> Iterator[Batch]:
    """One pass of the book's loaders: shuffled, without a last small batch, for training; else in order.

    Either draws from torch's global generator when it starts.
    """
    return iter(DataLoader(windows, batch_size=batch_size, shuffle=training, drop_last=training))


def cut_windows(
    config: PretrainConfig, tokenizer: tiktoken.Encoding, files: tuple[TokenFile, TokenFile]
) -> tuple[Windows, Windows]:
    """The training and the validation windows of a run.

    Args:
        files: the training and the validation tokens, as `token_files` gives them.

    Raises:
        UserError: a text is too short for one batch of training or one window of validation, has no text
            between ends of text, or holds a token id that the model does not know.
    """
    context = config.model.context_length
    windows = []
    for name, file, at_least in zip(
        ("training", "validation"),
        files,
        (config.data.batch_size * config.training.accumulate, 1),
        strict=True,
    ):
        tokens = file.ids
        if len(tokens) and not file.bytes:
            raise UserError(f"the {name} text is empty: its {len(tokens)} tokens are ends of text alone")
        fits = tokenizer.n_vocab <= config.model.vocab_size or not len(tokens)
        if not fits and (largest := int(tokens.max())) >= config.model.vocab_size:
            raise UserError(
                f"token id {largest} of the {name} text is outside the model: "
                f"model.vocab_size={config.model.vocab_size} must be at least {tokenizer.n_vocab} "
                f"for tokenizer.name={config.tokenizer.name}"
            )
        windows.append(Windows(tokens, context, config.data.stride or context))
        if len(windows[-1]) < at_least:
            raise UserError(
                f"the {name} text is too short: its {len(tokens)} tokens make {len(windows[-1])} windows of "
                f"model.context_length={context}, and {at_least} are needed for one update; give more text, "
                f"or lower model.context_length, data.batch_size or training.accumulate"
            )
    return windows[0], windows[1]
