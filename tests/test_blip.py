"""BLIP with random weights: its own forward passes, prompts, loading, and a few steps of
distillation.
"""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import write_blip
from PIL import Image
from safetensors.torch import load_file, save_file

from isa_lite.distill import DistillConfig, distill
from isa_lite.models.blip import load_blip
from isa_lite.models.vl_model import load_vl_model
from isa_lite.prompt import TEMPLATE, compose, prompt_ids, sentence_embeddings, splice
from isa_lite.query_encoder import QueryEncoder

transformers = pytest.importorskip(
    "transformers", reason="needs the extra: pip install 'isa_lite[blip]'"
)
TEXTS = ["a photo of a red cat", "a picture , make it blue at the top left"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_blip(tmp_path_factory.mktemp("blip"))


@pytest.fixture
def vl(folder):
    return load_vl_model(str(folder))


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)


@torch.no_grad()
def test_embeddings_are_those_of_its_own_forward_pass(vl, folder, images):
    model = transformers.BlipForImageTextRetrieval.from_pretrained(folder).eval()
    pixels, ids = vl.pixels(images[:2]), vl.tokenize(TEXTS)
    # images x texts
    theirs = model(ids, pixels, use_itm_head=False, attention_mask=(ids != 0).long()).itm_score
    image, patches = vl.encode_pixels_and_patches(pixels)
    for text in (vl.encode_text(TEXTS), vl.encode_vectors(vl.word_vectors(ids), ids)):
        assert torch.allclose(image @ text.T, theirs, atol=1e-5)
    assert torch.allclose(vl.encode_images(images[:2]), image, atol=1e-5)
    assert patches.shape == (2, 1 + 16, 48) and (theirs[0] - theirs[1]).abs().max() > 1e-3
    assert torch.allclose(vl.project_patches(patches)[:, 0], image, atol=1e-5)


@torch.no_grad()
def test_the_matching_head_is_its_own(vl, folder, images):
    model = transformers.BlipForImageTextRetrieval.from_pretrained(folder).eval()
    pixels, ids = vl.pixels(images[:2]), vl.tokenize(TEXTS)
    theirs = model(ids, pixels, attention_mask=(ids != 0).long()).itm_score
    vectors, patches = vl.word_vectors(ids), vl.encode_pixels_and_patches(pixels)[1]
    before = vectors.clone()
    assert torch.allclose(vl.matcher(vectors, ids != 0, patches), theirs, atol=1e-5)
    assert torch.equal(vectors, before)  # transformers adds positions in place
    # the image matters
    assert (vl.matcher(vectors, ids != 0, patches.flip(0)) - theirs).abs().max() > 1e-3
    assert vl.matcher_reads_words


@torch.no_grad()
def test_composition_against_a_hook_on_the_word_table(vl):
    tokens = torch.randn(2, 4, vl.word_width)
    modifiers = ["make it blue", "with a large star at the top left"]
    ids, places = prompt_ids(vl, 4, modifiers)
    assert ids.shape[1] < vl.context_length and (ids[0] == 101).sum() == (ids[0] == 102).sum() == 1
    hook = vl.tower.table.register_forward_hook(
        lambda m, i, out: out.masked_scatter(places.unsqueeze(-1), tokens)
    )
    theirs = vl.clip.encode_text(ids, normalize=True)
    hook.remove()
    assert torch.allclose(compose(vl, tokens, modifiers), theirs, atol=1e-5)
    assert (theirs - vl.clip.encode_text(ids, normalize=True)).abs().max() > 1e-2
    assert splice(vl, tokens, ids, places).shape == (*ids.shape, 32)


def test_pictures_are_prepared_as_transformers_does_it(vl, folder):
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 70, 3), np.uint8))
    settings = dict(
        size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3]
    )
    theirs = transformers.BlipImageProcessor(**settings)(picture, return_tensors="pt").pixel_values
    # a grey level is 1/255/0.2 = 0.02; two resizers round apart
    assert (vl.pixels([picture]) - theirs).abs().max() < 0.05


@pytest.mark.parametrize("lar_weight", [0.0, 0.5])
def test_distillation_runs_end_to_end_and_trains_the_encoder_alone(vl, images, lar_weight):
    encoder = QueryEncoder.for_model(vl, num_tokens=3, width=32, depth=1)
    before, frozen = encoder.mapping.to_word.direction.weight.clone(), vl.fingerprint
    config = DistillConfig(
        steps=3, batch_size=4, warmup=1, validation=2, validate_every=3, lar_weight=lar_weight
    )
    history = distill(images, vl, encoder, config, progress=False)
    assert len(history.gcd) == 3 and np.isfinite(history.gcd + history.lar).all()
    assert len(history.lar) == (3 if lar_weight else 0) and not np.isnan(history.matched).any()
    assert (
        not torch.equal(before, encoder.mapping.to_word.direction.weight)
        and vl.fingerprint == frozen
    )


@torch.no_grad()
def test_lar_reads_the_words_and_not_what_the_text_tower_made_of_them(vl):
    tokens = torch.randn(2, 3, vl.word_width)
    query, read, places = sentence_embeddings(vl, tokens, TEMPLATE)
    assert torch.equal(read[places].unflatten(0, (2, 3)), tokens)
    assert torch.allclose(query, compose(vl, tokens, ["", ""]), atol=1e-5)


# -------------------------------------------------------------------------------------------
# loading


def test_a_blip_loads_from_a_folder_frozen(folder):
    for name in (f"blip:{folder}", str(folder)):
        vl = load_vl_model(name)
        assert not any(p.requires_grad for p in vl.parameters()) and not vl.training
        assert vl.context_length == 77 and vl.image_size == 32 and vl.word_width == 32
    assert load_vl_model(str(folder)).fingerprint == vl.fingerprint


def test_without_transformers_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'isa_lite\[blip\]'"):
        load_vl_model(f"blip:{folder}")


def test_a_blip_for_captions_is_refused(tmp_path):
    write_blip(tmp_path, "BlipForConditionalGeneration")
    with pytest.raises(ValueError, match="BLIP.*weights are missing"):
        load_blip(str(tmp_path))


def test_a_link_to_nothing_is_no_default(tmp_path):
    write_blip(tmp_path)
    settings = tmp_path / "preprocessor_config.json"
    settings.unlink()
    load_blip(str(tmp_path))  # without one there are defaults
    settings.symlink_to(tmp_path / "nothing")
    with pytest.raises((OSError, ValueError), match=settings.name):
        load_blip(str(tmp_path))


def test_damaged_weights_and_tokenizers_are_named(tmp_path):
    write_blip(tmp_path)
    weights, info = tmp_path / "model.safetensors", tmp_path / "tokenizer_config.json"
    tensors = load_file(weights)
    bias = torch.zeros(16)
    for bad in (bias + float("inf"), bias + 1e38, bias.long()):
        save_file(tensors | {"text_proj.bias": bad}, weights, {"format": "pt"})
        with pytest.raises(ValueError, match="model.safetensors.*text.proj.bias"):
            load_blip(str(tmp_path))
    save_file(tensors, weights, {"format": "pt"})
    for content in ("3", json.dumps(json.loads(info.read_text()) | {"model_max_length": []})):
        info.write_text(content)
        with pytest.raises(ValueError, match="tokenizer_config.json"):
            load_blip(str(tmp_path))
    info.unlink()  # then transformers takes another padding
    with pytest.raises(ValueError, match="pads with.*tokenizer_config.json"):
        load_vl_model(str(tmp_path))


def test_folders_without_a_blip(tmp_path, folder):
    with pytest.raises(ValueError, match="BLIP.*config.json is missing"):
        load_vl_model(f"blip:{tmp_path}")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="BLIP.*config.json.*'bert'"):
        load_vl_model(f"blip:{tmp_path}")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match="no weights.*model.safetensors"):
        load_vl_model(f"blip:{tmp_path}")
