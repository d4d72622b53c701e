"""The sweep: its plan, what names a run, that it goes on, and that its record, table and figure say
what the runs said.
"""

import argparse
import json
import os
import shutil
import time

import pytest
from papermill.exceptions import PapermillExecutionError

from isa_lite.commands import main
from isa_lite.course import figures
from isa_lite.experiments import ablations, sweep
from isa_lite.mappings import MAPPINGS
from isa_lite.support.recipes import RECIPES, complete

DEFAULTS = complete(sweep.notebook_defaults())


def test_the_plan_changes_one_thing_at_a_time_and_repeats_nothing():
    runs = ablations.plan(DEFAULTS)
    assert (
        runs[0]["shows"][0] == ("", "default")
        and ablations.changed(runs[0]["parameters"], DEFAULTS) == {}
    )
    assert all(not run["parameters"]["single_vector"] for run in runs)
    keys = [json.dumps(run["parameters"], sort_keys=True) for run in runs]
    assert len(set(keys)) == len(keys)
    for run in runs:
        different = set(ablations.changed(run["parameters"], DEFAULTS))
        pairs = (
            {"gcd_weight", "lar_weight"},
            {"gcd_weight", "lar_share"},
            {"backbone", "backbone_weights"},
            {"vl_model", "backbone_weights"},
        )
        recipe = run["parameters"]["recipe"] != "default"
        assert len(different) <= 1 or different in pairs or recipe
        assert not recipe or different == {"recipe", *vars(RECIPES["core"])}
        # they belong to one backbone and one VL model
        learned = run["parameters"]["backbone_weights"]
        assert not learned or not {"backbone", "vl_model"} & different
    assert {("recipe", name) for name in RECIPES} <= {pair for run in runs for pair in run["shows"]}
    shown = {pair for run in runs for pair in run["shows"]}
    assert {("tokens", str(n)) for n in (1, 2, 4, 8, 12, 16, 24)} <= shown
    assert {("mapping", name) for name in MAPPINGS} <= shown
    assert {("training images", n) for n in ("250", "32000")} <= shown
    assert sum(name == "backbone" for name, _ in shown) >= 6
    default = {name for name, _ in runs[0]["shows"]}
    # Without learned weights, or with LAR on all images of a step, neither of two is the default.
    others = {"captions of the VL model", "losses"}
    # all others hold the default as one of their values
    assert default | others == {"", *ablations.ablations(DEFAULTS)}


def test_the_losses_are_both_each_and_neither():
    losses = ablations.ablations({**DEFAULTS, "lar_weight": 0.0})["losses"]
    assert all(
        changed["lar_share"] == 1 for changed in losses.values() if changed["lar_weight"]
    )  # what is said of LAR is of all of it
    assert [
        (bool(changed["gcd_weight"]), bool(changed["lar_weight"])) for changed in losses.values()
    ] == [
        (True, True),
        (True, False),
        (False, True),
        (False, False),
    ]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--only", "token", "--dry-run"], "ablation token; there are: losses, mapping"),
        (["--steps", "5"], "--out"),  # else the committed record would be overwritten
        (["--jobs", "0", "--dry-run"], "--jobs"),
    ],
)
def test_a_bad_argument_is_refused(capsys, arguments, said):
    with pytest.raises(SystemExit, match="2"):
        main(["sweep", *arguments])
    assert said in capsys.readouterr().err


def test_a_run_is_named_by_what_its_result_depends_on():
    first = sweep.key(DEFAULTS, "weights")
    assert (
        sweep.key(
            {**DEFAULTS, "out_dir": "elsewhere", "device": "cuda", "num_workers": 3}, "weights"
        )
        == first
    )
    assert (
        len({first, sweep.key(DEFAULTS, "others"), sweep.key({**DEFAULTS, "seed": 1}, "weights")})
        == 3
    )


@pytest.fixture
def notebook(monkeypatch):
    """In the place of papermill: writes the metrics that notebook 02 would; `fail` names numbers of
    tokens that stop it.
    """
    ran, fail = [], set()

    def execute_notebook(path, output, parameters, **_):
        ran.append(parameters)
        if parameters["num_tokens"] in fail:
            raise PapermillExecutionError(1, 1, "", "ValueError", "too many", [])
        isa = {
            f"R@{k}": float(parameters["num_tokens"] + k + parameters["seed"]) for k in (1, 5, 10)
        }
        found = {
            "methods": {"isa": isa, "composition ceiling": {"R@1": 50.0, "R@5": 60.0, "R@10": 70.0}}
        }
        found |= {
            "intervals": {},
            "training_seconds": {"isa": 7.0},
            "queries": 30,
            "gallery": 150,
            "machine": "m",
            "provenance": {},
        }
        folder = output.parent
        (folder / "metrics.json").write_text(json.dumps(found))
        (folder / "cache").mkdir(exist_ok=True)
        (folder / "isa.state.safetensors").write_text("")

    monkeypatch.setattr(sweep.papermill, "execute_notebook", execute_notebook)
    monkeypatch.setattr(sweep, "_attention", lambda *_: {})
    return ran, fail


@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_sweep_skips_what_is_done_goes_on_after_a_failure_and_gathers(
    tmp_path, notebook, capsys, monkeypatch, jobs
):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # restored after the test
    ran, fail = notebook
    fail.add(24)
    arguments = [
        "--only",
        "tokens",
        "--runs",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path / "sweep.json"),
        "--seeds",
        "0,1",
    ]
    arguments += ["--jobs", jobs]
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", *arguments])
    assert stopped.value.code == 2 and "2 runs failed" in capsys.readouterr().err and len(ran) == 16
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert [entry["label"] for entry in record["missing"]] == ["24", "24"]
    assert len(record["runs"]) == 16  # seven numbers of tokens, and the default once more

    fail.clear(), ran.clear()
    main(["sweep", *arguments, "--dry-run"])
    assert not ran and "2 of 16 runs to go" in capsys.readouterr().out
    main(["sweep", *arguments])
    assert [parameters["num_tokens"] for parameters in ran] == [24, 24]
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert not record["missing"] and record["defaults"]["steps"] == DEFAULTS["steps"]
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    left = [p.name for p in (tmp_path / "runs").rglob("*") if p.is_file()]
    assert set(left) == {"metrics.json", "result.json"}  # no targets, no training states

    assert os.environ["OMP_NUM_THREADS"] == (
        "7" if jobs == "1" else str(max(1, os.cpu_count() // 2))
    )

    table = ablations.table(record)
    assert (
        table.loc[("tokens", "4"), "R@1"].startswith("5.5 [")
        and table.loc[("tokens", "4"), "seeds"] == 2
    )
    assert table.loc[("tokens", "4"), "of the composition ceiling"] == "11%"
    assert list(table.index) == [
        ("default", "default"),
        *(("tokens", n) for n in ("1", "2", "4", "8", "12", "16", "24")),
    ]
    axes = figures.ablations(record).axes[0]
    assert axes.get_title(loc="left") == "tokens"
    assert list(axes.lines[0].get_xdata()) == [1, 2, 4, 8, 12, 16, 20, 24]
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "1",
        "2",
        "4",
        "8",
        "12",
        "",
        "20",
        "",
    ]  # not over one another
    assert list(axes.lines[0].get_ydata()) == [2.5, 3.5, 5.5, 9.5, 13.5, 17.5, 21.5, 25.5]


def test_what_is_finished_is_gathered_without_running_the_rest(tmp_path, notebook, capsys):
    ran, _ = notebook
    arguments = [
        "--runs",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path / "sweep.json"),
        "--gather",
    ]
    with pytest.raises(SystemExit):
        main(["sweep", *arguments])
    assert f"none of these runs is finished in {tmp_path / 'runs'}" in capsys.readouterr().err
    main(["sweep", "--only", "start words", *arguments[:-1]])
    ran.clear()
    main(["sweep", *arguments])
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert not ran and {"ablation": "tokens", "label": "4", "seed": 0} in record["missing"]
    # nothing of what was not varied, though its default is there; no ablation's name: the default
    # itself
    assert {entry["ablation"] for entry in record["runs"]} == {"", "start words"}


@pytest.mark.slow
def test_what_the_record_holds_is_kept_though_its_folder_is_gone(
    tmp_path, notebook, capsys, monkeypatch
):
    ran, _ = notebook
    arguments = [
        "--runs",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path / "sweep.json"),
        "--only",
        "tokens",
    ]
    main(["sweep", *arguments])
    before = json.loads((tmp_path / "sweep.json").read_text())
    shutil.rmtree(tmp_path / "runs")
    ran.clear()
    main(["sweep", *arguments, "--only", "start words", "--add"])
    assert [parameters["start_words"] for parameters in ran] == [""]
    after = json.loads((tmp_path / "sweep.json").read_text())
    assert [entry for entry in after["runs"] if entry["ablation"] != "start words"] == before[
        "runs"
    ]
    assert [entry["label"] for entry in after["runs"] if entry["ablation"] == "start words"] == [
        "a description",
        "none",
    ]

    # nor is what another ablation, seed or number of steps would leave out
    only = [*arguments[:-1], "start words", "--add"]
    for seed in "01":
        main(["sweep", *only, "--seeds", seed])
        again = json.loads((tmp_path / "sweep.json").read_text())["runs"]
        assert all(entry in again for entry in after["runs"]), seed
    assert {entry["seed"] for entry in again} == {0, 1}
    with pytest.raises(SystemExit):
        main(["sweep", *arguments, "--add", "--steps", "5"])
    assert (
        "sweep.json is of another default of steps; choose another --out" in capsys.readouterr().err
    )
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(sweep, "load_vl_model", lambda *_: argparse.Namespace(fingerprint="other"))
        main(["sweep", *arguments, "--add"])
    assert "sweep.json is of another VL model" in capsys.readouterr().err

    ran.clear()
    main(["sweep", *arguments])  # without --add everything is run again
    assert len(ran) == 8


@pytest.mark.slow
def test_a_damaged_record_or_result_is_named_before_anything_is_run(tmp_path, notebook, capsys):
    ran, _ = notebook
    arguments = [
        "sweep",
        "--only",
        "start words",
        "--add",
        "--runs",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path / "sweep.json"),
    ]
    main(arguments)
    ran.clear()
    for path in (tmp_path / "sweep.json", *(tmp_path / "runs").glob("*/result.json")):
        whole = path.read_text()
        for content in (
            "{",
            "[]",
            "{}",
            whole.replace('"R@1": ', '"R@1": -'),
            whole.replace('"wall_seconds"', '"seconds"'),
        ):
            path.write_text(content)
            with pytest.raises(SystemExit, match="2"):
                main(arguments)
            assert path.name in capsys.readouterr().err and not ran
        path.write_text(whole)


def test_a_sweep_of_core_changes_one_thing_of_core():
    core = complete(sweep.notebook_defaults() | {"recipe": "core"})
    runs = ablations.plan(core)
    assert (
        runs[0]["parameters"] == {**core, "single_vector": False, "seed": 0}
        and core["negatives"] == 0
    )
    assert {
        ("recipe", "core"),
        ("start words", "none"),
        ("norm matching", "off"),
        ("noise on words", "0"),
    } <= set(runs[0]["shows"])
    (shipped,) = (run["parameters"] for run in runs if ("recipe", "default") in run["shows"])
    assert shipped == ablations.plan(DEFAULTS)[0]["parameters"]


def test_the_record_keeps_what_a_vl_model_says_that_is_not_on_this_machine():
    runs = [
        {**run, "key": str(i)}
        for i, run in enumerate(ablations.plan(DEFAULTS, ["captions of the VL model"]))
    ]
    result = dict.fromkeys(ablations.KEPT, "m")
    first = ablations.gather(runs, {run["key"]: result for run in runs}, DEFAULTS)
    runs[2]["key"] = None
    again = ablations.gather(runs, {"0": result, "1": result}, DEFAULTS, first["runs"])
    assert again["runs"] == first["runs"] and len(first["runs"]) == 3 and not again["missing"]
    assert ablations.gather(runs, {"0": result}, DEFAULTS)["missing"]


def test_what_encoders_that_are_gone_looked_at_is_kept(tmp_path):
    runs = [{**run, "key": str(i)} for i, run in enumerate(ablations.plan(DEFAULTS, ["tokens"]))]
    done = {run["key"]: {} for run in runs if run["parameters"]["num_tokens"] != 8}
    # a run that was stopped
    (tmp_path / next(run["key"] for run in runs if run["parameters"]["num_tokens"] == 4)).mkdir()
    stored = {"24": "twenty-four", "4": "four", "8": "not this sweep's", "9": "not in the plan"}
    assert list(sweep._attention(runs, done, tmp_path, 0, stored).items()) == [
        ("4", "four"),
        ("24", "twenty-four"),
    ]
    assert not sweep._attention(runs, done, tmp_path, 1, stored)


def test_another_seed_that_is_added_leaves_what_the_first_looked_at(
    tmp_path, notebook, monkeypatch
):
    seen = []
    monkeypatch.setattr(
        sweep, "_attention", lambda runs, results, folder, seed, stored: seen.append(seed) or {}
    )
    arguments = [
        "--only",
        "tokens",
        "--runs",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path / "sweep.json"),
    ]
    main(["sweep", *arguments])
    looked = {"4": {"maps": [[[0.5]]], "grounding": [1.0], "elsewhere": [1.0]}}
    record = json.loads((tmp_path / "sweep.json").read_text()) | {"attention": looked}
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    main(["sweep", *arguments, "--add", "--seeds", "1"])
    assert (
        seen == [0, 0] and json.loads((tmp_path / "sweep.json").read_text())["attention"] == looked
    )


def test_what_has_not_begun_does_not_begin_after_an_error_of_the_sweep_itself(
    tmp_path, monkeypatch, capsys
):
    def execute(_, parameters, folder):
        begun.append(parameters)
        time.sleep(0.05)
        raise OSError("the disk is full")

    begun = []
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sweep, "execute", execute)
    with pytest.raises(SystemExit, match="2"):
        main(
            [
                "sweep",
                "--runs",
                str(tmp_path),
                "--only",
                "tokens",
                "--jobs",
                "2",
                "--out",
                str(tmp_path / "sweep.json"),
            ]
        )
    assert "the disk is full" in capsys.readouterr().err
    assert len(begun) < 8 and not (tmp_path / "sweep.json").exists()


def test_names_become_bars_and_the_default_is_said_in_words():
    def entry(label, value, changed):
        methods = {"isa": {"R@1": value}, "composition ceiling": {"R@1": 60.0}}
        return {
            "ablation": "losses",
            "label": label,
            "seed": 0,
            "changed": changed,
            "methods": methods,
        }

    axes = figures.ablations(
        {"runs": [entry("GCD", 40.0, {}), entry("neither", 3.0, {"gcd_weight": 0})]}
    ).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [40, 3]
    assert [text.get_text() for text in axes.texts] == ["40.0 default", "3.0"]
    assert axes.patches[0].get_facecolor() != axes.patches[1].get_facecolor()
    runs = [
        {**entry(label, 40.0, {}), "ablation": name}
        for name in ("losses", "tokens", "prompt")
        for label in "12"
    ]
    shown = figures.ablations({"runs": runs}, only=("prompt", "not run", "losses")).axes
    assert [axes.get_title(loc="left") for axes in shown] == ["prompt", "losses"]


def test_a_curve_shows_a_value_of_nothing():
    def entry(label, value, changed):
        methods = {"isa": {"R@1": value}, "composition ceiling": {"R@1": 60.0}}
        return {
            "ablation": "noise on words",
            "label": label,
            "seed": 0,
            "changed": changed,
            "methods": methods,
        }

    axes = figures.ablations(
        {"runs": [entry("0", 30.0, {"word_noise": 0.0}), entry("1", 40.0, {})]}
    ).axes[0]
    assert axes.get_xscale() == "linear" and [
        label.get_text() for label in axes.get_xticklabels()
    ] == ["0", "1"]


def test_long_numbers_do_not_lie_over_one_another():
    sizes = (250, 1000, 4000, 8000, 16000, 32000)
    methods = {"isa": {"R@1": 50.0}, "composition ceiling": {"R@1": 60.0}}
    runs = [
        {
            "ablation": "training images",
            "label": f"{n}",
            "seed": 0,
            "changed": {"num_images": n} if n != 8000 else {},
            "methods": methods,
        }
        for n in sizes
    ]
    axes = figures.ablations({"runs": runs}).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "250",
        "1000",
        "",
        "8000",
        "",
        "32000",
    ]


@pytest.mark.slow
def test_notebook_02_runs_as_one_of_the_sweep(tmp_path, monkeypatch):
    # the default, and one without its VL model
    monkeypatch.setattr(sweep, "plan", lambda *given: ablations.plan(*given)[::2])
    arguments = ["--smoke", "--only", "captions of the VL model", "--runs", str(tmp_path / "runs")]
    main(["sweep", *arguments, "--out", str(tmp_path / "sweep.json")])
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert [(entry["ablation"], entry["label"]) for entry in record["runs"]] == [("", "default")]
    assert record["runs"][0]["methods"]["isa"]["R@10"] > 0 and record["defaults"]["smoke"] is True
    # there is no such VL model: nothing to compare
    assert [entry["label"] for entry in record["missing"]] == ["without"]
