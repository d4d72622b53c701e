"""Late fusion: image and modifier are embedded apart; only embeddings, or scores, are joined.

Nothing is trained, and all of them pay for the large image tower at query time. A weight is the
modifier's share, 0 to 1. `Fusion.fit` chooses it on queries that are not those of the test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from isa_lite.retrieval.metrics import recall
from isa_lite.retrieval.queries import Queries, Scores
from isa_lite.support.settings import FUSED

#: What `Fusion.fit` chooses from.
WEIGHTS = tuple(round(float(w), 2) for w in np.linspace(0.05, 0.95, 19))


def weighted_sum(image: Tensor, text: Tensor, weight: float = 0.5) -> Tensor:
    """The weighted mean of two embeddings B x E, L2-normalised; 0.5: `image_plus_text`."""
    return F.normalize((1 - weight) * image + weight * text, dim=-1)


def slerp(image: Tensor, text: Tensor, weight: float = 0.5) -> Tensor:
    """A point on the great circle from image to text, B x E (Jang et al., ECCV 2024, not tuned).

    At a half it is the sum's direction. Elsewhere the sum leans to the nearer end, and this not.
    """
    # Equal or opposite embeddings leave the circle open: there the angle is held off 0 and pi.
    angle = (image * text).sum(-1, keepdim=True).clamp(-1 + 1e-6, 1 - 1e-6).acos()  # B x 1
    return F.normalize(((1 - weight) * angle).sin() * image + (weight * angle).sin() * text, dim=-1)


def product(image: Tensor, text: Tensor, gallery: Tensor, weight: float = 0.5) -> Tensor:
    """B x G: both similarities with a gallery G x E, moved to [0, 1], weighted, as a product."""
    like_image, like_text = ((1 + (x @ gallery.T).clamp(-1, 1)) / 2 for x in (image, text))
    return like_image ** (1 - weight) * like_text**weight


def calibrated(
    image: Tensor, text: Tensor, gallery: Tensor, corpus: Tensor, weight: float = 0.1
) -> Tensor:
    """BASIC-like scores B x G: centred embeddings, calibrated similarities, a harsh product.

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


@dataclass(frozen=True)
class Fusion:
    """A method that joins the two embeddings of a query: `join(image, text, weight)` -> B x E."""

    join: Callable[..., Tensor]
    weight: float = 0.5

    def __call__(self, queries: Queries) -> Tensor | Scores:
        known = queries.image_embeddings(), queries.text_embeddings(), queries.gallery
        return self._answer(*known, self.weight)

    def _answer(
        self, image: Tensor, text: Tensor, gallery: Tensor, weight: float
    ) -> Tensor | Scores:
        return self.join(image, text, weight)

    def recalls(self, queries: Queries, weights: Sequence[float] = WEIGHTS) -> list[float]:
        """Recall@1 in percent with each of the weights."""
        known = queries.image_embeddings(), queries.text_embeddings(), queries.gallery
        return [recall(queries.ranks(self._answer(*known, w)), 1) for w in weights]

    def fit(self, queries: Queries, weights: Sequence[float] = WEIGHTS) -> Fusion:
        """With the weight of the highest Recall@1 on these queries; ties: the first."""
        return replace(self, weight=weights[int(np.argmax(self.recalls(queries, weights)))])


class ScoreFusion(Fusion):
    """The same for what has no embedding: `join(image, text, gallery, weight)` -> scores B x G."""

    def _answer(self, image: Tensor, text: Tensor, gallery: Tensor, weight: float) -> Scores:
        return Scores(self.join(image, text, gallery, weight))


@dataclass(frozen=True)
class Calibrated:
    """`calibrated` as a method. corpus: C x E; `fit` takes the modifiers of other queries."""

    corpus: Tensor | None = None

    def fit(self, queries: Queries) -> Calibrated:
        return Calibrated(queries.vl.encode_text(queries.texts))

    def __call__(self, queries: Queries) -> Scores:
        known = queries.image_embeddings(), queries.text_embeddings(), queries.gallery
        return Scores(calibrated(*known, self.corpus))


#: Late fusion by the names that tables use, for those with a weight.
FUSIONS = dict(zip(FUSED, (Fusion(weighted_sum), Fusion(slerp), ScoreFusion(product)), strict=True))
#: All of late fusion.
FITTED = FUSIONS | {"BASIC-like": Calibrated()}
