"""A benchmark of rendered scenes: queries, their gallery with hard negatives, groups of queries."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from isa_lite.retrieval.metrics import cell
from isa_lite.retrieval.queries import Queries
from isa_lite.support.parameters import checked, optional, scene_count, whole
from isa_lite.world import load_world


@dataclass(kw_only=True)
class Benchmark(Queries):
    """Composed queries over a gallery of G rendered scenes, each of which knows what it shows.

    images: G x S x S x 3 uint8; scenes, jitter: what they show, and their rendering seeds; labels:
    G integers, equal for equal scenes, all of which are right answers. target: of each query, the
    image that was rendered as its answer. kinds[i] names the one or two changes of query i;
    held_out[i]: its reference or target shows a pair that no training has seen. world: its name
    (`isa_lite.world`).
    """

    world: str
    scenes: list[Hashable]
    jitter: np.ndarray
    labels: np.ndarray
    target: np.ndarray
    kinds: list[tuple[str, ...]]
    held_out: np.ndarray
    targets: Sequence[Sequence[int]] = field(init=False, repr=False)

    def __post_init__(self):
        super().__post_init__()
        equal = [np.flatnonzero(self.labels == self.labels[t]) for t in self.target]
        pairs = zip(self.target, equal, strict=True)
        self.targets = [[t, *found[found != t]] for t, found in pairs]

    def captions(self, rows: Sequence[int], seed: int = 0) -> list[str]:
        """A full caption of each of these images, drawn from the seed."""
        rng = np.random.default_rng((seed, 8))
        return [load_world(self.world).caption(self.scenes[i], rng) for i in rows]


def check_gallery(queries: int, gallery: int) -> None:
    """Raises ValueError for a gallery too small for the queries (`make_benchmark`)."""
    if gallery < 4 * queries:
        fault = f"parameter 'gallery' must be at least {4 * queries}"
        raise ValueError(f"{fault}, four times 'queries', not {gallery}")


@checked(
    queries=scene_count(1, each=4),
    gallery=scene_count(1),
    seed=whole(0),
    size=optional(whole(8, 4096)),
)
def make_benchmark(
    queries: int = 1000,
    gallery: int = 5000,
    seed: int = 0,
    size: int | None = None,
    world: str = "shapes",
) -> Benchmark:
    """Queries and gallery from a seed; held-out pairs are allowed. size: None: the world's own.

    The gallery holds, for each query, its reference, its target and two hard negatives (the
    reference after *other* changes), and is filled up to `gallery` with random scenes. Raises
    ValueError where that is more than `gallery`.
    """
    check_gallery(queries, gallery)
    scenes = load_world(world)
    rng = np.random.default_rng((seed, 5))
    shown: list[Hashable] = []
    texts, kinds = [], []
    for _ in range(queries):
        base = scenes.sample_scene(rng, held_out=True)
        wanted, change = scenes.modify(base, rng, held_out=True)
        others: list[Hashable] = []
        while len(others) < 2:
            other = scenes.modify(base, rng, held_out=True)[0]
            if other not in (wanted, *others):
                others.append(other)
        texts.append(change.text)
        kinds.append(change.kinds)
        shown += [base, wanted, *others]
    shown += [scenes.sample_scene(rng, held_out=True) for _ in range(gallery - len(shown))]
    jitter = rng.integers(2**31, size=gallery)
    number = {scene: i for i, scene in enumerate(dict.fromkeys(shown))}
    reference = 4 * np.arange(queries)
    unseen = np.array([scene.held_out for scene in shown])
    return Benchmark(
        images=scenes.render_many(shown, jitter, size or scenes.IMAGE_SIZE),
        reference=reference,
        texts=texts,
        world=world,
        scenes=shown,
        jitter=jitter,
        labels=np.array([number[scene] for scene in shown]),
        target=reference + 1,
        kinds=kinds,
        held_out=unseen[reference] | unseen[reference + 1],
    )


def groups(bench: Benchmark) -> dict[str, np.ndarray]:
    """Named subsets of the queries, B bool: all, each kind, two changes, seen and held-out."""
    alone = load_world(bench.world).KINDS
    kinds = {kind: np.array([k == (kind,) for k in bench.kinds]) for kind in alone}
    kinds["two changes"] = np.array([len(k) == 2 for k in bench.kinds])
    seen = {"seen pairs": ~bench.held_out, "held-out pairs": bench.held_out}
    return {"all": np.ones(len(bench), bool)} | kinds | seen


def group_table(bench: Benchmark, methods: Mapping[str, np.ndarray], k: int = 1) -> pd.DataFrame:
    """Recall@K in percent with its 95% interval: a row a group (with its size) of queries."""
    chosen = {f"{name} ({mask.sum()})": mask for name, mask in groups(bench).items() if mask.any()}

    def column(rank: np.ndarray) -> dict[str, str]:
        return {name: cell(rank[mask], k) for name, mask in chosen.items()}

    return pd.DataFrame({name: column(rank) for name, rank in methods.items()})
