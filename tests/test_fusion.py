"""Late fusion against formulas written out by hand."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from isa_lite.methods import baselines
from isa_lite.methods.fusion import (
    FUSIONS,
    Calibrated,
    Fusion,
    calibrated,
    product,
    slerp,
    weighted_sum,
)
from isa_lite.retrieval.metrics import score_ranks
from isa_lite.retrieval.queries import Scores
from isa_lite.retrieval.scene_queries import make_benchmark

torch.manual_seed(0)
IMAGE, TEXT, GALLERY, CORPUS = (normalize(torch.randn(n, 8) + 1, dim=1) for n in (5, 5, 30, 12))
BENCH = make_benchmark(queries=6, gallery=30, size=8)


class Reader:
    """Stands in for a VL model: its text embeddings are given."""

    def __init__(self, embeddings):
        self.embeddings = embeddings

    def encode_text(self, texts):
        return self.embeddings


def test_with_a_half_the_sum_is_the_baseline_and_slerp_agrees():
    text = normalize(torch.randn(6, 8), dim=1)
    bench = BENCH.embedded(Reader(text), GALLERY)
    sums = FUSIONS["weighted sum"](bench)
    assert torch.allclose(sums, baselines.image_plus_text(bench), atol=1e-6)
    assert torch.allclose(slerp(GALLERY[BENCH.reference], text), sums, atol=1e-5)
    assert (bench.ranks(Scores(sums @ GALLERY.T)) == bench.ranks(sums)).all()
    order = (sums @ GALLERY.T).argsort(dim=1, descending=True).tolist()
    for i, found in enumerate(bench.search(Scores(sums @ GALLERY.T), 5).tolist()):
        assert found == [j for j in order[i] if j != BENCH.reference[i]][:5]


def test_methods_that_rank_by_scores_rank_by_them():
    bench = BENCH.embedded(Reader(normalize(torch.randn(6, 8), dim=1)), GALLERY)
    image, text = bench.image_embeddings(), bench.text_embeddings()
    by_hand = product(image, text, GALLERY, 0.5)
    assert torch.equal(FUSIONS["product of similarities"](bench).values, by_hand)
    found = Calibrated().fit(BENCH.embedded(Reader(CORPUS), GALLERY))(bench)
    assert torch.equal(found.values, calibrated(image, text, GALLERY, CORPUS))


@pytest.mark.parametrize("name", FUSIONS)
def test_the_ends_of_the_weight_are_image_only_and_text_only(name):
    for weight, alone in ((0.0, IMAGE), (1.0, TEXT)):
        found = FUSIONS[name]._answer(IMAGE, TEXT, GALLERY, weight)
        scores = found.values if isinstance(found, Scores) else found @ GALLERY.T
        assert torch.equal(scores.argsort(1), (alone @ GALLERY.T).argsort(1))


def test_slerp_divides_the_angle():
    image, text = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    for weight in (0.2, 0.5, 0.9):
        degrees = np.deg2rad(90 * weight)
        there = torch.tensor([[np.cos(degrees), np.sin(degrees)]], dtype=torch.float32)
        assert (slerp(image, text, weight) @ there.T).item() == pytest.approx(1, abs=1e-6)
    # nothing between equal embeddings
    assert (slerp(image, image, 0.3) @ image.T).item() == pytest.approx(1, abs=1e-3)


def test_product_by_hand():
    # similarities 0.6 and -0.2 -> 0.8 and 0.4
    image, text, gallery = (
        torch.tensor([[1.0, 0.0]]),
        torch.tensor([[0.0, 1.0]]),
        torch.tensor([[0.6, -0.2]]),
    )
    assert product(image, text, gallery).item() == pytest.approx(np.sqrt(0.8 * 0.4), abs=1e-6)
    assert product(image, text, gallery, 0.25).item() == pytest.approx(
        0.8**0.75 * 0.4**0.25, abs=1e-6
    )


def test_calibrated_against_a_loop():
    image, text, gallery, corpus = (x.double().numpy() for x in (IMAGE, TEXT, GALLERY, CORPUS))
    found = calibrated(*(torch.from_numpy(x) for x in (image, text, gallery, corpus)), weight=0.2)
    for q in range(5):
        likes = []
        for query, mean in ((image[q], gallery.mean(0)), (text[q], corpus.mean(0))):
            scores = []
            for g in gallery:
                a, b = query - mean, g - gallery.mean(0)
                scores.append(a @ b / np.sqrt((a @ a) * (b @ b)))
            likes.append((np.array(scores) - min(scores)) / (max(scores) - min(scores)))
        assert np.allclose(found[q].numpy(), likes[0] * likes[1] - 0.2 * (likes[0] + likes[1]) ** 2)


def test_calibrated_ignores_what_all_texts_share():
    """The modality gap: all texts moved by one vector. Centring takes it out, the plain sum of
    similarities does not.
    """
    gap = 5 * torch.ones(8)
    assert torch.allclose(
        calibrated(IMAGE, TEXT + gap, GALLERY, CORPUS + gap),
        calibrated(IMAGE, TEXT, GALLERY, CORPUS),
        atol=1e-4,
    )
    plain, moved = (
        weighted_sum(IMAGE, text) @ GALLERY.T for text in (TEXT, normalize(TEXT + gap, dim=1))
    )
    assert not torch.equal(moved.argsort(1), plain.argsort(1))


def test_the_weight_is_chosen_by_recall():
    gallery = normalize(torch.randn(30, 64), dim=1)
    bench = BENCH.embedded(Reader(gallery[BENCH.target]), gallery)
    assert Fusion(weighted_sum).fit(bench, (0.0, 0.9)).weight == 0.9
    near = gallery.clone()
    near[BENCH.target] = normalize(gallery[BENCH.reference] + 0.1 * gallery[BENCH.target], dim=1)
    misled = BENCH.embedded(Reader(-gallery[BENCH.target]), near)
    assert Fusion(weighted_sum).fit(misled, (0.9, 0.0)).weight == 0.0


def test_ranking_scores_leaves_them_as_they_were():
    scores = torch.tensor([[0.9, 0.1, 0.5]])
    assert score_ranks(scores, np.array([0]), torch.tensor([[False, True, False]]))[0] == 2
    assert scores.isfinite().all()
