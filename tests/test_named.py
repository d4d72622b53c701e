"""Methods and benchmarks of the user's own, as README shows them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from isa_lite.benchmarks import cirr, tiny
from isa_lite.benchmarks.common import rank
from isa_lite.benchmarks.run import RunConfig, run
from isa_lite.commands import main
from isa_lite.distill import distill
from isa_lite.experiments import compare
from isa_lite.methods.named import named
from isa_lite.models.vl_model import load_vl_model
from isa_lite.query_encoder import QueryEncoder
from isa_lite.retrieval.results import provenance
from isa_lite.retrieval.scene_queries import make_benchmark
from isa_lite.support.settings import CompareConfig, DistillConfig
from isa_lite.world.scenes import render, sample_scenes

README = Path(__file__).parent.parent / "README.md"
QUIET = RunConfig(progress=False, num_workers=0)
FITTED = """
class Mine:
    def __init__(self, asked=()):
        self.asked = list(asked)

    def fit(self, queries):
        return Mine([*self.asked, queries])

    def __call__(self, queries):
        return queries.image_embeddings()
"""


@pytest.fixture(scope="module")
def vl():
    return load_vl_model()


@pytest.fixture
def mine(tmp_path) -> str:
    """README's file, written as it stands there."""
    section = README.read_text().split("## Your own method, benchmark")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.S)
    assert len(blocks) == 2 and all(len(block.splitlines()) <= 20 for block in blocks)
    (tmp_path / "mine.py").write_text("\n".join(blocks))
    return str(tmp_path / "mine.py")


def test_the_method_of_the_readme_is_measured_on_a_public_benchmark(mine, vl, tmp_path):
    root = tiny.write_tiny("cirr", tmp_path / "cirr", queries=6)
    found = run("cirr", root, vl, ["image + text", f"{mine}:leaning"], config=QUIET)
    (task,) = cirr.load(root)
    gallery = vl.encode_images([Image.open(p).convert("RGB") for p in task.files.values()])
    queries = task.embedded(vl, gallery)
    image, text = queries.image_embeddings(), queries.text_embeddings()
    ranking = rank(task, F.normalize(0.4 * image + 0.6 * text, dim=-1), gallery)
    assert found.methods["leaning"] == pytest.approx(cirr.score([task], [ranking]), abs=0.01)
    assert found.provenance["vl_fingerprint"] == vl.fingerprint


def test_a_method_of_ones_own_may_be_called_isa(vl, tmp_path):
    (tmp_path / "own.py").write_text("def isa(queries):\n    return queries.image_embeddings()\n")
    root = tiny.write_tiny("cirr", tmp_path / "cirr", queries=4)
    found = run("cirr", root, vl, [f"{tmp_path}/own.py:isa", "image only"], config=QUIET)
    assert found.methods["isa"] == found.methods["image only"] and "prompt" not in found.protocol
    assert "encoder" not in found.provenance


def test_the_benchmark_of_the_readme_is_scored(mine, vl, tmp_path, capsys):
    root = tmp_path / "pets"
    (root / "images").mkdir(parents=True)
    for i, scene in enumerate(sample_scenes(8, seed=3)):
        render(scene, i).save(root / "images" / f"pet{i}.png")
    asked = [{"from": f"pet{i}", "text": "red", "to": [f"pet{i + 1}", "pet7"]} for i in range(4)]
    (root / "val.json").write_text(json.dumps(asked))
    command = ["benchmarks", "own", "--read", f"{mine}:pets", "--root", str(root)]
    command += ["--methods", "image only", "--cache", str(tmp_path / "cache")]
    main([*command, "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    images = [Image.open(root / "images" / f"pet{i}.png").convert("RGB") for i in range(8)]
    points = vl.encode_images(images)
    scores = points[:4] @ points.T
    scores[range(4), range(4)] = -2  # a reference is not an answer
    order = scores.argsort(dim=1, descending=True).tolist()
    for k in (1, 5):
        hits = [bool({i + 1, 7} & set(order[i][:k])) for i in range(4)]
        assert found["methods"]["image only"][f"R@{k}"] == 100 * np.mean(hits)
    asked[0]["from"] = "pet99"
    (root / "val.json").write_text(json.dumps(asked))
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 2 and "pet99" in capsys.readouterr().err


def test_a_method_is_fitted_on_other_queries_than_it_is_measured_on(tmp_path, vl):
    (tmp_path / "fitted.py").write_text(FITTED)
    own = named([f"{tmp_path}/fitted.py:Mine"])
    config = CompareConfig(queries=4, gallery=16, chosen_queries=3, chosen_gallery=12)
    (fitted,) = compare.fitted(own, vl, 5, config).values()
    (other,) = fitted.asked
    assert len(other) == 3 and other.scenes[0] != make_benchmark(4, 16, 5).scenes[0]
    bench = compare.benchmark(vl, 5, config)
    found = compare.recalls(bench, {"mine": fitted})["mine"]["R@1"]
    points = bench.gallery[torch.from_numpy(bench.reference)]
    assert found == pytest.approx(100 * np.mean(bench.ranks(points) == 1), abs=0.01)


MINE = """
from isa_lite.token_learner import AdaptiveTokenLearner

class Mine(AdaptiveTokenLearner):
    pass
"""


def test_a_saved_encoder_with_a_mapping_of_ones_own_is_compared(tmp_path, vl):
    (tmp_path / "own.py").write_text(MINE)
    spec, config = f"{tmp_path}/own.py:Mine", CompareConfig()
    made = {n: getattr(config, n) for n in ("num_images", "steps", "batch_size")}
    encoder = QueryEncoder.for_model(vl, mapping=spec, num_tokens=2)
    encoder.save(tmp_path / "mine", {"parameters": made | {"seed": 4, "recipe": "core"}})
    with pytest.raises(ValueError, match="--mapping"):
        compare.encoders_by_seed([tmp_path / "mine"], vl, config)
    (found,) = compare.encoders_by_seed([tmp_path / "mine"], vl, config, spec).values()
    told = provenance(vl, found)
    assert told["encoder_fingerprint"] == encoder.fingerprint and told["recipe"] == "core"
    assert told["mapping"] == spec and told["num_tokens"] == 2


def test_the_mapping_and_the_loss_of_the_readme_are_trained(mine, vl, tmp_path):
    scenes = sample_scenes(24, seed=1)
    images = np.stack([np.array(render(scene, i, vl.image_size)) for i, scene in enumerate(scenes)])
    encoder = QueryEncoder.for_model(vl, mapping=f"{mine}:Corners")
    settings = {"gcd_weight": 0.0, "lar_weight": 0.0, "warmup": 0, "validation": 4, "lr": 0.01}
    config = DistillConfig(steps=12, batch_size=8, **settings)
    history = distill(images, vl, encoder, config, loss=f"{mine}:near", progress=False)
    assert np.mean(history.own[-3:]) < np.mean(history.own[:3])  # it falls
    encoder.save(tmp_path / "saved")
    loaded = QueryEncoder.load(tmp_path / "saved", vl, mapping=f"{mine}:Corners")
    assert torch.equal(
        loaded.sentences(images[:2]).tokens, encoder.eval().sentences(images[:2]).tokens
    )


@pytest.mark.parametrize(
    "names, said",
    [
        ("isa", "list of names"),
        ([], "list of names"),
        (["isa"], "--encoder"),
        (["image + tex"], "image \\+ tex"),
        (["text only", "text only"], "twice"),
        (["nowhere.py:mine"], "nowhere.py"),
        ([7], "7"),
    ],
)
def test_a_method_that_cannot_be_named_is_refused(names, said):
    with pytest.raises(ValueError, match=said):
        named(names)
