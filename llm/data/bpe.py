"""A tokenizer learnt from the text: byte-level BPE (Sennrich et al. 2016, on bytes as in GPT-2).

The library `tokenizers` counts words and chooses the merges. The result is a tiktoken encoding like any
other, stored in files that transformers can read too.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from queue import Queue
from threading import Event, Thread

import regex
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from llm.config import DataConfig, TokenizerConfig
from llm.data.byte_level import BYTE_OF, END_OF_TEXT, as_files, merge_of
from llm.data.cache import made_once, read_record, write_record
from llm.data.corpus import Split, find_splits
from llm.data.pieces import Rules, cut
from llm.data.shards import folder_tokenizer
from llm.data.tokenizer import LEARNT, load_tokenizer
from llm.data.tokenizer_files import FileEncoding, from_files
from llm.files import as_json, cache_folder
from llm.progress import Progress, format_count, format_seconds

log = logging.getLogger(__name__)

METHOD = 1  # increase it whenever the same text would give another tokenizer

# A longer text is sampled: evenly spread pieces of this many characters in all are learnt from. Memory grows
# with the number of different words; 32 MB of random words take 3 GB.
SAMPLED_CHARACTERS = 1 << 25
BLOCK_CHARACTERS = 1 << 16  # so that a text is cut into the same pieces however its files are read

LEAST_COUNT = 2  # a pair that occurs once is no pattern
SPARE = 64  # extra merges to ask for, as some may not be usable

GPT2 = Rules(regex.compile(r50k_pat_str), regex.compile(regex.escape(END_OF_TEXT)))  # GPT-2's tokenizer

# GPT-2's pattern, except that words are cut after 256 characters: for each merge, the learner goes through
# all of every word that has it, and a word may be as long as the text.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}{1,256}| ?\p{N}{1,256}| ?[^\s\p{L}\p{N}]{1,256}|\s{1,256}(?!\S)|\s"


def find_tokenizer(
    config: TokenizerConfig, data: DataConfig, splits: tuple[Split, Split] | None = None
) -> tuple[tiktoken.Encoding, tuple[Split, Split] | None]:
    """The tokenizer of a run, loaded by its name or learnt from the training split; and the splits of the
    text, or None for shards, which hold tokens only.

    Args:
        splits: the splits of the text, if they have been found already.

    Raises:
        UserError: see `load_tokenizer`, `find_splits` and `learn`.
    """
    if data.source == "shards":
        return folder_tokenizer(data, config), None
    if config.name != LEARNT or config.vocab_size is None:
        return load_tokenizer(config.name), splits or find_splits(data)
    splits = splits or find_splits(data)
    return learnt_tokenizer(splits[0], config.vocab_size, cache_folder(data.cache_dir)), splits


def learnt_tokenizer(training: Split, vocab_size: int, cache: Path) -> FileEncoding:
    """The tokenizer learnt from a training split, with at most `vocab_size` tokens; cached.

    Raises:
        UserError: see `learn`.
    """
    about = (METHOD, WORDS, r50k_pat_str, SAMPLED_CHARACTERS, training.sha256, vocab_size)
    fingerprint = hashlib.sha256(repr(about).encode()).hexdigest()[:32]
    path = cache / "tokenizers" / f"{fingerprint}.json"

    def read() -> FileEncoding | None:
        if (record := read_record(path, fingerprint)) is None:
            return None
        return from_files({name: text.encode() for name, text in record["files"].items()}, path)

    def make() -> None:
        files = as_files(learn(training, vocab_size))
        write_record(path, fingerprint, {"files": {name: as_json(value) for name, value in files.items()}})

    return made_once(path, read, make, doing="learning a tokenizer")


def learn(training: Split, vocab_size: int) -> tiktoken.Encoding:
    """Learn byte-level BPE with GPT-2's pattern: ids for the 256 bytes, then for the most frequent pairs,
    merged one after the other, and last for the end of text. A small text may give fewer than `vocab_size`
    ids. The same text gives the same tokens, however it is read.

    Raises:
        UserError: the text cannot be read.
    """
    begin, characters = time.perf_counter(), training.end - training.start
    if characters > SAMPLED_CHARACTERS:
        log.info(
            "learning a tokenizer from %s of the %s characters of the training text, evenly spread",
            format_count(SAMPLED_CHARACTERS),
            format_count(characters),
        )
    wanted = vocab_size - 1  # without the end of text
    asked = wanted + SPARE
    while len(ranks := usable(tokens := _merged(training, asked), wanted)) < wanted:
        if len({*tokens}) < asked - 256:  # the text has no more
            break
        asked += wanted
    log.info(
        "learnt a tokenizer of %s tokens from the training text in %s%s",
        f"{len(ranks) + 1:,}",
        format_seconds(time.perf_counter() - begin),
        "" if len(ranks) == wanted else ": nothing else in it occurs twice",
    )
    return _encoding(ranks)


def usable(tokens: Iterable[bytes], most: int) -> dict[bytes, int]:
    """Ranks for the 256 bytes and the learnt tokens, at most `most` of them.

    A token is omitted if it is there already, or if the merges before it leave more than two pieces of it,
    because tiktoken would then merge it differently than `tokenizers`. Such tokens are sometimes learnt from
    runs of one letter.
    """
    ranks = {bytes([byte]): byte for byte in range(256)}
    for token in tokens:
        if len(ranks) == most:
            break
        if token not in ranks and len(merge_of(token, len(ranks), ranks)) == 2:
            ranks[token] = len(ranks)
    return ranks


def _encoding(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        LEARNT, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
    )


def sample(training: Split) -> Iterator[tuple[int, list[str]]]:
    """The text to learn from: all of it, or evenly spread pieces if it is long. Pieces end where GPT-2's
    pattern divides the text anyway. Yields the number of characters up to a piece's end, and the piece, split
    at ends of text; an empty list for pieces that are skipped."""
    length, done = max(1, training.end - training.start), 0
    taken = min(length, SAMPLED_CHARACTERS)
    for number, piece in enumerate(cut(_blocks(training.pieces()), GPT2)):
        done += len(piece.text)
        yield done, piece.text.split(END_OF_TEXT) if number * taken % length < taken else []


def _blocks(pieces: Iterable[str]) -> Iterator[str]:
    """The same text in blocks of equal size, so that it is cut in the same way however it is read."""
    text = ""
    for piece in pieces:
        text += piece
        end = len(text) - len(text) % BLOCK_CHARACTERS
        for start in range(0, end, BLOCK_CHARACTERS):
            yield text[start : start + BLOCK_CHARACTERS]
        text = text[end:]
    yield text


def _merged(training: Split, vocab_size: int) -> list[bytes]:
    """The tokens that the library merges, in order, until bytes and merges are `vocab_size` tokens, or no
    pair is left.

    The library runs in a thread of its own and takes texts from this one, which can meanwhile handle signals
    and raise errors.
    """
    texts: Queue[list[str] | None] = Queue(maxsize=64)
    done: Queue[list[bytes] | Exception] = Queue()
    stopped = Event()
    Thread(target=_learner, args=(texts, vocab_size, done, stopped), daemon=True).start()
    progress, length = Progress("learning a tokenizer"), max(1, training.end - training.start)
    try:
        for characters, some in sample(training):
            texts.put(some)
            progress.update(characters / length, f"{format_count(characters)} characters")
        texts.put(None)
        while done.empty():
            progress.update(None, "merging")
            time.sleep(0.02)
    except BaseException:
        stopped.set()
        texts.put(None)
        raise
    finally:
        progress.clear()
    result = done.get()
    if isinstance(result, Exception):
        raise result
    return result


def _learner(
    texts: "Queue[list[str] | None]", vocab_size: int, done: "Queue[list[bytes] | Exception]", stopped: Event
) -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    source = iter(texts.get, None)

    def until_the_end() -> Iterator[str]:
        for some in source:
            yield from some
        if stopped.is_set():
            raise InterruptedError  # so that the library merges nothing

    try:
        tokenizer = Tokenizer(models.BPE())
        words = pre_tokenizers.Split(Regex(WORDS), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=LEAST_COUNT,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(until_the_end(), trainer)
        merges = json.loads(tokenizer.to_str())["model"]["merges"]
        done.put([bytes(BYTE_OF[letter] for letter in "".join(pair)) for pair in merges])
    except Exception as error:
        done.put(error)
        for _ in source:  # or the other thread would wait for room in the queue
            pass
