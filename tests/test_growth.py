"""A growing gallery: the same ranks as ranking everything at once, and shards that are kept."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from isa_lite.experiments import growth
from isa_lite.experiments.growth import GROWN, distractors, growth_ranks, growth_table, scene_key
from isa_lite.query_encoder import QueryEncoder
from isa_lite.retrieval.metrics import score_ranks
from isa_lite.retrieval.scene_queries import make_benchmark
from isa_lite.support.checkpoint import misfit
from isa_lite.world.scenes import sample_scenes


@pytest.fixture(scope="module")
def bench():
    return make_benchmark(6, 24, seed=1, size=16)


def test_equal_scenes_have_equal_keys_and_others_do_not():
    a, b = sample_scenes(300, seed=1), sample_scenes(300, seed=1)
    assert [scene_key(s) for s in a] == [scene_key(s) for s in b]
    assert len({scene_key(s) for s in a}) == len(set(a))


def test_ranks_in_a_growing_gallery_are_those_of_ranking_everything_at_once(bench):
    draw = torch.Generator().manual_seed(0)

    def vectors(n):
        return F.normalize(torch.randn(n, 8, generator=draw), dim=-1)

    gallery, query = vectors(24), vectors(6)
    shards = []
    for _ in range(3):
        keys = torch.randint(10**9, (10,), generator=draw)
        # shows what query 2 asks for
        keys[torch.randint(10, (1,), generator=draw)] = scene_key(bench.scenes[bench.target[2]])
        shards.append((vectors(10).half(), keys))
    sizes = [5, 10, 23, 30]
    found = growth_ranks(bench, {"m": query}, gallery, shards, sizes)["m"]
    wanted = torch.tensor([scene_key(bench.scenes[t]) for t in bench.target])
    own = torch.tensor([scene_key(s) for s in bench.scenes])
    for row, size in zip(found, sizes, strict=True):
        everything = torch.cat([gallery, torch.cat([e for e, _ in shards])[:size].float()])
        keys = torch.cat([own, torch.cat([k for _, k in shards])[:size]])
        assert (
            row == score_ranks(query @ everything.T, bench.reference, keys == wanted[:, None])
        ).all()
    # more distractors never help, unless they are hits
    assert (np.diff(np.delete(found, 2, axis=1), axis=0) >= 0).all()


def test_shards_are_kept_and_begin_alike_whatever_the_count(vl, tmp_path, monkeypatch):
    long = list(distractors(vl, 25, 0, tmp_path, shard=10, progress=False))
    assert [len(keys) for _, keys in long] == [10, 10, 5]
    monkeypatch.setattr(type(vl), "encode_images", lambda *_: pytest.fail("embedded again"))
    short = list(distractors(vl, 12, 0, tmp_path, shard=10, progress=False))
    assert torch.equal(short[1][0], long[1][0][:2]) and torch.equal(short[1][1], long[1][1][:2])
    assert not torch.equal(long[0][1], long[1][1])


def test_a_damaged_shard_is_made_again(vl, tmp_path):
    first = list(distractors(vl, 10, 0, tmp_path, shard=10, progress=False))
    (shard,) = tmp_path.iterdir()
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    again = list(distractors(vl, 10, 0, tmp_path, shard=10, progress=False))
    assert torch.equal(first[0][0], again[0][0]) and shard.stat().st_size == len(whole)


def test_the_time_of_a_shard_is_that_of_its_making(vl, tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "SHARD", 20)
    monkeypatch.setattr(growth, "distractors", partial(distractors, shard=20))
    encoder = QueryEncoder.for_model(vl, num_tokens=1)
    first, again = (
        growth.growth(vl, encoder, tmp_path, (10, 30), queries=5, progress=False) for _ in range(2)
    )
    assert first["embedding_seconds"] == again["embedding_seconds"] > 0  # the second call made none


def test_the_table_shows_recall_and_time_by_size():
    point = {"gallery": 5000, "search_ms": 0.5, "methods": {"isa": {"R@1": [50.0, 47.0, 53.0]}}}
    table = growth_table({"points": [point]})
    assert table.loc["5,000"].to_dict() == {"isa": "50.0 [47.0, 53.0]", "exact search, ms": 0.5}


@pytest.mark.parametrize("value", [-1.0, 1e30, float("nan"), "0.5"])
def test_a_time_that_no_search_takes_fits_no_record(value):
    recall = {f"R@{k}": [50.0, 47.0, 53.0] for k in (1, 5, 10)}
    methods = dict.fromkeys(("isa", "image + text", "composition ceiling"), recall)
    point = {"gallery": 5000, "search_ms": 0.5, "methods": methods}
    record = {"queries": 1, "machine": "", "date": "", "embedding_seconds": 1.0, "points": [point]}
    assert not misfit(record, GROWN)
    point["search_ms"] = value
    assert "search_ms" in misfit(record, GROWN)
