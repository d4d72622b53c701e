"""Recipes: what they set, that what is given has the last word, and that a run says which one it
was.
"""

import json
from dataclasses import asdict

import numpy as np
import pytest

from isa_lite.commands import distill as command
from isa_lite.commands import parser_of
from isa_lite.distill import distill
from isa_lite.models.vl_model import load_vl_model
from isa_lite.query_encoder import QueryEncoder
from isa_lite.support.recipes import START_WORDS, Recipe, complete, recipe
from isa_lite.support.settings import (
    DATA,
    SCENES_CLIP,
    SCENES_ENCODER,
    DistillConfig,
    QueryEncoderConfig,
)

NOTHING = {
    "start_words": "",
    "norm_matching": False,
    "backbone_weights": "",
    "word_noise": 0.0,
    "negatives": 0,
    "lar_share": 1.0,
}


def test_core_has_no_aid_and_default_has_all():
    assert asdict(recipe("core")) == NOTHING == asdict(Recipe())
    assert all(asdict(recipe("default"))[name] != value for name, value in NOTHING.items())
    fields = {*QueryEncoderConfig.__dataclass_fields__, *DistillConfig.__dataclass_fields__}
    assert (
        set(NOTHING) <= fields and recipe("core").encoder | recipe("core").distillation == NOTHING
    )
    with pytest.raises(ValueError, match="recipe.*'cor'"):
        recipe("cor")
    with pytest.raises(ValueError, match="'x'"):
        recipe(["x"])


def test_default_is_what_ships():
    info = json.loads((DATA / SCENES_ENCODER / "query_encoder.json").read_text())["info"][
        "parameters"
    ]
    aids = asdict(recipe("default"))
    assert {name: info[name] for name in aids if name in info} == {
        n: v
        for n, v in aids.items()
        if n not in ("negatives", "lar_share")  # it was trained with LAR in full
    }


def test_the_aids_of_the_scenes_stay_with_their_model_and_backbone():
    assert recipe("default", "ViT-B-32").encoder == {
        "start_words": "",
        "norm_matching": True,
        "backbone_weights": "",
    }
    assert recipe("default", SCENES_CLIP, "resnet18").encoder == {
        "start_words": START_WORDS, "norm_matching": True, "backbone_weights": ""
    }  # fmt: skip
    assert recipe("default", "ViT-B-32").distillation == recipe("default").distillation


def test_what_is_given_has_the_last_word():
    given = {
        "recipe": "core",
        "vl_model": SCENES_CLIP,
        "backbone": QueryEncoderConfig.backbone,
        "steps": 3,
    }
    assert complete(given) == given | NOTHING
    assert complete(given | {"word_noise": 0.5, "negatives": None})["word_noise"] == 0.5
    changed = complete(given | {"recipe": "default", "start_words": "", "norm_matching": False})
    assert (
        changed["start_words"] == ""
        and changed["norm_matching"] is False
        and changed["negatives"] == 8192
    )


def test_the_settings_of_distillation_follow_the_recipe():
    assert (DistillConfig().word_noise, DistillConfig().negatives) == (1.0, 8192)
    core = DistillConfig(recipe="core", negatives=5)
    assert (core.recipe, core.word_noise, core.negatives) == ("core", 0.0, 5)
    with pytest.raises(ValueError, match="recipe"):
        DistillConfig(recipe="paper")


@pytest.mark.parametrize(
    "given, expected",
    [
        ([], {}),
        (["--recipe", "core"], {"start_words": "", "norm_matching": False, "backbone_weights": ""}),
        (
            ["--recipe", "core", "--start-words", "a star"],
            {"start_words": "a star", "norm_matching": False, "backbone_weights": ""},
        ),
        (["--backbone-weights", ""], {"backbone_weights": ""}),
        (["--pretrained"], {"backbone_weights": ""}),
        (["--vl-model", "ViT-B-32"], {"start_words": "", "backbone_weights": ""}),
    ],
)
def test_the_command_takes_a_recipe_and_what_is_given_beside_it(given, expected):
    args = parser_of("distill").parse_args(["--images", "x", "--out", "y", *given])
    settings = command.encoder_settings(args)
    assert {name: settings[name] for name in recipe("default").encoder} == recipe(
        "default"
    ).encoder | expected


def test_a_run_says_its_recipe_and_its_dtype(vl_folder, tmp_path):
    vl = load_vl_model(str(vl_folder))
    encoder = QueryEncoder.for_model(vl, num_tokens=2, width=32, depth=1, image_size=64)
    images = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), np.uint8)
    config = DistillConfig(
        recipe="core", steps=1, batch_size=4, validation=4, dtype="float32", lar_weight=0
    )
    history = distill(images, vl, encoder, config, tmp_path / "cache", progress=False)
    assert (history.recipe, history.dtype) == ("core", "float32")
