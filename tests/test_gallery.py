"""Exact search against sorting by hand, and FAISS against exact search."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from isa_lite.gallery import FaissGallery, Gallery, agreement


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


def clustered(count: int, width: int = 16, seed: int = 0) -> torch.Tensor:
    """Unit vectors in clumps, as embeddings are."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(30, width, generator=draw)
    return normalize(
        centres[torch.randint(30, (count,), generator=draw)] + 0.5 * torch.randn(count, width, generator=draw), dim=1
    )


def indexed(embeddings: torch.Tensor, **settings) -> FaissGallery:
    return FaissGallery(embeddings, [str(i) for i in range(len(embeddings))], **settings)


@pytest.mark.parametrize(
    "settings", [{"kind": "flat"}, {"kind": "ivf", "lists": 20, "probes": 20}, {"kind": "ivf", "probes": 10**6}]
)
@pytest.mark.parametrize("exclude", [None, torch.tensor([5, -1, 1999, 0, 3, -1])])
@pytest.mark.parametrize("chunk", [1024, 4])
def test_faiss_that_looks_everywhere_is_exact_search(settings, exclude, chunk):
    embeddings = clustered(2000)
    queries = embeddings[[5, 7, 1999, 0, 2, 9]]
    exact = Gallery(embeddings, range(2000)).search(queries, 12, exclude)
    scores, found = indexed(embeddings, **settings).search(queries, 12, exclude, chunk)
    assert torch.equal(found, exact[1]) and torch.allclose(scores, exact[0], atol=1e-5)
    assert scores.dtype == exact[0].dtype and found.dtype == exact[1].dtype
    assert agreement(found, exact[1]) == 100


def test_more_probes_find_more_and_one_list_does_not_find_all():
    embeddings = clustered(3000)
    queries = normalize(embeddings[:200] + 0.1 * torch.randn(200, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    exact = Gallery(embeddings, range(3000)).search(queries, 10)[1]
    shares = [agreement(indexed(embeddings, kind="ivf", probes=p).search(queries, 10)[1], exact) for p in (1, 4, 16, 55)]
    assert shares == sorted(shares) and shares[0] < 95 and shares[-1] == 100
    again = indexed(embeddings, kind="ivf", probes=1).search(queries, 10)[1]
    assert agreement(again, exact) == shares[0]  # k-means from a fixed seed


def test_agreement_counts_what_both_found_wherever_it_stands():
    assert agreement(torch.tensor([[3, 1], [5, 6]]), torch.tensor([[1, 2], [6, 5]])) == 75
    assert agreement(torch.tensor([[-1, -1]]), torch.tensor([[1, 2]])) == 0


def test_a_list_that_holds_too_few_leaves_places_empty():
    embeddings = clustered(400)
    scores, found = indexed(embeddings, kind="ivf", lists=40, probes=1).search(embeddings[:5], 300, torch.arange(5))
    assert (found[:, -1] == -1).all() and (scores[found < 0] == float("-inf")).all() and (scores[found >= 0] <= 1.001).all()
    for row, own in zip(found.tolist(), range(5), strict=True):
        kept = [i for i in row if i >= 0]
        assert own not in row and len(set(kept)) == len(kept) and row == kept + [-1] * (300 - len(kept))


@pytest.mark.parametrize("count", [1, 5, 38, 39, 200])
def test_a_small_gallery_gets_few_lists_without_a_complaint(count, capfd):
    small = indexed(clustered(count), kind="ivf")
    assert small.search(clustered(count)[:1], 1)[1].tolist() == [[0]]
    assert small.index.nlist == max(1, count // 39)  # what FAISS asks for
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"kind": "hnsw"}, "kind must be 'flat' .* not 'hnsw'"),
        ({"kind": "ivf", "lists": 41}, "lists must be between 1 and 40"),
        ({"kind": "ivf", "lists": -1}, "lists must be between 1 and 40"),
        ({"kind": "ivf", "probes": 0}, "probes must be at least 1, not 0"),
    ],
)
def test_settings_of_an_index_are_checked(gallery, settings, message):
    with pytest.raises(ValueError, match=message):
        indexed(gallery.embeddings, **settings)
    with pytest.raises(ValueError, match="k must be between 1 and 40"):
        indexed(gallery.embeddings).search(gallery.embeddings, 41)


def test_a_gallery_knows_its_model_also_from_disk_and_as_an_index(gallery, tmp_path):
    gallery.save(tmp_path / "unknown.safetensors")
    assert Gallery.load(tmp_path / "unknown.safetensors").vl_model == ""
    Gallery(gallery.embeddings, gallery.ids, "0123").save(tmp_path / "known.safetensors")
    assert Gallery.load(tmp_path / "known.safetensors").vl_model == "0123"
    again = FaissGallery.load(tmp_path / "known.safetensors")
    assert again.vl_model == "0123" and torch.equal(
        again.search(gallery.embeddings, 3)[1], gallery.search(gallery.embeddings, 3)[1]
    )
