"""A sentence that starts from words: before training, its pseudo-words are those of a text.

That a prompt starts from words is CoOp's idea (Zhou et al., IJCV 2022); that a sentence about an
image may, ours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from isa_lite.models.vl_model import VLModel


def start_vectors(vl: VLModel, start_words: str) -> Tensor:
    """The word vectors of a text, N x D, on the CPU. Raises ValueError where `vl` has never seen
    one of its tokens.
    """
    ids = torch.tensor(vl.words.ids(start_words), device=vl.device)
    words = vl.word_vectors(ids).detach().float().cpu()
    if unknown := int((words.norm(dim=1) == 0).sum()):
        raise ValueError(
            f"start_words: {vl.name} has never seen {unknown} of the tokens of {start_words!r}"
        )
    return words


@torch.no_grad()
def start_from(to_word: nn.Module, words: Tensor, seen: float = 0.3) -> None:
    """Let the untrained sentence of a `ToWords` be these words, N x D, over and over: token l
    begins as word l modulo N. What is seen first moves it by about `seen` times the words' mean
    length.
    """
    to_word.start.copy_(words[torch.arange(len(to_word.start)) % len(words)])
    # most mappings end in a layer norm: vectors of length sqrt(width)
    width, length = to_word.direction.in_features, float(words.norm(dim=-1).mean())
    std = seen * length / (words.shape[1] * width) ** 0.5
    nn.init.normal_(to_word.direction.weight, std=std)
    nn.init.zeros_(to_word.direction.bias)
