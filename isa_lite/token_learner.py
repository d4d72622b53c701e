"""From a feature map to a sentence of pseudo-words: the adaptive token learner.

Paper: an attention mechanism selects salient visual patterns; they become a sentence of L
pseudo-words in the word-embedding space of the frozen text encoder. Ours: how, see each class.
`mappings` has the alternatives.

Shapes: B images, C x H x W the light encoder's feature map, L pseudo-words, D word-embedding width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isa_lite.models.attention import attend, wide_mlp


class Sentence(NamedTuple):
    """What a mapping writes about B images, and the weights with which it looked at them."""

    tokens: Tensor  # B x L x D pseudo-words
    maps: Tensor  # B x L x H x W, each summing to 1: the weights of one of its reads
    #: All N reads in order, B x N x L x H x W, means over the heads; None unless asked for.
    reads: Tensor | None = None


class Shapes(NamedTuple):
    """What a mapping reads and writes. Another grid than that of training is interpolated to."""

    channels: int  # C
    grid: tuple[int, int]  # H, W in training
    num_tokens: int  # L
    word_width: int  # D
    word_norm: float | None  # the length of a real word's vector; None: see `ToWords`


class ToWords(nn.Module):
    """The last layer of every mapping: ... x L x width -> ... x L x D. Ours.

    A pseudo-word is a learned vector of its place in the sentence (`start`) plus a linear map of
    what was seen. With a `norm` it is then stretched to that length, times 1/2 to 2 as the token
    itself chooses: otherwise learned tokens grow far beyond what the text tower has met.
    """

    def __init__(self, width: int, word_width: int, norm: float | None, num_tokens: int = 1):
        super().__init__()
        self.start, self.norm = nn.Parameter(torch.zeros(num_tokens, word_width)), norm
        self.direction = nn.Linear(width, word_width)
        if norm is not None:
            self.stretch = nn.Linear(width, 1)
            nn.init.zeros_(self.stretch.weight)
            nn.init.zeros_(self.stretch.bias)

    def forward(self, x: Tensor) -> Tensor:
        words = self.start + self.direction(x)  # ... x L x width -> ... x L x D
        if self.norm is None:
            return words
        return F.normalize(words, dim=-1) * self.norm * 2 ** torch.tanh(self.stretch(x))


class Block(nn.Module):
    """Refinement: tokens look at the feature map, then at one another, then an MLP; pre-norm,
    residual. After Wu et al., AAAI 2022; in ISA, ours.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.cross = nn.MultiheadAttention(width, heads, batch_first=True)
        self.among = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = wide_mlp(width)

    def forward(self, x: Tensor, memory: Tensor, reads: list[Tensor] | None = None) -> Tensor:
        """Tokens B x L x width, positions B x HW x width -> tokens. `reads`, if given, gets one
        more: B x L x HW.
        """
        seen, weights = attend(self.cross, self.norm1(x), memory, weights=reads is not None)
        if reads is not None:
            reads.append(weights)
        return self.think(x + seen)

    def think(self, x: Tensor) -> Tensor:
        """All but the look at the image: B x L x width -> the same shape."""
        y = self.norm2(x)
        x = x + attend(self.among, y, y)[0]
        return x + self.mlp(self.norm3(x))


class Spatial(nn.Module):
    """What the mappings with attention share: a 1x1 projection of the feature map to `width`
    channels, its learned position code, the way to words. Ours.

    A mapping makes what lies between in `build` and uses it in `forward`.
    """

    def __init__(self, shapes: Shapes, width: int = 128, depth: int = 2):
        super().__init__()
        self.project = nn.Conv2d(shapes.channels, width, 1)
        self.position = nn.Parameter(0.02 * torch.randn(1, width, *shapes.grid))
        self.build(shapes.num_tokens, width, depth)
        self.norm = nn.LayerNorm(width)
        self.to_word = ToWords(width, shapes.word_width, shapes.word_norm, shapes.num_tokens)

    def build(self, num_tokens: int, width: int, depth: int) -> None:
        raise NotImplementedError

    def placed(self, features: Tensor) -> Tensor:
        """B x C x H x W -> B x width x H x W."""
        x, position = self.project(features), self.position
        if position.shape[-2:] != x.shape[-2:]:
            position = F.interpolate(position, x.shape[-2:], mode="bilinear")
        return x + position

    def said(self, x: Tensor, maps: Tensor, reads: list[Tensor] | None, grid: tuple) -> Sentence:
        """Tokens B x L x width, maps B x L x HW, N reads of that shape (None: not asked for)."""
        found = None if reads is None else torch.stack(reads, 1).unflatten(-1, grid)
        return Sentence(self.to_word(self.norm(x)), maps.unflatten(-1, grid), found)


class AdaptiveTokenLearner(Spatial):
    """L attention maps pick L visual patterns, blocks refine them, a projection makes them words.

    Paper: the selection by attention. Ours: its form, after the token module of Wu et al., AAAI
    2022, with identities and a position code.

    The image is read 1 + `depth` times: by the maps, which pick, then by each block. `maps` are the
    first read alone, not all that a token sees (`interventions.sentences_changed`).
    """

    def build(self, num_tokens: int, width: int, depth: int) -> None:
        self.attend = nn.Conv2d(width, num_tokens, 1)  # one logit map a token
        # Who a token is. Without it all tokens start alike, see alike and stay alike: the sentence
        # says one word L times.
        self.identity = nn.Parameter(torch.randn(num_tokens, width))
        self.blocks = nn.ModuleList(Block(width, width // 32) for _ in range(depth))

    def forward(self, features: Tensor, reads: bool = False) -> Sentence:
        """B x C x H x W -> a `Sentence`, with all reads if asked for."""
        x = self.placed(features)  # X: B x C x H x W -> B x width x H x W
        maps = self.attend(x).flatten(2).softmax(-1)  # A: B x L x HW, each row sums to 1
        memory = x.flatten(2).transpose(1, 2).contiguous()  # B x HW x width
        tokens = maps @ memory + self.identity  # B x L x width: weighted means, and whose they are
        found = [maps] if reads else None
        for block in self.blocks:
            tokens = block(tokens, memory, found)
        return self.said(tokens, maps, found, x.shape[-2:])  # S: B x L x D
