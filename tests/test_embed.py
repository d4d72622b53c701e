"""Embedding a gallery of files: the same embeddings as all at once, in shards that are kept."""

import hashlib
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from isa_lite.retrieval import embed
from isa_lite.retrieval.embed import ahead, embed_files
from isa_lite.support.checkpoint import read_tensors, write_tensors
from isa_lite.support.images import read_image


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(embed, "SHARD", 3)


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    made = []
    for i in range(7):
        made.append(tmp_path / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (40 + 9 * i, 64, 3), dtype=np.uint8)).save(made[-1])
    return made


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_files_are_embedded_as_the_tower_embeds_their_pictures_in_their_order(
    files, vl, num_workers
):
    expected = vl.encode_images([read_image(f) for f in files])
    found = embed_files(files, vl, batch_size=2, num_workers=num_workers, progress=False)
    assert found.dtype == torch.float32 and torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, expected.flip(0), atol=1e-5)


def test_finished_shards_are_kept_and_only_what_changed_is_embedded_again(
    files, vl, tmp_path, monkeypatch
):
    cache, seen = tmp_path / "cache", []
    encode = type(vl).encode_pixels
    monkeypatch.setattr(
        type(vl),
        "encode_pixels",
        lambda self, pixels: seen.append(len(pixels)) or encode(self, pixels),
    )

    def embedded():
        seen.clear()
        return embed_files(files, vl, cache, batch_size=4, progress=False)

    first = embedded()
    assert seen == [3, 3, 1]
    assert torch.equal(embedded(), first) and seen == []
    Image.new("RGB", (30, 30), "red").save(files[4])
    again = embedded()
    assert (
        seen == [3]
        and torch.equal(again[:3], first[:3])
        and not torch.allclose(again[4], first[4], atol=1e-3)
    )
    with torch.no_grad():
        next(vl.clip.visual.parameters()).add_(0.1)  # another model
    embedded()
    assert seen == [3, 3, 1]


def test_a_run_that_was_stopped_goes_on_behind_its_last_shard(files, vl, tmp_path):
    whole = files[5].read_bytes()
    files[5].write_bytes(whole[:50])
    with pytest.raises(ValueError, match="5.png.*image"):
        embed_files(files, vl, tmp_path / "cache", progress=False)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    files[5].write_bytes(whole)
    assert torch.allclose(
        embed_files(files, vl, tmp_path / "cache", progress=False),
        embed_files(files, vl, progress=False),
        atol=1e-5,
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_all_broken_files_are_named_at_once_and_whole_shards_are_kept(
    files, vl, tmp_path, num_workers
):
    for i in (3, 4, 6):
        files[i].write_bytes(files[i].read_bytes()[:50])
    with pytest.raises(ValueError, match=r"^3 of 7 .*3\.png.*4\.png.*6\.png") as refused:
        embed_files(
            files,
            vl,
            tmp_path / "cache",
            batch_size=1,
            num_workers=num_workers,
            progress=False,
        )
    assert "5.png" not in str(refused.value) and len(list((tmp_path / "cache").iterdir())) == 1


def test_a_cache_that_is_a_file_is_refused_before_anything_is_embedded(
    files, vl, tmp_path, monkeypatch
):
    (tmp_path / "cache").write_text("")
    monkeypatch.setattr(type(vl), "encode_pixels", lambda *_: pytest.fail("embedded"))
    with pytest.raises(ValueError, match="cache"):
        embed_files(files, vl, tmp_path / "cache", progress=False)


def test_a_damaged_shard_is_made_again(files, vl, tmp_path):
    cache = tmp_path / "cache"
    first = embed_files(files, vl, cache, progress=False)
    for shard, left in zip(sorted(cache.iterdir()), (0, 5, 100), strict=True):
        shard.write_bytes(shard.read_bytes()[:left])
    assert torch.equal(embed_files(files, vl, cache, progress=False), first)
    assert (
        torch.equal(embed_files(files, vl, cache, progress=False), first)
        and len(list(cache.iterdir())) == 3
    )


def test_bad_input_is_refused_before_anything_is_embedded(files, vl, tmp_path):
    with pytest.raises(FileNotFoundError, match="2 of 9.*missing.*nowhere.png"):
        embed_files([*files, tmp_path / "nowhere.png", tmp_path / "neither.png"], vl)
    with pytest.raises(ValueError, match="there are no files"):
        embed_files([], vl)
    with pytest.raises(ValueError, match="batch_size"):
        embed_files(files, vl, batch_size=0)
    with pytest.raises(ValueError, match="dtype.*'half'"):
        embed_files(files, vl, dtype="half")


def test_half_precision_is_close_and_filed_apart(files, vl, tmp_path):
    exact = embed_files(files, vl, tmp_path, progress=False)
    half = embed_files(files, vl, tmp_path, dtype="bfloat16", progress=False)
    assert not torch.equal(exact, half) and (exact * half).sum(1).min() > 0.99


def test_work_is_done_ahead_by_two_a_thread_and_no_further():
    started, gate = [], threading.Event()

    def work(i):
        started.append(i)
        gate.wait(5)
        return i * i

    results = ahead(work, range(10), threads=2)
    gate.set()
    assert next(results) == 0
    assert set(started) <= set(range(5))  # four in advance, one more when the first was taken
    assert list(results) == [i * i for i in range(1, 10)]


# ---------------------------------------------------------------------------------------------- odd
# input


@pytest.mark.parametrize("wrong", ["a.png", b"a.png", [None], [3], None, 3, {"a.png"}])
def test_what_is_no_list_of_files_is_refused(vl, wrong):
    with pytest.raises(ValueError, match="files"):
        embed_files(wrong, vl)


def test_a_file_name_that_is_not_utf8_is_filed_in_the_cache(files, vl, tmp_path):
    folder, cache = tmp_path / "odd", tmp_path / "cache"
    folder.mkdir()
    try:
        odd = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png"))
        odd.write_bytes(files[0].read_bytes())
    except (OSError, UnicodeError):
        pytest.skip("this system has no such names")
    first = embed_files([odd, files[1]], vl, cache, progress=False)
    assert (
        torch.equal(embed_files([odd, files[1]], vl, cache, progress=False), first)
        and len(list(cache.iterdir())) == 1
    )


def test_the_keys_of_the_cache_are_those_of_earlier_versions(files, vl, tmp_path, monkeypatch):
    monkeypatch.setattr(type(vl), "fingerprint", "0123")
    monkeypatch.setattr("isa_lite.retrieval.embed._stamp", lambda path: f"{path.name} é")
    vl.preprocess = "as ever"  # a picture of the tower's own size needs none
    Image.new("RGB", (vl.image_size, vl.image_size)).save(files[0])
    embed_files(files[:1], vl, tmp_path / "cache", progress=False)
    said = "0123 as ever float32 draft=False with digests\n0.png é"
    assert [p.stem for p in (tmp_path / "cache").iterdir()] == [
        hashlib.sha256(said.encode()).hexdigest()[:24]
    ]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda part: {
            **part,
            "embeddings": part["embeddings"][:-1],
            "digests": part["digests"][:-1],
        },
        lambda part: {**part, "digests": part["digests"][:-1]},
        lambda part: {**part, "embeddings": part["embeddings"] * float("nan")},
        lambda part: {**part, "embeddings": part["embeddings"] * 2},
        lambda part: {**part, "embeddings": part["embeddings"].long()},
        lambda part: {"embeddings": part["embeddings"]},
        lambda part: {"other": part["embeddings"]},
    ],
)
def test_a_shard_that_does_not_belong_to_its_files_is_made_again(files, vl, tmp_path, spoil):
    first = embed_files(files[:3], vl, tmp_path / "cache", progress=False)
    (stored,) = (tmp_path / "cache").iterdir()
    write_tensors(stored, spoil(read_tensors(stored)[0]))
    assert torch.equal(embed_files(files[:3], vl, tmp_path / "cache", progress=False), first)
    assert torch.equal(read_tensors(stored)[0]["embeddings"], first)
