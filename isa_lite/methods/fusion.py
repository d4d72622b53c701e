"""Late fusion: a query's image and its modifier are embedded apart and only their scores, or
embeddings, are joined.

Nothing is trained. Each function takes the two embeddings of the queries (B x E), the gallery (G x
E), all L2-normalised, and returns scores B x G, higher is better, for
`evaluate.benchmark_score_ranks`. All of them pay for the large image tower at query time. A weight
is the modifier's share, 0 to 1; `choose_weight` picks it on queries that are not those of the test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from isa_lite.models.vl_model import VLModel
from isa_lite.retrieval.evaluate import Benchmark, benchmark_score_ranks, recall


def weighted_sum(image: Tensor, text: Tensor, gallery: Tensor, weight: float = 0.5) -> Tensor:
    """Cosine with the weighted mean of the two embeddings; with a half,
    `baselines.image_plus_text`.
    """
    return F.normalize((1 - weight) * image + weight * text, dim=-1) @ gallery.T


def slerp(image: Tensor, text: Tensor, gallery: Tensor, weight: float = 0.5) -> Tensor:
    """Cosine with the point that divides the great circle from image to text (Jang et al., ECCV
    2024, without their tuning).

    At a half it is the sum's direction. Elsewhere it keeps the promised angle where the sum leans
    to the nearer end.
    """
    # Equal or opposite embeddings leave the circle open: there the angle is held off 0 and pi.
    angle = (image * text).sum(-1, keepdim=True).clamp(-1 + 1e-6, 1 - 1e-6).acos()  # B x 1
    point = ((1 - weight) * angle).sin() * image + (weight * angle).sin() * text
    return F.normalize(point, dim=-1) @ gallery.T


def product(image: Tensor, text: Tensor, gallery: Tensor, weight: float = 0.5) -> Tensor:
    """Product of the two similarities, each moved from [-1, 1] to [0, 1] and raised to its weight:
    both have to agree.
    """
    like_image, like_text = ((1 + (x @ gallery.T).clamp(-1, 1)) / 2 for x in (image, text))
    return like_image ** (1 - weight) * like_text**weight


def calibrated(
    image: Tensor, text: Tensor, gallery: Tensor, corpus: Tensor, weight: float = 0.1
) -> Tensor:
    """BASIC-like: centred embeddings, calibrated similarities, and a product that punishes
    disagreement.

    corpus: C x E embeddings of texts of the domain; their mean is what every text has in common,
    and the gallery's mean what every image has. Both are subtracted. Each similarity is then
    scaled, query by query, so that the gallery's lowest is 0 and its highest 1, and the pair (a, b)
    scores a b - weight (a + b)^2, as a corner detector scores its two gradients.

    After BASIC (Psomas et al., 2025). Left out: the projection on a subspace learned from a text
    corpus, the expansion of the query with its neighbours, and the calibration by held-out
    statistics, for which the gallery's own range stands in.
    """
    image_mean, text_mean = gallery.mean(0), corpus.mean(0)
    centred = F.normalize(gallery - image_mean, dim=-1)

    def scaled(query: Tensor) -> Tensor:
        scores = F.normalize(query, dim=-1) @ centred.T  # B x G
        low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
        return (scores - low) / (high - low).clamp_min(1e-12)

    a, b = scaled(image - image_mean), scaled(text - text_mean)
    return a * b - weight * (a + b) ** 2


#: Late fusion by the names that tables use, for those that need nothing but the embeddings.
FUSIONS = {
    "weighted sum": weighted_sum,
    "spherical interpolation": slerp,
    "product of similarities": product,
}


def choose_weight(
    fuse: Callable[..., Tensor],
    bench: Benchmark,
    vl: VLModel,
    gallery: Tensor,
    weights: Sequence[float] = tuple(round(float(w), 2) for w in np.linspace(0.05, 0.95, 19)),
) -> float:
    """The weight with the highest Recall@1 on `bench`, which must not be the benchmark that is
    reported. Ties: the first.
    """
    image, text = gallery[torch.from_numpy(bench.reference)], vl.encode_text(bench.texts)
    found = [
        recall(benchmark_score_ranks(bench, fuse(image, text, gallery, weight)), 1)
        for weight in weights
    ]
    return weights[int(np.argmax(found))]
