"""Exact search against sorting by hand."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from isa_lite.gallery import Gallery


@pytest.fixture
def gallery() -> Gallery:
    torch.manual_seed(0)
    return Gallery(normalize(torch.randn(40, 6), dim=1), [f"image {i}" for i in range(40)])


def test_search_is_sorting(gallery):
    queries = normalize(torch.randn(9, 6), dim=1)
    scores, found = gallery.search(queries, 7)
    every = queries.double().numpy() @ gallery.embeddings.double().numpy().T
    assert np.array_equal(found.numpy(), np.argsort(-every, axis=1)[:, :7])
    assert np.allclose(scores.numpy(), -np.sort(-every, axis=1)[:, :7], atol=1e-6)
    assert (scores.diff(dim=1) <= 0).all() and torch.equal(gallery.search(queries, 40)[1][:, :7], found)


@pytest.mark.parametrize("chunk", [1, 2, 9, 100])
def test_search_in_chunks_with_references_left_out_is_sorting(gallery, chunk):
    queries, exclude = normalize(torch.randn(9, 6), dim=1), torch.tensor([3, -1, 39, 0, -1, 7, 7, 12, 1])
    queries[:3] = gallery.embeddings[[3, 3, 39]]  # the nearest would be the one that is left out
    before = gallery.embeddings.clone()
    scores, found = gallery.search(queries, 5, exclude, chunk)
    for q in range(9):
        cosines = {g: float(queries[q].double() @ gallery.embeddings[g].double()) for g in range(40) if g != int(exclude[q])}
        best = sorted(cosines, key=lambda g: -cosines[g])[:5]
        assert found[q].tolist() == best and scores[q].tolist() == pytest.approx([cosines[g] for g in best], abs=1e-6)
    assert found[1, 0] == 3 and torch.equal(gallery.embeddings, before)


def test_a_reference_is_never_found_and_minus_one_excludes_nothing(gallery):
    queries = gallery.embeddings[:3]
    _, found = gallery.search(queries, 40 - 1, torch.tensor([0, -1, 2]), chunk=2)
    assert 0 not in found[0] and found[1, 0] == 1 and 2 not in found[2]
    assert gallery.search(queries, 1)[1].flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize("k, exclude, most", [(0, None, 40), (-1, None, 40), (41, None, 40), (40, [3], 39), (41, [-1], 40)])
def test_k_must_fit(gallery, k, exclude, most):
    with pytest.raises(ValueError, match=f"between 1 and {most}, the images that every query may find, not {k}"):
        gallery.search(gallery.embeddings[:1], k, exclude and torch.tensor(exclude))


def test_a_gallery_on_disk_is_the_same(gallery, tmp_path):
    gallery.save(tmp_path / "gallery.safetensors")
    gallery.save(str(tmp_path / "gallery.safetensors"))  # over the old one
    again = Gallery.load(tmp_path / "gallery.safetensors")
    assert torch.equal(again.embeddings, gallery.embeddings) and list(again.ids) == gallery.ids and len(again) == 40
    assert torch.equal(again.search(again.embeddings, 3)[1], gallery.search(gallery.embeddings, 3)[1])
    assert [p.name for p in tmp_path.iterdir()] == ["gallery.safetensors"]  # no temporary file is left


def test_ids_and_embeddings_belong_together():
    with pytest.raises(ValueError, match="3 embeddings but 2 ids"):
        Gallery(torch.eye(3), ["a", "b"])
    with pytest.raises(ValueError, match="2 embeddings but 3 ids"):
        Gallery(torch.eye(3)[:2], ["a", "b", "c"])
