import json
import shutil

import numpy as np
import open_clip
import pytest
import torch

from isa_lite.experiments import cards
from isa_lite.models.vl_model import load_vl_model
from isa_lite.pretraining.towers import (
    PretrainConfig,
    SceneBatches,
    contrastive_loss,
    export,
    train_matcher,
    train_towers,
)
from isa_lite.support import training
from isa_lite.support.settings import DATA, SCENES_BACKBONE, SCENES_CLIP, SCENES_ENCODER
from isa_lite.world import scenes

TINY = {
    "image_size": 32,
    "embed_dim": 16,
    "vision_width": 4,
    "text_width": 32,
    "text_layers": 1,
    "context_length": 77,
}


def tiny(**settings) -> PretrainConfig:
    return PretrainConfig(
        **TINY
        | {
            "steps": 3,
            "matching_steps": 2,
            "families": 2,
            "singles": 3,
            "num_workers": 0,
            "warmup": 1,
        }
        | settings
    )


@pytest.mark.parametrize(
    "name, values",
    {
        "steps": (0, 1.5, None),
        "lr": (0, -1, float("nan"), "fast"),
        "partial": (-0.1, 1.1, None),
        "image_size": (48, 0, 10**6),
        "text_width": (16, 40, 10**9),
        "vision_width": (3, 0),
        "text_layers": (0, 10**30),
        "context_length": (0, 10**9),
        "embed_dim": ("x", 0),
        "families": (-1, 10**9),
        "num_workers": (-1, 10**9),
        "device": ("cuda:99", "nonsense", 3),
        "dtype": ("float16", None),
    }.items(),
)
def test_a_setting_that_cannot_work_is_named(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{name}"):
            tiny(**{name: value})
    with pytest.raises(ValueError, match="families and singles"):
        tiny(families=0, singles=1)


def test_contrastive_loss_against_loops():
    torch.manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(n, 8), dim=1) for n in (3, 5))
    owner = torch.tensor([0, 0, 1, 2, 2])
    logits = (7 * texts @ images.T).tolist()
    to_image = [-logits[m][o] + np.log(sum(np.exp(logits[m]))) for m, o in enumerate(owner)]
    to_text = []
    for m, o in enumerate(owner.tolist()):  # the image's other caption is no negative of this one
        others = [np.exp(logits[n][o]) for n in range(5) if owner[n] != o or n == m]
        to_text.append(-logits[m][o] + np.log(sum(others)))
    expected = (np.mean(to_image) + np.mean(to_text)) / 2
    assert float(contrastive_loss(images, texts, owner, torch.tensor(7.0))) == pytest.approx(
        expected, abs=1e-5
    )


def test_batches_are_a_function_of_seed_and_number_and_never_show_a_held_out_pair(monkeypatch):
    drawn: list[scenes.Scene] = []
    render_many = scenes.render_many
    monkeypatch.setattr(
        scenes, "render_many", lambda s, *rest: drawn.extend(s) or render_many(s, *rest)
    )
    config = tiny(families=10)
    images, texts, owner = SceneBatches(config, 1, 4, 9)[2]
    again = SceneBatches(config, 1, 6, 9)[0]  # number 6, from another start
    assert np.array_equal(images, again[0]) and (texts, owner) == again[1:]
    assert texts != SceneBatches(config, 1, 4, 9)[3][1]
    assert texts != SceneBatches(tiny(families=10, seed=1), 1, 4, 9)[2][1]
    assert len(images) == 10 * 5 + 3 and not any(s.held_out for s in drawn)
    assert sorted(set(owner)) == list(range(len(images)))
    assert owner.count(0) == 1  # the scene before any edit has no caption of change
    assert len(owner) == len(images) + 10 * 3


def test_a_caption_of_change_ends_in_the_words_of_an_edit():
    images, texts, owner = SceneBatches(tiny(), 1)[0]
    changes = [
        t
        for i, t in enumerate(texts)
        if owner.count(owner[i]) == 2 and (i > 0 and owner[i - 1] == owner[i])
    ]
    verbs = (
        "make",
        "change",
        "now",
        "move",
        "put",
        "add",
        "with",
        "there is also",
        "remove",
        "without",
        "take away",
        "instead",
    )
    assert len(changes) == 6 and all(any(v in t for v in verbs) for t in changes)


@pytest.mark.slow
def test_a_run_that_resumes_ends_with_the_same_weights(tmp_path):
    whole = train_towers(tiny(steps=4), log=lambda s: None)[0].state_dict()

    class Stop(Exception):
        pass

    def stop_after_two(path, modules, optimizer, info):
        save_run(path, modules, optimizer, info)
        if info["step"] == 2:
            raise Stop

    save_run, checkpoint = training.save_run, tmp_path / "towers.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "save_run", stop_after_two)
        with pytest.raises(Stop):
            train_towers(tiny(steps=4), checkpoint, log=lambda s: None, checkpoint_minutes=0)
    resumed = train_towers(tiny(steps=4), checkpoint, log=lambda s: None)[0].state_dict()
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


@pytest.mark.slow
def test_what_is_exported_loads_with_open_clips_own_loader(tmp_path):
    config = tiny()
    vl, _ = train_towers(config, log=lambda s: None)
    vl.matcher, _ = train_matcher(vl, config, log=lambda s: None)
    export(vl, config, tmp_path)
    clip, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    text = "a large red circle at the top left, make the circle blue"
    theirs = torch.nn.functional.normalize(clip.eval().encode_text(tokenizer([text])), dim=-1)
    loaded = load_vl_model(str(tmp_path))
    assert torch.allclose(loaded.encode_text([text]), theirs, atol=1e-5)
    # stored as float16
    assert torch.allclose(loaded.encode_text([text]), vl.encode_text([text]), atol=5e-3)
    image = scenes.render(scenes.sample_scenes(1, 0)[0], size=32)
    theirs = torch.nn.functional.normalize(clip.encode_image(preprocess(image)[None]), dim=-1)
    assert torch.allclose(loaded.encode_images([image]), theirs, atol=1e-5)
    assert (
        json.loads((tmp_path / "matching_encoder.json").read_text())["patches"]
        == loaded.matcher.patch_position.shape[0]
    )
    unseen = open_clip.tokenize(["zebra"])[0, 1]
    assert clip.token_embedding.weight[unseen].norm() == 0  # a word that training never met


CARDS = {
    SCENES_CLIP: "training.json",
    SCENES_BACKBONE: "backbone.json",
    SCENES_ENCODER: "query_encoder.json",
}


@pytest.mark.parametrize("name", CARDS)
def test_a_damaged_record_of_a_training_is_named_before_anything_is_measured(
    tmp_path, monkeypatch, name
):
    monkeypatch.setattr(cards, "measure", lambda *_: pytest.fail("measured"))
    folder = shutil.copytree(DATA / name, tmp_path / name)
    (folder / CARDS[name]).write_text("{}")
    make = {
        SCENES_CLIP: lambda: cards.vl_card(folder, None),
        SCENES_BACKBONE: lambda: cards.backbone_card(folder),
    }
    with pytest.raises(ValueError, match=CARDS[name]):
        make.get(name, lambda: cards.encoder_card(folder, None, None))()
