"""The gallery: embeddings and ids on disk; exact search, and FAISS behind the same interface.

Of images with the same score, both find the one first that stands first in the gallery.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from isa_lite.support.checkpoint import read_tensors, write_tensors
from isa_lite.support.parameters import check_settings, checked, path_name, whole

#: How far from 1 the length of an embedding may be; rounding to half precision stays far below it.
TOLERANCE = 0.01


def _checked_ids(ids: Sequence) -> Sequence[str | int]:
    """Ids that can be saved. Raises ValueError for other kinds, and for an id that comes twice."""
    if isinstance(ids, range):  # numbers that differ
        return ids
    if isinstance(ids, (str, bytes, os.PathLike, Mapping)) or not hasattr(ids, "__getitem__"):
        raise ValueError(
            f"ids must be a list of texts or whole numbers, not one {type(ids).__name__}"
        )
    plain = [
        os.fspath(i) if isinstance(i, os.PathLike) else i.item() if isinstance(i, np.generic) else i
        for i in ids
    ]
    for i, value in enumerate(plain):
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise ValueError(f"ids[{i}] must be a text, a path or a whole number, not {value!r}")
    if len(set(plain)) < len(plain):
        twice = next(name for name, count in Counter(plain).items() if count > 1)
        raise ValueError(f"ids must differ, and {twice!r} is there twice; give each image its own")
    return plain


def _checked_embeddings(embeddings: Tensor | np.ndarray) -> Tensor:
    """N x E float32. Raises ValueError for another shape or kind, or a row not of length 1."""
    embeddings = _vectors("embeddings", embeddings)
    lengths = torch.linalg.vector_norm(embeddings, dim=1)  # nan or inf where one of the numbers is
    wrong = ~((lengths - 1).abs() <= TOLERANCE)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"embeddings must be finite and L2-normalised, and {int(wrong.sum())} of {len(lengths)}"
            f" rows are not; the first is row {row}, of length {float(lengths[row]):.3g}"
        )
    return embeddings


def _vectors(what: str, values: Tensor | np.ndarray) -> Tensor:
    """As float32 B x E; one vector is one row. Raises ValueError for anything else, or nothing."""
    if isinstance(values, np.ndarray) and values.dtype.kind == "f":
        values = torch.from_numpy(np.ascontiguousarray(values))
    if not isinstance(values, Tensor) or not values.is_floating_point():
        kind = f"a {type(values).__name__}"
        if isinstance(values, (Tensor, np.ndarray)):
            kind = values.dtype
        raise ValueError(f"{what} must be a tensor or an array of floats, not {kind}")
    values = values.detach().float()
    if values.ndim == 1 and what == "queries":
        values = values[None]
    if values.ndim != 2 or 0 in values.shape:
        fault = f"{what} must have the shape {'B' if what == 'queries' else 'N'} x E"
        raise ValueError(f"{fault}, not {tuple(values.shape)}")
    return values


def indices(values: object) -> Tensor:
    """Whole numbers as a tensor; where they are something else, one of floats: no indices."""
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        return torch.full((0,), torch.nan)


@dataclass
class Gallery:
    """embeddings: N x E, L2-normalised; ids: N different names, by which the user knows the images.

    Arrays and half precision become a float32 tensor. Ids are texts or whole numbers, and stay what
    they are; those of numpy become Python's, and a path becomes its text. vl_model: the fingerprint
    of the model that embedded them, so that a query side of another model can be refused. Raises
    ValueError where one of these is something else.
    """

    embeddings: Tensor
    ids: Sequence[str | int]
    vl_model: str = ""

    def __post_init__(self):
        self.ids, self.embeddings = _checked_ids(self.ids), _checked_embeddings(self.embeddings)
        if len(self.embeddings) != len(self.ids):
            raise ValueError(f"{len(self.embeddings)} embeddings but {len(self.ids)} ids")
        if not isinstance(self.vl_model, str):
            fault = "vl_model must be a model's fingerprint, a text"
            raise ValueError(f"{fault}, not a {type(self.vl_model).__name__}")

    def __len__(self) -> int:
        return len(self.ids)

    def _checked(
        self, queries: Tensor | np.ndarray, k: int, exclude: Tensor | np.ndarray | None
    ) -> tuple[Tensor, int, Tensor]:
        """Queries B x E float32, k, and B indices to leave out, checked. Raises ValueError."""
        queries = _vectors("queries", queries).to(self.embeddings.device)
        if queries.shape[1] != self.embeddings.shape[1]:
            fault = f"queries have {queries.shape[1]} numbers each, and the gallery's embeddings"
            raise ValueError(f"{fault} {self.embeddings.shape[1]}; both must come from one model")
        if not queries.isfinite().all():
            row = int((~queries.isfinite().all(1)).nonzero()[0])
            raise ValueError(f"queries must be finite, and row {row} is not")
        exclude = torch.full((len(queries),), -1) if exclude is None else indices(exclude)
        exclude = exclude.to(queries.device)
        if exclude.shape != (len(queries),) or exclude.is_floating_point():
            fault = f"exclude must hold one index for each of the {len(queries)} queries"
            raise ValueError(f"{fault}, or -1 for none")
        if int(exclude.min()) < -1 or int(exclude.max()) >= len(self):
            raise ValueError(f"exclude must hold indices from -1 (none) to {len(self) - 1}")
        most = len(self) - int((exclude >= 0).any())
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 1 <= k <= most:
            raise ValueError(
                f"k must be between 1 and {most}, the images that every query may find, not {k}"
            )
        return queries, int(k), exclude

    @checked(chunk=whole(1))
    def search(
        self,
        queries: Tensor | np.ndarray,
        k: int,
        exclude: Tensor | np.ndarray | None = None,
        chunk: int = 1024,
    ) -> tuple[Tensor, Tensor]:
        """The k best for queries B x E (or one, E): cosines and gallery indices, B x k, best first.

        Of equal scores, the smaller index comes first. exclude: B indices (-1: none) of the image
        that a query must not find, usually its own reference. Raises ValueError for queries of
        another width or not finite, for k or exclude out of range.
        """
        queries, k, exclude = self._checked(queries, k, exclude)
        starts = range(0, len(queries), chunk)
        parts = [self._found(queries[s : s + chunk], k, exclude[s : s + chunk]) for s in starts]
        scores, found = zip(*parts, strict=True)
        return torch.cat(scores), torch.cat(found)

    def _found(self, queries: Tensor, k: int, exclude: Tensor) -> tuple[Tensor, Tensor]:
        """`search` of a few queries, checked."""
        scores = queries @ self.embeddings.T  # chunk x N
        mask_reference(scores, exclude)
        return best(scores, k)

    def save(self, path: str | Path) -> None:
        """To one safetensors file."""
        info = {"ids": list(self.ids), "vl_model": self.vl_model}
        write_tensors(Path(path), {"embeddings": self.embeddings}, info)

    @classmethod
    @checked(path=path_name())
    def load(cls, path: str | Path) -> Gallery:
        """What `save` wrote. Raises FileNotFoundError, or ValueError naming an unfit file."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no gallery {path}; Gallery.save writes one")
        tensors, info = read_tensors(Path(path))
        try:
            if "embeddings" not in tensors or not isinstance(info.get("ids"), list):
                raise ValueError("it lacks embeddings or ids")
            return cls(tensors["embeddings"], info["ids"], info.get("vl_model"))
        except ValueError as error:
            fault = f"{path} is no gallery that can be used: {error}"
            raise ValueError(f"{fault}; save it again") from error


def best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of each row of B x N scores, and where they stand, B x k; of equals the first.

    `topk` alone picks among equal scores as it likes; only the rows that have some are put right.
    """
    values, found = scores.topk(min(k + 1, scores.shape[1]))
    tied = (values[:, 1:] == values[:, :-1]).any(1)
    for row in tied.nonzero()[:, 0].tolist():
        # all that could be among the k, by their place
        among = (scores[row] >= values[row, k - 1]).nonzero()[:, 0]
        order = scores[row, among].argsort(descending=True, stable=True)[:k]
        found[row, :k] = among[order]
        values[row, :k] = scores[row, among[order]]
    return values[:, :k], found[:, :k]


def mask_reference(scores: Tensor, reference: Tensor) -> None:
    """In place: the score of each row's reference (B indices, -1: none) becomes minus infinity."""
    rows = torch.arange(len(scores), device=scores.device)[reference >= 0]
    scores[rows, reference[reference >= 0]] = float("-inf")


def _faiss():
    """FAISS, which is imported only where it is used.

    On macOS, PyTorch and FAISS bring an OpenMP each, and two of them in one process may stop or
    crash it (an open issue of both: github.com/faiss-wheels/faiss-wheels/issues/73). The usual way
    round, not tried by us: allow two, and give FAISS one thread.
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

    kind: "flat" compares a query with every image: exact. "ivf" (inverted file) is approximate:
    k-means puts the images into `lists` lists (0: the square root of their number), and a query
    looks through the `probes` lists nearest to it. `agreement` measures what that loses. Where it
    finds fewer than k, index -1 and score minus infinity fill up.
    """

    kind: str = "flat"
    lists: int = 0
    probes: int = 8

    def __post_init__(self):
        super().__post_init__()
        if self.kind not in ("flat", "ivf"):
            raise ValueError(
                f"kind must be 'flat' (exact) or 'ivf' (approximate), not {self.kind!r}"
            )
        # k-means wants 39 points a list, and says so where it gets fewer.
        check_settings(self, lists=whole(0, len(self)), probes=whole(1))
        lists = self.lists or max(1, min(round(len(self) ** 0.5), len(self) // 39))
        faiss, width = _faiss(), self.embeddings.shape[1]
        # inner product: the cosine, as everything has the length 1
        index = faiss.IndexFlatIP(width)
        if self.kind == "ivf":
            index = faiss.IndexIVFFlat(index, width, lists, faiss.METRIC_INNER_PRODUCT)
            # somebody who asks for more lists has been told, above
            index.cp.min_points_per_centroid = 1
            index.train(self._numpy(self.embeddings))  # from a fixed seed
            index.nprobe = min(self.probes, lists)
        index.add(self._numpy(self.embeddings))
        self.index = index

    @staticmethod
    def _numpy(vectors: Tensor) -> np.ndarray:
        return np.ascontiguousarray(vectors.detach().cpu().float().numpy())

    def _found(self, queries: Tensor, k: int, exclude: Tensor) -> tuple[Tensor, Tensor]:
        exclude = exclude[:, None].cpu()  # B x 1
        # one more, where one may be left out
        scores, found = self._search(self._numpy(queries), k + int((exclude >= 0).any()))
        unwanted = (found == exclude) & (exclude >= 0)
        # to the end with them; the rest stays in order
        order = unwanted.to(torch.uint8).argsort(dim=1, stable=True)
        return scores.gather(1, order)[:, :k], found.gather(1, order)[:, :k]

    def _search(self, queries: np.ndarray, k: int) -> tuple[Tensor, Tensor]:
        """Scores and indices, B x k each; of equal scores the smaller index first."""
        wanted = min(k + 1, len(self))
        while True:
            scores, found = map(torch.from_numpy, self.index.search(queries, max(k, wanted)))
            scores[found < 0] = float("-inf")
            last = scores[:, k - 1]
            if wanted >= len(self) or not ((scores[:, -1] == last) & last.isfinite()).any():
                break
            # the last one equals the k-th, so more may equal it
            wanted = min(2 * wanted, len(self))
        order = found.argsort(dim=1, stable=True)
        scores, found = scores.gather(1, order), found.gather(1, order)
        order = scores.argsort(dim=1, descending=True, stable=True)
        return scores.gather(1, order)[:, :k], found.gather(1, order)[:, :k]


def agreement(found: Tensor, exact: Tensor) -> float:
    """The share, in percent, of the exact answers that were found; both B x k indices."""
    return 100 * float((found[:, :, None] == exact[:, None, :]).any(1).float().mean())
