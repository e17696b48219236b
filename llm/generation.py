"""The decode loop: token ids in, token ids out."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llm.config import SamplingConfig
from llm.model import GPTModel
from llm.sampling import next_token


@torch.no_grad()
def generate(
    model: GPTModel,
    idx: Tensor,
    max_new_tokens: int,
    context_size: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    eos_id: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Go on from prompts idx (batch, time) for up to max_new_tokens: (batch, time + new).

    The book's call and semantics: the model sees the last context_size tokens, temperature 0 takes the
    likeliest token, top_k filters, and generation ends at eos_id, which is not part of the result. A row
    that ends before others is filled with eos_id.

    Draws from `generator`, or from torch's global stream as in the book if there is none.
    """
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    ended = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
    was_training = model.training
    model.eval()
    for _ in range(max_new_tokens):
        features = model.features(idx[:, -context_size:])
        logits = F.linear(features[:, -1], model.head_weight)  # (batch, vocab)
        token = next_token(logits.float(), config, generator)
        if eos_id is not None:
            ended |= token == eos_id
            token = token.masked_fill(ended, eos_id)
            if ended.all():
                break
        idx = torch.cat((idx, token.unsqueeze(-1)), dim=1)
    model.train(was_training)
    return idx


def sample_generator(seed: int, index: int, device: torch.device) -> torch.Generator:
    """The random stream of sample `index`: its own, whatever else is sampled."""
    state = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) >> 1)  # a seed is a signed 64-bit integer
