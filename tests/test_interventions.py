"""What a sentence depends on: reads replaced or left out, by hand and on the shipped encoder;
covered parts of images.
"""

import numpy as np
import pytest
import torch

from isa_lite.analysis import interventions
from isa_lite.analysis.interventions import cover_curves, covered, region_maps, sentences_changed
from isa_lite.models.vl_model import DATA, load_vl_model
from isa_lite.prompt import compose
from isa_lite.query_encoder import QueryEncoder
from isa_lite.retrieval.metrics import recall
from isa_lite.retrieval.scene_queries import make_benchmark


@pytest.fixture(scope="module")
def vl():
    return load_vl_model()


@pytest.fixture(scope="module")
def shipped(vl):
    return QueryEncoder.load(DATA / "scenes-query-encoder", vl)


@pytest.fixture(scope="module")
def bench(vl):
    return make_benchmark(40, 160, 3, vl.image_size)


def test_what_is_changed_and_what_is_not(shipped, bench):
    images, learner = bench.images[:3], shipped.mapping
    found = sentences_changed(shipped.train(), images, batch_size=2)
    assert shipped.training and not shipped.eval().training
    whole = shipped.sentences(images, reads=True)
    assert torch.allclose(found["as it is"], whole.tokens, atol=1e-5)
    with torch.no_grad():
        memory = learner.placed(shipped.features(shipped.pixels(images))).flatten(2).transpose(1, 2)
        picked = whole.maps.flatten(2) @ memory
        mean = memory.mean(1, keepdim=True)

        def written(tokens: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
            for block in learner.blocks:
                tokens = block.think(tokens) if seen is None else block(tokens, seen)
            return learner.to_word(learner.norm(tokens))

        by_hand = {
            "first read: even maps": written(mean + learner.identity, memory),
            "first read: another image's maps": written(
                whole.maps[[1, 2, 0]].flatten(2) @ memory + learner.identity, memory
            ),
            "first read: left out": written(learner.identity.expand(3, -1, -1), memory),
            # To attend to the mean alone is to attend to every position alike: values are a linear
            # map of what is there.
            "second read: even maps": written(picked + learner.identity, mean),
            "second read: left out": written(picked + learner.identity, None),
            "both reads: even maps": written(mean + learner.identity, mean),
        }
    assert set(found) == {"as it is", *by_hand}
    for name, tokens in by_hand.items():
        assert torch.allclose(found[name], tokens, atol=1e-4), name
        assert not torch.allclose(found[name], whole.tokens, atol=1e-2), name


@pytest.mark.slow
def test_both_reads_of_the_shipped_encoder_are_needed(vl, shipped):
    """R@1 of 250 queries in a gallery of 1200, as first measured: 94.0, 84.4, 83.2, 73.6, and 61.6
    without the second read.
    """
    bench = make_benchmark(250, 1200, 3, vl.image_size)
    gallery = vl.encode_images(bench.images)
    expected = {
        "as it is": 94.0,
        "first read: even maps": 84.4,
        "first read: another image's maps": 83.2,
        "first read: left out": 73.6,
        "second read: even maps": 86.0,
        "second read: left out": 61.6,
        "both reads: even maps": 32.4,
    }
    changed = sentences_changed(shipped, bench.images[bench.reference])
    found = {
        name: recall(bench.ranks(compose(vl, t, bench.texts), gallery), 1)
        for name, t in changed.items()
    }
    # three queries of 250: near ties fall otherwise on other processors
    assert found == pytest.approx(expected, abs=1.3)


def test_what_has_no_two_reads_is_refused(vl, bench):
    other = QueryEncoder.for_model(vl, mapping="average pooling", num_tokens=2)
    with pytest.raises(ValueError, match="encoder.*average pooling"):
        sentences_changed(other, bench.images[:2])
    with pytest.raises(ValueError, match="images"):
        sentences_changed(QueryEncoder.for_model(vl, num_tokens=2), bench.images[:1])
    with pytest.raises(ValueError, match="reads"):
        region_maps(bench.images[:2], other.sentences(bench.images[:2], reads=True).reads)


def test_the_named_pixels_and_no_others_are_covered():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 8, 12, 3), np.uint8)
    kept, regions = images.copy(), torch.zeros(2, 2, 3)
    regions[0, 0, 0] = regions[1, 1, 2] = 1  # the upper left cell, and the lower right one
    painted = covered(images, regions, 1 / 6)
    assert np.array_equal(images, kept)
    for image, before, (rows, columns) in zip(
        painted, images, (((0, 4), (0, 4)), ((4, 8), (8, 12))), strict=True
    ):
        changed = (image != before).any(-1)
        # of 96 pixels, one of which may have had the colour already
        assert 14 <= changed.sum() <= 16
        inside = np.zeros((8, 12), bool)
        inside[slice(*rows), slice(*columns)] = True
        # stretched smoothly, a cell is no sharp square
        assert (changed & inside).sum() >= 0.7 * changed.sum()
        assert (image[changed] == before.reshape(-1, 3).mean(0).round()).all()
    assert np.array_equal(covered(images, regions, 0), images)
    assert len(np.unique(covered(images, regions, 1)[0].reshape(-1, 3), axis=0)) == 1
    with pytest.raises(ValueError, match="share"):
        covered(images, regions, 1.5)
    with pytest.raises(ValueError, match="regions"):
        covered(images, regions[:1], 0.5)


def test_regions_are_means_over_tokens_and_blocks():
    reads, images = torch.rand(3, 3, 4, 2, 5), np.full((3, 4, 10, 3), 200, np.uint8)
    images[0, :2, 4:6] = (200, 170, 200)  # the third of five cells in the upper row
    found = region_maps(images, reads, seed=1)
    assert torch.allclose(found["first read"][1], sum(reads[1, 0, token] for token in range(4)) / 4)
    second = sum(reads[1, n, token] for n in (1, 2) for token in range(4)) / 8
    assert torch.allclose(found["second read"][1], second)
    assert torch.allclose(found["both reads"][1], (found["first read"][1] + second) / 2)
    assert torch.equal(found["first read, another image's"][0], found["first read"][1])
    assert (
        torch.equal(found["random cells"], region_maps(images, reads, seed=1)["random cells"])
        and found["random cells"].std() > 0
    )
    assert (
        found["contrast"][0].tolist() == [[0, 0, 10, 0, 0], [0] * 5]
        and not found["contrast"][1:].any()
    )


def test_a_curve_has_a_value_for_every_share_and_query(vl, shipped, bench):
    images, texts = bench.images[bench.reference[:4]], bench.texts[:4]
    whole = compose(vl, shipped.sentences(images).tokens, texts)
    regions = {
        "top": torch.tensor([[1.0], [0.0]]).expand(4, 2, 1),
        "bottom": torch.tensor([[0.0], [1.0]]).expand(4, 2, 1),
    }
    found = cover_curves(
        shipped, vl, images, texts, regions, (0, 0.25, 1), lambda q: (q * whole).sum(1).numpy()
    )
    assert {name: values.shape for name, values in found.items()} == {
        "top": (3, 4),
        "bottom": (3, 4),
    }
    for values in found.values():
        assert values[0] == pytest.approx(np.ones(4), abs=1e-5) and (values[1] < 1 - 1e-4).any()
    # all of an image is all of it
    assert found["top"][2] == pytest.approx(found["bottom"][2], abs=1e-5)
    expected = compose(
        vl, shipped.sentences(interventions.covered(images, regions["top"], 0.25)).tokens, texts
    )
    assert found["top"][1] == pytest.approx((expected * whole).sum(1).numpy(), abs=1e-5)
