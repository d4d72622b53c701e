"""The large tower as a query side: its map, what is trained and saved, and that distillation runs
on it.
"""

import copy

import numpy as np
import pytest
import torch

from isa_lite.distill import DistillConfig, distill
from isa_lite.models.symmetric import LargeTower
from isa_lite.models.vl_model import VLModel
from isa_lite.query_encoder import QueryEncoder
from isa_lite.world.scenes import render_many, sample_scenes


def symmetric(vl: VLModel, **settings) -> QueryEncoder:
    torch.manual_seed(0)
    return QueryEncoder.for_model(vl, backbone="vl", num_tokens=3, width=32, depth=1, **settings)


@pytest.fixture
def images() -> np.ndarray:
    return render_many(sample_scenes(16, 0), range(16), 64)


def test_the_map_holds_the_towers_patch_tokens_row_by_row(vl, images):
    pixels = vl.pixels(images[:3])
    patches = vl.encode_pixels_and_patches(pixels)[1]  # B x N x C
    (found,) = LargeTower(vl)(pixels)
    side = found.shape[-1]
    assert found.shape == (3, patches.shape[2], side, side) and side * side == patches.shape[1] > 1
    for i in range(patches.shape[1]):
        assert torch.equal(found[:, :, i // side, i % side], patches[:, i])


def test_only_the_token_learner_is_trained_and_saved(vl, images, tmp_path):
    encoder, before = symmetric(vl), copy.deepcopy(vl.state_dict())
    assert all(name.startswith("mapping.") for name in encoder.state_dict())
    start = {k: v.clone() for k, v in encoder.state_dict().items()}
    config = DistillConfig(
        steps=3, batch_size=4, validation=4, validate_every=2, warmup=1, dtype="float32"
    )
    history = distill(
        images, vl, encoder, config, checkpoint=tmp_path / "state.safetensors", progress=False
    )
    assert len(history.gcd) == 3 and np.isfinite(history.gcd).all()
    assert any(not torch.equal(start[k], v) for k, v in encoder.state_dict().items())
    # weights and running means alike
    assert all(torch.equal(before[k], v) for k, v in vl.state_dict().items())
    assert not encoder.train().backbone.vl.training
    encoder.save(tmp_path)
    loaded = QueryEncoder.load(tmp_path, vl)
    assert torch.equal(loaded.sentences(images).tokens, encoder.sentences(images).tokens)


def test_its_pictures_are_prepared_as_the_vl_model_wants_them(vl, images):
    vl.clip.visual.image_mean, vl.clip.visual.image_std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    encoder = symmetric(vl, image_size=32)
    assert encoder.config.image_size == vl.image_size and encoder.config.mean == (0.4, 0.5, 0.6)
    assert torch.equal(encoder.pixels(images), vl.pixels(images))


def test_without_the_model_it_is_refused(vl, tmp_path):
    symmetric(vl).save(tmp_path)
    with pytest.raises(ValueError, match="give it the model"):
        QueryEncoder.load(tmp_path)


def test_patches_that_form_no_square_are_refused(vl, monkeypatch):
    monkeypatch.setattr(
        vl, "encode_pixels_and_patches", lambda pixels: (None, torch.zeros(1, 5, 8))
    )
    with pytest.raises(ValueError, match="5 patch tokens"):
        symmetric(vl)
