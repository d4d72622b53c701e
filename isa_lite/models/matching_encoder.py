"""The matching encoder that comes with our small VL model: does this text belong to this image?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from isa_lite.models.attention import attend


class MatchingEncoder(nn.Module):
    """Does this text belong to this image? Text tokens look at patch tokens; a head answers.

    The image-text matching branch of ALBEF/BLIP in small (paper: "matching encoder"; its size is
    ours): `depth` blocks of self-attention among text tokens, cross-attention to patch tokens and
    an MLP. The mean over the text positions goes to a head of two classes: 0 = no match, 1 = match.
    """

    def __init__(
        self,
        text_width: int,
        patch_width: int,
        patches: int,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
    ):
        super().__init__()
        self.config = dict(text_width=text_width, patch_width=patch_width, patches=patches)
        self.config |= dict(width=width, depth=depth, heads=heads)
        self.text_in = nn.Linear(text_width, width)
        self.patch_in = nn.Sequential(nn.LayerNorm(patch_width), nn.Linear(patch_width, width))
        # about as large as what it is added to
        self.patch_position = nn.Parameter(0.5 * torch.randn(patches, width))
        how = {"batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(
            nn.TransformerDecoderLayer(width, heads, 4 * width, 0.0, "gelu", **how)
            for _ in range(depth)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2))

    def forward(self, text: Tensor, mask: Tensor, patches: Tensor) -> Tensor:
        """B x T x text_width, mask B x T (true = a word), B x N x patch_width -> B x 2 logits."""
        x = self.text_in(text)  # B x T x width
        memory = self.patch_in(patches) + self.patch_position  # B x N x width
        for block in self.blocks:
            y = block.norm1(x)
            x = x + attend(block.self_attn, y, y, mask)[0]
            x = x + attend(block.multihead_attn, block.norm2(x), memory)[0]
            x = x + block.linear2(block.activation(block.linear1(block.norm3(x))))
        weight = mask.unsqueeze(-1).to(x.dtype)
        return self.head((x * weight).sum(1) / weight.sum(1))  # B x width -> B x 2
