"""Grounding by hand and against pixels, nearest words of real words, deletion of tokens."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from isa_lite.analysis.sentences import (
    grounding,
    kept_and_followed,
    look,
    look_scene,
    moved,
    nearest_words,
    object_attention,
    ranks_rearranged,
    ranks_without,
    word_kinds,
    word_truth,
)
from isa_lite.models.vl_model import load_vl_model
from isa_lite.prompt import compose
from isa_lite.query_encoder import QueryEncoder
from isa_lite.retrieval.scene_queries import make_benchmark
from isa_lite.world import scenes


def test_attention_on_objects_by_hand():
    # two tokens on 2 x 2 cells
    maps = torch.tensor([[[0.5, 0.25], [0.25, 0.0]], [[0.0, 0.0], [0.0, 1.0]]])
    masks = np.zeros((2, 4, 4), bool)
    masks[0, :2, :2] = True  # all of the first cell
    masks[1, 2:, 3:] = True  # half of the last
    assert object_attention(maps, masks).tolist() == [[0.5, 0.0], [0.0, 0.5]]
    together, one = grounding(maps[None], [masks])
    # the objects cover 4 and 2 of 16 pixels
    assert together.tolist() == pytest.approx([0.5 / (6 / 16), 0.5 / (6 / 16)])
    assert one.tolist() == pytest.approx([0.5 / (4 / 16), 0.5 / (2 / 16)])


def test_attention_on_objects_against_a_loop_over_pixels():
    torch.manual_seed(0)
    maps = torch.rand(3, 6, 6).flatten(1).softmax(1).unflatten(1, (6, 6))
    masks = scenes.object_masks(scenes.sample_scene(np.random.default_rng(4)), seed=9)
    spread = maps.repeat_interleave(16, 1).repeat_interleave(16, 2) / 256
    for token in range(3):
        for n, mask in enumerate(masks):
            by_pixel = sum(
                float(spread[token, y, x]) for y, x in zip(*np.nonzero(mask), strict=True)
            )
            assert object_attention(maps, masks)[token, n].item() == pytest.approx(
                by_pixel, rel=1e-4
            )


def test_even_attention_scores_one():
    world = scenes.sample_scenes(20, seed=2)
    masks = [scenes.object_masks(scene, seed=i) for i, scene in enumerate(world)]
    together, one = grounding(torch.full((20, 4, 6, 6), 1 / 36), masks)
    assert together.tolist() == pytest.approx([1.0] * 4, rel=1e-4)
    assert one.tolist() == pytest.approx([1.0] * 4, rel=1e-4)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="masks.*10 x 12.*4 x 4"):
        object_attention(torch.rand(1, 4, 4), np.ones((1, 10, 12), bool))
    with pytest.raises(ValueError, match="maps of 2 images but masks of 1"):
        grounding(torch.rand(2, 1, 4, 4), [np.ones((1, 8, 8), bool)])


def test_the_nearest_word_of_a_word_is_itself():
    vl = load_vl_model()
    ids = vl.tokenizer(["red circle striped"])[0, 1:4]
    near = nearest_words(vl, 3 * vl.word_vectors(ids).detach()[None], k=2)
    assert [words[0][0] for words in near] == ["red", "circle", "striped"]
    assert all(words[0][1] == pytest.approx(1, abs=1e-5) and words[1][1] < 0.99 for words in near)


def test_words_that_the_model_never_met_are_nearest_to_nothing():
    vl = load_vl_model()
    table = vl.word_vectors(torch.arange(49408)).detach()
    met = {
        vl.tokenizer.decode([int(i)]).strip() for i in (table.norm(dim=1) > 0).nonzero().flatten()
    }
    # below zero with most words; a zero vector would win
    away = -normalize(table[table.norm(dim=1) > 0], dim=1).mean(0)
    assert all(word in met for word, _ in nearest_words(vl, away[None], k=len(met) // 2)[0])


def test_deleting_a_token_takes_that_token_out():
    vl, bench = load_vl_model(), make_benchmark(queries=8, gallery=40, seed=1)
    gallery = vl.encode_images(bench.images)
    torch.manual_seed(0)
    tokens = torch.randn(8, 3, vl.word_width) * vl.word_norm / vl.word_width**0.5
    bench = bench.embedded(vl, gallery)
    found = ranks_without(bench, tokens)
    assert sorted(found) == [-1, 0, 1, 2]
    for i, kept in ((-1, tokens), (1, torch.stack([tokens[:, 0], tokens[:, 2]], 1))):
        assert np.array_equal(found[i], bench.ranks(compose(vl, kept, bench.texts), gallery))
    with pytest.raises(ValueError, match="a sentence of one token"):
        ranks_without(bench, tokens[:, :1])


def test_what_the_nearest_words_name():
    vl = load_vl_model()
    # two sentences of three tokens
    say = [["red", "white", "large"], ["checkered", "left", "heart"]]
    tokens = torch.stack(
        [
            torch.stack([vl.word_vectors(torch.tensor(vl.tokenizer.encode(w)[:1]))[0] for w in s])
            for s in say
        ]
    )
    kinds = word_kinds(vl, tokens.detach())
    assert kinds.loc["token 1"].to_dict() == {
        "background": 50,
        "style": 0,
        "color": 50,
        "shape": 0,
        "place": 0,
        "other": 0,
    }
    assert kinds.loc["token 2"].to_dict() == {
        "background": 50,
        "style": 0,
        "color": 0,
        "shape": 0,
        "place": 50,
        "other": 0,
    }
    assert kinds.loc["token 3"].to_dict() == {
        "background": 0,
        "style": 0,
        "color": 0,
        "shape": 50,
        "place": 0,
        "other": 50,
    }


def test_whether_the_nearest_words_are_true_by_hand():
    vl = load_vl_model()
    one = scenes.Scene((scenes.Object(0, "star", "red", "small"),), "white", "flat")
    two = scenes.Scene(
        (scenes.Object(1, "heart", "red", "small"), scenes.Object(5, "moon", "blue", "large")),
        "sand",
        "flat",
    )
    # "left" is true of the top left only
    say = [["red", "heart", "left", "large"], ["green", "moon", "left", "sand"]]
    tokens = torch.stack(
        [
            torch.cat([vl.word_vectors(torch.tensor(vl.words.ids(w))) for w in words])
            for words in say
        ]
    ).detach()
    table = word_truth(vl, tokens, [one, two])
    # red: of both scenes; green: of none. heart: of the next scene only; moon: of its own only.
    # Sizes are of no kind.
    assert table["words"].to_dict() == {
        "background": 1,
        "style": 0,
        "color": 2,
        "shape": 2,
        "place": 2,
    }
    assert table["true, %"].drop("style").to_dict() == {
        "background": 100,
        "color": 50,
        "shape": 50,
        "place": 50,
    }
    assert table["true of the next image, %"].drop("style").to_dict() == {
        "background": 0,
        "color": 50,
        "shape": 50,
        "place": 50,
    }
    with pytest.raises(ValueError, match="2 sentences but 1 scenes"):
        word_truth(vl, tokens, [one])


def test_what_an_answer_kept_and_followed_by_hand():
    star = scenes.Object(0, "star", "red", "small")
    blue, large = (
        scenes.Object(0, "star", color, size)
        for color, size in (("blue", "small"), ("red", "large"))
    )
    reference, target = (
        scenes.Scene((star,), "white", "flat"),
        scenes.Scene((blue,), "white", "flat"),
    )
    assert kept_and_followed(reference, target, target) == (1, 1)
    assert kept_and_followed(reference, target, reference) == (1, 0)
    # the size, which the two share, is another; the colour is the old one
    assert kept_and_followed(reference, target, scenes.Scene((large,), "white", "flat")) == (
        3 / 4,
        0,
    )
    # neither the old colour nor the new one: half of the change, red is gone and blue is not there
    green = scenes.Object(0, "star", "green", "small")
    assert kept_and_followed(reference, target, scenes.Scene((green,), "white", "flat")) == (
        1,
        1 / 2,
    )
    empty = scenes.Scene((), "white", "flat")
    assert kept_and_followed(reference, empty, empty) == (1, 1) and kept_and_followed(
        reference, empty, reference
    ) == (1, 0)


def test_a_moved_token_goes_to_the_farther_end_and_the_others_keep_their_order():
    assert moved(4, 0) == [1, 2, 3, 0] and moved(4, 1) == [0, 2, 3, 1]
    assert moved(4, 2) == [2, 0, 1, 3] and moved(4, 3) == [3, 0, 1, 2] and moved(1, 0) == [0]


def test_sentences_are_ranked_in_the_order_that_is_asked_for():
    vl, bench = load_vl_model(), make_benchmark(queries=8, gallery=40, seed=1)
    gallery = vl.encode_images(bench.images)
    torch.manual_seed(0)
    tokens = torch.randn(8, 3, vl.word_width) * vl.word_norm / vl.word_width**0.5
    orders = {"as written": [0, 1, 2], "reversed": [2, 1, 0]}
    found = ranks_rearranged(bench.embedded(vl, gallery), tokens, orders)
    assert np.array_equal(
        found["reversed"], bench.ranks(compose(vl, tokens.flip(1), bench.texts), gallery)
    )
    assert np.array_equal(
        found["as written"], bench.ranks(compose(vl, tokens, bench.texts), gallery)
    )
    assert not np.array_equal(found["reversed"], found["as written"])


def test_several_encoders_look_at_the_same_scenes(vl):
    torch.manual_seed(0)
    encoders = [QueryEncoder.for_model(vl, num_tokens=n, width=32, depth=1).eval() for n in (3, 1)]
    found = look(encoders, images=12)
    i, scene = look_scene(12)
    assert list(found) == ["1", "3"] and len(scene.objects) == 3
    maps = encoders[0].sentences(scenes.render_many([scene], [i], 64)).maps[0]
    assert np.allclose(found["3"]["maps"], maps, atol=1e-4)
    assert len(found["3"]["grounding"]) == len(found["3"]["elsewhere"]) == 3
    with pytest.raises(ValueError, match=r"number of tokens.*\[3, 3\]"):
        look([encoders[0], encoders[0]])
