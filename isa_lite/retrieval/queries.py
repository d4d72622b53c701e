"""One set of composed queries for scenes, own folders and benchmarks; and what a method is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from isa_lite.models.vl_model import VLModel
from isa_lite.retrieval import metrics
from isa_lite.retrieval.gallery import Gallery, best, mask_reference
from isa_lite.support.images import Images

Rows = TypeVar("Rows", bound=Sequence)


@dataclass(kw_only=True)
class Queries:
    """B composed queries over a gallery of G images: find reference[i], changed as its text says.

    images: the G pictures of the gallery. reference: B gallery indices. texts: B modifiers; where a
    query has several, all of them in a row, and owner tells the query of each (None: text i is of
    query i). targets: of each query the gallery indices of its right answers, the annotated one
    first; none where nobody knows them. excluded: B gallery indices that a ranking leaves out, -1
    for none (None: the references). said: captions of each image, for the ceilings.

    vl, gallery: the frozen model, and the gallery by its large image tower, G x E, L2-normalised.
    `embedded` adds them, and a method finds them there.
    """

    images: Images
    reference: np.ndarray
    texts: list[str]
    targets: Sequence[Sequence[int]] = field(repr=False)
    owner: np.ndarray | None = None
    excluded: np.ndarray | None = None
    said: Sequence[Sequence[str]] = field(default=(), repr=False)
    vl: VLModel | None = field(default=None, repr=False)
    gallery: Tensor | None = field(default=None, repr=False)

    def __post_init__(self):
        self.excluded = self.reference if self.excluded is None else self.excluded

    def __len__(self) -> int:
        return len(self.reference)

    def embedded(self, vl: VLModel, gallery: Tensor | None = None) -> Queries:
        """The same queries, ready for methods. gallery: G x E, where it is known already."""
        gallery = vl.encode_images(self.images) if gallery is None else gallery
        return replace(self, vl=vl, gallery=gallery)

    # ---- what a method reads

    def image_embeddings(self) -> Tensor:
        """The references by the large image tower, B x E."""
        return self.gallery[torch.from_numpy(self.reference)]

    def text_embeddings(self) -> Tensor:
        """The modifiers by the text tower, B x E."""
        return self.joined(self.vl.encode_text(self.texts))

    def each(self, rows: Rows) -> Rows:
        """Of something for each query, a row for each text."""
        return rows if self.owner is None else rows[self.owner]

    def joined(self, points: Tensor) -> Tensor:
        """An embedding for each text -> B x E: the mean over a query's texts, L2-normalised."""
        if self.owner is None:
            return points
        total = points.new_zeros(len(self), points.shape[1])
        return F.normalize(total.index_add(0, torch.from_numpy(self.owner), points), dim=-1)

    def captions(self, rows: Sequence[int]) -> list[str]:
        """A caption of each of these gallery images. Raises LookupError where one has none."""
        if not self.said or not all(self.said[i] for i in rows):
            raise LookupError("nobody has captioned all of these images")
        return [self.said[i][0] for i in rows]

    # ---- how a method is judged

    def hits(self) -> Tensor:
        """B x G bool: which images are right answers."""
        found = torch.zeros(len(self), len(self.images), dtype=torch.bool)
        for row, right in zip(found, self.targets, strict=True):
            row[right] = True
        return found

    def ranks(self, answer: Tensor | Scores, gallery: Tensor | None = None) -> np.ndarray:
        """The rank of each query's best right answer, from 1. answer: what a method returned.
        gallery: G x E, where the answer is of another model than `vl`.
        """
        if isinstance(answer, Scores):
            return metrics.score_ranks(answer.values, self.excluded, self.hits())
        gallery = self.gallery if gallery is None else gallery
        return metrics.ranks(answer, gallery, self.excluded, self.hits())

    def search(self, answer: Tensor | Scores, k: int) -> Tensor:
        """Gallery indices of the k best images of each query, best first, B x k: all that there are
        where these are fewer. Of equal scores, the first in the gallery comes first.
        """
        excluded = torch.from_numpy(self.excluded)
        k = min(k, len(self.gallery) - int((excluded >= 0).any()))
        if isinstance(answer, Scores):
            scores = answer.values.clone()
            mask_reference(scores, excluded)
            return best(scores, k)[1]
        return Gallery(self.gallery, range(len(self.gallery))).search(answer, k, excluded)[1]


@dataclass(frozen=True)
class Scores:
    """What a method returns that ranks by no point of the space: B x G, higher is better."""

    values: Tensor


#: A way to compose: queries -> embeddings B x E, L2-normalised (or `Scores`). What has to be chosen
#: on *other* queries, a method does in `fit(queries)`, if it has one, which returns the method to
#: use. One with the attribute `oracle` reads captions, and is a ceiling.
Method = Callable[[Queries], Tensor | Scores]


def answers(methods: Mapping[str, Method], queries: Queries) -> dict[str, Tensor | Scores]:
    """What each method returns, without the ceilings whose captions nobody wrote."""
    found = {}
    for name, method in methods.items():
        try:
            found[name] = method(queries)
        except LookupError:
            if not getattr(method, "oracle", False):
                raise
    return found
