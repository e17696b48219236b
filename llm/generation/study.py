"""Metrics over many samples, by which sampling settings can be compared."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

import tiktoken
import torch

from llm.data.tokenizer import token_ids_to_text
from llm.generation.copying import NgramIndex, copied_runs, copied_share, longest_run
from llm.generation.texts import Sample

REPEATED_NGRAM = 4  # tokens, as in the repetition rate of Welleck et al. 2020 (seq-rep-4)


def sample_metrics(samples: list[Sample]) -> dict[str, float | None]:
    """Metrics over all new tokens of the samples; a metric is None if no sample is long enough for it.

    Log probabilities and entropies are in nats per token. `distinct_n` is the share of distinct n-grams
    among all (Li et al. 2016). It falls as samples grow in number and length, so compare it only between
    settings with equally many samples of equal length.
    """
    log_probability = _mean(list(chain.from_iterable(sample.log_probabilities for sample in samples)))
    token_ids = [sample.token_ids for sample in samples]
    return {
        "log_probability": log_probability,
        "perplexity": None if log_probability is None else math.exp(-log_probability),
        "entropy": _mean(list(chain.from_iterable(sample.entropies for sample in samples))),
        **{f"distinct_{n}": distinct_share(token_ids, n) for n in (1, 2, 3)},
        "repetition": repeated_share(token_ids, REPEATED_NGRAM),
        "length": _mean([len(ids) for ids in token_ids]),
    }


def distinct_share(samples: list[list[int]], n: int) -> float | None:
    """Distinct n-grams over all n-grams, pooled over the samples; None if there are none."""
    ngrams = [ngram for sample in samples for ngram in _ngrams(sample, n)]
    return len(set(ngrams)) / len(ngrams) if ngrams else None


def repeated_share(samples: list[list[int]], n: int) -> float | None:
    """The share of n-grams that occurred earlier in their own sample; None if there are none."""
    counts = [Counter(_ngrams(sample, n)) for sample in samples]
    total = sum(count.total() for count in counts)
    return 1 - sum(map(len, counts)) / total if total else None


def copying_of(sample: Sample, index: NgramIndex, tokenizer: tiktoken.Encoding) -> dict[str, Any]:
    """How much of a sample is copied word for word from the training text.

    `copied` is the share of its new tokens that lie in copied runs of at least the index's n tokens;
    `longest_copy` is the length of the longest run, found in the training split at `longest_copy_token`.
    """
    runs = copied_runs(index, sample.token_ids)
    longest = longest_run(runs)
    copied = {"copied": copied_share(runs, len(sample.token_ids))}
    if longest is None:
        return {**copied, "longest_copy": 0, "longest_copy_token": None, "longest_copy_text": None}
    words = sample.token_ids[longest.start : longest.start + longest.length]
    return {
        **copied,
        "longest_copy": longest.length,
        "longest_copy_token": longest.position,
        "longest_copy_text": token_ids_to_text(torch.tensor(words), tokenizer),
    }


def copying_metrics(samples: list[Sample], copying: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of `copying_of` over all samples, given those of each."""
    lengths = [len(sample.token_ids) for sample in samples]
    copied = sum(each["copied"] * length for each, length in zip(copying, lengths, strict=True))
    longest = max(copying, key=lambda each: each["longest_copy"])
    return {**longest, "copied": copied / sum(lengths) if any(lengths) else None}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _ngrams(token_ids: list[int], n: int) -> list[tuple[int, ...]]:
    return list(zip(*(token_ids[offset:] for offset in range(n)), strict=False))
