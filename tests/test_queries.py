"""Ranks, recall and intervals against loops and hand-worked examples; what the benchmark
promises.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn.functional import normalize

from isa_lite.commands import main
from isa_lite.retrieval import metrics, results, scene_queries
from isa_lite.retrieval.metrics import (
    KS,
    bootstrap_interval,
    paired_interval,
    ranks,
    recall,
    recall_difference,
    recall_interval,
    wilson_interval,
)
from isa_lite.retrieval.results import RECALLS, of_run, read_alike
from isa_lite.retrieval.scene_queries import groups, make_benchmark
from isa_lite.world import load_world, scenes

BENCH = make_benchmark(queries=60, gallery=300, seed=3, size=16)


def test_ranks_by_hand():
    # Scores of the query (1, 0): 1.0 (its reference), 0.6, 0.8 (target), 0.8 (a tie, no hit), 0.6
    # (equal to the target scene)
    gallery = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6], [0.8, -0.6], [0.6, -0.8]])
    query, reference = torch.tensor([[1.0, 0.0]]), np.array([0])

    def rank(*hits: int) -> int:
        return int(
            ranks(query, gallery, reference, torch.tensor([[i in hits for i in range(5)]]))[0]
        )

    assert rank(2) == 2  # the reference is out; the tie with image 3 counts against the query
    assert rank(2, 3) == 1  # both of the tied are hits
    assert rank(1) == 4  # behind both 0.8 and tied with image 4
    assert rank(1, 4) == 3  # one of two equal scenes is enough
    assert rank(0, 4) == 4  # the reference is no hit, though it shows the target scene
    assert (
        int(
            ranks(
                query, gallery, np.array([-1]), torch.tensor([[False, False, True, False, False]])
            )[0]
        )
        == 3
    )


def test_ranks_by_brute_force_with_ties_and_equal_labels():
    rng = np.random.default_rng(0)
    # Sixteen times +-1/4 has norm one, and all cosines are multiples of 1/8: ties are exact.
    gallery, queries = (
        torch.from_numpy(rng.choice([-0.25, 0.25], (n, 16)).astype(np.float32)) for n in (80, 50)
    )
    labels, reference, wanted = (
        rng.integers(0, 12, 80),
        rng.integers(0, 80, 50),
        rng.integers(0, 12, 50),
    )
    reference[:10] = -1
    found = ranks(queries, gallery, reference, torch.from_numpy(wanted[:, None] == labels[None]))
    tied = 0
    for q in range(50):
        scores = {
            g: sum(float(a) * float(b) for a, b in zip(queries[q], gallery[g], strict=True))
            for g in range(80)
        }
        scores.pop(int(reference[q]), None)
        best = max(s for g, s in scores.items() if labels[g] == wanted[q])
        others = [s for g, s in scores.items() if labels[g] != wanted[q]]
        tied += best in others
        assert found[q] == 1 + sum(s >= best for s in others)
    assert tied > 10 and len(set(found)) > 10


def test_a_query_without_a_hit_is_an_error():
    hits = torch.tensor([[True, False], [True, False]])
    with pytest.raises(ValueError, match="query 1 has no hit"):  # but its own reference
        ranks(torch.eye(2), torch.eye(2), np.array([-1, 0]), hits)
    with pytest.raises(ValueError, match="query 0 has no hit"):
        ranks(
            torch.eye(2),
            torch.eye(2),
            np.array([-1, -1]),
            ~hits & torch.tensor([False, True])[:, None],
        )


def test_recall_is_the_share_of_ranks_up_to_k():
    rank = np.array([1] * 30 + [2] * 10 + [7] * 25 + [50] * 35)
    assert (recall(rank, 1), recall(rank, 5), recall(rank, 10)) == (30.0, 40.0, 65.0)


def test_wilson_equals_scipy_for_every_share():
    for count in (1, 2, 7, 60, 1000):
        hits = np.arange(count + 1)
        low, high = wilson_interval(hits, count)
        for h in hits[:: max(1, count // 60)]:
            theirs = stats.binomtest(int(h), count).proportion_ci(0.95, method="wilson")
            assert (low[h], high[h]) == pytest.approx(tuple(theirs), abs=1e-12)
    theirs = stats.binomtest(13, 40).proportion_ci(0.8, method="wilson")
    assert np.ravel(wilson_interval(13, 40, level=0.8)) == pytest.approx(tuple(theirs))
    low, high = wilson_interval([[0], [5]], [5, 10, 20])
    assert low.shape == high.shape == (2, 3) and low[0].tolist() == [0, 0, 0] and high[1, 0] == 1


@pytest.mark.parametrize(
    "hits, count", [(0, 0), (3, 2), (-1, 5), (float("nan"), 5), ([1, 1], [2, 0])]
)
def test_no_interval_of_what_is_no_share(hits, count):
    with pytest.raises(ValueError, match="hits"):
        wilson_interval(hits, count)


@pytest.mark.parametrize("share", [0.5, 0.95, 1.0])
def test_wilson_holds_the_true_share_as_often_as_it_says(share):
    """Drawn 20000 times: 60 queries, each a hit with this probability. Single shares lie a little
    beside the nominal 95%.
    """
    low, high = wilson_interval(np.random.default_rng(0).binomial(60, share, 20000), 60)
    held = ((low <= share) & (share <= high)).mean()
    ends = np.stack(wilson_interval(np.arange(61), 60))
    exact = stats.binom.pmf(np.arange(61), 60, share)[(ends[0] <= share) & (share <= ends[1])].sum()
    assert (
        held == pytest.approx(exact, abs=0.006) and 0.93 <= held and (held <= 0.975 or share == 1)
    )


def test_wilson_holds_as_often_as_it_says_over_all_shares():
    shares = np.linspace(0.01, 0.99, 99)
    low, high = wilson_interval(np.random.default_rng(0).binomial(60, shares, (4000, 99)), 60)
    assert ((low <= shares) & (shares <= high)).mean() == pytest.approx(0.95, abs=0.01)


def test_a_recall_of_all_or_none_has_an_interval_with_a_width():
    ranks = np.ones(60, int)
    low, high = recall_interval(ranks, 1)
    assert (low, high) == (pytest.approx(93.98, abs=0.01), 100.0)
    assert recall_interval(ranks + 1, 1) == (0.0, pytest.approx(6.02, abs=0.01))
    table = metrics.recall_table({"isa": ranks})
    assert table.loc["isa", "R@1"] == "100.0 [94.0, 100.0]"


def test_the_bootstrap_of_a_mean_against_scipys_and_the_normal_approximation():
    # like average precisions: many near 0, some near 1
    values = np.random.default_rng(2).beta(0.5, 2, 400)
    mine = bootstrap_interval(values)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(5)
    )
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert mine == pytest.approx(tuple(theirs.confidence_interval), abs=0.06 * width)
    assert mine[1] - mine[0] == pytest.approx(2 * 1.96 * stats.sem(values), rel=0.08)
    assert bootstrap_interval(values) == mine != bootstrap_interval(values, seed=1)
    for bad in ([1.0], [[1.0, 2.0]], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="values"):
            bootstrap_interval(bad)


def test_the_paired_bootstrap_against_an_exact_computation():
    """Differences of hits are -1, 0 or 1: a draw's counts are multinomial, so its distribution can
    be drawn without queries.
    """
    rng = np.random.default_rng(3)
    hard = rng.random(500) < 0.5  # hard for both methods
    first, second = (
        np.where(hard | (rng.random(500) < 0.05), 9, 1),
        np.where(hard | (rng.random(500) < 0.15), 9, 1),
    )
    difference, low, high = recall_difference(first, second, 1)
    assert difference == pytest.approx(recall(first, 1) - recall(second, 1))
    steps = (first <= 1).astype(int) - (second <= 1)
    shares = [(steps == value).mean() for value in (-1, 0, 1)]
    counts = np.random.default_rng(4).multinomial(500, shares, 20000)
    exact = np.percentile(100 * (counts[:, 2] - counts[:, 0]) / 500, [2.5, 97.5])
    assert (low, high) == pytest.approx(exact, abs=0.41)  # two queries
    # seen in pairs, hidden by separate intervals
    assert low > 0 and recall_interval(first, 1)[0] < recall_interval(second, 1)[1]
    assert paired_interval(second, first) == pytest.approx(
        tuple(-p for p in reversed(paired_interval(first, second))), abs=0.1
    )
    with pytest.raises(ValueError, match="first and second"):
        paired_interval([1, 2, 3], [1, 2])


def test_the_benchmark_is_what_it_says():
    b = BENCH
    assert (
        len(b) == 60
        and len(b.scenes) == len(b.labels) == len(b.images) == 300
        and b.images.shape[1:] == (16, 16, 3)
    )
    assert b.reference.tolist() == list(range(0, 240, 4)) and b.target.tolist() == list(
        range(1, 240, 4)
    )
    for q in range(60):
        reference, target, *others = b.scenes[4 * q : 4 * q + 4]
        assert len({reference, target, *others}) == 4
        assert b.held_out[q] == any(
            (o.shape, o.color) in scenes.HELD_OUT for s in (reference, target) for o in s.objects
        )
    assert 0 < b.held_out.sum() < 60
    assert (b.labels[b.reference] != b.labels[b.target]).all()
    for i in range(0, 300, 7):
        assert np.array_equal(b.images[i], scenes.render(b.scenes[i], int(b.jitter[i]), 16))


def test_the_target_of_a_query_shows_the_changes_that_its_kinds_name():
    for r, t, text, kinds in zip(
        BENCH.reference, BENCH.target, BENCH.texts, BENCH.kinds, strict=True
    ):
        a, b = BENCH.scenes[r], BENCH.scenes[t]
        assert ("background" in kinds) == (a.background != b.background) and (
            b.background in text or "background" not in kinds
        )
        assert ("style" in kinds) == (a.style != b.style) and (
            b.style in text or "style" not in kinds
        )
        assert len(b.objects) - len(a.objects) == ("add" in kinds) - ("remove" in kinds)
        if not {"add", "remove"} & set(kinds):
            for kind, name in (("color", "color"), ("size", "size"), ("move", "cell")):
                differ = sorted(getattr(o, name) for o in a.objects) != sorted(
                    getattr(o, name) for o in b.objects
                )
                assert (kind in kinds) == differ, text


def test_equal_scenes_have_equal_labels(monkeypatch):
    few = scenes.sample_scenes(5, 0)
    monkeypatch.setattr(scenes, "sample_scene", lambda rng, held_out: few[rng.integers(5)])
    b = make_benchmark(queries=20, gallery=100, size=8)
    i, j = np.triu_indices(100, 1)
    equal = np.array([b.scenes[m] == b.scenes[n] for m, n in zip(i, j, strict=True)])
    assert equal.sum() > 50 and ((b.labels[i] == b.labels[j]) == equal).all()
    # Equal scenes are drawn with a jitter of their own.
    assert all(b.jitter[m] != b.jitter[n] for m, n in zip(i[equal], j[equal], strict=True))


def test_the_benchmark_follows_its_seed():
    again, other = (make_benchmark(queries=60, gallery=300, seed=s, size=16) for s in (3, 4))
    assert again.texts == BENCH.texts and np.array_equal(again.images, BENCH.images)
    assert other.texts != BENCH.texts and not np.array_equal(other.images, BENCH.images)


def test_a_gallery_must_hold_what_the_queries_bring():
    with pytest.raises(ValueError, match="'gallery'.*40.*39"):
        make_benchmark(queries=10, gallery=39)
    # nothing is left to fill
    assert len(make_benchmark(queries=10, gallery=40, size=8).scenes) == 40


def test_an_equal_scene_is_a_hit_in_the_benchmark():
    gallery = normalize(torch.randn(300, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    assert (BENCH.ranks(gallery[BENCH.target], gallery) == 1).all()
    labels = BENCH.labels.copy()
    labels[250] = labels[1]  # as if image 250 showed the first target too
    twin = replace(BENCH, labels=labels)
    query = gallery[BENCH.target].clone()
    query[0] = gallery[250]
    assert twin.ranks(query, gallery)[0] == 1 < BENCH.ranks(query, gallery)[0]


def test_groups_divide_the_queries():
    found = groups(BENCH)
    kinds = [found[k] for k in (*scenes.KINDS, "two changes")]
    assert (
        (np.sum(kinds, 0) == 1).all()
        and (found["seen pairs"] ^ found["held-out pairs"]).all()
        and found["all"].all()
    )
    for kind in scenes.KINDS:
        assert all(BENCH.kinds[i] == (kind,) for i in np.flatnonzero(found[kind]))
    assert all(len(BENCH.kinds[i]) == 2 for i in np.flatnonzero(found["two changes"]))
    assert np.array_equal(found["held-out pairs"], BENCH.held_out)


def test_tables_show_recall_with_its_interval_a_row_a_method_or_group():
    rng = np.random.default_rng(0)
    methods = {name: rng.integers(1, 20, 60) for name in ("isa", "image only")}
    table = metrics.recall_table(methods)
    assert list(table.index) == list(methods) and list(table.columns) == ["R@1", "R@5", "R@10"]
    low, high = recall_interval(methods["isa"], 5)
    assert (
        table.loc["isa", "R@5"]
        == f"{100 * (methods['isa'] <= 5).mean():.1f} [{low:.1f}, {high:.1f}]"
    )
    found = groups(BENCH)
    by_group = scene_queries.group_table(BENCH, methods, k=5)
    assert list(by_group.index) == [f"{n} ({m.sum()})" for n, m in found.items() if m.any()]
    assert by_group.loc["all (60)", "isa"] == table.loc["isa", "R@5"]
    two = methods["image only"][found["two changes"]]
    assert by_group.loc[f"two changes ({len(two)})", "image only"].startswith(
        f"{recall(two, 5):.1f} ["
    )


@pytest.fixture
def run(tmp_path):
    """A metrics.json as notebook 02 writes it."""

    def write(seed: int, weight: float, shift: int = 0):
        rng = np.random.default_rng((seed, shift))
        methods = {name: rng.integers(1, 20, 60) for name in ("isa", "image only")}
        record = of_run(BENCH, methods, seed, {"lar_weight": weight})
        path = tmp_path / f"{seed}-{weight}.json"
        path.write_text(
            json.dumps(record | {"machine": "a laptop", "training_seconds": {"isa": 1.0}})
        )
        return path, record, methods

    return write


def test_metrics_hold_recalls_in_percent_overall_and_by_group(run):
    _, record, methods = run(0, 0.1)
    assert (record["queries"], record["gallery"], record["seed"], record["params"]) == (
        60,
        300,
        0,
        {"lar_weight": 0.1},
    )
    for name, rank in methods.items():
        assert record["methods"][name] == {
            f"R@{k}": round(100 * sum(rank <= k) / 60, 2) for k in KS
        }
        low, high = record["intervals"][name]["R@5"]
        assert low < record["methods"][name]["R@5"] < high
        for group, mask in groups(BENCH).items():
            # a group without queries has no recall
            assert (group in record["groups"]) == mask.any()
            if mask.any():
                found = record["groups"][group]
                shares = found["methods"][name]
                assert (
                    found["queries"] == mask.sum()
                    and 0 <= shares["R@1"] <= shares["R@5"] <= shares["R@10"] <= 100
                )
                assert shares == {f"R@{k}": round(recall(rank[mask], k), 2) for k in KS}
                assert all(
                    low <= shares[k] <= high for k, (low, high) in found["intervals"][name].items()
                )
    assert set(record["methods"]) == set(record["intervals"]) == {"isa", "image only"}
    assert (
        record["groups"]["all"]["methods"] == record["methods"]
        and record["groups"]["all"]["intervals"] == record["intervals"]
    )
    assert json.loads(json.dumps(record)) == record


def test_seed_interval_is_students():
    # Mean 4, standard deviation 2, n = 3: 4 +- 4.3027 * 2 / sqrt(3)
    assert metrics.seed_interval([2, 4, 6]) == pytest.approx((4 - 4.9683, 4 + 4.9683), abs=1e-3)
    values = [51.0, 52.5, 49.9, 53.1, 50.2]
    theirs = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert metrics.seed_interval(values) == pytest.approx(theirs)
    assert np.isnan(metrics.seed_interval([2.0])).all()


def test_the_command_prints_a_run_and_gathers_several(run, tmp_path, capsys):
    path, record, _ = run(0, 0.1)
    main(["evaluate", str(path)])
    shown = capsys.readouterr().out
    assert (
        "60 queries, gallery of 300" in shown
        and f"{record['methods']['isa']['R@1']:.1f} [" in shown
    )
    paths = [
        str(run(seed, weight, shift)[0]) for seed in (0, 1) for shift, weight in enumerate((0, 0.1))
    ]
    main(["evaluate", "--gather", str(tmp_path / "all.json"), *paths])
    gathered = json.loads((tmp_path / "all.json").read_text())
    assert len(gathered["runs"]) == 4 and gathered["machine"] == "a laptop"
    for path, kept in zip(paths, gathered["runs"], strict=True):
        whole = json.loads(Path(path).read_text())
        assert kept == {k: v for k, v in whole.items() if k not in ("machine", "data", "intervals")}
    table = results.runs_table(gathered["runs"])
    assert capsys.readouterr().out == table.to_string() + "\n"
    assert list(table.index) == [
        "isa, lar_weight 0 (2 seeds)",
        "image only (2 seeds)",
        "isa, lar_weight 0.1 (2 seeds)",
    ]
    values = [
        r["methods"]["isa"]["R@1"] for r in gathered["runs"] if r["params"]["lar_weight"] == 0.1
    ]
    low, high = metrics.seed_interval(values)
    assert low < 0  # of two seeds; a recall is never below 0
    assert (
        table.loc["isa, lar_weight 0.1 (2 seeds)", "R@1"]
        == f"{np.mean(values):.1f} [0.0, {high:.1f}]"
    )
    assert list(results.runs_table(gathered["runs"], methods=["image only"]).index) == [
        "image only (2 seeds)"
    ]
    change = results.effect(gathered["runs"], k=5)
    recalls = {
        (r["params"]["lar_weight"], r["seed"]): r["methods"]["isa"]["R@5"] for r in gathered["runs"]
    }
    assert (
        change.tolist() == [recalls[0.1, seed] - recalls[0, seed] for seed in (0, 1)]
        and change.any()
    )
    with pytest.raises(ValueError, match=r"same seeds"):
        results.effect(gathered["runs"][:3])
    Path(paths[0]).write_text(json.dumps(whole | {"machine": "a desktop"}))
    assert results.gather(map(Path, paths))["machine"] == "a desktop / a laptop"


def test_the_command_names_a_missing_file(run, tmp_path, capsys):
    path = run(0, 0.1)[0]
    for options in ([], ["--gather", str(tmp_path / "all.json")]):
        with pytest.raises(SystemExit, match="2"):
            main(["evaluate", *options, str(path), "nowhere.json"])
        shown = capsys.readouterr()
        assert "nowhere.json" in shown.err and shown.out == ""
    assert not (tmp_path / "all.json").exists()


def test_the_intervals_of_means_hold_the_truth_as_often_as_they_say():
    """Students over five seeds, and the paired bootstrap over sixty queries, each on data whose
    true mean is known.
    """
    rng = np.random.default_rng(6)
    ends = np.array([metrics.seed_interval(values) for values in rng.normal(80, 3, (1500, 5))])
    assert ((ends[:, 0] <= 80) & (80 <= ends[:, 1])).mean() == pytest.approx(0.95, abs=0.02)
    # Method one hits 60%; the other hits where it does, but for a tenth of the queries: the true
    # difference is 6 points.
    held = []
    for _ in range(300):
        first = rng.random(60) < 0.6
        low, high = paired_interval(100 * first, 100 * (first & (rng.random(60) >= 0.1)), draws=300)
        held.append(low <= 6 <= high)
    # A percentile bootstrap of rare differences is a little too narrow: where none was drawn it has
    # no width.
    assert 0.85 <= np.mean(held) <= 0.97


def test_ranks_and_recall_against_sklearn():
    """With one right answer and no reference, Recall@K is top-K accuracy."""
    from sklearn.metrics import top_k_accuracy_score

    generator = torch.Generator().manual_seed(8)
    gallery, queries = (normalize(torch.randn(n, 6, generator=generator), dim=1) for n in (30, 200))
    wanted = np.random.default_rng(8).integers(0, 30, 200)
    found = ranks(
        queries, gallery, np.full(200, -1), torch.from_numpy(wanted[:, None] == np.arange(30))
    )
    for k in (1, 5, 10):
        theirs = top_k_accuracy_score(
            wanted, (queries @ gallery.T).numpy(), k=k, labels=np.arange(30)
        )
        assert recall(found, k) == pytest.approx(100 * theirs)


def test_stored_runs_name_the_same_things(tmp_path):
    row = {"methods": {"isa": dict.fromkeys(("R@1", "R@5", "R@10"), 1.0)}, "weights": {"sum": 0.5}}
    shape = {"runs": [{"methods": RECALLS, "weights": {str: float}}, ...]}
    path = tmp_path / "stored.json"
    for rows, fault in (
        ([], "runs is empty"),
        ([row, row | {"weights": {}}], "'sum'.*runs.1."),
        ([row, row], None),
    ):
        path.write_text(json.dumps({"runs": rows}))
        if fault:
            with pytest.raises(ValueError, match=f"stored.json.*{fault}"):
                read_alike(path, "runs", shape)
    assert read_alike(path, "runs", shape) == {"runs": [row, row]}


DAMAGE = {
    "cut off": lambda found: "{",
    "a list": lambda found: [],
    "no methods": lambda found: {k: v for k, v in found.items() if k != "methods"},
    "a share of nothing": lambda found: (
        found | {"methods": {"isa": found["methods"]["isa"] | {"R@5": float("nan")}}}
    ),
    "a share of 101": lambda found: (
        found | {"methods": {"isa": found["methods"]["isa"] | {"R@5": 101}}}
    ),
    "half an interval": lambda found: found | {"intervals": {"isa": {f"R@{k}": [1.0] for k in KS}}},
    "no intervals of one": lambda found: found | {"intervals": {"isa": found["intervals"]["isa"]}},
    "a seed that is no number": lambda found: found | {"seed": None},
}


@pytest.mark.parametrize("options", [[], ["--gather", "all.json"]], ids=["printed", "gathered"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_named_and_nothing_is_printed(
    run, tmp_path, monkeypatch, capsys, damage, options
):
    monkeypatch.chdir(tmp_path)
    good, bad = run(0, 0.1)[0], run(1, 0.1)[0]
    found = damage(json.loads(bad.read_text()))
    bad.write_text(found if isinstance(found, str) else json.dumps(found))
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", *options, str(good), str(bad)])
    shown = capsys.readouterr()
    assert (
        bad.name in shown.err
        and len(shown.err.splitlines()) == 1
        and shown.out == ""
        and not Path("all.json").exists()
    )


def test_a_benchmark_of_things_is_made_as_one_of_shapes():
    bench, world = make_benchmark(6, 30, seed=2, size=32, world="things"), load_world("things")
    assert bench.images.shape == (30, 32, 32, 3)
    for q, (r, t) in enumerate(zip(bench.reference, bench.target, strict=True)):
        picture = world.render(bench.scenes[t], int(bench.jitter[t]), 32)
        assert np.array_equal(bench.images[t], picture)
        assert bench.targets[q][0] == t and bench.scenes[r] != bench.scenes[t]
    assert set(groups(bench)) >= set(world.KINDS)
    assert len(bench.captions(bench.reference)) == 6
    with pytest.raises(ValueError, match="world.*'letters'"):
        make_benchmark(6, 30, world="letters")
