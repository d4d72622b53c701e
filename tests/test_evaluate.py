"""Ranks, recall and intervals against loops and hand-worked examples; what the benchmark promises."""

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from isa_lite import evaluate
from isa_lite.evaluate import KS, benchmark_ranks, bootstrap_interval, groups, make_benchmark, metrics, ranks, recall

BENCH = make_benchmark(queries=60, gallery=300, seed=3, size=16)


def test_ranks_by_hand():
    # Scores of the query (1, 0): 1.0 (its reference), 0.6, 0.8 (target), 0.8 (a tie, no hit), 0.6 (equal to the target scene)
    gallery = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6], [0.8, -0.6], [0.6, -0.8]])
    query, reference = torch.tensor([[1.0, 0.0]]), np.array([0])

    def rank(*hits: int) -> int:
        return int(ranks(query, gallery, reference, torch.tensor([[i in hits for i in range(5)]]))[0])

    assert rank(2) == 2  # the reference is out; the tie with image 3 counts against the query
    assert rank(2, 3) == 1  # both of the tied are hits
    assert rank(1) == 4  # behind both 0.8 and tied with image 4
    assert rank(1, 4) == 3  # one of two equal scenes is enough
    assert rank(0, 4) == 4  # the reference is no hit, though it shows the target scene
    assert int(ranks(query, gallery, np.array([-1]), torch.tensor([[False, False, True, False, False]]))[0]) == 3


def test_ranks_by_brute_force_with_ties_and_equal_labels():
    rng = np.random.default_rng(0)
    gallery = torch.from_numpy(rng.integers(-1, 2, (80, 4)).astype(np.float32))
    queries = torch.from_numpy(rng.integers(-1, 2, (50, 4)).astype(np.float32))
    labels, reference, wanted = rng.integers(0, 12, 80), rng.integers(0, 80, 50), rng.integers(0, 12, 50)
    found = ranks(queries, gallery, reference, torch.from_numpy(wanted[:, None] == labels[None]))
    tied = 0
    for q in range(50):
        scores = {g: sum(float(a) * float(b) for a, b in zip(queries[q], gallery[g], strict=True)) for g in range(80)}
        del scores[int(reference[q])]
        best = max(s for g, s in scores.items() if labels[g] == wanted[q])
        others = [s for g, s in scores.items() if labels[g] != wanted[q]]
        tied += best in others
        assert found[q] == 1 + sum(s >= best for s in others)
    assert tied > 10


def test_a_query_without_a_hit_is_an_error():
    hits = torch.tensor([[True, False], [True, False]])
    with pytest.raises(ValueError, match="query 1 has no hit"):
        ranks(torch.eye(2), torch.eye(2), np.array([-1, 0]), hits)


def test_recall_and_its_interval_against_drawing_queries_again():
    rank = np.array([1] * 30 + [2] * 10 + [7] * 25 + [50] * 35)
    assert (recall(rank, 1), recall(rank, 5), recall(rank, 10)) == (30.0, 40.0, 65.0)
    rng = np.random.default_rng(1)
    drawn = [100 * np.mean(rng.choice(rank, 100) <= 5) for _ in range(4000)]
    assert bootstrap_interval(rank, 5) == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=1.01)
    assert bootstrap_interval(rank, 5) == bootstrap_interval(rank, 5) and bootstrap_interval(rank, 100) == (100.0, 100.0)


def test_the_benchmark_is_what_it_says():
    b = BENCH
    assert len(b) == 60 and len(b.scenes) == len(b.labels) == len(b.images) == 300 and b.images.shape[1:] == (16, 16, 3)
    assert b.reference.tolist() == list(range(0, 240, 4)) and b.target.tolist() == list(range(1, 240, 4))
    for q in range(60):
        reference, target, *others = b.scenes[4 * q : 4 * q + 4]
        assert len({reference, target, *others}) == 4
        assert b.held_out[q] == any(
            (o.shape, o.color) in evaluate.scenes.HELD_OUT for s in (reference, target) for o in s.objects
        )
    for i, j in zip(*np.triu_indices(300), strict=True):
        assert (b.labels[i] == b.labels[j]) == (b.scenes[i] == b.scenes[j])
    assert 0 < b.held_out.sum() < 60


def test_the_benchmark_follows_its_seed():
    again, other = (make_benchmark(queries=60, gallery=300, seed=s, size=16) for s in (3, 4))
    assert again.texts == BENCH.texts and np.array_equal(again.images, BENCH.images)
    assert other.texts != BENCH.texts and not np.array_equal(other.images, BENCH.images)


def test_a_gallery_must_hold_what_the_queries_bring():
    with pytest.raises(ValueError, match="a gallery of 39 is too small for 10 queries"):
        make_benchmark(queries=10, gallery=39)


def test_an_equal_scene_is_a_hit_in_the_benchmark():
    gallery = normalize(torch.randn(300, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    assert (benchmark_ranks(BENCH, gallery[BENCH.target], gallery) == 1).all()
    labels = BENCH.labels.copy()
    labels[250] = labels[1]  # as if image 250 showed the first target too
    twin = evaluate.Benchmark(**{**vars(BENCH), "labels": labels})
    query = gallery[BENCH.target].clone()
    query[0] = gallery[250]
    assert benchmark_ranks(twin, query, gallery)[0] == 1 < benchmark_ranks(BENCH, query, gallery)[0]


def test_groups_divide_the_queries():
    found = groups(BENCH)
    kinds = [found[k] for k in (*evaluate.KINDS, "two changes")]
    assert (np.sum(kinds, 0) == 1).all() and (found["seen pairs"] ^ found["held-out pairs"]).all() and found["all"].all()
    assert all(BENCH.kinds[i] == ("color",) for i in np.flatnonzero(found["color"]))


@pytest.fixture
def run(tmp_path):
    """A metrics.json as notebook 02 writes it."""

    def write(seed: int, weight: float, shift: int = 0):
        rng = np.random.default_rng((seed, shift))
        methods = {name: rng.integers(1, 20, 60) for name in ("isa", "image only")}
        record = metrics(BENCH, methods, seed, {"lar_weight": weight})
        path = tmp_path / f"{seed}-{weight}.json"
        path.write_text(json.dumps(record | {"machine": "a laptop", "training_seconds": {"isa": 1.0}}))
        return path, record, methods

    return write


def test_metrics_hold_recalls_in_percent_overall_and_by_group(run):
    _, record, methods = run(0, 0.1)
    assert (record["queries"], record["gallery"], record["seed"], record["params"]) == (60, 300, 0, {"lar_weight": 0.1})
    for name, rank in methods.items():
        assert record["methods"][name] == {f"R@{k}": round(100 * sum(rank <= k) / 60, 2) for k in KS}
        low, high = record["intervals"][name]["R@5"]
        assert low <= record["methods"][name]["R@5"] <= high
        mask = groups(BENCH)["held-out pairs"]
        assert record["groups"]["held-out pairs"]["queries"] == mask.sum()
        assert record["groups"]["held-out pairs"]["methods"][name]["R@1"] == round(recall(rank[mask], 1), 2)


def test_seed_interval_is_students():
    # Mean 4, standard deviation 2, n = 3: 4 +- 4.3027 * 2 / sqrt(3)
    assert evaluate.seed_interval([2, 4, 6]) == pytest.approx((4 - 4.9683, 4 + 4.9683), abs=1e-3)
    assert np.isnan(evaluate.seed_interval([2.0])).all()


def test_the_command_prints_a_run_and_gathers_several(run, tmp_path, capsys):
    path, record, _ = run(0, 0.1)
    evaluate.main([str(path)])
    shown = capsys.readouterr().out
    assert "60 queries, gallery of 300" in shown and f"{record['methods']['isa']['R@1']:.1f} [" in shown
    paths = [str(run(seed, weight, shift)[0]) for seed in (0, 1) for shift, weight in enumerate((0, 0.1))]
    evaluate.main(["--gather", str(tmp_path / "all.json"), *paths])
    gathered = json.loads((tmp_path / "all.json").read_text())
    assert len(gathered["runs"]) == 4 and gathered["machine"] == "a laptop"
    table = evaluate.runs_table(gathered["runs"])
    assert list(table.index) == ["isa, lar_weight 0 (2 runs)", "image only (4 runs)", "isa, lar_weight 0.1 (2 runs)"]
    values = [r["methods"]["isa"]["R@1"] for r in gathered["runs"] if r["params"]["lar_weight"] == 0.1]
    assert table.loc["isa, lar_weight 0.1 (2 runs)", "R@1"].startswith(f"{np.mean(values):.1f} [")


def test_the_command_names_a_missing_file(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["nowhere.json"])
    assert "there is no file nowhere.json" in capsys.readouterr().err
