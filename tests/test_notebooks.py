"""The committed notebooks: as they stand, and run again."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import execute
import nbformat
import numpy as np
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image

from isa_lite.gallery import Gallery
from isa_lite.query_encoder import QueryEncoder
from isa_lite.vl_model import load_vl_model

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def papermill(name: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(ROOT / "notebooks" / name),
        str(folder / "executed.ipynb"),
        "--no-progress-bar",
    ]
    return subprocess.run(
        [*command, *arguments], cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": ""}
    )


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


def test_distillation_runs_at_smoke_size_and_writes_its_results(tmp_path):
    done = papermill("02_distillation.ipynb", tmp_path, "-p", "smoke", "true", "-p", "out_dir", "out", "-p", "num_tokens", "3")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (found["queries"], found["gallery"], found["params"]["num_tokens"]) == (30, 150, 3)
    names = {"isa", "image only", "text only", "image + text", "single vector", "composition ceiling", "target ceiling"}
    assert set(found["methods"]) == names
    for recalls in found["methods"].values():
        assert list(recalls) == ["R@1", "R@5", "R@10"]
        assert 0 <= recalls["R@1"] <= recalls["R@5"] <= recalls["R@10"] <= 100
    assert found["methods"]["target ceiling"]["R@1"] > found["methods"]["text only"]["R@1"]
    assert (tmp_path / "out" / "query_encoder.safetensors").is_file()


def test_a_folder_becomes_a_gallery_and_a_query_encoder_at_smoke_size(tmp_path):
    made = papermill("05_your_images.ipynb", tmp_path, "-p", "smoke", "true", "-p", "out_dir", "out")
    assert made.returncode == 0, made.stderr[-3000:]
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (found["queries"], found["gallery"], found["held_out"]) == (20, 120, 12)
    assert set(found["methods"]) == {"isa", "image only", "text only", "image + text", "composition ceiling", "target ceiling"}
    # What is held out is in neither training: not among the targets of distillation, nor among the captions of the large model.
    (targets,) = (tmp_path / "out" / "cache").glob("*/embeddings.npy")
    recorded = json.loads((tmp_path / "out" / "vl_model" / "training.json").read_text())
    assert len(np.load(targets)) == 108 and recorded["data"]["held out"] == 12
    assert json.loads((tmp_path / "out" / "without_change" / "training.json").read_text())["config"]["change"] == 0
    # What was made is a folder like a user's, and a model to take: the same again with both named, and without any queries.
    own = [
        "-p",
        "images",
        "out/icons/images",
        "-p",
        "vl_model",
        "out/vl_model",
        "-p",
        "captions",
        "none",
        "-p",
        "triplets",
        "none",
    ]
    done = papermill("05_your_images.ipynb", tmp_path, *own, "-p", "smoke", "true", "-p", "out_dir", "mine")
    assert done.returncode == 0, done.stderr[-3000:]
    vl = load_vl_model(str(tmp_path / "out" / "vl_model"))
    assert QueryEncoder.load(tmp_path / "mine", vl).config.num_tokens == 8
    gallery = Gallery.load(tmp_path / "mine" / "gallery.safetensors")
    assert len(gallery) == 120 and gallery.ids[0] == "icon_0000.png"
    few = [Image.open(tmp_path / "out" / "icons" / "images" / name) for name in gallery.ids[:3]]
    assert torch.allclose(gallery.embeddings[:3], vl.encode_images(few), atol=1e-4)  # under the names of their images
    assert not (tmp_path / "mine" / "metrics.json").exists()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_at_smoke_size_from_another_folder_and_again_in_the_same_kernel(tmp_path, path):
    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = re.sub(r"^(seed: int =) \d+", r"\1 3", cell.source, flags=re.M).replace(
                "smoke: bool = False", "smoke: bool = True"
            )
            assert "seed: int = 3" in cell.source
    notebook.cells += [new_code_cell(cell.source) for cell in notebook.cells if cell.cell_type == "code"]
    nbformat.write(notebook, tmp_path / "twice.ipynb")
    done = papermill(str(tmp_path / "twice.ipynb"), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = [o for cell in nbformat.read(tmp_path / "executed.ipynb", 4).cells for o in cell.get("outputs", ())]
    noise = [o["text"] for o in outputs if o.get("name") == "stderr"]  # progress bars may stand there
    assert not [text for text in noise if "Warning" in text]


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("02_distillation.ipynb", ("-p", "stesp", "10"), "unknown parameter 'stesp'; did you mean 'steps'?"),
        ("02_distillation.ipynb", ("-p", "lar_weight", "-1"), "parameter 'lar_weight' must be a number of at least 0"),
        ("02_distillation.ipynb", ("-p", "backbone", "mobilenetv4_conv_smal"), "unknown backbone 'mobilenetv4_conv_smal'"),
        ("02_distillation.ipynb", ("-p", "images", "nowhere"), "there is no folder nowhere"),
        ("03_retrieval.ipynb", ("-p", "encoder", "nowhere"), "nowhere holds no query_encoder.json"),
        ("02_distillation.ipynb", ("-p", "num_tokens", "65"), "'num_tokens' and 'template' must leave room for a modifier"),
        ("02_distillation.ipynb", ("-p", "gallery", "3999"), "'gallery' must be at least 4000, four times 'queries'"),
        ("07_deploy.ipynb", ("-p", "gallery", "1999"), "'gallery' must be at least 2000, four times 'queries'"),
        ("03_retrieval.ipynb", ("-p", "queries", "200", "-p", "gallery", "500"), "'gallery' must be at least 800"),
        ("06_benchmarks.ipynb", ("-p", "split", "train"), "parameter 'split' must be 'val' for the tiny trees"),
        ("04_attention.ipynb", ("-p", "images", "1"), "parameter 'images' must be a whole number of at least 40"),
        ("05_your_images.ipynb", ("-p", "images", "nowhere"), "there is no folder nowhere"),
        ("05_your_images.ipynb", ("-p", "captions", "none"), "without captions no model can be trained"),
        ("05_your_images.ipynb", ("-p", "captions", "my.csv", "-p", "smoke", "true"), "there is no file my.csv"),
        ("05_your_images.ipynb", ("-p", "held_out", "0.7"), "held_out must be a share between 0 and 0.5"),
        ("01_token_learner.ipynb", ("-p", "word", "blu"), "parameter 'word' must be one of"),
        ("01_token_learner.ipynb", ("-p", "word", "red"), "parameter 'caption' must contain 'red' once"),
        ("01_token_learner.ipynb", ("-p", "word", "cyan", "-p", "caption", "cyan"), "'cyan' is cut into 2 pieces"),
        ("05_your_images.ipynb", ("-p", "stride", "7"), "has no feature map of stride 7"),
        ("05_your_images.ipynb", ("-p", "backbone_weights", "lite0"), "are the weights of 'tf_efficientnet_lite0', but"),
        ("07_deploy.ipynb", ("-p", "thread", "1"), "unknown parameter 'thread'; did you mean 'threads'?"),
        ("07_deploy.ipynb", ("-p", "distractors", "5"), "parameter 'distractors' must be a whole number of at least 100"),
        ("00_start_here.ipynb", ("-p", "galery", "500"), "unknown parameter 'galery'; did you mean 'gallery'?"),
    ],
)
def test_a_bad_parameter_stops_a_notebook_with_its_name(tmp_path, name, arguments, message):
    done = papermill(name, tmp_path, *arguments)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.parametrize(
    "name", ["00_start_here", "01_token_learner", "03_retrieval", "04_attention", "06_benchmarks", "07_deploy"]
)
def test_a_short_notebook_gives_what_it_shows(name):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--nbval",
        "--nbval-current-env",
        f"notebooks/{name}.ipynb",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_notebook_is_stripped_of_what_says_nothing_and_refused_with_a_warning():
    bar = new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "0%"})
    kept = new_output("stream", name="stdout", text="2\n")
    cell = new_code_cell("print(2)", outputs=[bar, kept], metadata={"papermill": {}, "execution": {}, "tags": []})
    tagged = new_code_cell("a = 1", metadata={"tags": ["parameters"]})
    metadata = {
        "papermill": {},
        "kernelspec": {"name": "python3", "display_name": "Python 3"},
        "language_info": {"name": "python", "version": "3.11.1"},
    }
    notebook = execute.strip(new_notebook(cells=[cell, tagged], metadata=metadata))
    assert [c.metadata for c in notebook.cells] == [{}, {"tags": ["parameters"]}] and notebook.cells[0].outputs == [kept]
    assert notebook.metadata == {
        "kernelspec": {"name": "python3", "display_name": "Python 3"},
        "language_info": {"name": "python"},
    }
    cell.outputs.append(new_output("stream", name="stderr", text="UserWarning: this"))
    with pytest.raises(ValueError, match=r"the cell beginning 'print\(2\)' has an error or a warning.*UserWarning: this"):
        execute.strip(notebook)
