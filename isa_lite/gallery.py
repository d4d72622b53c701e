"""The gallery: embeddings of the images to search, with their ids, on disk; exact search, and FAISS behind the same interface."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from isa_lite.checkpoint import read_tensors, write_tensors


@dataclass
class Gallery:
    """embeddings: N x E, L2-normalised; ids: N names, whatever tells the images apart to the user.

    vl_model: the fingerprint of the model that embedded them, so that a query side of another model can be refused.
    """

    embeddings: Tensor
    ids: Sequence[str]
    vl_model: str = ""

    def __post_init__(self):
        if len(self.embeddings) != len(self.ids):
            raise ValueError(f"{len(self.embeddings)} embeddings but {len(self.ids)} ids")

    def __len__(self) -> int:
        return len(self.ids)

    def _check_k(self, k: int, exclude: Tensor | None) -> None:
        most = len(self) - (exclude is not None and bool((exclude >= 0).any()))
        if not 1 <= k <= most:
            raise ValueError(f"k must be between 1 and {most}, the images that every query may find, not {k}")

    def search(self, queries: Tensor, k: int, exclude: Tensor | None = None, chunk: int = 1024) -> tuple[Tensor, Tensor]:
        """The k best by cosine for queries B x E: scores and gallery indices, both B x k, best first.

        exclude: B indices (-1: none) of the image that a query must not find, usually its own reference.
        """
        self._check_k(k, exclude)
        parts = []
        for s in range(0, len(queries), chunk):
            scores = queries[s : s + chunk] @ self.embeddings.T  # chunk x N
            if exclude is not None:
                mask_reference(scores, exclude[s : s + chunk])
            parts.append(scores.topk(k))
        return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])

    def save(self, path: str | Path) -> None:
        """To one safetensors file."""
        write_tensors(Path(path), {"embeddings": self.embeddings}, {"ids": list(self.ids), "vl_model": self.vl_model})

    @classmethod
    def load(cls, path: str | Path) -> Gallery:
        """What `save` wrote."""
        tensors, info = read_tensors(Path(path))
        return cls(tensors["embeddings"], info["ids"], info.get("vl_model", ""))


def mask_reference(scores: Tensor, reference: Tensor) -> None:
    """In place: the score of each row's reference (B indices, -1: none) becomes minus infinity."""
    rows = torch.arange(len(scores))[reference >= 0]
    scores[rows, reference[reference >= 0]] = float("-inf")


def _faiss():
    """FAISS, which is imported only where it is used.

    On macOS, PyTorch and FAISS bring an OpenMP each, and two of them in one process may stop or crash it (an open issue of both:
    github.com/faiss-wheels/faiss-wheels/issues/73). The usual way round, not tried by us: allow two, and give FAISS one thread.
    """
    if sys.platform == "darwin":
        os.environ.setdefault("KMP_DUPLICATE_LIB_OK", "TRUE")
    import faiss

    if sys.platform == "darwin":
        faiss.omp_set_num_threads(1)
    return faiss


@dataclass
class FaissGallery(Gallery):
    """The same gallery, searched by FAISS, which keeps a copy of the embeddings.

    kind: "flat" compares a query with every image: exact. "ivf" (inverted file) is approximate: k-means puts the images into
    `lists` lists (0: the square root of their number), and a query looks through the `probes` lists that it is nearest to.
    What that loses is to be measured, with `agreement`.
    """

    kind: str = "flat"
    lists: int = 0
    probes: int = 8

    def __post_init__(self):
        super().__post_init__()
        if self.kind not in ("flat", "ivf"):
            raise ValueError(f"kind must be 'flat' (exact) or 'ivf' (approximate), not {self.kind!r}")
        # k-means wants 39 points a list, and says so where it gets fewer.
        lists = self.lists or max(1, min(round(len(self) ** 0.5), len(self) // 39))
        if not 1 <= lists <= len(self):
            raise ValueError(f"lists must be between 1 and {len(self)}, the images, or 0 for a choice; not {self.lists}")
        if self.probes < 1:
            raise ValueError(f"probes must be at least 1, not {self.probes}")
        faiss, width = _faiss(), self.embeddings.shape[1]
        index = faiss.IndexFlatIP(width)  # inner product: the cosine, as everything has the length 1
        if self.kind == "ivf":
            index = faiss.IndexIVFFlat(index, width, lists, faiss.METRIC_INNER_PRODUCT)
            index.cp.min_points_per_centroid = 1  # somebody who asks for more lists has been told, above
            index.train(self._numpy(self.embeddings))  # from a fixed seed
            index.nprobe = min(self.probes, lists)
        index.add(self._numpy(self.embeddings))
        self.index = index

    @staticmethod
    def _numpy(vectors: Tensor) -> np.ndarray:
        return np.ascontiguousarray(vectors.detach().cpu().float().numpy())

    def search(self, queries: Tensor, k: int, exclude: Tensor | None = None, chunk: int = 1024) -> tuple[Tensor, Tensor]:
        """As `Gallery.search`. Where an approximate search finds fewer than k, index -1 and score minus infinity fill up."""
        self._check_k(k, exclude)
        more = k + (exclude is not None)  # one more, in the place of the one that is left out
        parts = [self.index.search(self._numpy(queries[s : s + chunk]), more) for s in range(0, len(queries), chunk)]
        scores, found = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True))  # B x more each
        scores[found < 0] = float("-inf")
        if exclude is not None:
            unwanted = (found == exclude[:, None]) & (exclude >= 0)[:, None]
            order = unwanted.to(torch.uint8).argsort(dim=1, stable=True)  # to the end with them; the rest stays in order
            scores, found = scores.gather(1, order)[:, :k], found.gather(1, order)[:, :k]
        return scores, found


def agreement(found: Tensor, exact: Tensor) -> float:
    """The share, in percent, of the exact answers that were found: both B x k indices (an index's own "recall")."""
    return 100 * float((found[:, :, None] == exact[:, None, :]).any(1).float().mean())
