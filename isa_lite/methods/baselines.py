"""What ISA is measured against, all untrained: simpler means, and the two ceilings."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from isa_lite.retrieval.queries import Queries


def image_only(queries: Queries) -> Tensor:
    """The reference's own embedding from the large image tower; the modifier is ignored."""
    return queries.image_embeddings()


def text_only(queries: Queries) -> Tensor:
    """The modifier through the text tower; the reference is ignored."""
    return queries.text_embeddings()


def image_plus_text(queries: Queries) -> Tensor:
    """The sum of the two embeddings above: the late fusion that every paper begins with."""
    return F.normalize(queries.image_embeddings() + queries.text_embeddings(), dim=-1)


def composition_ceiling(queries: Queries) -> Tensor:
    """The reference's full caption and the modifier, in words, through the text tower.

    What a sentence method would reach if its pseudo-words said exactly what a full caption says.
    """
    said = queries.captions(queries.each(queries.reference))
    both = [f"{caption}, {text}" for caption, text in zip(said, queries.texts, strict=True)]
    return queries.joined(queries.vl.encode_text(both))


def target_ceiling(queries: Queries) -> Tensor:
    """A full caption of the target by the text tower: what is lost with nothing to compose."""
    return queries.vl.encode_text(queries.captions([right[0] for right in queries.targets]))


# They read what no method of retrieval may see: a caption of the reference, or of the target.
composition_ceiling.oracle = target_ceiling.oracle = True

#: The methods without training, by the names that tables and metrics.json use.
UNTRAINED = {
    "image only": image_only,
    "text only": text_only,
    "image + text": image_plus_text,
    "composition ceiling": composition_ceiling,
    "target ceiling": target_ceiling,
}
