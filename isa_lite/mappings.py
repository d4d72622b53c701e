"""Two more ways from a feature map to a sentence, both by attention, and the table of all mapping
networks.

What a reviewer of the paper asked for: other mapping networks than one MLP. Their interface is that
of
`token_learner`: feature map B x C x H x W -> `Sentence`, tokens B x L x D and maps B x L x H x W,
and all reads if asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from isa_lite.models.attention import attend
from isa_lite.token_learner import (
    AdaptiveTokenLearner,
    AveragePooling,
    Sentence,
    SingleVector,
    Spatial,
    sentence,
)


class SlotAttention(Spatial):
    """L slots compete for the positions of the feature map, look again `depth` times, and become
    words.

    After Locatello et al. 2020 ("Object-centric learning with slot attention"): the softmax runs
    over the *slots*, so that what one of them takes the others do not get; each then takes the
    weighted mean of what it won, and a GRU and an MLP, the same ones in every round, update it.
    Different from theirs: a slot starts from a learned vector of its own, not from a draw of a
    common Gaussian, so that a token keeps its place in the sentence and nothing is random at query
    time; and nothing is reconstructed. A single slot has no rival, and takes the mean over the
    image.

    The maps are the weights of the last round's means, which is the last of its reads.
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
        x = self.placed(features)
        memory = self.norm_memory(x.flatten(2).transpose(1, 2))  # B x HW x width
        key, value = self.key(memory), self.value(memory)
        slots, found = self.start.repeat(len(x), 1, 1), []  # B x L x width
        for _ in range(self.rounds):
            # B x L x HW
            logits = self.query(self.norm_slots(slots)) @ key.transpose(1, 2) / key.shape[-1] ** 0.5
            won = logits.softmax(1) + 1e-8  # over the slots: every position is shared out
            maps = won / won.sum(-1, keepdim=True)  # B x L x HW, each row sums to 1
            found.append(maps)
            seen = (maps @ value).flatten(0, 1)  # BL x width
            slots = self.update(seen, slots.flatten(0, 1).to(seen.dtype)).unflatten(
                0, slots.shape[:2]
            )
            slots = slots + self.mlp(self.norm_mlp(slots))
        return sentence(
            self.to_word(self.norm(slots)), maps, found if reads else None, x.shape[-2:]
        )


class Resampler(Spatial):
    """L learned latents read the feature map through `depth` blocks of cross-attention and become
    words.

    After the Perceiver (Jaegle et al. 2021) in the form of Flamingo's resampler (Alayrac et al.
    2022): the queries are the latents, keys and values are the positions *and* the latents, so that
    one attention both reads the image and lets the tokens talk. Different from theirs: one image
    and no video, a learned position code for each cell, and few, narrow blocks.

    The maps are the last block's attention, averaged over its heads, to the positions alone and
    scaled to sum to one: what goes to other latents is left out. The reads are the same of every
    block. Raises ValueError for a depth of 0, which would never look at the image.
    """

    def build(self, num_tokens: int, width: int, depth: int) -> None:
        if depth < 1:
            raise ValueError(
                f"a resampler needs a depth of at least 1 to look at the image, not {depth}"
            )
        self.latents = nn.Parameter(torch.randn(num_tokens, width))
        self.norm_memory = nn.LayerNorm(width)
        self.norms = nn.ModuleList(
            nn.ModuleList(nn.LayerNorm(width) for _ in range(2)) for _ in range(depth)
        )
        self.attends = nn.ModuleList(
            nn.MultiheadAttention(width, width // 32, batch_first=True) for _ in range(depth)
        )
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(depth)
        )

    def forward(self, features: Tensor, reads: bool = False) -> Sentence:
        x = self.placed(features)
        memory = self.norm_memory(x.flatten(2).transpose(1, 2))  # B x HW x width
        latents, positions, found = self.latents.repeat(len(x), 1, 1), memory.shape[1], []
        for (norm, norm_mlp), attention, mlp in zip(
            self.norms, self.attends, self.mlps, strict=True
        ):
            query = norm(latents)
            both = torch.cat([memory, query], 1)  # B x (HW + L) x width
            shown = reads or attention is self.attends[-1]
            # weights: B x L x (HW + L), the mean over the heads
            read, weights = attend(attention, query, both, weights=shown)
            latents = latents + read
            latents = latents + mlp(norm_mlp(latents))
            if shown:
                maps = weights[..., :positions]
                maps = maps / maps.sum(-1, keepdim=True)
                found.append(maps)
        return sentence(
            self.to_word(self.norm(latents)), maps, found if reads else None, x.shape[-2:]
        )


#: The mapping networks by the name under which a query encoder asks for one.
MAPPINGS = {
    "adaptive": AdaptiveTokenLearner,
    "single vector": SingleVector,
    "average pooling": AveragePooling,
    "slot attention": SlotAttention,
    "resampler": Resampler,
}
