"""Maps of embeddings, the modality gap, and probes, on data whose answer is known."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from isa_lite.analysis.spaces import FACTS, modality_gap, probes, project
from isa_lite.world.scenes import sample_scenes


def test_the_gap_is_the_distance_of_the_centres():
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # centre (1/2, 1/2)
    b = torch.tensor([[-1.0, 0.0], [0.0, 1.0]])  # centre (-1/2, 1/2)
    assert modality_gap(a, b) == pytest.approx(1.0)
    assert modality_gap(a, a.flip(0)) == 0


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_two_clusters_stay_apart_and_every_point_keeps_its_name(method):
    draw = torch.Generator().manual_seed(0)
    centre = 4 * F.normalize(torch.randn(2, 16, generator=draw), dim=-1)
    near = {
        name: centre[i] + 0.1 * torch.randn(20 + i, 16, generator=draw)
        for i, name in enumerate(("a", "b"))
    }
    found = project(near, method)
    assert {k: v.shape for k, v in found.items()} == {"a": (20, 2), "b": (21, 2)}
    within = max(np.ptp(points, axis=0).max() for points in found.values())
    assert np.linalg.norm(found["a"].mean(0) - found["b"].mean(0)) > within / 2
    # the seed decides
    assert all(np.array_equal(found[k], v) for k, v in project(near, method).items())


def test_a_probe_finds_the_token_that_holds_a_fact_and_only_that():
    world = [s for s in sample_scenes(900, seed=2) if len(s.objects) == 1]
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randn(len(world), 2, 24, generator=draw)
    names = sorted({s.background for s in world})
    tokens[:, 1, : len(names)] += 3 * F.one_hot(
        torch.tensor([names.index(s.background) for s in world]), len(names)
    )
    table = probes(tokens, world)
    assert list(table.index) == ["token 1", "token 2", "all", "guessing"] and list(
        table.columns
    ) == list(FACTS)
    assert table.loc["token 2", "background"] > 85
    assert table.loc["token 1", "background"] < table.loc["guessing", "background"] + 12
    assert table.loc["token 2", "shape"] < table.loc["guessing", "shape"] + 12
    assert probes(tokens, world, facts=["shape"], together=False).equals(
        table[["shape"]].drop("all")
    )


def test_what_cannot_be_drawn_or_probed_is_refused():
    with pytest.raises(ValueError, match="'pca'.*'umap'"):
        project({"a": torch.zeros(5, 3)}, "umap")
    with pytest.raises(ValueError, match="2 embeddings are too few"):
        project({"a": torch.zeros(2, 3)})
    world = sample_scenes(30, seed=0)
    with pytest.raises(ValueError, match="exactly one object"):
        probes(torch.zeros(30, 1, 4), world)
