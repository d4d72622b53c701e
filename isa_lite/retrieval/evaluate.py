"""Evaluation on rendered scenes: queries with a gallery of hard negatives, ranks, Recall@K with
intervals.

`python -m isa_lite evaluate runs/02_distillation/metrics.json` prints the table of a finished run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from scipy import stats
from torch import Tensor

from isa_lite.retrieval.gallery import indices, mask_reference
from isa_lite.support.checkpoint import Between, misfit, read_json
from isa_lite.support.parameters import checked, scene_count, whole
from isa_lite.world import scenes
from isa_lite.world.scenes import KINDS, Scene

KS = (1, 5, 10)
#: What a results file holds (`checkpoint.misfit`): of each method its recall in percent; a run; a
#: run as notebook 02 writes it.
RECALLS = {str: {f"R@{k}": Between(0, 100) for k in KS}}
RUN = {
    "seed": int,
    "queries": int,
    "gallery": int,
    "params": dict,
    "methods": RECALLS,
    "training_seconds": {str: float},
}
METRICS = RUN | {"intervals": {str: {f"R@{k}": (Between(0, 100), Between(0, 100)) for k in KS}}}
METRICS |= {"data": str, "machine": str, "groups": dict}
#: Several runs of notebook 02 as `gather` puts them together.
NAMED = ("isa", "image + text", "composition ceiling", "target ceiling")
GATHERED = RUN | {
    "params": {"lar_weight": float},
    "methods": RECALLS | dict.fromkeys(NAMED, RECALLS[str]),
}
GATHERED = {"machine": str, "runs": [GATHERED, ...]}


@dataclass
class Benchmark:
    """Composed queries over a gallery of rendered scenes.

    scenes, jitter: the gallery's G scenes and their rendering seeds; images: G x S x S x 3 uint8;
    labels: G integers, equal for equal scenes. A query i is (reference[i], texts[i]) with the
    target scene that target[i] shows; both are gallery indices. kinds[i] names its one or two
    changes; held_out[i]: reference or target shows a shape-colour pair that no training has seen.
    """

    scenes: list[Scene]
    jitter: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    reference: np.ndarray
    target: np.ndarray
    texts: list[str]
    kinds: list[tuple[str, ...]]
    held_out: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)


def check_gallery(queries: int, gallery: int) -> None:
    """Raise ValueError where a gallery of so many images has no room for what so many queries bring
    (`make_benchmark`).
    """
    if gallery < 4 * queries:
        raise ValueError(
            f"parameter 'gallery' must be at least {4 * queries}, four times 'queries', not"
            f" {gallery}"
        )


@checked(queries=scene_count(1, each=4), gallery=scene_count(1), seed=whole(0), size=whole(8, 4096))
def make_benchmark(
    queries: int = 1000, gallery: int = 5000, seed: int = 0, size: int = scenes.IMAGE_SIZE
) -> Benchmark:
    """Queries and gallery from a seed (no scene of training is reused on purpose; held-out pairs
    are allowed here).

    The gallery holds, for each query, its reference, its target and two hard negatives (the
    reference after *other* changes), and is filled up to `gallery` with random scenes. Raises
    ValueError where that is more than `gallery`.
    """
    check_gallery(queries, gallery)
    rng = np.random.default_rng((seed, 5))
    world: list[Scene] = []
    reference, target, texts, kinds = [], [], [], []
    for _ in range(queries):
        base = scenes.sample_scene(rng, held_out=True)
        wanted, change = scenes.modify(base, rng, held_out=True)
        others: list[Scene] = []
        while len(others) < 2:
            other = scenes.modify(base, rng, held_out=True)[0]
            if other not in (wanted, *others):
                others.append(other)
        (
            reference.append(len(world)),
            target.append(len(world) + 1),
            texts.append(change.text),
            kinds.append(change.kinds),
        )
        world += [base, wanted, *others]
    world += [scenes.sample_scene(rng, held_out=True) for _ in range(gallery - len(world))]
    jitter = rng.integers(2**31, size=gallery)
    number = {scene: i for i, scene in enumerate(dict.fromkeys(world))}
    return Benchmark(
        world,
        jitter,
        scenes.render_many(world, jitter, size),
        np.array([number[s] for s in world]),
        np.array(reference),
        np.array(target),
        texts,
        kinds,
        np.array(
            [world[r].held_out or world[t].held_out for r, t in zip(reference, target, strict=True)]
        ),
    )


def ranks(queries: Tensor, gallery: Tensor, reference: np.ndarray, hits: Tensor) -> np.ndarray:
    """`score_ranks` by cosine: queries B x E, gallery G x E, both L2-normalised. Raises ValueError
    for another width or NaN.
    """
    for name, points in (("gallery", gallery), ("queries", queries)):
        good = (
            isinstance(points, Tensor)
            and points.is_floating_point()
            and points.ndim == 2
            and not points.isnan().any()
        )
        if not good or points.shape[1] != gallery.shape[1]:
            raise ValueError(
                f"{name} must be numbers, of the same width in queries and gallery, and a row for"
                " each"
            )
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
    if (
        reference.shape != (queries,)
        or reference.is_floating_point()
        or not ((reference >= -1) & (reference < images)).all()
    ):
        raise ValueError(f"reference must be {queries} indices from -1 to {images - 1}")
    if not isinstance(hits, Tensor) or hits.dtype != torch.bool or hits.shape != scores.shape:
        raise ValueError(f"hits must be bool, {queries} x {images}")
    scores = scores.clone()
    mask_reference(scores, reference)
    hits = hits & scores.isfinite()
    if not hits.any(1).all():
        raise ValueError(
            f"query {int((~hits.any(1)).nonzero()[0])} has no hit in the gallery apart from its"
            " reference"
        )
    best = scores.masked_fill(~hits, float("-inf")).amax(1, keepdim=True)  # B x 1
    return ((scores >= best) & ~hits).sum(1).add(1).numpy()


def benchmark_ranks(bench: Benchmark, queries: Tensor, gallery: Tensor) -> np.ndarray:
    """`benchmark_score_ranks` by cosine: queries B x E, gallery G x E, both L2-normalised."""
    return benchmark_score_ranks(bench, queries @ gallery.T)


def benchmark_score_ranks(bench: Benchmark, scores: Tensor) -> np.ndarray:
    """`score_ranks` for a benchmark and scores B x G: a hit is every gallery image with the
    target's label.
    """
    hits = torch.from_numpy(bench.labels[bench.target][:, None] == bench.labels[None])  # B x G
    return score_ranks(scores, bench.reference, hits)


@checked(k=whole(1))
def recall(rank: np.ndarray, k: int) -> float:
    """Recall@K in percent: the share of queries whose best hit is among the first K. rank: of each,
    from 1.
    """
    rank = np.asarray(rank)
    if rank.dtype.kind not in "iu" or not rank.size or rank.min() < 1:
        raise ValueError(
            "rank must hold a whole number of at least 1 for each query, not"
            f" {np.array2string(rank, threshold=5)}"
        )
    return float(100 * np.mean(rank <= k))


def wilson_interval(
    hits: ArrayLike, count: ArrayLike, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the interval of a share, `hits` of `count`, as shares; arrays of any shape that
    broadcast.

    The true shares that a score test would not reject (Wilson, "Probable inference, the law of
    succession, and statistical inference", JASA 1927). Unlike a bootstrap it has a width where all
    or none are hits: 60 of 60 gives 0.94 to 1. A 95% interval means: of such intervals, each from
    queries drawn anew, about 95 in 100 hold the true share. It does not mean that 95 in 100 new
    results fall into this one. Raises ValueError for a count below 1 or hits outside 0 to count.
    """
    hits, count = np.asarray(hits, float), np.asarray(count, float)
    if not ((count >= 1) & (hits >= 0) & (hits <= count)).all():
        raise ValueError(
            "wilson_interval: hits must lie between 0 and count, and count be at least 1, not"
            f" {hits} of {count}"
        )
    z, share = stats.norm.ppf((1 + level) / 2), hits / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * np.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2) / (1 + z**2 / count)
    # Without a miss the interval ends at 1, and without a hit at 0; rounding would stop just short
    # of them.
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
        raise ValueError(
            "bootstrap_interval: values must be at least two finite numbers in a row, not of shape"
            f" {values.shape}"
        )
    rng = np.random.default_rng((seed, 6))
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def paired_interval(
    first: ArrayLike, second: ArrayLike, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95% interval of the mean of `first` - `second`, B values each for the *same* queries (paired
    bootstrap).

    A drawn query counts for both methods, so what is hard for both cancels out. Values: 0 or 100
    for a miss or a hit gives points of recall (`recall_difference`); average precisions give points
    of mAP. Raises ValueError for other lengths.
    """
    first, second = np.asarray(first, float), np.asarray(second, float)
    if first.shape != second.shape:
        raise ValueError(
            f"paired_interval: first and second must hold the same queries, not {first.shape} and"
            f" {second.shape}"
        )
    return bootstrap_interval(first - second, draws, seed)


def recall_difference(
    first: np.ndarray, second: np.ndarray, k: int = 1
) -> tuple[float, float, float]:
    """Recall@K of ranks `first` minus that of `second`, same queries, in points: the difference and
    its 95% interval, paired.
    """
    hit, other = 100.0 * (first <= k), 100.0 * (second <= k)
    return float((hit - other).mean()), *paired_interval(hit, other)


def _cell(rank: np.ndarray, k: int) -> str:
    low, high = recall_interval(rank, k)
    return f"{recall(rank, k):.1f} [{low:.1f}, {high:.1f}]"


def recall_table(methods: Mapping[str, np.ndarray], ks: tuple[int, ...] = KS) -> pd.DataFrame:
    """Recall@K with its 95% interval for every method, as text like `52.1 [49.0, 55.2]`."""
    rows = {name: [_cell(rank, k) for k in ks] for name, rank in methods.items()}
    return pd.DataFrame.from_dict(rows, "index", columns=[f"R@{k}" for k in ks])


def groups(bench: Benchmark) -> dict[str, np.ndarray]:
    """Named subsets of the queries as B bool: all, each kind alone, two changes at once, seen and
    held-out pairs.
    """
    kinds = {kind: np.array([k == (kind,) for k in bench.kinds]) for kind in KINDS}
    two = {"two changes": np.array([len(k) == 2 for k in bench.kinds])}
    return (
        {"all": np.ones(len(bench), bool)}
        | kinds
        | two
        | {"seen pairs": ~bench.held_out, "held-out pairs": bench.held_out}
    )


def group_table(bench: Benchmark, methods: Mapping[str, np.ndarray], k: int = 1) -> pd.DataFrame:
    """Recall@K in percent with its 95% interval: a row a group of queries (with its size), a column
    a method.
    """
    chosen = {f"{name} ({mask.sum()})": mask for name, mask in groups(bench).items() if mask.any()}
    return pd.DataFrame(
        {
            m: {name: _cell(rank[mask], k) for name, mask in chosen.items()}
            for m, rank in methods.items()
        }
    )


def metrics(
    bench: Benchmark, methods: Mapping[str, np.ndarray], seed: int, params: Mapping
) -> dict:
    """What a run writes to metrics.json: recall of every method in percent, its interval, and by
    group.
    """

    def recalls(mask: np.ndarray) -> dict:
        return {m: {f"R@{k}": round(recall(r[mask], k), 2) for k in KS} for m, r in methods.items()}

    def intervals(mask: np.ndarray) -> dict:
        return {
            m: {f"R@{k}": [round(v, 2) for v in recall_interval(r[mask], k)] for k in KS}
            for m, r in methods.items()
        }

    found = {name: mask for name, mask in groups(bench).items() if mask.any()}
    return {
        "queries": len(bench),
        "gallery": len(bench.scenes),
        "data": "rendered scenes",
        "seed": seed,
        "params": dict(params),
        "methods": recalls(found["all"]),
        "intervals": intervals(found["all"]),
        "groups": {
            n: {"queries": int(m.sum()), "methods": recalls(m), "intervals": intervals(m)}
            for n, m in found.items()
        },
    }


def seed_interval(values: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean over seeds, from Student's t: few seeds, wide interval. (nan, nan)
    for one seed.
    """
    if len(values) < 2:
        return float("nan"), float("nan")
    half = float(
        stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    )
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def read_metrics(path: str | Path) -> dict:
    """The metrics.json of a run of notebook 02. Raises FileNotFoundError, or ValueError naming the
    file, for another one.
    """
    found = read_json(
        Path(path), "the results of notebook 02 (metrics.json in its out_dir)", METRICS
    )
    if without := sorted(set(found["methods"]) ^ set(found["intervals"])):
        raise ValueError(
            f"{path} has only a recall or only its interval of {without[0]!r}; run notebook 02"
            " again"
        )
    return found


def read_alike(path: Path, what: str, shape: dict, rows: str = "runs") -> dict:
    """`checkpoint.read_json` of a record whose `rows` name the same methods, and the same of what
    else they tell by name.
    """
    found = read_json(path, what, shape)
    first = found[rows][0]
    for i, row in enumerate(found[rows]):
        for key in ("methods", "training_seconds", "weights"):
            if key in shape[rows][0] and (other := set(row[key]) ^ set(first[key])):
                raise ValueError(
                    f"{path} should hold {what}, but {min(other)!r} is not in the {key} of all"
                    f" {rows}, see {rows}[{i}]"
                )
    return found


def gather(paths: Sequence[Path]) -> dict:
    """Several runs' metrics.json as one record: what `runs_table` shows, with the machine. Raises
    what `read_metrics` raises.
    """
    paths = list(paths)
    runs = [read_metrics(path) for path in paths]
    if other := [
        path
        for path, run in zip(paths, runs, strict=True)
        if misfit(run["params"], {"lar_weight": float})
    ]:
        raise ValueError(f"{other[0]} does not say its lar_weight; run notebook 02 again")
    kept = ("seed", "queries", "gallery", "params", "methods", "training_seconds", "groups")
    for run in runs:
        run["params"].pop("out_dir", None)  # where a run wrote is of no interest to others
    return {
        "machine": " / ".join(sorted({r["machine"] for r in runs})),
        "runs": [{k: r[k] for k in kept} for r in runs],
    }


def runs_table(
    runs: Sequence[Mapping],
    parameter: str | None = "lar_weight",
    methods: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Mean Recall@K over seeds with its 95% interval, a row a method; ISA has one a value of
    `parameter`, if there is one.
    """
    # of each row, the recalls by seed: a seed counts once
    rows: dict[str, dict[int, Mapping[str, float]]] = {}
    for run in sorted(runs, key=lambda r: r["params"][parameter] if parameter else 0):
        for name, found in run["methods"].items():
            if methods is None or name in methods:
                row = (
                    f"{name}, {parameter} {run['params'][parameter]:g}"
                    if parameter and name == "isa"
                    else name
                )
                rows.setdefault(row, {})[run["seed"]] = found
    cells = {}
    for name, found in rows.items():
        values = {k: [f[f"R@{k}"] for f in found.values()] for k in KS}
        cells[f"{name} ({len(found)} seeds)"] = [_mean(values[k]) for k in KS]
    return pd.DataFrame.from_dict(cells, "index", columns=[f"R@{k}" for k in KS])


def _mean(values: Sequence[float]) -> str:
    # Student's interval may reach where no recall is
    low, high = np.clip(seed_interval(values), 0, 100)
    return f"{np.mean(values):.1f} [{low:.1f}, {high:.1f}]"


def effect(
    runs: Sequence[Mapping], k: int = 1, parameter: str = "lar_weight", method: str = "isa"
) -> np.ndarray:
    """What the higher of two values of `parameter` adds to Recall@K, in points, a number a seed
    (paired: same seed, same data).

    Raises ValueError unless there are exactly two values, each run with the same seeds.
    """
    found: dict[float, dict[int, float]] = {}
    for run in runs:
        found.setdefault(run["params"][parameter], {})[run["seed"]] = run["methods"][method][
            f"R@{k}"
        ]
    if len(found) != 2 or len({frozenset(by_seed) for by_seed in found.values()}) != 1:
        seeds = {value: sorted(by_seed) for value, by_seed in found.items()}
        raise ValueError(f"two values of {parameter} with the same seeds are needed, not {seeds}")
    low, high = (found[value] for value in sorted(found))
    return np.array([high[seed] - low[seed] for seed in sorted(low)])
