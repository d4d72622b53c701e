"""What ISA is measured against: embeddings of the same queries by simpler means, and the two
ceilings.

Each function returns B x E, L2-normalised, for `evaluate.benchmark_ranks`. None of them is trained
here.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from isa_lite.models.vl_model import VLModel
from isa_lite.prompt import compose
from isa_lite.query_encoder import QueryEncoder
from isa_lite.retrieval.evaluate import Benchmark
from isa_lite.world import scenes


def image_only(bench: Benchmark, vl: VLModel, gallery: Tensor) -> Tensor:
    """The reference's own embedding from the large image tower; the modifier is ignored."""
    return gallery[bench.reference]


def text_only(bench: Benchmark, vl: VLModel, gallery: Tensor) -> Tensor:
    """The modifier through the text tower; the reference is ignored."""
    return vl.encode_text(bench.texts)


def image_plus_text(bench: Benchmark, vl: VLModel, gallery: Tensor) -> Tensor:
    """The sum of the two embeddings above: the late fusion that every paper on the task begins
    with.
    """
    return F.normalize(image_only(bench, vl, gallery) + text_only(bench, vl, gallery), dim=-1)


def _captions(bench: Benchmark, rows: np.ndarray, seed: int) -> list[str]:
    rng = np.random.default_rng((seed, 8))
    return [scenes.caption(bench.scenes[i], rng) for i in rows]


def composition_ceiling(bench: Benchmark, vl: VLModel, gallery: Tensor, seed: int = 0) -> Tensor:
    """The reference's full caption and the modifier, in words, through the text tower.

    What a sentence method would reach if its pseudo-words said exactly what a full caption says.
    """
    captions = _captions(bench, bench.reference, seed)
    return vl.encode_text(
        [f"{caption}, {text}" for caption, text in zip(captions, bench.texts, strict=True)]
    )


def target_ceiling(bench: Benchmark, vl: VLModel, gallery: Tensor, seed: int = 0) -> Tensor:
    """The target's full caption through the text tower: what is lost even when nothing needs
    composing.
    """
    return vl.encode_text(_captions(bench, bench.target, seed))


#: The methods without training, by the names that tables and metrics.json use.
UNTRAINED = {
    "image only": image_only,
    "text only": text_only,
    "image + text": image_plus_text,
    "composition ceiling": composition_ceiling,
    "target ceiling": target_ceiling,
}


def composed(
    bench: Benchmark, vl: VLModel, encoder: QueryEncoder, template: str | None = None
) -> Tensor:
    """A trained query encoder: the reference's sentence and the modifier through the frozen text
    tower.
    """
    tokens = encoder.sentences(bench.images[bench.reference]).tokens
    return compose(vl, tokens, bench.texts, **({"template": template} if template else {}))
