"""Single-word inversions on the shipped VL model: each learns what it promises, from what it may
see.
"""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from isa_lite import prompt
from isa_lite.methods import inversion
from isa_lite.methods.inversion import (
    keyword_prompt,
    lincir_like,
    optimize_words,
    pic2word_like,
    searle_like,
)
from isa_lite.models.vl_model import load_vl_model
from isa_lite.world import scenes

WORLD = scenes.sample_scenes(64, seed=5)
CAPTIONS = [scenes.caption(s, np.random.default_rng(i)) for i, s in enumerate(WORLD)]


@pytest.fixture(scope="module")
def vl():
    return load_vl_model()


@pytest.fixture(scope="module")
def images(vl):
    return vl.encode_images(scenes.render_many(WORLD, range(64)))  # 64 x E


def found_by(vl, words, images):
    scores = prompt.compose(vl, words.unsqueeze(1), [""] * len(words)) @ images.T
    return (scores.argmax(1) == torch.arange(len(images))).float().mean().item()


@pytest.mark.slow
def test_pic2word_like_learns_to_name_images_and_leaves_the_model_alone(vl, images):
    before = vl.fingerprint
    short, long = (
        pic2word_like(vl, images, steps=n, batch_size=64, lr=3e-3, progress=False) for n in (1, 30)
    )
    assert found_by(vl, short(images), images) < 0.2 < 0.7 < found_by(vl, long(images), images)
    assert vl.fingerprint == before


START = "large red circle"


def test_a_word_starts_as_the_first_of_the_start_words(vl, images):
    large = vl.word_vectors(torch.tensor(vl.words.ids("large"))).detach()[0]
    made = {
        "Pic2Word-like": pic2word_like(
            vl, images, steps=1, batch_size=8, lr=1e-9, start_words=START, progress=False
        )(images),
        "SEARLE-like": searle_like(
            vl,
            images,
            torch.randn(64, vl.word_width),
            steps=1,
            batch_size=8,
            lr=1e-9,
            start_words=START,
            progress=False,
        )(images),
        "LinCIR-like": lincir_like(
            vl, CAPTIONS, steps=1, batch_size=8, lr=1e-9, start_words=START, progress=False
        )(images),
        "optimised": optimize_words(
            vl, images[:4], steps=1, lr=1e-9, start_words=START, progress=False
        ),
    }
    for name, words in made.items():
        assert torch.nn.functional.cosine_similarity(words, large, dim=1).min() > 0.9, name
    with pytest.raises(ValueError, match="start_words"):
        pic2word_like(vl, images, steps=1, start_words="red zebra", progress=False)


@pytest.mark.parametrize(
    "aid", [{"word_noise": 0.0, "negatives": 0}, {"word_noise": 1.0}, {"negatives": 40}]
)
def test_an_aid_changes_what_is_learned_and_zero_leaves_it_out(vl, images, aid):
    fit = {"steps": 2, "batch_size": 8, "progress": False}
    words = torch.randn(64, vl.word_width, generator=torch.Generator().manual_seed(0))
    learned = {
        "Pic2Word-like": lambda **aids: (
            pic2word_like(vl, images, **fit, **aids).to_word.direction.weight
        ),
        "SEARLE-like": lambda **aids: (
            searle_like(vl, images, words, **fit, **aids).to_word.direction.weight
        ),
        "LinCIR-like": lambda **aids: (
            lincir_like(vl, CAPTIONS, **fit, **aids).to_word.direction.weight
        ),
        "optimised": lambda **aids: optimize_words(vl, images[:4], steps=2, progress=False, **aids),
    }
    places = {
        "SEARLE-like": ("negatives",),
        "LinCIR-like": ("word_noise",),
        "optimised": ("word_noise",),
    }
    for name, learn in learned.items():
        given = {n: value for n, value in aid.items() if n in places.get(name, aid)}
        if given:
            assert torch.equal(learn(), learn(**given)) == (not any(given.values())), name


def test_further_negatives_are_other_images_than_the_batchs(images):
    rows = images.new_tensor(range(64))[:, None]
    batch = torch.tensor([3, 60, 7])
    found, every, none = (
        inversion.Training(negatives=n).others(rows, batch, 0).flatten().tolist()
        for n in (50, 1000, 0)
    )
    assert len(set(found)) == 50 and not set(found) & {3, 60, 7}
    assert len(every) == 61 and none == []


def test_a_seed_gives_a_mapping(vl, images):
    a, b, c = (
        pic2word_like(vl, images, steps=3, batch_size=8, seed=s, progress=False).state_dict()
        for s in (0, 0, 1)
    )
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)


@pytest.mark.slow
def test_optimized_words_name_their_images_whatever_shares_their_batch(vl, images):
    words = optimize_words(vl, images[:16], steps=30, progress=False)
    assert (
        torch.allclose(words.norm(dim=1), torch.full((16,), vl.word_norm))
        and found_by(vl, words, images[:16]) > 0.8
    )
    assert torch.allclose(
        words, optimize_words(vl, images[:16], steps=30, batch_size=7, progress=False), atol=1e-3
    )


def test_gravity_keeps_words_near_real_ones(vl, images):
    known = vl.word_vectors(torch.arange(49408)).detach()
    known = normalize(known[known.norm(dim=1) > 0], dim=1)
    free, held = (
        (
            normalize(optimize_words(vl, images[:6], steps=40, gravity=g, progress=False), dim=1)
            @ known.T
        )
        .amax(1)
        .mean()
        for g in (0.0, 3.0)
    )
    assert held > free + 0.2


def test_searle_like_guesses_the_given_words(vl, images):
    words = torch.randn(64, vl.word_width)
    mapping = searle_like(vl, images, words, steps=60, batch_size=64, progress=False)
    guess = normalize(mapping(images), dim=1) @ normalize(words, dim=1).T
    assert (guess.argmax(1) == torch.arange(64)).float().mean() > 0.9
    with pytest.raises(ValueError, match="64 images but 63 words"):
        searle_like(vl, images, words[:63], steps=1, progress=False)


def test_key_words_become_placeholders(vl):
    ids, marks = keyword_prompt(vl, "a photo of two red stars, on grass")
    kept = [
        vl.tokenizer.decode([i]).strip() if not mark else "*"
        for i, mark in zip(ids, marks, strict=True)
    ]
    assert kept == ["a", "photo", "of", "*", ",", "on", "*"]


@pytest.mark.slow
def test_lincir_like_replaces_the_key_words_of_captions_and_sees_no_image(vl, monkeypatch):
    for touched in ("encode_images", "encode_pixels", "encode_pixels_and_patches"):
        monkeypatch.setattr(vl, touched, None)
    mapping = lincir_like(vl, CAPTIONS, steps=40, batch_size=32, lr=3e-3, noise=0.2, progress=False)
    # The keywords of a caption as one pseudo-word made from the caption's embedding: nearest to
    # that caption?
    latent = vl.encode_text(CAPTIONS)
    with torch.no_grad():
        words, found = mapping(latent), []
        for word, caption in zip(words, CAPTIONS, strict=True):
            ids, marks = keyword_prompt(vl, caption)
            ids = torch.tensor([[vl.tokenizer.sot_token_id, *ids, vl.tokenizer.eot_token_id]])
            vectors = vl.word_vectors(ids).clone()
            vectors[0, 1:-1][torch.tensor(marks)] = word
            found.append(vl.encode_vectors(vectors, ids)[0])
    right = ((torch.stack(found) @ latent.T).argmax(1) == torch.arange(64)).float().mean()
    assert right > 0.7


def test_a_caption_without_key_words_is_refused(vl):
    with pytest.raises(ValueError, match="'this is a photo of it'.*key word"):
        lincir_like(vl, [*CAPTIONS[:3], "this is a photo of it"], steps=1, progress=False)


def test_too_little_to_contrast_is_refused(vl, images):
    with pytest.raises(ValueError, match=r"two embeddings.*\(1, 256\)"):
        pic2word_like(vl, images[:1], steps=1, progress=False)
    with pytest.raises(ValueError, match="batch_size.*2.*1 and 1"):
        pic2word_like(vl, images, steps=1, batch_size=1, progress=False)


def test_a_query_is_the_word_and_the_modifier_in_the_prompt(vl, images):
    images = images[:3]
    mapping = pic2word_like(vl, images, steps=1, batch_size=3, progress=False)
    texts = ["make it blue", "", "add a star"]
    with torch.no_grad():
        expected = prompt.compose(vl, mapping(images)[:, None], texts)
    assert torch.allclose(mapping.compose(vl, images, texts), expected, atol=1e-6)
