"""Weights for a light backbone: the loss, the training that resumes, and what is refused."""

import json

import numpy as np
import pytest
import torch

from isa_lite.commands import main
from isa_lite.models.backbones import SCENES, WEIGHTS
from isa_lite.models.vl_model import load_vl_model
from isa_lite.pretraining import light_backbone
from isa_lite.pretraining.light_backbone import BackboneConfig, feature_loss, learn_features
from isa_lite.query_encoder import QueryEncoder
from isa_lite.support.checkpoint import read_tensors, write_tensors
from isa_lite.world import scenes

FEW = {"steps": 6, "batch_size": 16, "warmup": 2}


@pytest.fixture(scope="module")
def vl():
    """The shipped model: its features are worth learning."""
    return load_vl_model()


@pytest.fixture(scope="module")
def images(vl):
    return scenes.render_many(scenes.sample_scenes(96, seed=5), range(96), vl.image_size)


def fresh(vl, seed=0, **settings):
    torch.manual_seed(seed)
    return QueryEncoder.for_model(vl, stride=16, num_tokens=3, width=32, depth=1, **settings)


def test_the_loss_is_the_error_of_averaged_features_in_standard_deviations():
    rng = np.random.default_rng(0)
    fine, patches = rng.normal(size=(2, 3, 4, 4)), rng.normal(size=(2, 4, 3))
    mean, std = rng.normal(size=3), rng.uniform(1, 2, 3)
    errors = []
    for image in range(2):
        for row in range(2):
            for column in range(2):
                seen = fine[image, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean(
                    (1, 2)
                )
                errors.append((seen - (patches[image, 2 * row + column] - mean) / std) ** 2)
    loss = feature_loss(*(torch.from_numpy(x) for x in (fine, patches, mean, std)))
    assert loss.item() == pytest.approx(np.mean(errors))


@pytest.mark.slow
def test_the_features_of_the_large_tower_are_learned(vl, images, tmp_path):
    encoder = fresh(vl)
    loss, _ = learn_features(
        images, vl, encoder, BackboneConfig(steps=120, batch_size=32, warmup=10), tmp_path
    )
    assert loss < 0.8  # 1: the mean feature, whatever the image
    assert not encoder.backbone.training


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_weights(vl, images, tmp_path, monkeypatch):
    whole, halves = fresh(vl), fresh(vl)
    config, state = BackboneConfig(**FEW), tmp_path / "state.safetensors"
    learn_features(images, vl, whole, config, tmp_path)

    calls = iter(range(5))
    rate = light_backbone.learning_rate

    def stops(step, config):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return rate(step, config)

    monkeypatch.setattr(light_backbone, "learning_rate", stops)
    with pytest.raises(KeyboardInterrupt):
        learn_features(images, vl, halves, config, tmp_path, state, 0)
    monkeypatch.undo()
    again = fresh(vl, seed=1)
    learn_features(images, vl, again, config, tmp_path, state)
    for (name, a), b in zip(
        whole.backbone.state_dict().items(), again.backbone.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    with pytest.raises(ValueError, match=r"state.safetensors.*config.steps.*7"):
        learn_features(images, vl, again, BackboneConfig(**FEW | {"steps": 7}), tmp_path, state)


@pytest.mark.parametrize("name", ["steps", "num_images", "batch_size", "stride"])
def test_settings_that_cannot_work_are_refused(name):
    with pytest.raises(ValueError, match=f"^{name} must be a whole number"):
        BackboneConfig(**{name: 0})


@pytest.mark.parametrize("name, value", [("backbone", "resnet18"), ("stride", 32)])
def test_another_backbone_than_the_encoders_is_refused(vl, images, tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} {value!r}"):
        learn_features(
            images, vl, fresh(vl), BackboneConfig(**FEW | {name: value}), tmp_path / "cache"
        )
    assert not (tmp_path / "cache").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the command writes, after a few steps."""
    base = tmp_path_factory.mktemp("light_backbone")
    main(
        [
            "light_backbone",
            "--num-images=64",
            "--steps=3",
            "--batch-size=16",
            f"--out={base / 'weights'}",
            f"--run={base / 'run'}",
        ]
    )
    return base / "weights"


def test_a_query_encoder_starts_from_what_the_command_wrote(vl, images, folder, tmp_path):
    encoder = fresh(vl, backbone_weights=str(folder), image_size=None)
    stored = read_tensors(folder / f"{WEIGHTS}.safetensors")[0]
    for name, value in encoder.backbone.model.state_dict().items():
        assert torch.equal(value, stored[name]), name
    record = json.loads((folder / f"{WEIGHTS}.json").read_text())
    assert encoder.config.image_size == record["image_size"] == vl.image_size
    assert (
        record["config"]["steps"] == 3
        and record["loss"] > 0
        and record["vl_model"] == vl.fingerprint
    )
    random = fresh(vl).backbone.model.state_dict()
    assert any(
        not torch.equal(random[name], value)
        for name, value in encoder.backbone.model.state_dict().items()
    )
    encoder.save(tmp_path)  # and is loaded where the folder is not
    config = json.loads((tmp_path / "query_encoder.json").read_text())
    assert config["config"]["backbone_weights"] == str(folder)
    folder.rename(folder.with_name("moved"))
    try:
        loaded = QueryEncoder.load(tmp_path, vl)
        assert torch.equal(
            loaded.sentences(images[:2]).tokens, encoder.sentences(images[:2]).tokens
        )
    finally:
        folder.with_name("moved").rename(folder)


def test_the_shipped_weights_say_more_than_random_ones(vl, images):
    """Of what the large tower says about unseen images, a linear layer on the shipped backbone's
    map explains most.
    """
    with torch.inference_mode():
        wanted = vl.encode_pixels_and_patches(vl.pixels(images))[1].float().flatten(1)  # N x PC

        def left(encoder):
            seen = encoder.eval().features(encoder.pixels(images)).flatten(1)  # N x chw
            kernel = seen @ seen.T + 1e-2 * seen.square().sum(1).mean() * torch.eye(len(seen))
            train, test = slice(0, 64), slice(64, None)
            centre = wanted[train].mean(0)
            guess = centre + kernel[test, train] @ torch.linalg.solve(
                kernel[train, train], wanted[train] - centre
            )
            return (
                (guess - wanted[test]).square().sum() / (centre - wanted[test]).square().sum()
            ).item()

        assert left(fresh(vl, backbone_weights=SCENES)) < 0.8 * left(fresh(vl))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"backbone_weights": "scnes"},
            "unknown backbone_weights 'scnes': there are 'scenes', 'lite0', and any folder",
        ),
        (
            {"backbone": "resnet18", "backbone_weights": SCENES},
            "are the weights of 'mobilenetv4_conv_small_050', but .* 'resnet18'",
        ),
        (
            {"backbone": "vl", "backbone_weights": SCENES},
            "backbone 'vl' has its own weights; set backbone_weights to ''",
        ),
        ({"backbone_weights": SCENES, "pretrained": True}, "but pretrained=True asks for others"),
        ({"backbone_weights": SCENES, "stride": 32}, "end before stride 32"),
    ],
)
def test_weights_that_do_not_fit_are_refused(vl, settings, message):
    with pytest.raises(ValueError, match=message):
        QueryEncoder.for_model(vl, **settings)


def test_weights_learned_from_another_model_are_refused(vl, folder, tmp_path):
    for name in (f"{WEIGHTS}.json", f"{WEIGHTS}.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    record = json.loads((tmp_path / f"{WEIGHTS}.json").read_text())
    (tmp_path / f"{WEIGHTS}.json").write_text(json.dumps(record | {"vl_model": "another"}))
    with pytest.raises(ValueError, match="another VL model.*'scenes-clip'"):
        fresh(vl, backbone_weights=str(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        {"mean": [0.5, 0.5]},
        {"mean": [0.5, 1e30, 0.5]},
        {"std": [0, 1, 1]},
        {"image_size": "96"},
        {"backbone": None},
        {"image_size": 10**9},
    ],
    ids=str,
)
def test_a_damaged_record_of_weights_is_named(vl, folder, tmp_path, change):
    (tmp_path / f"{WEIGHTS}.safetensors").write_bytes(
        (folder / f"{WEIGHTS}.safetensors").read_bytes()
    )
    record = json.loads((folder / f"{WEIGHTS}.json").read_text()) | change
    (tmp_path / f"{WEIGHTS}.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"{WEIGHTS}.json.*{next(iter(change))}"):
        fresh(vl, backbone_weights=str(tmp_path))


@pytest.mark.parametrize(
    "damage",
    [lambda t: t.fill_(float("nan")), lambda t: t[None], lambda t: t.long()],
    ids=["nan", "shape", "kind"],
)
def test_weights_that_are_damaged_are_named(vl, folder, tmp_path, damage):
    (tmp_path / f"{WEIGHTS}.json").write_bytes((folder / f"{WEIGHTS}.json").read_bytes())
    tensors = read_tensors(folder / f"{WEIGHTS}.safetensors")[0]
    tensors["conv_stem.weight"] = damage(tensors["conv_stem.weight"])
    write_tensors(tmp_path / f"{WEIGHTS}.safetensors", tensors)
    with pytest.raises(ValueError, match="backbone_weights.*conv_stem.weight"):
        fresh(vl, backbone_weights=str(tmp_path))
