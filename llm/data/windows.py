"""From tokens to windows to batches, in an order that can be resumed."""

import logging
from collections.abc import Iterator

import numpy as np
import tiktoken
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from llm.config import DataConfig, PretrainConfig
from llm.data.cutting import AnyWindows, Batch, DocumentWindows, Windows, shifted
from llm.data.mixture import Mixture
from llm.data.permutation import Permutation
from llm.data.shards import folders_of, open_folder, sharded
from llm.data.tokens import ShardedTokens, TokenFile
from llm.errors import UserError

log = logging.getLogger(__name__)


class TrainingBatches:
    """Endless batches of a training split, epoch after epoch, that can start at any position.

    The shuffled order depends only on (seed, epoch, position). The book's order is that of torch's
    DataLoader, which draws from the global generator at the start of each epoch; the generator's state at
    that time is kept, so that a run can resume inside an epoch.
    """

    def __init__(self, windows: AnyWindows | Mixture, config: DataConfig, seed: int) -> None:
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
        if isinstance(self.windows, Mixture):
            return self.windows.batches(self.epoch, self.position, self.batch_size)
        if not self.book_order:
            return shuffled_batches(
                self._windows_of_epoch(self.windows), self.batch_size, (self.seed, self.epoch), self.position
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

    def _windows_of_epoch(self, windows: AnyWindows) -> AnyWindows:
        """The windows of this epoch. With `data.shift_windows` each epoch after the first cuts them at
        another offset, so that tokens have other contexts and no window can be memorised."""
        stream = (self.seed, self.epoch, 2)  # longer than the order's stream, and different from evaluations'
        return shifted(windows, stream) if self.shift and self.epoch else windows

    def state(self) -> tuple[dict[str, int], Tensor | None]:
        """The position of the next batch; in the book's order, the generator's state when its epoch began."""
        return {"epoch": self.epoch, "position": self.position}, self._epoch_generator_state

    def load_state(self, place: dict[str, int], epoch_generator_state: Tensor | None) -> None:
        """The inverse of `state`."""
        self.epoch, self.position = place["epoch"], place["position"]
        self._epoch_generator_state = epoch_generator_state
        self._batches = None


def shuffled_batches(
    windows: AnyWindows | Mixture,
    batch_size: int,
    stream: tuple[int, ...],
    position: int = 0,
    drop_last: bool = True,
) -> Iterator[Batch]:
    """The batches of one epoch from `position` on, in a random order that `stream` seeds."""
    order = random_order(windows, stream)
    end = len(windows) // batch_size * batch_size if drop_last else len(windows)
    for start in range(position * batch_size, end, batch_size):
        yield windows.batch(torch.from_numpy(order[start : min(start + batch_size, end)]))


def random_order(windows: AnyWindows | Mixture, stream: tuple[int, ...]) -> np.ndarray | Permutation:
    """A random order of windows, seeded by `stream`. For shards, which may have too many windows for memory,
    it is computed on demand."""
    if isinstance(windows, Windows) and isinstance(windows.tokens, np.ndarray):
        return np.random.default_rng(stream).permutation(len(windows))
    return Permutation(len(windows), stream)


def ordered_batches(windows: AnyWindows | Mixture, batch_size: int) -> Iterator[Batch]:
    """Every window once, in order; the last batch may be smaller."""
    for start in range(0, len(windows), batch_size):
        yield windows.batch(torch.arange(start, min(start + batch_size, len(windows))))


def whole_batches(token_ids: np.ndarray, context_length: int, batch_size: int) -> Iterator[Batch]:
    """Batches in which every token (tokens,) except the first is a target once: whole windows, and a last
    batch with the rest."""
    windows = Windows(token_ids, context_length, context_length)
    yield from ordered_batches(windows, batch_size)
    rest = torch.from_numpy(token_ids[len(windows) * context_length :].astype(np.int64))[None]
    if rest.shape[1] > 1:
        yield rest[:, :-1], rest[:, 1:]


def book_batches(windows: AnyWindows | Mixture, batch_size: int, training: bool) -> Iterator[Batch]:
    """One pass of the book's data loaders: for training, shuffled and without a last small batch; else in
    order.

    Both draw from torch's global generator when they start.
    """
    return iter(DataLoader(windows, batch_size=batch_size, shuffle=training, drop_last=training))


def cut_windows(
    config: PretrainConfig, tokenizer: tiktoken.Encoding, files: tuple[TokenFile, TokenFile]
) -> tuple[AnyWindows | Mixture, AnyWindows]:
    """The training and the validation windows of a run.

    Args:
        files: the training and the validation tokens, as `token_files` gives them.

    Raises:
        UserError: a text is too short for one training update or one validation window, has no text between
            ends of text, or holds a token id that the model does not know.
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
        if len(tokens) and file.bytes == 0:
            raise UserError(f"the {name} text is empty: its {len(tokens)} tokens are ends of text alone")
        fits = tokenizer.n_vocab <= config.model.vocab_size or not len(tokens)
        if not fits and (largest := _largest(tokens, tokenizer)) >= config.model.vocab_size:
            raise UserError(
                f"token id {largest} of the {name} text is outside the model: "
                f"model.vocab_size={config.model.vocab_size} must be at least {tokenizer.n_vocab} "
                f"for tokenizer.name={config.tokenizer.name}"
            )
        windows.append(_windows(config, tokens))
        if len(windows[-1]) < at_least:
            raise UserError(
                f"the {name} text is too short: its {len(tokens)} tokens make {len(windows[-1])} windows of "
                f"model.context_length={context}, and {at_least} are needed for one update; give more text, "
                f"or lower model.context_length, data.batch_size or training.accumulate"
            )
    return _shuffled(config, tokenizer, windows[0]), windows[1]


def _largest(tokens: np.ndarray | ShardedTokens, tokenizer: tiktoken.Encoding) -> int:
    """The largest id; for shards, whose tokens would take long to read, the tokenizer's largest."""
    return tokenizer.n_vocab - 1 if isinstance(tokens, ShardedTokens) else int(tokens.max())


def _windows(config: PretrainConfig, tokens: np.ndarray | ShardedTokens) -> AnyWindows:
    context = config.model.context_length
    if isinstance(tokens, ShardedTokens) and not config.data.cross_documents:
        within = DocumentWindows(tokens, context, config.data.stride or context)
        if within.covered < len(tokens):
            skipped = 1 - within.covered / len(tokens)
            log.info("documents shorter than a window are skipped: %.1f%% of the tokens", 100 * skipped)
        return within
    return Windows(tokens, context, config.data.stride or context)


def _shuffled(
    config: PretrainConfig, tokenizer: tiktoken.Encoding, windows: AnyWindows
) -> AnyWindows | Mixture:
    """The training windows, as a `Mixture` if they are shards' in random order.

    Raises:
        UserError: a folder of a mixture has no window.
    """
    data = config.data
    if data.source != "shards" or data.order == "book":
        return windows
    sources, weights = [windows], [1.0]
    if data.mixture:
        folders = folders_of(data)
        sources = [_windows(config, sharded(open_folder(folder, tokenizer)[0])) for folder in folders]
        weights = [folder.weight for folder in folders]
        for source, folder in zip(sources, folders, strict=True):
            if not len(source):
                raise UserError(
                    f"data.mixture: {folder.path} is too short for a window of "
                    f"model.context_length={config.model.context_length}: leave it out"
                )
    return Mixture(windows.tokens, sources, weights, config.seed, data.shift_windows)
