"""Recall and search time as the gallery grows: `python -m isa_lite growth`.

Distractors are rendered from a seed and embedded once, in shards that resume. A distractor that
happens to show the very scene that a query asks for is a hit, as everywhere in this project.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from isa_lite.deploy.measure import side_by_side
from isa_lite.methods.baselines import composition_ceiling, image_plus_text
from isa_lite.methods.isa import Isa
from isa_lite.models.vl_model import VLModel
from isa_lite.query_encoder import QueryEncoder
from isa_lite.retrieval.gallery import Gallery
from isa_lite.retrieval.metrics import KS, recall, recall_interval, score_ranks
from isa_lite.retrieval.scene_queries import Benchmark, make_benchmark
from isa_lite.support.checkpoint import Between, read_info, read_shard, write_tensors
from isa_lite.support.settings import GROWTH_SIZES
from isa_lite.world.scenes import Scene, render_many, sample_scene

SHARD = 10_000
_RECALL = {f"R@{k}": (Between(0, 100),) * 3 for k in KS}
_METHODS = {str: _RECALL} | dict.fromkeys(("isa", "image + text", "composition ceiling"), _RECALL)
#: What the file of a growth curve holds (`checkpoint.misfit`).
GROWN = {"queries": int, "machine": str, "date": str, "embedding_seconds": Between(0, 1e9)}
_POINT = {"gallery": Between(1, 1e12), "search_ms": Between(0, 1e9), "methods": _METHODS}
GROWN |= {"points": [_POINT, ...]}


def scene_key(scene: Scene) -> int:
    """64 bits that are equal for equal scenes."""
    digest = hashlib.blake2b(repr(scene).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _shard(vl: VLModel, seed: int, cache: str | Path, start: int, shard: int) -> Path:
    return Path(cache) / f"{vl.fingerprint}-{seed}-{start}-{shard}.safetensors"


def distractors(
    vl: VLModel, count: int, seed: int, cache: str | Path, shard: int = SHARD, progress: bool = True
) -> Iterator:
    """Shards of rendered scenes: embeddings n x E (float16) and `scene_key`s n; kept in `cache`."""
    how = {"desc": "distractors", "unit": "image", "mininterval": 2, "disable": not progress}
    with tqdm(total=count, **how) as bar:
        for start in range(0, count, shard):
            path = _shard(vl, seed, cache, start, shard)
            stored = read_shard(path)
            if stored is None:
                began = time.perf_counter()
                rng = np.random.default_rng((seed, 9, start))
                world = [sample_scene(rng, held_out=True) for _ in range(shard)]
                keys = torch.tensor([scene_key(scene) for scene in world])
                jitter, parts = rng.integers(2**31, size=shard), []
                for s in range(0, shard, 500):
                    some = slice(s, s + 500)
                    pictures = render_many(world[some], jitter[some], vl.image_size)
                    parts.append(vl.encode_images(pictures).half())
                seconds = time.perf_counter() - began
                stored = {"embeddings": torch.cat(parts), "keys": keys}
                write_tensors(path, stored, {"seconds": seconds})
            here = min(shard, count - start)
            bar.update(here)
            yield stored["embeddings"][:here], stored["keys"][:here]


def growth_ranks(
    bench: Benchmark,
    queries: Mapping[str, Tensor],
    gallery: Tensor,
    shards: Sequence,
    sizes: Sequence[int],
) -> dict[str, np.ndarray]:
    """Ranks of queries (B x E) in a gallery (G x E) with `sizes` distractors: sizes x B.

    shards: pairs of embeddings and scene keys, in order. Ties and hits as in `score_ranks`.
    """
    everything = _joined(gallery, shards)
    own = [scene_key(scene) for scene in bench.scenes]
    keys = torch.cat([torch.tensor(own), *(k for _, k in shards)])
    targets = np.array(own)[bench.target]
    ranks = {name: np.zeros((len(sizes), len(bench)), int) for name in queries}
    # a few queries at a time: against a million images they are as many numbers
    for rows in np.array_split(np.arange(len(bench)), -(-len(bench) // 50)):
        hits = keys == torch.from_numpy(targets[rows])[:, None]
        for name, query in queries.items():
            scores = query[rows] @ everything.T
            for i, size in enumerate(sizes):
                known = slice(len(gallery) + size)
                some = scores[:, known], bench.reference[rows], hits[:, known]
                ranks[name][i, rows] = score_ranks(*some)
    return ranks


def _joined(gallery: Tensor, shards: Sequence) -> Tensor:
    """The benchmark's own images (G x E) and all distractors."""
    return torch.cat([gallery, *(embeddings.float() for embeddings, _ in shards)])


def search_time(embeddings: Tensor, query: Tensor, rounds: int = 15) -> float:
    """Median milliseconds of one exact search (query 1 x E, the ten best)."""
    gallery = Gallery(embeddings, range(len(embeddings)))
    return side_by_side({"": lambda: gallery.search(query, 10)}, rounds, warm_up=0)[""]


def growth(
    vl: VLModel,
    encoder: QueryEncoder,
    cache: str | Path,
    sizes: Sequence[int] = GROWTH_SIZES,
    queries: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> dict:
    """At every size: Recall@K with 95% Wilson intervals of three methods; search time."""
    bench = make_benchmark(queries, 4 * queries, seed, vl.image_size).embedded(vl)
    gallery = bench.gallery
    shards = list(distractors(vl, max(sizes), seed, cache, progress=progress))
    # What every shard took when it was made, in this call or an earlier one.
    files = [_shard(vl, seed, cache, start, SHARD) for start in range(0, max(sizes), SHARD)]
    embedding = sum(read_info(file)["seconds"] for file in files)
    methods = {
        "isa": Isa(encoder)(bench),
        "image + text": image_plus_text(bench),
        "composition ceiling": composition_ceiling(bench),
    }
    ranks = growth_ranks(bench, methods, gallery, shards, sizes)
    everything = _joined(gallery, shards)
    points = []
    for i, size in enumerate(sizes):
        recalls = {name: {} for name in ranks}
        for name, k in itertools.product(ranks, KS):
            rank = ranks[name][i]
            values = recall(rank, k), *recall_interval(rank, k)
            recalls[name][f"R@{k}"] = [round(v, 2) for v in values]
        count = len(gallery) + size
        ms = round(search_time(everything[:count], methods["isa"][:1]), 3)
        sizes_here = {"distractors": size, "gallery": count}
        points.append(sizes_here | {"methods": recalls, "search_ms": ms})
    about = {"data": "rendered scenes", "queries": queries, "seed": seed}
    return about | {"points": points, "embedding_seconds": round(embedding, 3)}


def growth_table(found: Mapping, k: int = 1) -> pd.DataFrame:
    """A row a gallery size: Recall@K of each method with its interval, and ms of one search."""
    told, rows = "{:.1f} [{:.1f}, {:.1f}]", {}
    for point in found["points"]:
        row = {name: told.format(*values[f"R@{k}"]) for name, values in point["methods"].items()}
        rows[f"{point['gallery']:,}"] = row | {"exact search, ms": point["search_ms"]}
    return pd.DataFrame.from_dict(rows, "index")
