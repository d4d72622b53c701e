"""Exact search against sorting by hand, and FAISS against exact search."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch.nn.functional import normalize

from isa_lite.deploy.client import read_gallery
from isa_lite.retrieval.gallery import FaissGallery, Gallery, agreement


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
    assert (scores.diff(dim=1) <= 0).all() and torch.equal(
        gallery.search(queries, 40)[1][:, :7], found
    )


@pytest.mark.parametrize("chunk", [1, 2, 9, 100])
def test_search_in_chunks_with_references_left_out_is_sorting(gallery, chunk):
    queries, exclude = (
        normalize(torch.randn(9, 6), dim=1),
        torch.tensor([3, -1, 39, 0, -1, 7, 7, 12, 1]),
    )
    queries[:3] = gallery.embeddings[[3, 3, 39]]  # the nearest would be the one that is left out
    before = gallery.embeddings.clone()
    scores, found = gallery.search(queries, 5, exclude, chunk)
    for q in range(9):
        cosines = {
            g: float(queries[q].double() @ gallery.embeddings[g].double())
            for g in range(40)
            if g != int(exclude[q])
        }
        best = sorted(cosines, key=lambda g: -cosines[g])[:5]
        assert found[q].tolist() == best and scores[q].tolist() == pytest.approx(
            [cosines[g] for g in best], abs=1e-6
        )
    assert found[1, 0] == 3 and torch.equal(gallery.embeddings, before)


def test_a_reference_is_never_found_and_minus_one_excludes_nothing(gallery):
    queries = gallery.embeddings[:3]
    _, found = gallery.search(queries, 40 - 1, torch.tensor([0, -1, 2]), chunk=2)
    assert 0 not in found[0] and found[1, 0] == 1 and 2 not in found[2]
    assert gallery.search(queries, 1)[1].flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "k, exclude, most",
    [(0, None, 40), (-1, None, 40), (41, None, 40), (40, [3], 39), (41, [-1], 40)],
)
def test_k_must_fit(gallery, k, exclude, most):
    with pytest.raises(ValueError, match=f"between 1 and {most}.*not {k}"):
        gallery.search(gallery.embeddings[:1], k, exclude and torch.tensor(exclude))


def test_a_gallery_on_disk_is_the_same(gallery, tmp_path):
    gallery.save(tmp_path / "gallery.safetensors")
    gallery.save(str(tmp_path / "gallery.safetensors"))  # over the old one
    again = Gallery.load(tmp_path / "gallery.safetensors")
    assert (
        torch.equal(again.embeddings, gallery.embeddings)
        and list(again.ids) == gallery.ids
        and len(again) == 40
    )
    assert torch.equal(
        again.search(again.embeddings, 3)[1], gallery.search(gallery.embeddings, 3)[1]
    )
    # no temporary file is left
    assert [p.name for p in tmp_path.iterdir()] == ["gallery.safetensors"]


def test_ids_and_embeddings_belong_together():
    with pytest.raises(ValueError, match="3 embeddings but 2 ids"):
        Gallery(torch.eye(3), ["a", "b"])
    with pytest.raises(ValueError, match="2 embeddings but 3 ids"):
        Gallery(torch.eye(3)[:2], ["a", "b", "c"])


@pytest.mark.parametrize(
    "embeddings, ids",
    [(None, "ab"), (torch.eye(2), {"a", "b"}), (torch.eye(2), {"a": 1, "b": 2})],
    ids=["nothing", "a set", "a dict"],
)
def test_what_is_no_list_of_vectors_or_names_is_refused(embeddings, ids):
    with pytest.raises(ValueError, match="^(embeddings|ids) must be"):
        Gallery(embeddings, list(ids) if embeddings is None else ids)


def clustered(count: int, width: int = 16, seed: int = 0) -> torch.Tensor:
    """Unit vectors in clumps, as embeddings are."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(30, width, generator=draw)
    return normalize(
        centres[torch.randint(30, (count,), generator=draw)]
        + 0.5 * torch.randn(count, width, generator=draw),
        dim=1,
    )


def indexed(embeddings: torch.Tensor, **settings) -> FaissGallery:
    return FaissGallery(embeddings, [str(i) for i in range(len(embeddings))], **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "flat"},
        {"kind": "ivf", "lists": 20, "probes": 20},
        {"kind": "ivf", "probes": 10**6},
    ],
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
    queries = normalize(
        embeddings[:200] + 0.1 * torch.randn(200, 16, generator=torch.Generator().manual_seed(1)),
        dim=1,
    )
    exact = Gallery(embeddings, range(3000)).search(queries, 10)[1]
    shares = [
        agreement(indexed(embeddings, kind="ivf", probes=p).search(queries, 10)[1], exact)
        for p in (1, 4, 16, 55)
    ]
    assert shares == sorted(shares) and shares[0] < 95 and shares[-1] == 100
    again = indexed(embeddings, kind="ivf", probes=1).search(queries, 10)[1]
    assert agreement(again, exact) == shares[0]  # k-means from a fixed seed


def test_agreement_counts_what_both_found_wherever_it_stands():
    assert agreement(torch.tensor([[3, 1], [5, 6]]), torch.tensor([[1, 2], [6, 5]])) == 75
    assert agreement(torch.tensor([[-1, -1]]), torch.tensor([[1, 2]])) == 0


def test_a_list_that_holds_too_few_leaves_places_empty():
    embeddings = clustered(400)
    scores, found = indexed(embeddings, kind="ivf", lists=40, probes=1).search(
        embeddings[:5], 300, torch.arange(5)
    )
    assert (
        (found[:, -1] == -1).all()
        and (scores[found < 0] == float("-inf")).all()
        and (scores[found >= 0] <= 1.001).all()
    )
    for row, own in zip(found.tolist(), range(5), strict=True):
        kept = [i for i in row if i >= 0]
        assert (
            own not in row
            and len(set(kept)) == len(kept)
            and row == kept + [-1] * (300 - len(kept))
        )


@pytest.mark.parametrize("count", [1, 5, 38, 39, 200])
def test_a_small_gallery_gets_few_lists_without_a_complaint(count, capfd):
    small = indexed(clustered(count), kind="ivf")
    assert small.search(clustered(count)[:1], 1)[1].tolist() == [[0]]
    assert small.index.nlist == max(1, count // 39)  # what FAISS asks for
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"kind": "hnsw"}, "kind.*'flat'.*'hnsw'"),
        ({"kind": "ivf", "lists": 41}, "lists must be.* 0 to 40"),
        ({"kind": "ivf", "lists": -1}, "lists must be.* 0 to 40"),
        ({"kind": "ivf", "probes": 0}, "probes must be.* 1, not 0"),
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


# ------------------------------------------------------------------------------------- what goes in
# is checked

EYE = torch.eye(3)


@pytest.mark.parametrize(
    "embeddings",
    [
        torch.tensor([[1.0, 0, 0], [0, float("nan"), 0], [0, 0, 1]]),
        torch.tensor([[1.0, 0, 0], [0, float("inf"), 0], [0, 0, 1]]),
        100 * EYE,
        torch.zeros(3, 3),
        EYE[None],
        torch.ones(3),
        EYE.long(),
        [[1.0, 0, 0]] * 3,
    ],
)
@pytest.mark.parametrize("kind", [Gallery, FaissGallery])
def test_embeddings_that_cannot_be_searched_are_refused(embeddings, kind):
    with pytest.raises(ValueError, match="embeddings"):
        kind(embeddings, ["a", "b", "c"])


@pytest.mark.parametrize(
    "ids",
    [
        "abc",
        b"abc",
        ["a", "b", "a"],
        ["a", None, "b"],
        [1, 2.5, 3],
        [True, 2, 3],
        np.array([1, 2, 2]),
        3,
    ],
)
def test_ids_that_do_not_tell_images_apart_are_refused(ids):
    with pytest.raises(ValueError, match="ids"):
        Gallery(EYE, ids)


@pytest.mark.parametrize(
    "ids, kept",
    [
        (np.array([3, 1, 2]), [3, 1, 2]),
        (np.array(["a", "b", "c"]), ["a", "b", "c"]),
        ([Path("x/a.png"), Path("b.png"), "c"], [str(Path("x/a.png")), "b.png", "c"]),
        (range(3), [0, 1, 2]),
        (("a", 1, "1"), ["a", 1, "1"]),
        (["a\udcff", "é", ""], ["a\udcff", "é", ""]),  # a file name that is not UTF-8
    ],
)
def test_ids_of_every_kind_are_saved_as_they_are_read(tmp_path, ids, kept):
    made = Gallery(EYE, ids)
    made.save(tmp_path / "gallery.safetensors")
    assert list(made.ids) == kept == Gallery.load(tmp_path / "gallery.safetensors").ids
    assert read_gallery(tmp_path / "gallery.safetensors")[1] == kept


@pytest.mark.parametrize("kind", [Gallery, FaissGallery])
def test_queries_may_be_arrays_of_any_precision_or_one_vector(gallery, kind):
    made = kind(gallery.embeddings.numpy().astype(np.float64), gallery.ids)
    wanted = gallery.search(gallery.embeddings[:2], 3)[1]
    queries = gallery.embeddings[:2]
    for given in (
        queries,
        queries.numpy(),
        queries.double(),
        queries.half(),
        queries.numpy().astype(np.float16),
        queries.bfloat16(),
    ):
        assert torch.equal(made.search(given, 3)[1], wanted)
    assert torch.equal(made.search(queries[1], 3)[1], wanted[1:])
    assert torch.equal(made.search(queries, 3, exclude=np.array([-1, -1]))[1], wanted)
    assert kind(gallery.embeddings.half(), gallery.ids).embeddings.dtype == torch.float32


@pytest.mark.parametrize(
    "queries, k, exclude, named",
    [
        (torch.eye(7)[:2], 3, None, "queries"),
        (torch.empty(0, 6), 3, None, "queries"),
        (torch.eye(6)[None], 3, None, "queries"),
        ([[1.0] * 6], 3, None, "queries"),
        ([], 3, None, "queries"),
        (torch.full((1, 6), float("nan")), 3, None, "queries"),
        (torch.eye(6)[:2], 3, torch.tensor([1]), "exclude"),
        (torch.eye(6)[:2], 3, torch.tensor([1, 40]), "exclude"),
        (torch.eye(6)[:2], 3, torch.tensor([1, -2]), "exclude"),
        (torch.eye(6)[:2], 3, torch.tensor([0.5, 1]), "exclude"),
        (torch.eye(6)[:2], 3, "x", "exclude"),
        (torch.eye(6)[:2], 2.0, None, "k must"),
        (torch.eye(6)[:2], True, None, "k must"),
    ],
)
@pytest.mark.parametrize("kind", [Gallery, FaissGallery])
def test_searches_that_cannot_work_are_refused(gallery, kind, queries, k, exclude, named):
    with pytest.raises(ValueError, match=named):
        kind(gallery.embeddings, gallery.ids).search(queries, k, exclude)


# ----------------------------------------------------------------------------------------------------
# ties


@pytest.mark.parametrize(
    "settings", [None, {"kind": "flat"}, {"kind": "ivf", "lists": 3, "probes": 3}]
)
@pytest.mark.parametrize("k", [1, 2, 7, 49, 50, 120])
def test_of_equal_scores_the_first_in_the_gallery_is_found_first(settings, k):
    place = torch.randint(3, (120,), generator=torch.Generator().manual_seed(0))
    embeddings, exclude = (
        torch.eye(4)[place],
        torch.tensor([-1, int((place == 1).nonzero()[0]), -1]),
    )
    made = Gallery(embeddings, range(120)) if settings is None else indexed(embeddings, **settings)
    found = made.search(torch.eye(4)[:3], k)[1].tolist()
    for query in range(3):
        order = sorted(range(120), key=lambda i: (place[i] != query, i))
        assert found[query] == order[:k]
    if k < 120:
        order = [i for i in sorted(range(120), key=lambda i: (place[i] != 1, i)) if i != exclude[1]]
        assert made.search(torch.eye(4)[:3], k, exclude)[1][1].tolist() == order[:k]


# --------------------------------------------------------------------------------------------------
# damage


def damaged(path: Path) -> dict:
    """Ways in which a file of a gallery can be damaged, or be another file, by what is wrong with
    it.
    """
    whole = path.read_bytes()
    metadata = {"info": json.dumps({"ids": ["a", "b", "c"], "vl_model": ""})}
    return {
        "cut off": whole[:60],
        "empty": b"",
        "text": b"no gallery" * 9,
        "no ids": save({"embeddings": EYE}),
        "no embeddings": save({"other": EYE}, metadata),
        "too few ids": save({"embeddings": EYE}, {"info": json.dumps({"ids": ["a", "b"]})}),
        "ids are a text": save({"embeddings": EYE}, {"info": json.dumps({"ids": "abc"})}),
        "info is a list": save({"embeddings": EYE}, {"info": "[]"}),
        "info is no JSON": save({"embeddings": EYE}, {"info": "{"}),
        "ids are objects": save({"embeddings": EYE}, {"info": json.dumps({"ids": [{}, [], 1]})}),
        "twice the same id": save(
            {"embeddings": EYE}, {"info": json.dumps({"ids": ["a", "a", "b"]})}
        ),
        "model is a number": save(
            {"embeddings": EYE}, {"info": json.dumps({"ids": ["a", "b", "c"], "vl_model": 3})}
        ),
        "nan": save({"embeddings": EYE * float("nan")}, metadata),
        "too long": save({"embeddings": 100 * EYE}, metadata),
        "whole numbers": save({"embeddings": EYE.long()}, metadata),
        "three axes": save({"embeddings": EYE[None].repeat(3, 1, 1)}, metadata),
    }


def test_a_damaged_file_is_named_by_both_readers(tmp_path):
    path = tmp_path / "gallery.safetensors"
    Gallery(EYE, ["a", "b", "c"]).save(path)
    for what, content in damaged(path).items():
        path.write_bytes(content)
        for read in (Gallery.load, read_gallery):
            with pytest.raises(ValueError, match=r"gallery\.safetensors"):
                pytest.fail(f"{what}: {read(path)}")
    path.unlink()
    for read in (Gallery.load, read_gallery):
        with pytest.raises(FileNotFoundError, match=r"gallery\.safetensors"):
            read(path)
