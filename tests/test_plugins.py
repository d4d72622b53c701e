"""What FILE.py:NAME loads, and the one line that says what is wrong with it; mappings and losses of
one's own.
"""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from isa_lite.commands import main
from isa_lite.distill import DistillConfig, distill
from isa_lite.mappings import MAPPINGS
from isa_lite.query_encoder import QueryEncoder
from isa_lite.support.plugins import load
from isa_lite.world.scenes import render_many, sample_scenes

FILE = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Pair:
    one: int
    two: int = 2

def add(a, b):
    return a + b

number = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def test_a_function_and_a_class_come_out_of_a_file_and_nothing_else_can_import_it(file):
    assert load(f"{file}:add", "loss")(2, 3) == 5
    assert load(f"{file}:Pair", "mapping")(1).two == 2
    assert "mine" not in sys.modules
    file.write_text(FILE.replace("a + b", "a * b"))
    assert load(f"{file}:add", "loss")(2, 3) == 6


@pytest.mark.parametrize(
    "name, said",
    [
        ("sub", "mine.py defines no 'sub'"),
        ("", "mine.py defines no ''"),
        ("number", "number is no class or function"),
    ],
)
def test_a_name_that_cannot_be_used_is_named(file, name, said):
    with pytest.raises(ValueError, match=f"loss '.*mine.py:{name}'.*{said}"):
        load(f"{file}:{name}", "loss")


@pytest.mark.parametrize("spec", ["adaptive", "mine.txt:add", "mine.py", ":add", "", None, 3])
def test_another_form_is_refused(spec):
    with pytest.raises(ValueError, match="loss .* must be given as FILE.py:NAME"):
        load(spec, "loss")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"mapping '.*none.py:A': there is no file"):
        load(f"{tmp_path / 'none.py'}:A", "mapping")


@pytest.mark.parametrize(
    "source, said",
    [
        ("def (", "SyntaxError: "),
        ("import not_there_at_all", "ModuleNotFoundError: .*not_there_at_all"),
        ("raise KeyError('two\\nlines')", "KeyError: .*two"),
        ("import sys; sys.exit('bye')", "SystemExit: bye"),
    ],
)
def test_a_file_that_fails_is_one_line_and_leaves_nothing_behind(tmp_path, source, said):
    path, before = tmp_path / "bad.py", set(sys.modules)
    path.write_text(source)
    with pytest.raises(ValueError, match=f"bad.py fails with {said}") as error:
        load(f"{path}:A", "mapping")
    assert "\n" not in str(error.value)
    assert not [name for name in set(sys.modules) - before if "plugin" in name]


# ------------------------------------------------------------------------- a mapping of one's own

MAPPING = """
from pathlib import Path
import torch
from torch import nn
from isa_lite.token_learner import Sentence, ToWords

seen = Path(__file__).with_name("seen")
seen.write_text("run " + (seen.read_text() if seen.exists() else ""))

class Corners(nn.Module):
    def __init__(self, shapes, width=8, depth=0):
        super().__init__()
        self.reduce = nn.Conv2d(shapes.channels, width, 1)
        self.to_word = ToWords(width, shapes.word_width, shapes.word_norm, 2)

    def forward(self, features, reads=False):
        x = self.reduce(features)
        maps = torch.zeros(len(x), 2, *x.shape[2:])
        maps[:, 0, 0, 0] = maps[:, 1, -1, -1] = 1
        tokens = maps.flatten(2) @ x.flatten(2).transpose(1, 2)  # B x 2 x width
        return Sentence(self.to_word(tokens), maps, maps[:, None] if reads else None)

class Wordless(nn.Module):
    def __init__(self, shapes, width=8, depth=0):
        super().__init__()

class Short(Corners):
    def forward(self, features, reads=False):
        return super().forward(features)._replace(maps=torch.ones(1, 2))

class Unsized(Corners):
    def __init__(self, shapes):
        super().__init__(shapes)
"""


@pytest.fixture
def corners(tmp_path):
    path = tmp_path / "corners.py"
    path.write_text(MAPPING)
    return f"{path}:Corners"


def encoder_of(vl, mapping):
    torch.manual_seed(0)
    return QueryEncoder.for_model(vl, mapping=mapping)


def test_an_encoder_with_a_mapping_of_ones_own_loads_when_it_is_named_again(vl, corners, tmp_path):
    encoder = encoder_of(vl, corners).eval()
    assert encoder.config.num_tokens == 2 and encoder.config.width == 8
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    before = encoder.sentences(images)
    encoder.save(tmp_path / "mine")
    saved = json.loads((tmp_path / "mine" / "query_encoder.json").read_text())
    assert saved["config"]["mapping"] == corners
    ran = (tmp_path / "seen").read_text()
    with pytest.raises(
        ValueError, match=r"query_encoder\.json names.*corners\.py:Corners.*--mapping"
    ):
        QueryEncoder.load(tmp_path / "mine", vl)
    assert (tmp_path / "seen").read_text() == ran  # nothing was run
    loaded = QueryEncoder.load(tmp_path / "mine", vl, mapping=corners)
    for one, other in zip(before[:2], loaded.sentences(images)[:2], strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match=r"query_encoder\.safetensors does not fit"):
        QueryEncoder.load(tmp_path / "mine", vl, mapping="single vector")


def test_a_class_in_the_table_of_mappings_is_one_of_them(vl, corners, tmp_path, monkeypatch):
    monkeypatch.setitem(MAPPINGS, "corners", load(corners, "mapping"))
    encoder_of(vl, "corners").save(tmp_path / "mine")
    assert QueryEncoder.load(tmp_path / "mine", vl).config.mapping == "corners"
    monkeypatch.delitem(MAPPINGS, "corners")
    with pytest.raises(ValueError, match="query_encoder.*unknown mapping 'corners'"):
        QueryEncoder.load(tmp_path / "mine", vl)


@pytest.mark.parametrize(
    "name, said", [("Wordless", "to_word"), ("Short", "maps"), ("Unsized", "width and depth")]
)
def test_a_mapping_that_writes_no_sentence_is_refused(vl, corners, name, said):
    with pytest.raises(ValueError, match=f"mapping '.*:{name}'.*{said}"):
        encoder_of(vl, corners.replace("Corners", name))


# ---------------------------------------------------------------------------- a loss of one's own

LOSSES = """
from isa_lite.losses import gcd_loss

def contrast(query, target, others, tokens):
    assert query.shape == target.shape and others.shape[1] == query.shape[1]
    assert tokens.shape[:2] == (len(query), 3)
    return gcd_loss(query, target, 0.05, others)

def long(query, target, others, tokens):
    return 1 - tokens.sum(-1).mean()

def both(*given):
    return contrast(*given) + long(*given)

def rows(query, target, others, tokens):
    return (query * target).sum(-1)

def constant(query, target, others, tokens):
    return query.detach().sum()
"""


@pytest.fixture
def losses(tmp_path):
    path = tmp_path / "losses.py"
    path.write_text(LOSSES)
    return path


def trained(vl, loss=None, checkpoint=None, **settings):
    torch.manual_seed(0)
    encoder = QueryEncoder.for_model(vl, num_tokens=3, width=32, depth=1)
    images = render_many(sample_scenes(12, 0), range(12), 64)
    few = {"steps": 2, "batch_size": 4, "validation": 4, "dtype": "float32", "lar_weight": 0.0}
    config = DistillConfig(**few | settings)
    history = distill(images, vl, encoder, config, None, checkpoint, progress=False, loss=loss)
    return encoder.state_dict(), history


def alike(one, other):
    return all(torch.equal(one[k], other[k]) for k in one)


def test_a_loss_of_ones_own_takes_the_place_of_the_papers_or_is_added(vl, losses):
    plain, history = trained(vl)
    instead, said = trained(vl, f"{losses}:contrast", gcd_weight=0.0)
    assert alike(plain, instead) and said.own == history.gcd == said.gcd and history.own == []
    # added to GCD it is what a loss of both is alone
    added, whole, plain = (
        trained(vl, loss, gcd_weight=weight, warmup=0)[0]["mapping.to_word.start"]
        for loss, weight in ((f"{losses}:long", 1.0), (f"{losses}:both", 0.0), (None, 1.0))
    )
    assert torch.allclose(added, whole, atol=1e-4) and (added - plain).abs().max() > 1e-3


def test_a_run_with_a_loss_of_ones_own_is_not_taken_up_with_another(vl, losses, tmp_path):
    weights, history = trained(vl, f"{losses}:contrast", tmp_path / "run")
    again, taken_up = trained(vl, f"{losses}:contrast", tmp_path / "run")
    assert alike(weights, again) and taken_up.own == history.own
    for other in (None, lambda *given: given[0].sum()):
        with pytest.raises(ValueError, match="run belongs to another run.*loss: "):
            trained(vl, other, tmp_path / "run")


@pytest.mark.parametrize("loss", ["rows", "constant"])
def test_a_loss_that_cannot_be_followed_down_is_named(vl, losses, loss):
    with pytest.raises(ValueError, match=f"loss '.*:{loss}' must give a scalar"):
        trained(vl, f"{losses}:{loss}")
    with pytest.raises(ValueError, match="loss must be a function"):
        trained(vl, 3)


@pytest.mark.parametrize(
    "given, said",
    [
        (["--mapping", "nearest"], "--mapping"),
        (["--mapping", "none.py:A"], "mapping 'none.py:A': there is no file"),
        (["--loss", "contrast"], "loss 'contrast' must be given as FILE.py:NAME"),
        (["--loss", "{losses}:none"], "defines no 'none'"),
    ],
)
def test_a_bad_name_ends_the_command_with_status_2(losses, tmp_path, capsys, given, said):
    given = [part.format(losses=losses) for part in given]
    with pytest.raises(SystemExit) as end:
        main(["distill", "--images", str(tmp_path), "--out", str(tmp_path / "out"), *given])
    error = capsys.readouterr().err
    assert end.value.code == 2 and said in error and error.count("\n") == 1


def test_the_command_trains_with_both(vl_folder, corners, losses, tmp_path, capsys):
    losses.write_text(LOSSES.replace("(len(query), 3)", "(len(query), 2)"))
    (tmp_path / "images").mkdir()
    for i, image in enumerate(render_many(sample_scenes(8, 0), range(8), 64)):
        Image.fromarray(image).save(tmp_path / "images" / f"{i}.png")
    folders = ["--images", f"{tmp_path}/images", "--out", f"{tmp_path}/out", "--vl-model"]
    few = "--steps 1 --batch-size 4 --validation 4 --gcd-weight 0 --lar-weight 0".split()
    main(
        [
            "distill",
            *folders,
            str(vl_folder),
            "--mapping",
            corners,
            "--loss",
            f"{losses}:contrast",
            *few,
        ]
    )
    encoder = QueryEncoder.load(tmp_path / "out", mapping=corners)
    assert encoder.info["loss"] == f"{losses}:contrast" and encoder.config.num_tokens == 2
