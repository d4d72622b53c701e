"""The gallery: embeddings of the images to search, with their ids, on disk; and exact search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from isa_lite.checkpoint import read_tensors, write_tensors


@dataclass
class Gallery:
    """embeddings: N x E, L2-normalised; ids: N names, whatever tells the images apart to the user."""

    embeddings: Tensor
    ids: Sequence[str]

    def __post_init__(self):
        if len(self.embeddings) != len(self.ids):
            raise ValueError(f"{len(self.embeddings)} embeddings but {len(self.ids)} ids")

    def __len__(self) -> int:
        return len(self.ids)

    def search(self, queries: Tensor, k: int, exclude: Tensor | None = None, chunk: int = 1024) -> tuple[Tensor, Tensor]:
        """The k best by cosine for queries B x E: scores and gallery indices, both B x k, best first.

        exclude: B indices (-1: none) of the image that a query must not find, usually its own reference.
        """
        most = len(self) - (exclude is not None and bool((exclude >= 0).any()))
        if not 1 <= k <= most:
            raise ValueError(f"k must be between 1 and {most}, the images that every query may find, not {k}")
        parts = []
        for s in range(0, len(queries), chunk):
            scores = queries[s : s + chunk] @ self.embeddings.T  # chunk x N
            if exclude is not None:
                mask_reference(scores, exclude[s : s + chunk])
            parts.append(scores.topk(k))
        return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])

    def save(self, path: str | Path) -> None:
        """To one safetensors file."""
        write_tensors(Path(path), {"embeddings": self.embeddings}, {"ids": list(self.ids)})

    @classmethod
    def load(cls, path: str | Path) -> Gallery:
        """What `save` wrote."""
        tensors, info = read_tensors(Path(path))
        return cls(tensors["embeddings"], info["ids"])


def mask_reference(scores: Tensor, reference: Tensor) -> None:
    """In place: the score of each row's reference (B indices, -1: none) becomes minus infinity."""
    rows = torch.arange(len(scores))[reference >= 0]
    scores[rows, reference[reference >= 0]] = float("-inf")
