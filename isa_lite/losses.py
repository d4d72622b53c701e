"""The training losses: global contrastive distillation (GCD) and local alignment regularization
(LAR).

Paper: GCD aligns the query embedding of an unlabeled image with the frozen large visual encoder's
embedding of it; LAR aligns local features, and the frozen matching encoder is part of training.
Ours: every formula below.

Shapes: B images, E embedding width, T text positions, P patches.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from isa_lite.models.matching_encoder import MatchingEncoder
from isa_lite.models.vl_model import VLModel
from isa_lite.support import distributed


def gcd_loss(
    query: Tensor, target: Tensor, temperature: float, others: Tensor | None = None
) -> Tensor:
    """GCD as InfoNCE both ways, in nats: query, target B x E, L2-normalised; row i is image i.

    others: M x E, of images that are not in the batch, further negatives for every sentence. They
    never grow stale as those of a memory bank do (He et al., CVPR 2020): the large tower is frozen.
    """
    logits = query @ target.T / temperature  # B x B
    further = [] if others is None else [query @ others.T / temperature]  # B x M
    wide = torch.cat([logits, *further], 1)  # B x (B + M)
    return _both_ways(wide, logits.T)


def _both_ways(rows: Tensor, columns: Tensor) -> Tensor:
    """Logits of B sentences and of B images, the own one of each on the diagonal -> nats."""
    own = torch.arange(len(rows), device=rows.device)
    return (F.cross_entropy(rows, own) + F.cross_entropy(columns, own)) / 2


def hardest_other(similarity: Tensor) -> Tensor:
    """For each row of a B x B similarity, the column of the most similar *other* item: B."""
    return similarity.detach().clone().fill_diagonal_(float("-inf")).argmax(1)


def matching_loss(
    matcher: MatchingEncoder, text: Tensor, mask: Tensor, patches: Tensor, other: Tensor
) -> tuple[Tensor, Tensor]:
    """LAR by the frozen matching encoder: own image against the hardest other one.

    text: B x T x width contextual sentence tokens, mask: B x T; patches: B x P x width of the large
    image tower, perhaps with further images behind; other: B indices of the non-matching images
    among them. Returns the cross-entropy in nats (the mean over both halves) and the share of
    sentences whose own image scores higher than the other.
    """
    shown = torch.cat([patches[: len(text)], patches[other]])  # 2B x P x width
    logits = matcher(text.repeat(2, 1, 1), mask.repeat(2, 1), shown)  # 2B x 2
    own = (
        torch.arange(2, device=logits.device).flip(0).repeat_interleave(len(text))
    )  # 1 .. 1 0 .. 0
    # 2 x B: log-odds of a match, own image above, other below
    score = logits.detach().diff(dim=1).view(2, -1)
    return F.cross_entropy(logits, own), (score[0] > score[1]).float().mean()


def late_interaction_loss(tokens: Tensor, patches: Tensor, temperature: float) -> Tensor:
    """LAR where the VL model has no matching encoder: each token finds its best patch, contrasted
    over the batch.

    tokens: B x L x E contextual sentence tokens, patches: B x P x E, both L2-normalised. The score
    of sentence i and image j is the mean over i's tokens of the best cosine with j's patches.
    """
    best = torch.einsum("ile,jne->ijln", tokens, patches).amax(-1)  # B x B x L
    logits = best.mean(-1) / temperature  # B x B
    return _both_ways(logits, logits.T)


def lar_loss(
    vl: VLModel,
    context: Tensor,
    places: Tensor,
    patches: Callable[[np.ndarray], Tensor],
    rows: np.ndarray,
    hardest: np.ndarray,
    temperature: float,
) -> tuple[Tensor, float, list[float]]:
    """The LAR that the VL model allows: this process's share of the loss, the whole loss's value,
    and the share of matched images (none with late interaction, which judges no single image).

    context, places: B x T x width, B x T; patches: of images, by their indices; rows: the images of
    this process; hardest: the hardest other of each, which may be another process's.
    """
    if vl.matcher is None:
        words = vl.project_tokens(context[places].unflatten(0, (len(places), -1)))  # B x L x E
        seen = vl.project_patches(patches(rows))  # B x P x E
        both = distributed.gather(words), distributed.gather(seen)
        loss = late_interaction_loss(*both, temperature)
        return loss, loss.item(), []
    shown = np.concatenate([rows, np.setdiff1d(hardest, rows)])
    place = {image: i for i, image in enumerate(shown)}
    other = torch.tensor([place[image] for image in hardest], device=context.device)  # B
    mask = torch.ones_like(places)  # without a modifier every position is a word of the prompt
    terms = matching_loss(vl.matcher, context, mask, patches(shown), other)
    loss, matched = (term / distributed.count() for term in terms)
    return loss, distributed.total(loss).item(), [distributed.total(matched).item()]
