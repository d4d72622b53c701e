"""A user's own queries (`own_data.read_triplets`) by the methods without training, and by a query
encoder. Ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from isa_lite.methods import baselines
from isa_lite.models.vl_model import VLModel
from isa_lite.prompt import compose
from isa_lite.query_encoder import QueryEncoder
from isa_lite.retrieval.own_data import Triplets
from isa_lite.support.images import ImageFolder


def untrained(
    queries: Triplets, vl: VLModel, gallery: Tensor, captions: Sequence[Sequence[str]] | None
) -> dict[str, Tensor]:
    """The queries by simpler means, B x E each, named as in `baselines.UNTRAINED`, and the ceilings
    where captions allow them.

    composition ceiling: the reference's first caption and the modifier, in words; target ceiling:
    the first caption of the first target. Both need a caption of every image that they speak of,
    and are left out otherwise.
    """
    # of a benchmark, they read reference and texts alone
    simple = ("image only", "text only", "image + text")
    found = {name: baselines.UNTRAINED[name](queries, vl, gallery) for name in simple}
    firsts = [right[0] for right in queries.targets]
    if captions and all(captions[i] for i in queries.reference):
        said = [
            f"{captions[i][0]}, {text}"
            for i, text in zip(queries.reference, queries.texts, strict=True)
        ]
        found["composition ceiling"] = vl.encode_text(said)
    if captions and all(captions[i] for i in firsts):
        found["target ceiling"] = vl.encode_text([captions[i][0] for i in firsts])
    return found


def composed(
    queries: Triplets, images: ImageFolder, vl: VLModel, encoder: QueryEncoder, template: str
) -> Tensor:
    """The queries by a trained query encoder, B x E: the reference's sentence and the modifier
    through the frozen text tower.

    Raises ValueError for a modifier that does not fit the text tower.
    """
    used, place = np.unique(queries.reference, return_inverse=True)
    parts = np.array_split(used, len(used) // 256 + 1)  # not all pictures in memory at once
    tokens = torch.cat([encoder.sentences([images[int(i)] for i in part]).tokens for part in parts])
    return compose(vl, tokens[place], queries.texts, template)
