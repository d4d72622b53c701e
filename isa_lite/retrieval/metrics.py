"""Metrics of a ranking: the rank of the best hit, Recall@K, and intervals of what is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from scipy import stats
from torch import Tensor

from isa_lite.retrieval.gallery import indices, mask_reference
from isa_lite.support.parameters import checked, whole

KS = (1, 5, 10)


def ranks(queries: Tensor, gallery: Tensor, reference: np.ndarray, hits: Tensor) -> np.ndarray:
    """`score_ranks` by cosine: queries B x E, gallery G x E, length 1. ValueError for misfits."""
    for name, points in (("gallery", gallery), ("queries", queries)):
        good = isinstance(points, Tensor) and points.is_floating_point() and points.ndim == 2
        if not good or points.isnan().any() or points.shape[1] != gallery.shape[1]:
            fault = f"{name} must be numbers, of the same width in queries and gallery"
            raise ValueError(f"{fault}, and a row for each")
    return score_ranks(queries.float() @ gallery.float().T, reference, hits)


def score_ranks(scores: Tensor, reference: np.ndarray, hits: Tensor) -> np.ndarray:
    """The rank (1 = first) of each query's best hit in the gallery, with the reference left out.

    scores: B x G, higher is better; reference: B gallery indices (-1: none); hits: B x G bool. A
    tie with something that is no hit counts against the query. Raises ValueError for a query
    without a hit, and for scores, reference or hits that do not belong together.
    """
    if not isinstance(scores, Tensor) or scores.ndim != 2 or scores.isnan().any():
        raise ValueError("scores must be numbers, B x G")
    reference, (queries, images) = indices(reference), scores.shape
    whole_numbers = reference.shape == (queries,) and not reference.is_floating_point()
    if not whole_numbers or not ((reference >= -1) & (reference < images)).all():
        raise ValueError(f"reference must be {queries} indices from -1 to {images - 1}")
    if not isinstance(hits, Tensor) or hits.dtype != torch.bool or hits.shape != scores.shape:
        raise ValueError(f"hits must be bool, {queries} x {images}")
    scores = scores.clone()
    mask_reference(scores, reference)
    hits = hits & scores.isfinite()
    if not hits.any(1).all():
        fault = f"query {int((~hits.any(1)).nonzero()[0])} has no hit"
        raise ValueError(f"{fault} in the gallery apart from its reference")
    best = scores.masked_fill(~hits, float("-inf")).amax(1, keepdim=True)  # B x 1
    return ((scores >= best) & ~hits).sum(1).add(1).numpy()


@checked(k=whole(1))
def recall(rank: np.ndarray, k: int) -> float:
    """Recall@K in percent: the share of queries with a best hit (rank, from 1) in the first K."""
    rank = np.asarray(rank)
    if rank.dtype.kind not in "iu" or not rank.size or rank.min() < 1:
        fault = "rank must hold a whole number of at least 1 for each query"
        raise ValueError(f"{fault}, not {np.array2string(rank, threshold=5)}")
    return float(100 * np.mean(rank <= k))


def wilson_interval(
    hits: ArrayLike, count: ArrayLike, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the interval of a share, `hits` of `count`, as shares; arrays that broadcast.

    The true shares that a score test would not reject (Wilson, "Probable inference, the law of
    succession, and statistical inference", JASA 1927). Unlike a bootstrap it has a width where all
    or none are hits: 60 of 60 gives 0.94 to 1. A 95% interval means: of such intervals, each from
    queries drawn anew, about 95 in 100 hold the true share. It does not mean that 95 in 100 new
    results fall into this one. Raises ValueError for a count below 1 or hits outside 0 to count.
    """
    hits, count = np.asarray(hits, float), np.asarray(count, float)
    if not ((count >= 1) & (hits >= 0) & (hits <= count)).all():
        fault = "wilson_interval: hits must lie between 0 and count"
        raise ValueError(f"{fault}, and count be at least 1, not {hits} of {count}")
    z, share = stats.norm.ppf((1 + level) / 2), hits / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * np.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2) / (1 + z**2 / count)
    # Without a miss it ends at 1, and without a hit at 0; rounding would stop just short of them.
    return np.where(hits == 0, 0.0, middle - half), np.where(hits == count, 1.0, middle + half)


def recall_interval(rank: np.ndarray, k: int) -> tuple[float, float]:
    """95% interval of Recall@K over queries, in percent (`wilson_interval`)."""
    low, high = wilson_interval(np.count_nonzero(rank <= k), len(rank))
    return 100 * float(low), 100 * float(high)


def bootstrap_interval(values: ArrayLike, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95% interval of the mean of B values, one per query, from queries drawn again with
    replacement (percentile bootstrap).

    For means that are no share of hits: the mean average precision of CIRCO, or a difference
    (`paired_interval`). A share has `wilson_interval`. Raises ValueError unless there are at least
    two values, all of them numbers.
    """
    values = np.asarray(values, float)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        fault = "bootstrap_interval: values must be at least two finite numbers in a row"
        raise ValueError(f"{fault}, not of shape {values.shape}")
    rng = np.random.default_rng((seed, 6))
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def paired_interval(
    first: ArrayLike, second: ArrayLike, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95% interval (paired bootstrap) of the mean of `first` - `second`, B values, same queries.

    A drawn query counts for both methods, so what is hard for both cancels out. Values: 0 or 100
    for a miss or a hit gives points of recall (`recall_difference`); average precisions give points
    of mAP. Raises ValueError for other lengths.
    """
    first, second = np.asarray(first, float), np.asarray(second, float)
    if first.shape != second.shape:
        fault = "paired_interval: first and second must hold the same queries"
        raise ValueError(f"{fault}, not {first.shape} and {second.shape}")
    return bootstrap_interval(first - second, draws, seed)


def recall_difference(
    first: np.ndarray, second: np.ndarray, k: int = 1
) -> tuple[float, float, float]:
    """Recall@K of ranks `first` minus `second`'s, in points, with its paired 95% interval."""
    hit, other = 100.0 * (first <= k), 100.0 * (second <= k)
    return float((hit - other).mean()), *paired_interval(hit, other)


def seed_interval(values: Sequence[float]) -> tuple[float, float]:
    """95% interval (Student's t) of the mean over seeds; (nan, nan) for one seed."""
    if len(values) < 2:
        return float("nan"), float("nan")
    t, mean = stats.t.ppf(0.975, len(values) - 1), float(np.mean(values))
    half = float(t * np.std(values, ddof=1) / np.sqrt(len(values)))
    return mean - half, mean + half


def cell(rank: np.ndarray, k: int) -> str:
    low, high = recall_interval(rank, k)
    return f"{recall(rank, k):.1f} [{low:.1f}, {high:.1f}]"


def recall_table(methods: Mapping[str, np.ndarray], ks: tuple[int, ...] = KS) -> pd.DataFrame:
    """Recall@K with its 95% interval for every method, as text like `52.1 [49.0, 55.2]`."""
    rows = {name: [cell(rank, k) for k in ks] for name, rank in methods.items()}
    return pd.DataFrame.from_dict(rows, "index", columns=[f"R@{k}" for k in ks])
