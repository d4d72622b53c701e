"""The committed notebooks: as they stand, and run again."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import execute
import nbformat
import numpy as np
import pytest
import torch
from conftest import nbval
from nbformat.v4 import new_code_cell, new_notebook, new_output
from nbval.plugin import get_sanitize_patterns
from papermill.translators import PythonTranslator
from PIL import Image

from isa_lite.benchmarks.tiny import LABEL, write_tiny
from isa_lite.deploy.onnx_files import to_onnx
from isa_lite.models.vl_model import load_vl_model
from isa_lite.query_encoder import QueryEncoder
from isa_lite.retrieval.gallery import Gallery

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# the others train for minutes
SHORT = [path.stem for path in NOTEBOOKS if path.name[:2] not in ("02", "05")]


def papermill(name: str | Path, folder: Path, fails: bool = False, **parameters) -> str:
    """Runs a notebook by papermill's command in `folder`, as README does, into executed.ipynb;
    returns what it said.
    """
    command = [
        sys.executable,
        "-m",
        "papermill",
        f"{ROOT / 'notebooks' / name}.ipynb",
        "executed.ipynb",
        "--no-progress-bar",
    ]
    command += [word for key, value in parameters.items() for word in ("-p", key, str(value))]
    environment = os.environ | {"PYTHONWARNINGS": ""}
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, encoding="utf-8", env=environment
    )
    assert bool(done.returncode) == fails, done.stderr[-3000:]
    return done.stderr


def run_here(name: str, times: int = 1, **parameters) -> None:
    """Runs a notebook's cells in this process, which has imported everything already; a new one
    takes seconds for that.

    As papermill and IPython do it: parameters are a cell behind theirs, and what was run is kept in
    `In`.
    """
    names = {"display": lambda *_: None, "In": []}
    for cell in times * nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4).cells:
        sources = [cell.source] if cell.cell_type == "code" else []
        if "parameters" in cell.metadata.get("tags", []):
            sources.append(PythonTranslator.codify(parameters))
        for source in sources:
            names["In"].append(source)
            exec(compile(source, name, "exec"), names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_committed_notebook_was_run_once_from_top_to_bottom_without_noise(path):
    cells = json.loads(path.read_text())["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    assert sum("parameters" in c["metadata"].get("tags", []) for c in code) == 1
    for output in (o for c in code for o in c["outputs"]):
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr", output["text"]
        if "image/png" in output.get("data", {}):
            assert output["metadata"]["image/png"]["alt"], "a figure without alternative text"
    assert not re.search(r"/home/|/Users/|/tmp/|site-packages", path.read_text())


def of_distillation(folder: Path) -> None:
    """What notebook 02 leaves behind at smoke size, with three tokens."""
    out = folder / "runs" / "02_distillation"
    found = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert (found["queries"], found["gallery"], found["params"]["num_tokens"]) == (30, 150, 3)
    names = {
        "isa",
        "image only",
        "text only",
        "image + text",
        "single vector",
        "composition ceiling",
        "target ceiling",
    }
    assert set(found["methods"]) == names
    for recalls in found["methods"].values():
        assert list(recalls) == ["R@1", "R@5", "R@10"]
        assert 0 <= recalls["R@1"] <= recalls["R@5"] <= recalls["R@10"] <= 100
    assert found["methods"]["target ceiling"]["R@1"] > found["methods"]["text only"]["R@1"]
    assert (out / "query_encoder.safetensors").is_file()


def of_your_images(folder: Path) -> None:
    """What notebook 05 leaves behind at smoke size; then the same again on it, as if it were the
    user's own.
    """
    out = folder / "runs" / "05_your_images"
    found = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert (found["queries"], found["gallery"], found["held_out"]) == (20, 120, 12)
    assert set(found["methods"]) == {
        "isa",
        "image only",
        "text only",
        "image + text",
        "composition ceiling",
        "target ceiling",
    }
    # What is held out is in neither training: not among the targets of distillation, nor among the
    # captions of the large model.
    (targets,) = (out / "cache").glob("*/*.embeddings.npy")
    recorded = json.loads((out / "vl_model" / "training.json").read_text(encoding="utf-8"))
    assert len(np.load(targets)) == 108 and recorded["data"]["held out"] == 12
    recorded = json.loads((out / "without_change" / "training.json").read_text(encoding="utf-8"))
    assert recorded["config"]["change"] == 0
    # What was made is a folder like a user's, and a model to take: the same again with both named,
    # and without any queries.
    own = {
        "images": out / "icons" / "images",
        "vl_model": out / "vl_model",
        "captions": "none",
        "triplets": "none",
    }
    papermill("05_your_images", folder, **own, smoke=True, out_dir="mine")
    vl = load_vl_model(str(out / "vl_model"))
    assert QueryEncoder.load(folder / "mine", vl).config.num_tokens == 8
    gallery = Gallery.load(folder / "mine" / "gallery.safetensors")
    assert len(gallery) == 120 and gallery.ids[0] == "icon_0000.png"
    few = [Image.open(out / "icons" / "images" / name) for name in gallery.ids[:3]]
    # under the names of their images
    assert torch.allclose(gallery.embeddings[:3], vl.encode_images(few), atol=1e-4)
    assert not (folder / "mine" / "metrics.json").exists()


def of_benchmarks(folder: Path) -> None:
    found = json.loads(
        (folder / "runs/06_benchmarks/cirr/metrics.json").read_text(encoding="utf-8")
    )
    assert found["data"] == f"cirr ({LABEL})"


#: What makes a run small, where that is not `smoke` alone, and what is looked at afterwards.
SMALL = {"00_start_here": {"gallery": 100}, "02_distillation": {"smoke": True, "num_tokens": 3}}
AFTER = {
    "02_distillation": of_distillation,
    "05_your_images": of_your_images,
    "06_benchmarks": of_benchmarks,
}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_at_smoke_size_from_another_folder_and_again(
    tmp_path, path, monkeypatch, recwarn
):
    """In this process: nbval below, the sweep (02) and `of_your_images` (05) start each notebook in
    a kernel.
    """
    monkeypatch.chdir(tmp_path)
    written = {}

    # tracing is most of 07's time, and the same network gives the same file
    def traced_once(*given):
        *_, file = given
        if file.name not in written:
            to_onnx(*given)
            written[file.name] = file.read_bytes()
        file.write_bytes(written[file.name])

    monkeypatch.setattr("isa_lite.deploy.export.to_onnx", traced_once)
    monkeypatch.setattr("isa_lite.deploy.latency.to_onnx", traced_once)
    run_here(path.stem, times=2, seed=3, **SMALL.get(path.stem, {"smoke": True}))
    assert not [
        w.message
        for w in recwarn
        if issubclass(w.category, (UserWarning, RuntimeWarning, FutureWarning))
    ]
    if path.stem in AFTER:
        AFTER[path.stem](tmp_path)


#: Parameters that a notebook refuses, and what its words must hold: the parameter, and what is
#: wrong with it.
REFUSED = [
    ("00_start_here", {"reference": 300}, "'reference'"),
    ("01_token_learner", {"word": "blu"}, "'word'.*'blue'"),
    ("01_token_learner", {"word": "red"}, "'caption'.*'red'"),
    ("01_token_learner", {"word": "cyan", "caption": "cyan"}, "'word'.*'cyan'.*2 pieces"),
    ("02_distillation", {"lar_weight": -1}, "'lar_weight'.*at least 0"),
    ("02_distillation", {"backbone": "mobilenetv4_conv_smal"}, "backbone 'mobilenetv4_conv_smal'"),
    ("02_distillation", {"images": "nowhere"}, "no folder nowhere"),
    ("02_distillation", {"num_tokens": 65}, "'num_tokens', 'template'"),
    ("02_distillation", {"recipe": "paper"}, "'recipe'.*'core', 'default'"),
    ("02_distillation", {"negatives": -1}, "'negatives'.*at least 0"),
    ("02_distillation", {"gallery": 3999}, "'gallery'.*4000"),
    ("03_retrieval", {"encoder": "nowhere"}, "nowhere.*query_encoder.json"),
    ("03_retrieval", {"queries": 200, "gallery": 500}, "'gallery'.*800"),
    ("04_attention", {"images": 1}, "'images'.*at least 40"),
    ("05_your_images", {"images": "nowhere"}, "no folder nowhere"),
    ("05_your_images", {"captions": "none", "smoke": True}, "captions"),
    ("05_your_images", {"captions": "my.csv", "smoke": True}, "no file my.csv"),
    ("05_your_images", {"held_out": 0.7}, "held_out.*0.5"),
    ("05_your_images", {"stride": 7}, "stride 7"),
    ("05_your_images", {"backbone_weights": "lite0"}, "tf_efficientnet_lite0"),
    ("06_benchmarks", {"split": "train"}, "'split'.*'val'"),
    ("06_benchmarks", {"root": "."}, "'root'.*one benchmark"),
    ("00_start_here", {"gallery": 10**9}, "'gallery'.*memory"),
    ("01_token_learner", {"images": 10**9}, "'images'.*memory"),
    ("02_distillation", {"num_images": 10**9}, "'num_images'.*memory"),
    ("02_distillation", {"gallery": 10**9}, "'gallery'.*memory"),
    ("02_distillation", {"num_tokens": 10**9}, "'num_tokens'"),
    ("02_distillation", {"lar_weight": float("inf")}, "'lar_weight'"),
    ("02_distillation", {"device": "cuda:99"}, "'device'.*cuda:99"),
    ("02_distillation", {"vl_model": "ViT-B-23"}, "'vl_model'.*ViT-B-32"),
    ("02_distillation", {"template": "a photo"}, "'template'"),
    ("02_distillation", {"out_dir": "taken"}, "'out_dir'.*taken"),
    ("03_retrieval", {"gallery": 10**9}, "'gallery'.*memory"),
    ("04_attention", {"encoder": "taken"}, "'encoder'.*taken"),
    ("05_your_images", {"template": "a photo"}, "'template'"),
    ("05_your_images", {"num_tokens": 60}, "'num_tokens'"),
    ("05_your_images", {"lar_weight": float("inf")}, "'lar_weight'"),
    ("05_your_images", {"vl_model": "nowhere"}, "'vl_model'.*nowhere"),
    ("05_your_images", {"out_dir": "taken/below"}, "'out_dir'.*taken"),
    ("06_benchmarks", {"benchmark": "cirr", "root": "nowhere"}, "'root'.*nowhere"),
    ("06_benchmarks", {"out_dir": "taken"}, "'out_dir'.*taken"),
    ("06_benchmarks", {"template": "a photo"}, "'template'"),
    ("07_deploy", {"out_dir": "taken"}, "'out_dir'.*taken"),
    ("07_deploy", {"distractors": 10**9}, "'distractors'.*memory"),
    ("07_deploy", {"distractors": 5}, "'distractors'.*at least 100"),
    ("07_deploy", {"gallery": 1999}, "'gallery'.*2000"),
]


@pytest.mark.parametrize("name, given, words", REFUSED)
def test_a_notebook_refuses_a_bad_parameter_by_its_name(tmp_path, monkeypatch, name, given, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("")
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        run_here(name, **given)
    assert not list(tmp_path.rglob("*.safetensors")), (
        "work was done before the parameter was looked at"
    )


@pytest.mark.slow
def test_the_benchmarks_are_run_on_a_folder_of_the_user(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tiny("cirr", tmp_path / "tiny", queries=3, size=32)
    run_here("06_benchmarks", benchmark="cirr", root="tiny", submit=False)
    found = json.loads(
        (tmp_path / "runs/06_benchmarks/cirr/metrics.json").read_text(encoding="utf-8")
    )
    assert found["data"] == "cirr (the images in root)"


OWN = """
from isa_lite.token_learner import AdaptiveTokenLearner

class Mine(AdaptiveTokenLearner):
    pass

def backwards(queries):
    return -queries.image_embeddings()
"""


@pytest.mark.slow
def test_a_method_and_a_mapping_of_the_users_own_stand_in_notebook_03(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    encoder = QueryEncoder.for_model(load_vl_model(), mapping="own.py:Mine", num_tokens=3)
    encoder.save("mine")
    own = {"encoder": "mine", "mapping": "own.py:Mine", "method": "own.py:backwards"}
    run_here("03_retrieval", smoke=True, **own)
    said = capsys.readouterr().out
    # the opposite of an image is near to what is least like it, which is hardly the answer
    assert "backwards: R@1 0.0" in said and "3 tokens" in said


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_an_unknown_parameter_is_named_with_the_nearest(path):
    with pytest.raises(ValueError, match="unknown.*'sede'.*'seed'"):
        run_here(path.stem, sede=1)


@pytest.mark.slow
def test_a_bad_parameter_stops_papermill_with_its_name(tmp_path):
    said = papermill("00_start_here", tmp_path, fails=True, sede=1)
    assert "unknown parameter 'sede'" in said and "'seed'" in said


def measured(text: str) -> bool:
    """Whether nbval would leave out something of this text."""
    first = get_sanitize_patterns((ROOT / "notebooks" / "nbval.cfg").read_text(encoding="utf-8"))[
        0
    ][0]
    return bool(re.search(first, text))


@pytest.mark.parametrize("name", SHORT)
def test_what_is_not_compared_is_asserted(name):
    """A number that was measured, or a cell that is not compared at all, has an assertion: there
    or, for a table, in the next.
    """
    code = [
        cell
        for cell in nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4).cells
        if cell.cell_type == "code"
    ]
    for cell, following in zip(code, [*code[1:], code[-1]], strict=True):
        shown = [o.get("text", "") for o in cell.outputs] + [
            o.data.get("text/plain", "") for o in cell.outputs if "data" in o
        ]
        stored = '/ "results" /' in cell.source  # read from a file: the same everywhere
        if "NBVAL_IGNORE_OUTPUT" in cell.source or (measured("\n".join(shown)) and not stored):
            assert re.search(r"\bassert |\bclaim\(", cell.source + following.source), cell.source
        marked = [line for line in cell.source.splitlines() if "NBVAL" in line]
        assert marked in ([], ["# NBVAL_IGNORE_OUTPUT"]), "a marker is a whole line"


def test_two_outputs_are_alike_where_they_differ_in_what_was_measured_alone():
    def compared(text: str) -> str:
        for pattern, instead in get_sanitize_patterns(
            (ROOT / "notebooks" / "nbval.cfg").read_text(encoding="utf-8")
        ):
            text = re.sub(pattern, instead, text)
        return text

    assert compared("files, 8 bits   90.0   99.8") == compared("files, 8 bits    100.0  99.7")
    assert compared("R@1 86.7 [85.6, 87.8], 98%, -1.5e-05") == compared(
        "R@1 9.7 [-0.6, 7.8], 7.5%, 2.0"
    )
    for one, other in (
        ("(500, 20, 192)", "(500, 21, 192)"),
        ("90.0", "nan"),
        ("holds: a", "DOES NOT HOLD: a"),
        ("R@1 5.0", "R@5 5.0"),
    ):
        assert compared(one) != compared(other)


@pytest.mark.slow
def test_nbval_compares_so_wherever_it_is_started(tmp_path):
    for name in ("conftest.py", "nbval.cfg"):
        shutil.copy(ROOT / "notebooks" / name, tmp_path)
    for name, source, stored in (
        ("good", "print('R@1', 90.4, (2, 3))", "R@1 90.0 (2, 3)"),
        ("bad", "print((2, 3))", "(2, 4)"),
    ):
        cell = new_code_cell(
            source,
            outputs=[new_output("stream", name="stdout", text=stored + "\n")],
            execution_count=1,
        )
        nbformat.write(new_notebook(cells=[cell]), tmp_path / f"{name}.ipynb")
    done = nbval(tmp_path, "good.ipynb", "bad.ipynb")
    assert "1 failed, 1 passed" in done.stdout and "FAILED bad.ipynb" in done.stdout, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_a_short_notebook_gives_what_it_shows(name):
    done = nbval(ROOT, f"notebooks/{name}.ipynb")
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_notebook_is_stripped_of_what_says_nothing_and_refused_with_a_warning():
    bar = new_output(
        "display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "0%"}
    )
    kept = new_output("stream", name="stdout", text="2\n")
    cell = new_code_cell(
        "print(2)", outputs=[bar, kept], metadata={"papermill": {}, "execution": {}, "tags": []}
    )
    tagged = new_code_cell("a = 1", metadata={"tags": ["parameters"]})
    metadata = {
        "papermill": {},
        "kernelspec": {"name": "python3", "display_name": "Python 3"},
        "language_info": {"name": "python", "version": "3.11.1"},
    }
    notebook = execute.strip(new_notebook(cells=[cell, tagged], metadata=metadata))
    assert [c.metadata for c in notebook.cells] == [
        {},
        {"tags": ["parameters"]},
    ] and notebook.cells[0].outputs == [kept]
    assert notebook.metadata == {
        "kernelspec": {"name": "python3", "display_name": "Python 3"},
        "language_info": {"name": "python"},
    }
    cell.outputs.append(new_output("stream", name="stderr", text="UserWarning: this"))
    with pytest.raises(ValueError, match=r"print\(2\).*UserWarning: this"):
        execute.strip(notebook)
