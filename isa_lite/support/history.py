"""What a distillation notes of its steps, how it is read back from a run's state, and what is
validated meanwhile. Ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from isa_lite.support.checkpoint import damaged, misfit
from isa_lite.support.images import Images, batch_loader

#: What a state says of the run so far (`checkpoint.misfit`).
_SHAPE = dict.fromkeys(("gcd", "lar", "matched"), [float])
_SHAPE |= {"recall": [(int, float)], "seconds": float}


@dataclass
class History:
    """One entry a step: loss terms in nats, and the share of sentences that the matching encoder
    puts with their own image (none where LAR is late interaction); own: a loss of the caller's.

    recall: validation points, (step, Recall@1 in percent of own image among those held back).
    recipe, dtype: of the run's settings.
    """

    gcd: list[float] = field(default_factory=list)
    lar: list[float] = field(default_factory=list)
    matched: list[float] = field(default_factory=list)
    recall: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    recipe: str = ""
    dtype: str = ""
    own: list[float] = field(default_factory=list)

    def restore(self, path: Path, info: dict) -> None:
        """Take over what the state of a run, `info`, says. Raises ValueError, naming the file, for
        a damaged one.
        """
        found = info.get("history")
        if fault := misfit(found, _SHAPE, "its history"):
            raise damaged(path, fault)
        found = {"own": []} | found  # states of before have none
        whole = set(found) == {f.name for f in fields(History)}
        if not whole or misfit(found["own"], [float]) or len(found["gcd"]) != info["step"]:
            raise damaged(path, "its history is not that of its steps")
        # of these two the settings speak
        known = found | {"recipe": self.recipe, "dtype": self.dtype}
        vars(self).update(known, recall=[tuple(point) for point in found["recall"]])


@torch.inference_mode()
def own_image_recall(
    images: Images,
    rows: np.ndarray,
    known: np.ndarray,
    encoder: nn.Module,
    queries: Callable[[Tensor], Tensor],
    num_workers: int = 0,
) -> float:
    """Recall@1 in percent: does the sentence of an image find it among all of `rows`?

    known: N x E, of all images; queries: sentences B x L x D -> B x E.
    """
    chunks = [rows[s : s + 128] for s in range(0, len(rows), 128)]
    was_training = encoder.training
    encoder.eval()
    # pictures of any size come and go
    loader = batch_loader(images, chunks, encoder.pixels, num_workers)
    tokens = torch.cat([encoder(pixels).tokens for pixels in loader])  # N x L x D
    found = torch.cat([queries(part) for part in tokens.split(256)]).cpu()  # N x E
    encoder.train(was_training)
    best = (found @ torch.from_numpy(np.array(known[rows])).T).argmax(1)
    return 100 * float((best == torch.arange(len(rows))).float().mean())
