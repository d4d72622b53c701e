"""The comparison of all methods: every method on the same queries, resumable, gathered."""

import json
from pathlib import Path

import pytest

from isa_lite.commands import main
from isa_lite.experiments import compare, sweep
from isa_lite.experiments.compare import CompareConfig
from isa_lite.methods.baselines import UNTRAINED
from isa_lite.methods.fusion import FUSIONS, Fusion
from isa_lite.methods.isa import Isa
from isa_lite.models.vl_model import DATA, load_vl_model
from isa_lite.prompt import compose
from isa_lite.query_encoder import QueryEncoder
from isa_lite.retrieval.metrics import recall
from isa_lite.retrieval.scene_queries import make_benchmark

TINY = CompareConfig(
    num_images=24,
    inverted=6,
    steps=2,
    batch_size=6,
    queries=20,
    gallery=100,
    chosen_queries=10,
    chosen_gallery=40,
)
BUDGET = {name: getattr(CompareConfig(), name) for name in ("num_images", "steps", "batch_size")}


@pytest.mark.slow
def test_every_method_is_measured_on_the_benchmark_of_the_seed(monkeypatch):
    vl = load_vl_model()
    chosen_on = []
    monkeypatch.setattr(Fusion, "fit", lambda self, bench: chosen_on.append(bench) or self)
    encoder = QueryEncoder.for_model(vl, num_tokens=2)
    symmetric = QueryEncoder.for_model(vl, backbone="vl", num_tokens=2)
    found = compare.rivals(vl, 7, TINY, progress=False)
    trained = {
        f"{name}{aids}"
        for name in ("Pic2Word-like", "SEARLE-like", "LinCIR-like")
        for aids in ("", compare.AIDED)
    }
    assert set(found["methods"]) == {"BASIC-like", *UNTRAINED, *FUSIONS, *trained}
    assert set(found["training_seconds"]) == trained and set(found["weights"]) == set(FUSIONS)
    bench = make_benchmark(20, 100, 7)
    assert chosen_on and all(
        not set(other.texts) & set(bench.texts) or other.scenes[0] != bench.scenes[0]
        for other in chosen_on
    )
    measured = found["methods"] | compare.recalls(
        bench.embedded(vl), {"isa": Isa(encoder), "symmetric isa": Isa(symmetric)}
    )
    gallery = vl.encode_images(bench.images)
    tokens = [e.sentences(bench.images[bench.reference]).tokens for e in (encoder, symmetric)]
    for name, queries in (
        ("isa", compose(vl, tokens[0], bench.texts)),
        ("symmetric isa", compose(vl, tokens[1], bench.texts)),
        ("text only", vl.encode_text(bench.texts)),
    ):
        expected = recall(bench.ranks(queries, gallery), 10)
        assert measured[name]["R@10"] == pytest.approx(expected, abs=0.01)


@pytest.mark.slow
def test_a_one_word_recipe_is_trained_as_it_is_and_with_the_aids_it_has_a_place_for(monkeypatch):
    given = {}

    def training(name, original):
        def train(*args, **settings):
            given.setdefault(name, []).append(
                {
                    n: settings.get(n)
                    for n in ("start_words", "word_noise", "negatives")
                    if n in settings
                }
            )
            return original(*args, **settings)

        monkeypatch.setattr(compare, name, train)

    for name in ("pic2word_like", "searle_like", "optimize_words", "lincir_like"):
        training(name, getattr(compare, name))
    compare.rivals(load_vl_model(), 7, TINY, progress=False)
    start, noise, negatives = (
        {n: getattr(TINY, n)} for n in ("start_words", "word_noise", "negatives")
    )
    assert all(value for aid in (start, noise, negatives) for value in aid.values())
    assert given["pic2word_like"] == [{}, start | noise | negatives] and given["lincir_like"] == [
        {},
        start | noise,
    ]
    assert given["optimize_words"] == [{}, start | noise] and given["searle_like"] == [
        {},
        start | negatives,
    ]


@pytest.fixture
def folders(tmp_path):
    vl = load_vl_model()
    for seed in (0, 1):
        QueryEncoder.for_model(vl, num_tokens=1).save(
            tmp_path / str(seed), {"parameters": {"seed": seed, **BUDGET}}
        )
    return [str(tmp_path / str(seed)) for seed in (0, 1)]


@pytest.fixture
def counted(monkeypatch):
    """`rivals` and the benchmark replaced by what costs nothing; the list of the seeds that
    `rivals` was asked for.
    """
    asked = []

    def rivals(vl, seed, config):
        asked.append(seed)
        if asked == [0, 1]:
            raise KeyboardInterrupt
        found = {
            "seed": seed,
            "params": vars(config),
            "methods": dict.fromkeys(UNTRAINED, dict.fromkeys(("R@1", "R@5", "R@10"), 1.0)),
        }
        return found | {"training_seconds": {}, "weights": {}}

    def recalls(seed, methods):
        light = {"isa": 30.0, "symmetric isa": 40.0 + seed}
        assert {name: m.encoder.config.backbone == "vl" for name, m in methods.items()} == {
            name: name != "isa" for name in methods
        }
        return {name: dict.fromkeys(("R@1", "R@5", "R@10"), light[name]) for name in methods}

    monkeypatch.setattr(compare, "rivals", rivals)
    monkeypatch.setattr(compare, "recalls", recalls)
    monkeypatch.setattr(compare, "benchmark", lambda vl, seed, config: seed)
    return asked


@pytest.mark.slow
def test_a_comparison_goes_on_where_it_was_and_is_gathered(
    folders, tmp_path, counted, monkeypatch, capsys
):
    arguments = [
        "--isa",
        *folders,
        "--run",
        str(tmp_path / "run"),
        "--out",
        str(tmp_path / "out.json"),
    ]
    with pytest.raises(SystemExit, match="130"):
        main(["compare", *arguments])
    main(["compare", *arguments])
    assert counted == [0, 1, 1]  # seed 0 was kept
    runs = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert [(run["seed"], set(run["methods"])) for run in runs] == [
        (0, {"isa", *UNTRAINED}),
        (1, {"isa", *UNTRAINED}),
    ]
    assert "isa (2 seeds)" in capsys.readouterr().out
    monkeypatch.setattr(compare, "CompareConfig", lambda: CompareConfig(queries=20))
    main(["compare", *arguments])
    assert counted == [0, 1, 1, 0, 1]  # other settings: measured again


@pytest.mark.slow
def test_a_damaged_record_is_named(folders, tmp_path, counted, capsys):
    main(["compare", "--rivals", "1", "--run", str(tmp_path / "run")])
    (kept,) = (tmp_path / "run").iterdir()
    for content in (
        "",
        "[]",
        kept.read_text().replace("1.0", "NaN"),
        kept.read_text().replace("methods", "method"),
    ):
        kept.write_text(content)
        with pytest.raises(SystemExit, match="2"):
            main(["compare", "--rivals", "1", "--run", str(tmp_path / "run")])
        assert kept.name in capsys.readouterr().err and counted == [1]


def test_an_encoder_that_does_not_say_its_budget_is_named(folders, tmp_path, counted, capsys):
    file = Path(folders[0]) / "query_encoder.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"info": {}}))
    with pytest.raises(SystemExit, match="2"):
        main(
            [
                "compare",
                "--isa",
                folders[0],
                "--run",
                str(tmp_path),
                "--out",
                str(tmp_path / "out.json"),
            ]
        )
    assert "query_encoder.json" in capsys.readouterr().err and not counted


def test_the_other_methods_can_be_measured_beforehand(folders, tmp_path, counted, capsys):
    main(["compare", "--rivals", "1", "--run", str(tmp_path / "run")])
    main(
        [
            "compare",
            "--isa",
            folders[1],
            "--run",
            str(tmp_path / "run"),
            "--out",
            str(tmp_path / "out.json"),
        ]
    )
    assert counted == [1]
    with pytest.raises(SystemExit):
        main(["compare", "--run", str(tmp_path / "run")])
    assert "either --isa" in capsys.readouterr().err


def test_two_runs_of_one_seed_are_refused(folders, tmp_path, counted, capsys):
    with pytest.raises(SystemExit):
        main(
            [
                "compare",
                "--isa",
                folders[0],
                folders[0],
                "--run",
                str(tmp_path),
                "--out",
                str(tmp_path / "out.json"),
            ]
        )
    assert "second run with seed 0" in capsys.readouterr().err and not counted


@pytest.mark.slow
def test_symmetric_runs_are_paired_by_seed(folders, tmp_path, counted, capsys):
    vl = load_vl_model()
    for seed in (0, 1):
        encoder = QueryEncoder.for_model(vl, backbone="vl", num_tokens=1)
        encoder.save(tmp_path / f"s{seed}", {"parameters": {"seed": seed, **BUDGET}})
    arguments = [
        "--isa",
        *reversed(folders),
        "--run",
        str(tmp_path / "run"),
        "--out",
        str(tmp_path / "out.json"),
        "--symmetric",
    ]
    with pytest.raises(SystemExit):
        main(["compare", *arguments, str(tmp_path / "s1")])
    assert (
        "--symmetric has the seeds [1], and --isa [0, 1]" in capsys.readouterr().err and not counted
    )
    counted.append(9)
    main(["compare", *arguments, str(tmp_path / "s1"), str(tmp_path / "s0")])
    runs = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert compare.relative(runs).tolist() == pytest.approx([30 / 40, 30 / 41])
    assert "R@1 of asymmetric / symmetric ISA: 0.741" in capsys.readouterr().out


def test_the_budget_is_that_of_the_shipped_query_encoder():
    shipped = json.loads((DATA / "scenes-query-encoder" / "query_encoder.json").read_text())[
        "info"
    ]["parameters"]
    assert BUDGET == {name: shipped[name] for name in BUDGET}
    # and more than notebook 02's, which has to be quick
    notebook = sweep.notebook_defaults(sweep.NOTEBOOK)
    assert BUDGET["num_images"] == notebook["num_images"]
    assert BUDGET["steps"] * BUDGET["batch_size"] > notebook["steps"] * notebook["batch_size"]


@pytest.mark.slow
def test_an_encoder_of_another_budget_is_refused(folders, tmp_path, counted, capsys):
    vl = load_vl_model()
    QueryEncoder.for_model(vl, num_tokens=1).save(
        tmp_path / "short", {"parameters": {"seed": 2, **BUDGET, "steps": 400}}
    )
    with pytest.raises(SystemExit):
        main(
            [
                "compare",
                "--isa",
                *folders,
                str(tmp_path / "short"),
                "--run",
                str(tmp_path),
                "--out",
                str(tmp_path / "out.json"),
            ]
        )
    error = capsys.readouterr().err
    assert (
        "short had steps 400, and not the 800 of all other methods; train it with -p steps 800"
        in error
        and not counted
    )
