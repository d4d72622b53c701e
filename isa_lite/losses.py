"""The two training losses: global contrastive distillation (GCD) and local alignment regularization
(LAR).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from isa_lite.models.matching_encoder import MatchingEncoder


def gcd_loss(
    query: Tensor, target: Tensor, temperature: float, others: Tensor | None = None
) -> Tensor:
    """InfoNCE both ways between sentence embeddings and the large tower's embeddings of the same
    images.

    query, target: B x E, L2-normalised; row i of both is image i. others: M x E, L2-normalised, of
    images that are not in the batch: further negatives for every sentence. Returns the mean over
    both directions, in nats.
    Paper: GCD; both directions, the temperature as a constant and the further negatives are ours.
    These cost next to nothing and never grow stale, as those of a memory bank do (He et al., CVPR
    2020), because the large tower is frozen.
    """
    logits = query @ target.T / temperature  # B x B
    # B x (B + M)
    wide = logits if others is None else torch.cat([logits, query @ others.T / temperature], 1)
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(wide, own) + F.cross_entropy(logits.T, own)) / 2


def hardest_other(similarity: Tensor) -> Tensor:
    """For each row of a B x B similarity, the column of the most similar *other* item: B
    indices.
    """
    return similarity.detach().clone().fill_diagonal_(float("-inf")).argmax(1)


def matching_loss(
    matcher: MatchingEncoder, text: Tensor, mask: Tensor, patches: Tensor, other: Tensor
) -> tuple[Tensor, Tensor]:
    """Own image against the hardest other one, seen through the frozen matching encoder.

    text: B x T x width contextual sentence tokens, mask: B x T; patches: B x N x width of the large
    image tower, perhaps with further images behind; other: B indices of the non-matching images
    among them. Returns the cross-entropy in nats (the mean over both halves) and the share of
    sentences whose own image scores higher than the other.
    """
    # 2B x 2
    logits = matcher(
        text.repeat(2, 1, 1), mask.repeat(2, 1), torch.cat([patches[: len(text)], patches[other]])
    )
    # 1 ... 1 0 ... 0
    own = torch.arange(2, device=logits.device).flip(0).repeat_interleave(len(text))
    # 2 x B: log-odds of a match, own image above, other below
    score = logits.detach().diff(dim=1).view(2, -1)
    return F.cross_entropy(logits, own), (score[0] > score[1]).float().mean()


def late_interaction_loss(tokens: Tensor, patches: Tensor, temperature: float) -> Tensor:
    """LAR where the VL model has no matching encoder: each token finds its best patch, contrasted
    over the batch. Ours.

    tokens: B x L x E contextual sentence tokens, patches: B x N x E, both L2-normalised. The score
    of sentence i and image j is the mean over i's tokens of the best cosine with j's patches.
    """
    best = torch.einsum("ile,jne->ijln", tokens, patches).amax(-1)  # B x B x L
    logits = best.mean(-1) / temperature  # B x B
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
