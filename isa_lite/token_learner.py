"""From a feature map to a sentence of pseudo-words: the adaptive token learner and simpler
alternatives.

Every module here maps a light encoder's feature map, B x C x H x W, to a `Sentence`: L vectors in
the word-embedding space of the frozen text tower, and the attention maps behind them. They differ
in nothing else, so a comparison of them is a comparison of the mapping alone. `mappings` has two
more, and the table of all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isa_lite.models.attention import attend


class Sentence(NamedTuple):
    """What a mapping writes about B images, and the weights with which it looked at them.

    tokens: B x L x D pseudo-words. maps: B x L x H x W, each summing to one over the image: the
    weights of one of its reads.
    reads: those of all N of them, in order, B x N x L x H x W, means over the heads. Only a forward
    pass that is asked for them (`reads=True`) computes them: training does not pay for what it does
    not use. None otherwise.
    """

    tokens: Tensor
    maps: Tensor
    reads: Tensor | None = None


class ToWords(nn.Module):
    """The last layer of every mapping: ... x L x width -> ... x L x word_width, the pseudo-words.

    Each is the sum of a learned vector of its place in the sentence (`start`) and a linear map of
    what was seen. With a `norm` it is then normalised and stretched to that length, times a factor
    between 1/2 and 2 that the token itself
    chooses: without this, learned tokens grow far beyond anything that the text tower has met.
    Ours.
    """

    def __init__(self, width: int, word_width: int, norm: float | None, num_tokens: int = 1):
        super().__init__()
        self.start, self.norm = nn.Parameter(torch.zeros(num_tokens, word_width)), norm
        self.direction = nn.Linear(width, word_width)
        if norm is not None:
            self.stretch = nn.Linear(width, 1)
            nn.init.zeros_(self.stretch.weight), nn.init.zeros_(self.stretch.bias)

    @torch.no_grad()
    def start_from(self, words: Tensor, seen: float = 0.3) -> None:
        """Let the untrained sentence be these words, N x word_width, over and over: token l begins
        as word l modulo N.

        What is seen then moves a token by about `seen` times the words' mean length, until training
        says otherwise. The idea of a prompt that starts from words is CoOp's (Zhou et al., IJCV
        2022); that a sentence about an image may, ours.
        """
        self.start.copy_(words[torch.arange(len(self.start)) % len(words)])
        # Most mappings end in a layer norm: vectors of length sqrt(width). Where they are shorter,
        # training soon makes up for it.
        width = self.direction.in_features
        nn.init.normal_(
            self.direction.weight,
            std=seen * float(words.norm(dim=-1).mean()) / (words.shape[-1] * width) ** 0.5,
        )
        nn.init.zeros_(self.direction.bias)

    def forward(self, x: Tensor) -> Tensor:
        words = self.start + self.direction(x)
        return (
            words
            if self.norm is None
            else F.normalize(words, dim=-1) * self.norm * 2 ** torch.tanh(self.stretch(x))
        )


class Block(nn.Module):
    """Refinement: tokens look at the feature map, then at one another, then an MLP; pre-norm,
    residual.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.cross = nn.MultiheadAttention(width, heads, batch_first=True)
        self.among = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, memory: Tensor, reads: list[Tensor] | None = None) -> Tensor:
        """x: B x L x width tokens, memory: B x HW x width positions. `reads`, if given, gets one
        more: B x L x HW.
        """
        seen, weights = attend(self.cross, self.norm1(x), memory, weights=reads is not None)
        if reads is not None:
            reads.append(weights)  # the mean over the heads
        return self.think(x + seen)

    def think(self, x: Tensor) -> Tensor:
        """All but the look at the image: B x L x width -> the same shape."""
        y = self.norm2(x)
        x = x + attend(self.among, y, y)[0]
        return x + self.mlp(self.norm3(x))


class Spatial(nn.Module):
    """What the mappings with attention share: a 1x1 projection of the feature map, its learned
    position code, the way to words.

    channels: C of the feature map; grid: its (H, W) in training, other sizes interpolate the
    position code; num_tokens: L;
    word_width and norm: width and typical length of real word vectors (norm None: see `ToWords`).
    What lies between, of `width` and `depth`, is made by `build` and used by `forward`, which a
    mapping defines.
    """

    def __init__(
        self,
        channels: int,
        grid: tuple[int, int],
        num_tokens: int,
        word_width: int,
        norm: float | None,
        width: int = 128,
        depth: int = 2,
    ):
        super().__init__()
        self.project = nn.Conv2d(channels, width, 1)
        self.position = nn.Parameter(0.02 * torch.randn(1, width, *grid))
        self.build(num_tokens, width, depth)
        self.norm, self.to_word = nn.LayerNorm(width), ToWords(width, word_width, norm, num_tokens)

    def build(self, num_tokens: int, width: int, depth: int) -> None:
        raise NotImplementedError

    def placed(self, features: Tensor) -> Tensor:
        """B x C x H x W -> B x width x H x W."""
        x, position = self.project(features), self.position
        if position.shape[-2:] != x.shape[-2:]:
            position = F.interpolate(position, x.shape[-2:], mode="bilinear")
        return x + position


def sentence(
    tokens: Tensor, maps: Tensor, reads: list[Tensor] | None, grid: tuple[int, int]
) -> Sentence:
    """A `Sentence` of tokens B x L x D, maps B x L x HW, and reads of that shape, N of them (None:
    not asked for).
    """
    return Sentence(
        tokens,
        maps.unflatten(-1, grid),
        None if reads is None else torch.stack(reads, 1).unflatten(-1, grid),
    )


class AdaptiveTokenLearner(Spatial):
    """L spatial attention maps pick L visual patterns; blocks refine them; a projection makes them
    words.

    So the image is read 1 + `depth` times: first by the maps, which pick, then by the
    cross-attention of each block. `maps` are the weights of the first read alone. They are not all
    that a token sees (`interventions.sentences_changed`).

    After the paper's description (adaptive selection of salient visual patterns by attention) and
    the token module of Wu et al., AAAI 2022; the sizes and the position code are ours.
    """

    def build(self, num_tokens: int, width: int, depth: int) -> None:
        self.attend = nn.Conv2d(width, num_tokens, 1)  # one logit map a token
        # Who a token is. Without it all tokens start alike, see alike and stay alike: the sentence
        # says one word L times.
        self.identity = nn.Parameter(torch.randn(num_tokens, width))
        self.blocks = nn.ModuleList(Block(width, width // 32) for _ in range(depth))

    def forward(self, features: Tensor, reads: bool = False) -> Sentence:
        x = self.placed(features)  # B x C x H x W -> B x width x H x W
        maps = self.attend(x).flatten(2).softmax(-1)  # B x L x HW, each row sums to 1
        memory = x.flatten(2).transpose(1, 2).contiguous()  # B x HW x width
        # B x L x width: weighted means of positions, and whose they are
        tokens = maps @ memory + self.identity
        found = [maps] if reads else None
        for block in self.blocks:
            tokens = block(tokens, memory, found)
        return sentence(self.to_word(self.norm(tokens)), maps, found, x.shape[-2:])


class _Pooled(nn.Module):
    """What the two alternatives share: the mean over the image, so that every map is uniform, and
    the only read.
    """

    def __init__(self, num_tokens: int):
        super().__init__()
        self.num_tokens = num_tokens

    def tokens(self, pooled: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, features: Tensor, reads: bool = False) -> Sentence:
        batch, _, height, width = features.shape
        uniform = features.new_full((batch, self.num_tokens, height, width), 1 / (height * width))
        tokens = self.tokens(features.mean((2, 3)))  # B x C x H x W -> B x C -> B x L x D
        return Sentence(tokens, uniform, uniform.unsqueeze(1) if reads else None)


class SingleVector(_Pooled):
    """One pseudo-word from the pooled features by an MLP: the mapping network of the paper's
    ablation.

    It has one token, whatever num_tokens says. Width and depth are ours; they give it two thirds of
    the weights that the adaptive token learner has with the same words.
    """

    def __init__(
        self,
        channels: int,
        grid,
        num_tokens: int,
        word_width: int,
        norm: float | None,
        width: int = 512,
        depth: int = 2,
    ):
        super().__init__(1)
        layers: list[nn.Module] = [nn.Linear(channels, width), nn.GELU()]
        for _ in range(depth - 1):
            layers += [nn.Linear(width, width), nn.GELU()]
        self.mlp, self.to_word = nn.Sequential(*layers), ToWords(width, word_width, norm)

    def tokens(self, pooled: Tensor) -> Tensor:
        return self.to_word(self.mlp(pooled).unsqueeze(1))


class AveragePooling(_Pooled):
    """L pseudo-words from the pooled features, a linear map each: many words, but no attention.
    Ours.
    """

    def __init__(
        self,
        channels: int,
        grid,
        num_tokens: int,
        word_width: int,
        norm: float | None,
        width: int = 128,
        depth: int = 1,
    ):
        super().__init__(num_tokens)
        self.spread, self.to_word = (
            nn.Linear(channels, num_tokens * width),
            ToWords(width, word_width, norm, num_tokens),
        )

    def tokens(self, pooled: Tensor) -> Tensor:
        return self.to_word(F.gelu(self.spread(pooled)).unflatten(1, (self.num_tokens, -1)))
