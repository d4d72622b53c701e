"""Attention with the weights of an `nn.MultiheadAttention`, computed in our order of memory.

PyTorch's own module turns B x T x W around to T x B x W. On a CPU its products then fall into T
small ones, and a training step of ours takes a quarter longer. Same weights, same result. Ours.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def attend(
    layer: nn.MultiheadAttention,
    x: Tensor,
    memory: Tensor,
    mask: Tensor | None = None,
    weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """B x T x W looks at B x N x W -> B x T x W, and if asked for mean weights B x T x N.

    mask: B x N bool, true where there is something. Give a tensor twice for self-attention.
    """
    w, b, width = layer.in_proj_weight, layer.in_proj_bias, layer.embed_dim
    if x is memory:
        query, key, value = F.linear(x, w, b).chunk(3, -1)
    else:
        query = F.linear(x, w[:width], b[:width])
        key, value = F.linear(memory, w[width:], b[width:]).chunk(2, -1)
    # B x T x W -> B x heads x T x W / heads
    heads = (layer.num_heads, -1)
    query, key, value = (t.unflatten(-1, heads).transpose(1, 2) for t in (query, key, value))
    seen = None if mask is None else mask[:, None, None]  # the same for all heads and all that look
    looked = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
    out = layer.out_proj(looked.transpose(1, 2).flatten(2))
    if not weights:
        return out, None
    logits = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5  # B x heads x T x N
    if seen is not None:
        logits = logits.masked_fill(~seen, float("-inf"))
    return out, logits.softmax(-1).mean(1)


def wide_mlp(width: int) -> nn.Sequential:
    """What follows attention in a block: ... x width -> the same."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
