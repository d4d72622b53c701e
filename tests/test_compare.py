"""The comparison of all methods: every method on the same queries, resumable, gathered."""

import json

import pytest

from isa_lite import compare
from isa_lite.baselines import UNTRAINED, composed
from isa_lite.compare import CompareConfig
from isa_lite.evaluate import benchmark_ranks, make_benchmark, recall
from isa_lite.fusion import FUSIONS
from isa_lite.query_encoder import QueryEncoder
from isa_lite.vl_model import load_vl_model

TINY = CompareConfig(
    num_images=24, inverted=6, steps=2, batch_size=6, queries=20, gallery=100, chosen_queries=10, chosen_gallery=40
)


def test_every_method_is_measured_on_the_benchmark_of_the_seed(monkeypatch):
    vl = load_vl_model()
    chosen_on = []
    monkeypatch.setattr(compare, "choose_weight", lambda fuse, bench, vl, gallery: chosen_on.append(bench) or 0.5)
    encoder = QueryEncoder.for_model(vl, num_tokens=2)
    symmetric = QueryEncoder.for_model(vl, backbone="vl", num_tokens=2)
    found = compare.compare(vl, encoder, 7, TINY, progress=False, symmetric=symmetric)
    trained = {"Pic2Word-like", "SEARLE-like", "LinCIR-like"}
    assert set(found["methods"]) == {"isa", "symmetric isa", "BASIC-like", *UNTRAINED, *FUSIONS, *trained}
    assert set(found["training_seconds"]) == trained and set(found["weights"]) == set(FUSIONS)
    bench = make_benchmark(20, 100, 7)
    assert chosen_on and all(not set(other.texts) & set(bench.texts) or other.scenes[0] != bench.scenes[0] for other in chosen_on)
    gallery = vl.encode_images(bench.images)
    for name, queries in (
        ("isa", composed(bench, vl, encoder)),
        ("symmetric isa", composed(bench, vl, symmetric)),
        ("text only", vl.encode_text(bench.texts)),
    ):
        expected = recall(benchmark_ranks(bench, queries, gallery), 10)
        assert found["methods"][name]["R@10"] == pytest.approx(expected, abs=0.01)


@pytest.fixture
def folders(tmp_path):
    vl = load_vl_model()
    for seed in (0, 1):
        QueryEncoder.for_model(vl, num_tokens=1).save(tmp_path / str(seed), {"parameters": {"seed": seed}})
    return [str(tmp_path / str(seed)) for seed in (0, 1)]


def test_a_comparison_goes_on_where_it_was_and_is_gathered(folders, tmp_path, monkeypatch, capsys):
    done = []

    def counted(vl, encoder, seed, config, symmetric):
        done.append(seed)
        if done == [0, 1]:
            raise KeyboardInterrupt
        recalls = {f"R@{k}": 10.0 * seed + k for k in (1, 5, 10)}
        return {"seed": seed, "params": vars(config), "methods": {"isa": recalls}}

    monkeypatch.setattr(compare, "compare", counted)
    arguments = ["--isa", *folders, "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out.json")]
    with pytest.raises(KeyboardInterrupt):
        compare.main(arguments)
    compare.main(arguments)
    assert done == [0, 1, 1]  # seed 0 was kept
    assert [run["seed"] for run in json.loads((tmp_path / "out.json").read_text())["runs"]] == [0, 1]
    assert "isa (2 seeds)" in capsys.readouterr().out


def test_two_runs_of_one_seed_are_refused(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "compare", None)  # refused before any work
    with pytest.raises(SystemExit):
        compare.main(["--isa", folders[0], folders[0], "--run", str(tmp_path), "--out", str(tmp_path / "out.json")])
    assert "second run with seed 0" in capsys.readouterr().err


def test_symmetric_runs_are_paired_by_seed(folders, tmp_path, monkeypatch, capsys):
    vl, seen = load_vl_model(), []
    for seed in (0, 1):
        encoder = QueryEncoder.for_model(vl, backbone="vl", num_tokens=1)
        encoder.save(tmp_path / f"s{seed}", {"parameters": {"seed": seed}})

    def counted(vl, encoder, seed, config, symmetric):
        seen.append((encoder.config.backbone, symmetric.config.backbone))
        recalls = {name: {f"R@{k}": value for k in (1, 5, 10)} for name, value in (("isa", 30.0), ("symmetric isa", 40.0 + seed))}
        return {"seed": seed, "params": vars(config), "methods": recalls}

    monkeypatch.setattr(compare, "compare", counted)
    arguments = ["--isa", *folders, "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out.json"), "--symmetric"]
    with pytest.raises(SystemExit):
        compare.main([*arguments, str(tmp_path / "s1")])
    assert "--symmetric has the seeds [1], and --isa [0, 1]" in capsys.readouterr().err and not seen
    compare.main([*arguments, str(tmp_path / "s1"), str(tmp_path / "s0")])
    assert [other for _, other in seen] == ["vl", "vl"] and all(light != "vl" for light, _ in seen)
    runs = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert compare.relative(runs).tolist() == pytest.approx([30 / 40, 30 / 41])
    assert "R@1 of asymmetric / symmetric ISA: 0.741" in capsys.readouterr().out
