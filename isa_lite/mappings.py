"""Other ways from a feature map to a sentence, and the table of all of them. Shapes are those of
`token_learner`.

Paper: a single vector, in its ablation. Ours: the others, which a reviewer of the paper asked for.
They differ from the adaptive token learner in nothing but the mapping.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isa_lite.models.attention import attend, wide_mlp
from isa_lite.token_learner import AdaptiveTokenLearner, Sentence, Shapes, Spatial, ToWords


def pooled(words: Tensor, features: Tensor, reads: bool) -> Sentence:
    """The sentence B x L x D of a mean over the map B x C x H x W, which is its only read."""
    batch, _, height, width = features.shape
    uniform = features.new_full((batch, words.shape[1], height, width), 1 / (height * width))
    return Sentence(words, uniform, uniform.unsqueeze(1) if reads else None)


class SingleVector(nn.Module):
    """One pseudo-word from the pooled features by an MLP, whatever num_tokens says.

    Paper: the ablation's mapping network. Ours: its sizes; with the same words it has two thirds of
    the weights of the adaptive token learner.
    """

    def __init__(self, shapes: Shapes, width: int = 512, depth: int = 2):
        super().__init__()
        sizes = pairwise([shapes.channels] + [width] * max(1, depth))
        layers = [layer for size in sizes for layer in (nn.Linear(*size), nn.GELU())]
        self.mlp = nn.Sequential(*layers)
        self.to_word = ToWords(width, shapes.word_width, shapes.word_norm)

    def forward(self, features: Tensor, reads: bool = False) -> Sentence:
        x = self.mlp(features.mean((2, 3)))  # B x C x H x W -> B x C -> B x width
        return pooled(self.to_word(x.unsqueeze(1)), features, reads)  # B x 1 x D


class AveragePooling(nn.Module):
    """L pseudo-words from the pooled features, a linear map each; no attention. Ours."""

    def __init__(self, shapes: Shapes, width: int = 128, depth: int = 1):
        super().__init__()
        self.spread = nn.Linear(shapes.channels, shapes.num_tokens * width)
        self.to_word = ToWords(width, shapes.word_width, shapes.word_norm, shapes.num_tokens)

    def forward(self, features: Tensor, reads: bool = False) -> Sentence:
        x = F.gelu(self.spread(features.mean((2, 3))))  # B x C x H x W -> B x C -> B x (L width)
        x = x.unflatten(1, (len(self.to_word.start), -1))  # B x L x width
        return pooled(self.to_word(x), features, reads)


class SlotAttention(Spatial):
    """L slots compete for the positions of the feature map, look again `depth` times, and become
    words. Ours.

    After Locatello et al. 2020 ("Object-centric learning with slot attention"): the softmax runs
    over the *slots*, so that what one takes the others do not get. Different from theirs: a slot
    starts from a learned vector of its own, so that a token keeps its place in the sentence and
    nothing is random at query time; and nothing is reconstructed. A single slot takes the mean over
    the image. The maps are the last round's weights.
    """

    def build(self, num_tokens: int, width: int, depth: int) -> None:
        self.rounds = 1 + depth  # 3 by default, as in their paper
        self.start = nn.Parameter(torch.randn(num_tokens, width))
        self.norm_memory, self.norm_slots, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.update = nn.GRUCell(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )

    def forward(self, features: Tensor, reads: bool = False) -> Sentence:
        x = self.placed(features)  # B x width x H x W
        memory = self.norm_memory(x.flatten(2).transpose(1, 2))  # B x HW x width
        key, value = self.key(memory), self.value(memory)
        slots, found = self.start.repeat(len(x), 1, 1), []  # B x L x width
        for _ in range(self.rounds):
            query = self.query(self.norm_slots(slots))
            logits = query @ key.transpose(1, 2) / key.shape[-1] ** 0.5  # B x L x HW
            won = logits.softmax(1) + 1e-8  # over the slots: every position is shared out
            maps = won / won.sum(-1, keepdim=True)  # B x L x HW, each row sums to 1
            found.append(maps)
            seen = (maps @ value).flatten(0, 1)  # BL x width
            updated = self.update(seen, slots.flatten(0, 1).to(seen.dtype))  # BL x width
            slots = updated.unflatten(0, slots.shape[:2])  # B x L x width
            slots = slots + self.mlp(self.norm_mlp(slots))
        return self.said(slots, maps, found if reads else None, x.shape[-2:])


class Resampler(Spatial):
    """L learned latents read the feature map through `depth` blocks of cross-attention and become
    words. Ours.

    After the Perceiver (Jaegle et al. 2021) in the form of Flamingo's resampler (Alayrac et al.
    2022): keys and values are the positions *and* the latents, so that one attention both reads the
    image and lets the tokens talk. Different from theirs: one image, a learned position code, and
    few, narrow blocks. The maps are the last block's attention to the positions, its mean over the
    heads, scaled to sum to one. Raises ValueError for a depth of 0, which would never look.
    """

    def build(self, num_tokens: int, width: int, depth: int) -> None:
        if depth < 1:
            raise ValueError(f"a resampler needs a depth of at least 1 to look, not {depth}")
        self.latents = nn.Parameter(torch.randn(num_tokens, width))
        self.norm_memory = nn.LayerNorm(width)
        self.norms = nn.ModuleList(
            nn.ModuleList(nn.LayerNorm(width) for _ in range(2)) for _ in range(depth)
        )
        self.attends = nn.ModuleList(
            nn.MultiheadAttention(width, width // 32, batch_first=True) for _ in range(depth)
        )
        self.mlps = nn.ModuleList(wide_mlp(width) for _ in range(depth))

    def forward(self, features: Tensor, reads: bool = False) -> Sentence:
        x = self.placed(features)  # B x width x H x W
        memory = self.norm_memory(x.flatten(2).transpose(1, 2))  # B x HW x width
        latents, found = self.latents.repeat(len(x), 1, 1), []  # B x L x width
        for (norm, norm_mlp), layer, mlp in zip(self.norms, self.attends, self.mlps, strict=True):
            query = norm(latents)
            both = torch.cat([memory, query], 1)  # B x (HW + L) x width
            shown = reads or layer is self.attends[-1]
            read, weights = attend(layer, query, both, weights=shown)  # weights: B x L x (HW + L)
            latents = latents + read
            latents = latents + mlp(norm_mlp(latents))
            if shown:
                maps = weights[..., : memory.shape[1]]  # B x L x HW
                found.append(maps / maps.sum(-1, keepdim=True))
        return self.said(latents, found[-1], found if reads else None, x.shape[-2:])


#: The mapping networks by the name under which a query encoder asks for one. A class of your own
#: may be put in, or be named as FILE.py:NAME. It is made with `Shapes` and, with defaults, width
#: and depth; its `forward` is that of the others, and its `to_word` a `ToWords`.
MAPPINGS: dict[str, type[nn.Module]] = {
    "adaptive": AdaptiveTokenLearner,
    "single vector": SingleVector,
    "average pooling": AveragePooling,
    "slot attention": SlotAttention,
    "resampler": Resampler,
}
