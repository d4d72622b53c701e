"""The public benchmarks: small trees in their layouts, hand-worked numbers, the traps, submission
files.
"""

import doctest
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from isa_lite import benchmarks
from isa_lite.benchmarks import circo, cirr, common, fashioniq
from isa_lite.benchmarks.common import Query, Ranking, Task, average_precision_at, rank, recall_at
from isa_lite.benchmarks.run import RunConfig, run
from isa_lite.benchmarks.tiny import LABEL, write_tiny
from isa_lite.commands import main
from isa_lite.deploy import export
from isa_lite.methods.baselines import UNTRAINED
from isa_lite.methods.isa import Isa
from isa_lite.prompt import TEMPLATE, compose, prompt_ids
from isa_lite.query_encoder import QueryEncoder


def put(path: Path, content=None, color=(0, 0, 0)) -> None:
    """A JSON file, or an image of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is not None:
        path.write_text(json.dumps(content))
    else:
        Image.new("RGB", (8, 8), color).save(path)


@pytest.fixture
def fashioniq_root(tmp_path):
    """Dress: 3 queries; shirt and toptee: 1 each, and both have an image named "same"."""
    root = tmp_path / "fashionIQ"
    triplets = {
        "dress": [
            ("d0", "d1", ["is red.", " has no sleeves, "]),
            ("d1", "d2", ["is longer?", "is blue"]),
            ("d2", "d0", ["a", "b"]),
        ],
        "shirt": [("same", "s1", ["has $5 on it", ""])],
        "toptee": [("t0", "same", ["is green", "is plain"])],
    }
    names = {
        "dress": ["d0", "x0", "x1", "d1", "d2"],
        "shirt": ["same", "s1", "x2"],
        "toptee": ["t0", "same"],
    }
    for category, split in itertools.product(triplets, ("val", "test")):
        entries = [
            {"candidate": c, "target": t, "captions": both} for c, t, both in triplets[category]
        ]
        if split == "test":
            entries = [{"candidate": e["candidate"], "captions": e["captions"]} for e in entries]
        put(root / f"captions/cap.{category}.{split}.json", entries)
        put(root / f"image_splits/split.{category}.{split}.json", names[category])
    for i, name in enumerate(sorted({n for listed in names.values() for n in listed})):
        put(
            root / "images" / (name + (".png" if i % 2 else ".jpg")),
            color=(20 * i, 255 - 20 * i, 90),
        )
    return root


@pytest.fixture
def cirr_root(tmp_path):
    root = tmp_path / "CIRR"
    for split, folder in (("val", "dev"), ("test1", "test1")):
        names = [f"{folder}-{i}-0-img1" for i in range(8)]
        queries = [(12, 0, 3, range(6)), (7, 4, 6, (2, 3, 4, 5, 6, 7))]
        entries = [
            {
                "pairid": pair,
                "reference": names[reference],
                "target_hard": names[target],
                "target_soft": {names[target]: 0.5, names[(target + 1) % 8]: 1.0},
                "caption": "show two of them",
                "img_set": {"id": 1, "members": [names[m] for m in members]},
            }
            for pair, reference, target, members in queries
        ]
        if split == "test1":
            entries = [{k: v for k, v in e.items() if not k.startswith("target")} for e in entries]
        put(root / f"cirr/captions/cap.rc2.{split}.json", entries)
        put(
            root / f"cirr/image_splits/split.rc2.{split}.json",
            {name: f"./{folder}/{name}.png" for name in names},
        )
        for i, name in enumerate(names):
            put(root / folder / f"{name}.png", color=(30 * i, 200, 255 - 30 * i))
    return root


@pytest.fixture
def circo_root(tmp_path):
    root = tmp_path / "CIRCO"
    answers = [(101, [101, 102, 103], ["addition", "negation"]), (104, [104], ["addition"])]
    for split in ("val", "test"):
        entries = []
        for i, (target, truths, aspects) in enumerate(answers):
            entry = {
                "id": i,
                "reference_img_id": 100 + 5 * i,
                "relative_caption": "is asleep",
                "shared_concept": "a dog",
            }
            if split == "val":
                entry |= {
                    "target_img_id": target,
                    "gt_img_ids": truths,
                    "semantic_aspects": aspects,
                }
            entries.append(entry)
        put(root / f"annotations/{split}.json", entries)
    pictures = [{"id": i, "file_name": f"{i:012d}.jpg"} for i in range(100, 107)]
    put(
        root / "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json",
        {"images": pictures, "info": {}},
    )
    for picture in pictures:
        put(
            root / "COCO2017_unlabeled/unlabeled2017" / picture["file_name"],
            color=(picture["id"], 0, 60),
        )
    return root


def on_circle(degrees) -> torch.Tensor:
    """Unit vectors at these angles: the nearest angle is the best match."""
    angle = torch.deg2rad(torch.as_tensor(degrees, dtype=torch.float32))
    return torch.stack([angle.cos(), angle.sin()], 1)


# ---------------------------------------------------------------------------------------------
# FashionIQ


def test_fashioniq_reads_png_and_jpg_and_keeps_the_categories_apart(fashioniq_root):
    tasks = fashioniq.load(fashioniq_root)
    assert [(t.name, len(t.queries), list(t.files)) for t in tasks] == [
        ("dress", 3, ["d0", "x0", "x1", "d1", "d2"]),
        ("shirt", 1, ["same", "s1", "x2"]),
        ("toptee", 1, ["t0", "same"]),
    ]
    assert {path.suffix for task in tasks for path in task.files.values()} == {".png", ".jpg"}
    assert (tasks[0].queries[1].reference, tasks[0].queries[1].targets) == ("d1", ("d2",))


def test_the_triplets_gallery_has_only_images_of_the_triplets_and_gives_another_number(
    fashioniq_root,
):
    tasks = [fashioniq.load(fashioniq_root, gallery=g)[0] for g in ("split", "triplets")]
    assert [list(t.files) for t in tasks] == [["d0", "x0", "x1", "d1", "d2"], ["d0", "d1", "d2"]]
    assert tasks[0].protocol["gallery"] != tasks[1].protocol["gallery"]
    angles = {"d0": 0, "x0": 8, "x1": 9, "d1": 10, "d2": 90}
    ranked = [
        rank(t, on_circle([5, 90, 0]), on_circle([angles[i] for i in t.files])) for t in tasks
    ]
    first = [recall_at(2, r.top, ["d1", "d2", "d0"]) for r in ranked]
    # x0 and x1 lie before d1 in the split gallery only
    assert first == [pytest.approx(200 / 3), 100]


def test_the_reference_stays_in_the_ranking_of_fashioniq(fashioniq_root):
    task = fashioniq.load(fashioniq_root)[2]
    assert rank(task, on_circle([0]), on_circle([0, 90])).top == [["t0", "same"]]
    assert task.protocol["reference"] == "stays in the ranking"


def test_fashioniq_averages_categories_whatever_their_size(fashioniq_root):
    tasks = fashioniq.load(fashioniq_root)
    filler = [f"n{i}" for i in range(60)]

    def at(place, target):
        return [*filler[: place - 1], target, *filler[place - 1 :]]

    rankings = [
        Ranking([at(10, "d1"), at(11, "d2"), at(51, "d0")], []),
        Ranking([at(50, "s1")], []),
        Ranking([at(1, "same")], []),
    ]
    found = fashioniq.score(tasks, rankings)
    assert found == pytest.approx(
        {
            "dress R@10": 100 / 3,
            "dress R@50": 200 / 3,
            "shirt R@10": 0,
            "shirt R@50": 100,
            "toptee R@10": 100,
            "toptee R@50": 100,
        }
        | {"mean R@10": 400 / 9, "mean R@50": 800 / 9}
    )


def test_captions_are_stripped_and_joined_in_both_orders_or_one(fashioniq_root):
    both, one = (fashioniq.load(fashioniq_root, captions=c)[0] for c in fashioniq.CAPTIONS)
    assert both.queries[0].texts == ("is red and has no sleeves", "has no sleeves and is red")
    assert one.queries[0].texts == ("is red and has no sleeves",)
    assert both.protocol["captions"] != one.protocol["captions"]


def test_an_empty_caption_leaves_the_other_one_alone_and_is_told(fashioniq_root):
    task = fashioniq.load(fashioniq_root)[1]
    assert task.queries[0].texts == ("has $5 on it",)
    assert any("an empty caption in 1 of the queries" in note for note in task.notes)


def test_a_name_twice_in_a_split_file_is_one_image_and_told(fashioniq_root):
    listed = fashioniq_root / "image_splits/split.toptee.val.json"
    assert not any(
        "more than once" in note for task in fashioniq.load(fashioniq_root) for note in task.notes
    )
    put(listed, ["t0", "same", "t0"])
    task = fashioniq.load(fashioniq_root)[2]
    assert list(task.files) == ["t0", "same"]
    assert any(
        "toptee val: 1 names stand more than once in image_splits/split.toptee.val.json" in note
        for note in task.notes
    )


def test_the_embeddings_of_both_orders_are_averaged(fashioniq_root, vl):
    task = fashioniq.load(fashioniq_root)[0]
    image = F.normalize(torch.randn(5, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    queries = task.embedded(vl, image)
    found = UNTRAINED["text only"](queries)
    for query, row in zip(task.queries, found, strict=True):
        a, b = vl.encode_text(query.texts)
        torch.testing.assert_close(row, (a + b) / (a + b).norm())
    summed = UNTRAINED["image + text"](queries)
    references = image[[0, 3, 4]]
    torch.testing.assert_close(summed, F.normalize(references + found, dim=1))
    torch.testing.assert_close(UNTRAINED["image only"](queries), references)


def test_fashioniq_writes_each_entry_with_its_ranking(fashioniq_root, tmp_path):
    tasks = fashioniq.load(fashioniq_root, "test")
    rankings = [
        rank(t, on_circle([30] * len(t.queries)), on_circle(range(0, 10 * len(t.files), 10)))
        for t in tasks
    ]
    paths = fashioniq.write_submissions(tmp_path / "out", tasks, rankings)
    assert [p.name for p in paths] == [
        "dress.test.pred.json",
        "shirt.test.pred.json",
        "toptee.test.pred.json",
    ]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [p.name for p in paths]
    shirt = {"candidate": "same", "captions": ["has $5 on it", ""], "ranking": ["x2", "s1", "same"]}
    assert json.loads(paths[1].read_text()) == [shirt]
    assert [fashioniq.check_submission(p, t) for p, t in zip(paths, tasks, strict=True)] == [
        [],
        [],
        [],
    ]


@pytest.mark.parametrize(
    "spoil, problem",
    [
        (lambda c: c.pop(), "2 entries, not 3"),
        (
            lambda c: c.reverse(),
            "2 entries are not those of the annotations in their order, the first: 0",
        ),
        (lambda c: c[1].pop("ranking"), "1 entries have no ranking"),
        (lambda c: c[2]["ranking"].pop(), "1 lists do not hold 50 ids, the first: 2"),
        (lambda c: c[2].update(ranking=["d0"] * 5), "1 lists name an image twice, the first: 2"),
        (
            lambda c: c[0]["ranking"].__setitem__(0, "d0.png"),
            "1 lists name something that is no image of the gallery",
        ),
        (lambda c: c[0].update(ranking="d0"), "1 lists are no list of image ids, the first: 0"),
    ],
)
def test_a_bad_fashioniq_file_is_found_out(fashioniq_root, tmp_path, spoil, problem):
    task = fashioniq.load(fashioniq_root, "test")[0]
    content = [{**q.entry, "ranking": list(task.files)} for q in task.queries]
    spoil(content)
    put(tmp_path / "dress.test.pred.json", content)
    (found,) = fashioniq.check_submission(tmp_path / "dress.test.pred.json", task)
    assert found.startswith(problem)


# --------------------------------------------------------------------------------------------------
# CIRR


@pytest.mark.parametrize("layout", ["beside cirr/", "img_raw/", "inside cirr/", "root is cirr/"])
def test_cirr_images_are_found_wherever_they_are_kept(cirr_root, layout):
    root = cirr_root
    if layout in ("img_raw/", "inside cirr/"):
        folder = cirr_root / ("img_raw" if layout == "img_raw/" else "cirr")
        folder.mkdir(exist_ok=True)
        (cirr_root / "dev").rename(folder / "dev")
    elif layout == "root is cirr/":
        root = cirr_root / "cirr"
    (task,) = cirr.load(root)
    assert len(task.files) == 8 and all(path.parent.name == "dev" for path in task.files.values())


def test_cirr_removes_the_reference_and_ranks_the_five_others_of_the_set(cirr_root):
    (task,) = cirr.load(cirr_root)
    gallery = on_circle(range(0, 80, 10))  # image i lies at 10 i degrees
    ranking = rank(task, on_circle([1, 41]), gallery)
    names = list(task.files)
    assert ranking.top[0] == [names[i] for i in (1, 2, 3, 4, 5, 6, 7)]  # 0 is the reference
    assert ranking.top[1] == [names[i] for i in (5, 3, 6, 2, 7, 1, 0)]  # 4 is the reference
    assert ranking.subset == [
        [names[i] for i in (1, 2, 3, 4, 5)],
        [names[i] for i in (5, 3, 6, 2, 7)],
    ]
    kept = rank(replace(task, remove_reference=False), on_circle([1, 41]), gallery)
    assert [row[0] for row in kept.top] == [names[0], names[4]]


def test_cirr_recalls_worked_by_hand(cirr_root):
    (task,) = cirr.load(cirr_root)
    ranking = rank(task, on_circle([1, 41]), on_circle(range(0, 80, 10)))
    # Targets are 3 (third of all, third of its subset) and 6 (third, third); a second ranking puts
    # 6 first.
    everything = {"R@1": 0, "R@5": 100, "R@10": 100, "R@50": 100}
    assert cirr.score([task], [ranking]) == everything | {
        "Recall_subset@1": 0,
        "Recall_subset@2": 0,
        "Recall_subset@3": 100,
    }
    ranking = rank(task, on_circle([1, 61]), on_circle(range(0, 80, 10)))
    half = everything | {
        "R@1": 50,
        "Recall_subset@1": 50,
        "Recall_subset@2": 50,
        "Recall_subset@3": 100,
    }
    assert cirr.score([task], [ranking]) == half


def test_a_target_outside_its_set_is_a_miss_that_is_told(cirr_root):
    path = cirr_root / "cirr/captions/cap.rc2.val.json"
    entries = json.loads(path.read_text())
    entries[0]["target_hard"] = "dev-7-0-img1"
    (before,) = cirr.load(cirr_root)
    put(path, entries)
    (task,) = cirr.load(cirr_root)
    ranking = rank(task, on_circle([71, 61]), on_circle(range(0, 80, 10)))
    found = cirr.score([task], [ranking])
    assert found["R@1"] == 100 and found["Recall_subset@3"] == 50
    assert [n for n in task.notes if n not in before.notes] == [
        "the target of 1 queries is not in their img_set: each is a miss in every Recall_subset"
    ]


def test_the_soft_target_of_cirr_plays_no_part(cirr_root):
    (task,) = cirr.load(cirr_root)
    assert [q.targets for q in task.queries] == [("dev-3-0-img1",), ("dev-6-0-img1",)]


def test_cirr_writes_two_files_as_its_server_wants_them(cirr_root, tmp_path):
    (task,) = cirr.load(cirr_root, "test1")
    assert not task.answered
    ranking = rank(task, on_circle([1, 41]), on_circle(range(0, 80, 10)))
    paths = cirr.write_submissions(tmp_path / "out", [task], [ranking])
    assert [p.name for p in paths] == ["cirr.test1.recall.json", "cirr.test1.recall_subset.json"]
    names = [f"test1-{i}-0-img1" for i in range(8)]
    recall, subset = (json.loads(p.read_text()) for p in paths)
    assert recall["12"] == names[1:] and set(recall) == {"version", "metric", "12", "7"}
    assert subset == {
        "version": "rc2",
        "metric": "recall_subset",
        "12": [names[i] for i in (1, 2, 3)],
        "7": [names[i] for i in (5, 3, 6)],
    }
    assert [cirr.check_submission(p, task) for p in paths] == [[], []]


@pytest.mark.parametrize(
    "metric, spoil, problem",
    [
        ("recall", lambda c: c.pop("version"), '"version" must be "rc2", not None'),
        (
            "recall",
            lambda c: c.update(metric="mAP"),
            '"metric" must be "recall" or "recall_subset"',
        ),
        ("recall", lambda c: c.pop("7"), "1 of 2 queries have no list, the first: 7"),
        (
            "recall",
            lambda c: c.update({"99": []}),
            "1 keys are no query of cirr test1, the first: 99",
        ),
        (
            "recall",
            lambda c: c["7"].__setitem__(0, "test1-4-0-img1"),
            "1 lists name their own reference, the first: 7",
        ),
        (
            "recall",
            lambda c: c["7"].__setitem__(0, "test1-5-0-img1.png"),
            "1 lists name something that is no image",
        ),
        (
            "recall",
            lambda c: c.update(note="x" * 5_000_000),
            "the file has 5.0 MB; the server takes 5",
        ),
        (
            "recall_subset",
            lambda c: c["12"].append("test1-4-0-img1"),
            "1 lists do not hold 3 ids, the first: 12",
        ),
        (
            "recall_subset",
            lambda c: c["12"].__setitem__(0, "test1-7-0-img1"),
            "1 lists name something that is no image",
        ),
    ],
)
def test_a_bad_cirr_file_is_found_out(cirr_root, tmp_path, metric, spoil, problem):
    (task,) = cirr.load(cirr_root, "test1")
    ranking = rank(task, on_circle([1, 41]), on_circle(range(0, 80, 10)))
    path = cirr.write_submissions(tmp_path, [task], [ranking])[metric == "recall_subset"]
    content = json.loads(path.read_text())
    spoil(content)
    put(path, content)
    found = cirr.check_submission(path, task)
    assert found and found[0].startswith(problem)


# -------------------------------------------------------------------------------------------------
# CIRCO


def test_circo_average_precision_worked_by_hand():
    # Hits at 1, 3 and 6 of three right answers.
    row = ["a", "x", "b", "y", "z", "c"]
    assert average_precision_at(6, row, ["a", "b", "c"]) == pytest.approx((1 + 2 / 3 + 3 / 6) / 3)
    assert average_precision_at(5, row, ["a", "b", "c"]) == pytest.approx((1 + 2 / 3) / 3)
    # Five right answers, but only two places: two hits are all that can be had.
    assert average_precision_at(2, row, ["a", "x", "b", "y", "z"]) == 1
    assert average_precision_at(2, row, ["q"]) == 0
    with pytest.raises(ValueError, match="twice"):
        average_precision_at(3, ["a", "a"], ["a"])


def test_circo_metrics_worked_by_hand(circo_root):
    (task,) = circo.load(circo_root)
    rankings = [[102, 100, 101, 105, 106, 103, 104], [105, 104, 100, 101, 102, 103, 106]]
    found = circo.score([task], [Ranking(rankings, [[], []])])
    first5, first10, second = (1 + 2 / 3) / 3, (1 + 2 / 3 + 3 / 6) / 3, 1 / 2
    assert found["mAP@5"] == pytest.approx(50 * (first5 + second))
    assert found["mAP@10"] == found["mAP@50"] == pytest.approx(50 * (first10 + second))
    assert found["mAP@10 addition"] == found["mAP@10"] and found[
        "mAP@10 negation"
    ] == pytest.approx(100 * first10)
    assert found["Recall@5"] == 100
    # Recall asks for the annotated target: 102 and 103 are right answers too, and do not count.
    rankings[0] = [102, 103, 104, 105, 106, 101, 100]
    assert circo.score([task], [Ranking(rankings, [[], []])])["Recall@5"] == 50


def test_circo_annotations_without_aspects_are_read(circo_root):
    entries = json.loads((circo_root / "annotations/val.json").read_text())
    put(
        circo_root / "annotations/val.json",
        [{k: v for k, v in e.items() if k != "semantic_aspects"} for e in entries],
    )
    (task,) = circo.load(circo_root)
    found = circo.score([task], [Ranking([[101], [104]], [[], []])])
    assert list(found) == [f"{m}@{k}" for m in ("mAP", "Recall") for k in (5, 10, 25, 50)]


@pytest.mark.parametrize(
    "key, value",
    [("semantic_aspects", "negation"), ("semantic_aspects", None), ("gt_img_ids", None)],
)
def test_circo_lists_that_are_none_are_named(circo_root, key, value):
    entries = json.loads((circo_root / "annotations/val.json").read_text())
    put(circo_root / "annotations/val.json", [entries[0] | {key: value}, *entries[1:]])
    with pytest.raises(
        ValueError, match=f"query {entries[0]['id']} of annotations/val.json.*gt_img_ids.*{value}"
    ):
        circo.load(circo_root)


def test_the_reference_stays_in_the_ranking_of_circo(circo_root):
    (task,) = circo.load(circo_root)
    assert [row[0] for row in rank(task, on_circle([0, 50]), on_circle(range(0, 70, 10))).top] == [
        100,
        105,
    ]


def test_the_shared_concept_is_off_unless_asked_for_and_named(circo_root):
    (plain,), (with_concept,) = circo.load(circo_root), circo.load(circo_root, shared_concept=True)
    assert (plain.queries[0].texts, with_concept.queries[0].texts) == (
        ("is asleep",),
        ("a dog, is asleep",),
    )
    assert plain.protocol["shared_concept"] == "not used" != with_concept.protocol["shared_concept"]


def test_circo_writes_numbers_by_number(circo_root, tmp_path):
    (task,) = circo.load(circo_root, "test")
    (path,) = circo.write_submissions(
        tmp_path, [task], [rank(task, on_circle([0, 60]), on_circle(range(0, 70, 10)))]
    )
    written = json.loads(path.read_text())
    assert path.name == "circo.test.json"
    assert written == {"0": list(range(100, 107)), "1": list(range(106, 99, -1))}
    assert circo.check_submission(path, task) == []


@pytest.mark.parametrize(
    "spoil, problem",
    [
        (lambda c: c.update(metric="mAP"), "1 keys are no query of circo test, the first: metric"),
        (lambda c: c.pop("1"), "1 of 2 queries have no list, the first: 1"),
        (lambda c: c["0"].__setitem__(0, "100"), "1 lists write image ids as another type"),
        (lambda c: c["0"].__setitem__(0, 99), "1 lists name something that is no image"),
        (lambda c: c["0"].__setitem__(0, 101), "1 lists name an image twice, the first: 0"),
        (lambda c: c["0"].__setitem__(0, True), "1 lists are no list of image ids, the first: 0"),
        (lambda c: c["0"].append(99), "1 lists do not hold 50 ids, the first: 0"),
    ],
)
def test_a_bad_circo_file_is_found_out(circo_root, tmp_path, spoil, problem):
    (task,) = circo.load(circo_root, "test")
    content = {str(i): list(range(100, 107)) for i in range(2)}
    spoil(content)
    put(tmp_path / "circo.test.json", content)
    assert circo.check_submission(tmp_path / "circo.test.json", task)[0].startswith(problem)


def test_circo_refuses_a_target_that_is_no_ground_truth(circo_root):
    entries = json.loads((circo_root / "annotations/val.json").read_text())
    entries[1]["gt_img_ids"] = [101]
    put(circo_root / "annotations/val.json", entries)
    with pytest.raises(ValueError, match="query 1 of annotations/val.json.*104.*ground truths"):
        circo.load(circo_root)


# ------------------------------------------------------------------------------------------- what
# they share


def test_metrics_agree_with_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(50):
        size, k = int(rng.integers(3, 30)), int(rng.integers(1, 35))
        order = rng.permutation(size).tolist()
        relevant = rng.choice(size, int(rng.integers(1, size)), replace=False).tolist()
        hit = np.isin(order[:k], relevant)
        precision = [hit[: i + 1].mean() for i in range(len(hit))]
        expected = sum(p for p, h in zip(precision, hit, strict=True) if h) / min(len(relevant), k)
        assert average_precision_at(k, order, relevant) == pytest.approx(expected)
        places = {name: i for i, name in enumerate(order)}
        assert recall_at(k, [order] * size, range(size)) == pytest.approx(
            100 * np.mean([places[i] < k for i in range(size)])
        )


@pytest.mark.parametrize("remove", [True, False])
def test_a_ranking_agrees_with_brute_force(remove):
    rng = torch.Generator().manual_seed(1)
    gallery, queries = (F.normalize(torch.randn(n, 8, generator=rng), dim=1) for n in (70, 9))
    ids = [f"i{n}" for n in range(70)]
    asked = [Query(str(i), ids[3 * i], ("",), subset=tuple(ids[40 + i : 45 + i])) for i in range(9)]
    task = Task("t", "val", {i: Path(i) for i in ids}, asked, {}, remove_reference=remove)
    found = rank(task, queries, gallery)
    for i, query in enumerate(asked):
        scores = {name: float(queries[i] @ gallery[j]) for j, name in enumerate(ids)}
        order = sorted(
            (n for n in ids if not (remove and n == query.reference)), key=scores.get, reverse=True
        )
        assert found.top[i] == order[:50]
        assert found.subset[i] == [n for n in order if n in query.subset]
    with pytest.raises(ValueError, match="70 images.*69 embeddings"):
        rank(task, queries, gallery[1:])
    queries[2, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        rank(task, queries, gallery)


@pytest.mark.parametrize("module", [benchmarks, common, fashioniq], ids=lambda m: m.__name__)
def test_the_examples_in_the_docstrings_run(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testmod(module)
    assert tried and not failed


LOADERS = {"fashioniq": fashioniq.load, "cirr": cirr.load, "circo": circo.load}


@pytest.mark.parametrize(
    "name, image, counted",
    [
        (
            "fashioniq",
            "images/d1.*",
            "1 of 5 images of dress val are missing (the first: d1; searched: {}/images, ",
        ),
        (
            "fashioniq",
            "images/x0.*",
            "1 of 5 images of dress val are missing (the first: x0; searched: {}/images, ",
        ),
        (
            "cirr",
            "dev/dev-7-0-img1.png",
            "1 of 8 images of cirr val are missing (the first: dev-7-0-img1; searched: {}, ",
        ),
        (
            "circo",
            "COCO2017_unlabeled/unlabeled2017/*103.jpg",
            "1 of 7 images of circo val are missing (the first: 103; ",
        ),
    ],
)
def test_a_missing_image_is_an_error_that_counts_and_an_option_that_is_printed(
    request, name, image, counted
):
    root = request.getfixturevalue(f"{name}_root")
    before = LOADERS[name](root)[0]
    (path,) = root.glob(image)
    path.unlink()
    with pytest.raises(FileNotFoundError) as error:
        LOADERS[name](root)
    assert counted.format(root) in str(error.value) and "--partial" in str(error.value)
    task = LOADERS[name](root, partial=True)[0]
    assert task.notes[0].startswith("PARTIAL: 1 of")
    gone = (before.files.keys() - task.files.keys()).pop()
    assert [q.id for q in task.queries] == [q.id for q in before.queries if gone not in q.images]
    assert task.left_out == len(before.queries) - len(task.queries)


def test_a_submission_of_an_incomplete_split_is_refused(cirr_root, tmp_path):
    (cirr_root / "test1/test1-7-0-img1.png").unlink()  # a member of the second query's set
    (task,) = cirr.load(cirr_root, "test1", partial=True)
    assert [q.id for q in task.queries] == ["12"]
    with pytest.raises(ValueError, match="1 queries.*images"):
        cirr.write_submissions(
            tmp_path / "out", [task], [rank(task, on_circle([0]), on_circle(range(7)))]
        )
    assert not (tmp_path / "out").exists()


def test_no_file_is_left_of_a_submission_that_would_be_rejected(circo_root, tmp_path):
    (task,) = circo.load(circo_root, "test")
    with pytest.raises(ValueError, match=r"circo.test.json.*50 ids.*1"):
        circo.write_submissions(
            tmp_path / "out", [task], [Ranking([list(range(100, 107)), [100]], [[], []])]
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, file",
    [
        ("fashioniq", "image_splits/split.shirt.val.json"),
        ("fashioniq", "captions/cap.dress.val.json"),
        ("cirr", "cirr/image_splits/split.rc2.val.json"),
        ("circo", "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json"),
    ],
)
def test_a_missing_annotation_file_is_named_with_the_folder_that_was_searched(request, name, file):
    root = request.getfixturevalue(f"{name}_root")
    (root / file).write_text("[{")
    with pytest.raises(ValueError, match=file.rsplit("/", 1)[1]):
        LOADERS[name](root)
    (root / file).unlink()
    with pytest.raises(FileNotFoundError) as error:
        LOADERS[name](root)
    assert f"there is no {file.removeprefix('cirr/')} in the folder {root}" in str(error.value)


def test_an_entry_without_its_target_is_named(fashioniq_root):
    entries = json.loads((fashioniq_root / "captions/cap.dress.val.json").read_text())
    del entries[2]["target"]
    put(fashioniq_root / "captions/cap.dress.val.json", entries)
    with pytest.raises(ValueError, match="entry 2 of captions/cap.dress.val.json.*target"):
        fashioniq.load(fashioniq_root)


def test_an_image_that_the_gallery_does_not_list_is_named(fashioniq_root):
    put(fashioniq_root / "image_splits/split.dress.val.json", ["d0", "d2"])
    with pytest.raises(ValueError, match="query 0 of dress val.*d1.*gallery"):
        fashioniq.load(fashioniq_root)


DRESS = "captions/cap.dress.val.json"
INFO = "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json"


def test_queries_that_share_an_id_are_refused_before_anything_is_embedded(cirr_root, circo_root):
    """A submission has one list an id, and on a validation split one of the two would count
    twice.
    """
    for split in ("val", "test1"):
        file = cirr_root / f"cirr/captions/cap.rc2.{split}.json"
        entries = json.loads(file.read_text())
        put(file, [entries[0], {**entries[1], "pairid": entries[0]["pairid"]}])
        with pytest.raises(ValueError, match=f"cirr {split}.*several queries.*12"):
            cirr.load(cirr_root, split)
    entries = json.loads((circo_root / "annotations/test.json").read_text())
    put(circo_root / "annotations/test.json", [{**e, "id": e["id"] + 1} for e in entries])
    with pytest.raises(ValueError, match=r"annotations/test.json.*0 to 1"):
        circo.load(circo_root, "test")


@pytest.mark.parametrize("name", LOADERS)
def test_a_tree_of_another_size_than_the_official_one_says_so(request, name):
    task = LOADERS[name](request.getfixturevalue(f"{name}_root"))[0]
    queries, images = {
        "fashioniq": (2017, 3817),
        "cirr": (4181, 2297),
        "circo": (220, "at least 120000"),
    }[name]
    assert any(
        f"the complete one {queries} and {images}: no number here compares" in note
        for note in task.notes
    )
    with pytest.raises(ValueError, match="split must be one of .*, not 'valid'"):
        LOADERS[name](request.getfixturevalue(f"{name}_root"), "valid")


@pytest.mark.parametrize("least, noted", [(6, False), (7, False), (8, True)])
def test_the_gallery_of_circo_may_hold_more_than_is_known(circo_root, monkeypatch, least, noted):
    (task,) = circo.load(circo_root)
    assert len(task.files) == 7
    monkeypatch.setattr(circo, "SIZES", {"val": len(task.queries)})
    monkeypatch.setattr(circo, "GALLERY", least)
    assert any("complete one" in note for note in circo.load(circo_root)[0].notes) == noted


def test_a_dollar_or_a_brace_in_a_caption_is_text(circo_root, vl):
    entries = json.loads((circo_root / "annotations/val.json").read_text())
    entries[0]["relative_caption"] = "costs $ {sentence} and * more"
    put(circo_root / "annotations/val.json", entries)
    (task,) = circo.load(circo_root)
    encoder = QueryEncoder.for_model(vl, num_tokens=2)
    found = Isa(encoder)(task.embedded(vl, torch.zeros(7, 16)))
    pictures = [Image.open(task.files[q.reference]).convert("RGB") for q in task.queries]
    one_by_one = [
        compose(vl, encoder.sentences([p]).tokens, q.texts)
        for p, q in zip(pictures, task.queries, strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(one_by_one), atol=1e-5, rtol=1e-4)
    entries[0]["relative_caption"] = "costs {sentence} and more"
    put(circo_root / "annotations/val.json", entries)
    (task,) = circo.load(circo_root)
    other = Isa(encoder)(task.embedded(vl, torch.zeros(7, 16)))
    assert not torch.allclose(found[0], other[0], atol=1e-3)


def room(vl, num_tokens: int, modifier: str) -> bool:
    try:
        prompt_ids(vl, num_tokens, [modifier])
    except ValueError:
        return False
    return True


def test_a_single_vector_leaves_its_modifiers_the_room_that_they_have(circo_root, vl):
    """They were counted as if the one pseudo-word were the twelve of the settings."""
    encoder = QueryEncoder.for_model(vl, mapping="single vector")
    fits = next(text for n in range(vl.context_length, 0, -1) if room(vl, 1, text := "very " * n))
    assert not room(vl, 12, fits)
    entries = json.loads((circo_root / "annotations/val.json").read_text())
    entries[1]["relative_caption"] = fits
    put(circo_root / "annotations/val.json", entries)
    result = run("circo", circo_root, vl, ["isa"], encoder)
    assert result.protocol["modifiers cut to fit"] == "0"
    assert export._fits(vl, encoder, fits, TEMPLATE)


def test_a_caption_that_does_not_fit_is_an_error_before_anything_is_embedded(
    circo_root, vl, tmp_path, monkeypatch
):
    entries = json.loads((circo_root / "annotations/val.json").read_text())
    entries[1]["relative_caption"] = "is very " * 60 + "asleep"
    put(circo_root / "annotations/val.json", entries)
    encoder = QueryEncoder.for_model(vl, num_tokens=2)
    with monkeypatch.context() as patch:
        patch.setattr(
            "isa_lite.benchmarks.run.embed_files", lambda *a, **k: pytest.fail("embedded first")
        )
        with pytest.raises(ValueError, match="query 1 of circo val.*too long"):
            run("circo", circo_root, vl, ["isa"], encoder)
        with pytest.raises(ValueError, match="query 1 of circo val.*too long"):
            run("circo", circo_root, vl, ["text only"])
        with pytest.raises(ValueError, match="a template holds"):
            run(
                "circo",
                circo_root,
                vl,
                ["isa"],
                encoder,
                RunConfig(template="{modifier}", truncate=True),
            )
        with pytest.raises(ValueError, match="needs a query encoder"):
            run("circo", circo_root, vl, ["isa"])
        with pytest.raises(ValueError, match="give a folder"):
            run("circo", circo_root, vl, ["text only"], config=RunConfig(split="test"))
    result = run("circo", circo_root, vl, ["isa"], encoder, RunConfig(truncate=True))
    assert result.protocol["modifiers cut to fit"] == "1"


# ------------------------------------------------------------- what public users' copies and
# damaged ones look like


CAPTIONS = "cirr/captions/cap.rc2.val.json"
SPLIT = "cirr/image_splits/split.rc2.val.json"


@pytest.mark.parametrize(
    "path",
    [
        "/etc/x.png",
        "../secret.png",
        "./dev/../../secret.png",
        "C:\\x.png",
        "\\\\host\\x.png",
        "dev\\..\\x.png",
    ],
)
def test_no_path_of_a_split_file_leads_out_of_the_folder(cirr_root, path):
    put(cirr_root.parent / "secret.png")
    listed = json.loads((cirr_root / SPLIT).read_text())
    put(cirr_root / SPLIT, {**listed, "dev-2-0-img1": path})
    with pytest.raises(ValueError, match=r"split\.rc2\.val\.json.*dev-2-0-img1"):
        cirr.load(cirr_root)


@pytest.mark.parametrize(
    "name, file, spoil, message",
    [
        ("circo", INFO, lambda c: {"annotations": []}, "image_info_unlabeled2017.json.*images"),
        ("circo", INFO, lambda c: c["images"], "image_info_unlabeled2017.json.*images"),
        ("circo", INFO, lambda c: {"images": [*c["images"], {**c["images"][0], "file_name": "x.jpg"}]}, "lists an id twice"),
        ("circo", "annotations/val.json", lambda c: {"data": c}, "annotations/val.json.*no list"),
        ("circo", "annotations/val.json", lambda c: [1], "annotations/val.json.*no list"),
        ("cirr", CAPTIONS, lambda c: [{**c[0], "img_set": {"id": 1}}], "img_set of query 12 .* members"),
        ("cirr", CAPTIONS, lambda c: [{**c[0], "img_set": None}], "img_set of query 12 .* members"),
        ("cirr", SPLIT, list, "split.rc2.val.json.*path"),
        ("cirr", CAPTIONS, lambda c: [], "captions/cap.rc2.val.json.*no list"),
        ("cirr", CAPTIONS, lambda c: [{**c[0], "caption": None}], "query 12 of cirr val.*None"),
        ("circo", "annotations/val.json", lambda c: [], "annotations/val.json.*no list"),
        ("fashioniq", DRESS, lambda c: [{**c[0], "captions": "is red"}], "captions of entry 0.*no list.*'is"),
        ("fashioniq", DRESS, lambda c: [{**c[0], "captions": ["x", None]}], "captions of entry 0.*no list"),
        ("fashioniq", "image_splits/split.dress.val.json", lambda c: {"d0": 1}, "split.dress.val.json.*no list"),
        ("cirr", SPLIT, lambda c: {**c, "dev-2-0-img1": 3}, "split.rc2.val.json.*dev-2-0-img1"),
        ("cirr", CAPTIONS, lambda c: [{**c[0], "reference": ["dev-0-0-img1"]}], "query 12 of .*another type"),
        ("cirr", CAPTIONS, lambda c: [{**c[0], "target_hard": None}], "query 12 of .*another type"),
        ("cirr", CAPTIONS, lambda c: [{**c[0], "img_set": {"members": [[1]]}}], "query 12 of .*another type"),
        ("cirr", CAPTIONS, lambda c: [{**c[0], "img_set": {"members": ["dev-1-0-img1"] * 6}}], "query 12 of .*twice"),
        ("cirr", CAPTIONS, lambda c: [{**c[0], "pairid": {}}], "pairid"),
        ("cirr", CAPTIONS, lambda c: [{**c[0], "caption": ["x"]}], "query 12"),
        ("fashioniq", DRESS, lambda c: [{**c[0], "candidate": {}}], "entry 0 of captions/cap.dress"),
        ("fashioniq", "image_splits/split.dress.val.json", lambda c: [*c, ["x"]], "split.dress.val.json.*another type"),
        ("fashioniq", "image_splits/split.dress.val.json", lambda c: [*c, ""], "split.dress.val.json.*''"),
        ("circo", "annotations/val.json", lambda c: [{**c[0], "reference_img_id": "100"}], "query 0 of .*another type"),
        ("circo", "annotations/val.json", lambda c: [{**c[0], "gt_img_ids": [101, [102]]}], "query 0 of .*another type"),
        ("circo", "annotations/val.json", lambda c: [{**c[0], "semantic_aspects": [None]}], "query 0 of .*semantic_aspects"),
        ("circo", "annotations/val.json", lambda c: [{**c[0], "relative_caption": None}], "query 0 of .*relative_caption"),
        ("circo", "annotations/val.json", lambda c: [{**c[0], "id": []}], "annotations/val.json"),
        ("circo", INFO, lambda c: {"images": [{**c["images"][0], "id": [1]}]}, "image_info_unlabeled2017.json.*another type"),
        ("circo", INFO, lambda c: {"images": [{**c["images"][0], "file_name": ["x"]}]}, "image_info.*file_name"),
        ("circo", INFO, lambda c: {"images": [{**c["images"][0], "file_name": "../x.jpg"}]}, "image_info.*file_name"),
    ],
)  # fmt: skip
def test_what_is_of_another_kind_or_type_is_named_with_its_file(
    request, name, file, spoil, message
):
    root = request.getfixturevalue(f"{name}_root")
    put(root / file, spoil(json.loads((root / file).read_text())))
    with pytest.raises(ValueError, match=message):
        LOADERS[name](root)


@pytest.mark.parametrize(
    "name, file",
    [("cirr", CAPTIONS), ("fashioniq", "captions/cap.shirt.val.json"), ("circo", INFO)],
)
def test_a_byte_order_mark_is_no_part_of_the_json(request, name, file):
    root = request.getfixturevalue(f"{name}_root")
    before = LOADERS[name](root)
    (root / file).write_bytes(b"\xef\xbb\xbf" + (root / file).read_bytes())
    assert LOADERS[name](root) == before


def test_an_empty_picture_is_a_missing_one(cirr_root, circo_root, fashioniq_root):
    for root, file in (
        (cirr_root, "dev/dev-7-0-img1.png"),
        (circo_root, "COCO2017_unlabeled/unlabeled2017/000000000103.jpg"),
        (
            fashioniq_root,
            next(p for p in (fashioniq_root / "images").iterdir() if p.stem == "d2").relative_to(
                fashioniq_root
            ),
        ),
    ):
        (root / file).write_bytes(b"")
        load = {"CIRR": cirr, "CIRCO": circo}.get(root.name, fashioniq).load
        with pytest.raises(FileNotFoundError, match="1 of . images"):
            load(root)
        assert any("PARTIAL" in note for note in load(root, partial=True)[0].notes)


def test_pictures_are_found_with_another_ending_and_the_one_that_is_listed_first(
    cirr_root, circo_root, fashioniq_root
):
    for path in [
        *cirr_root.glob("dev/*.png"),
        *circo_root.rglob("*.jpg"),
        *fashioniq_root.rglob("images/*.*"),
    ]:
        Image.open(path).save(path.with_suffix(".webp"))
        path.unlink()
    for load, root in (
        (cirr.load, cirr_root),
        (circo.load, circo_root),
        (fashioniq.load, fashioniq_root),
    ):
        assert {path.suffix for task in load(root) for path in task.files.values()} == {".webp"}
    listed = cirr_root / "dev/dev-1-0-img1.png"
    put(listed)
    assert listed in cirr.load(cirr_root)[0].files.values()


def test_the_folders_in_which_users_keep_the_images(cirr_root, fashioniq_root):
    """FashionIQ by category, where a shirt and a toptee may share a name; CIRR in images/."""
    (cirr_root / "images").mkdir()
    (cirr_root / "dev").rename(cirr_root / "images/dev")
    assert {path.parent for path in cirr.load(cirr_root)[0].files.values()} == {
        cirr_root / "images/dev"
    }
    named = {path.stem: path for path in (fashioniq_root / "images").iterdir()}
    for task in fashioniq.load(fashioniq_root):
        for name in task.files:
            put(fashioniq_root / "images" / task.name / f"{name}.png")
    for path in named.values():
        path.unlink()
    for task in fashioniq.load(fashioniq_root):
        assert {path.parent.name for path in task.files.values()} == {task.name}


@pytest.mark.parametrize("name", ["cirr", "circo"])
def test_an_empty_caption_is_told(request, name):
    root = request.getfixturevalue(f"{name}_root")
    file, key, first = (
        (CAPTIONS, "caption", "12")
        if name == "cirr"
        else ("annotations/val.json", "relative_caption", "0")
    )
    entries = json.loads((root / file).read_text())
    assert not any("empty" in note for note in LOADERS[name](root)[0].notes)
    put(root / file, [{**entries[0], key: "  "}, *entries[1:]])
    (note,) = (note for note in LOADERS[name](root)[0].notes if "empty" in note)
    assert "1 of the queries" in note and first in note


def test_of_equal_scores_the_first_in_the_gallery_comes_first(cirr_root):
    (task,) = cirr.load(cirr_root)
    gallery = on_circle([0, 90, 0, 90, 0, 90, 0, 90])
    ranking = rank(task, on_circle([0, 90]), gallery)
    names = list(task.files)
    assert ranking.top[0] == [names[i] for i in (2, 4, 6, 1, 3, 5, 7)] and ranking.top[1] == [
        names[i] for i in (1, 3, 5, 7, 0, 2, 6)
    ]
    assert ranking.subset[0] == [names[i] for i in (2, 4, 1, 3, 5)]
    turned = replace(task, queries=[replace(q, subset=q.subset[::-1]) for q in task.queries])
    # whatever the order of the annotations
    assert rank(turned, on_circle([0, 90]), gallery) == ranking


def test_an_out_that_is_a_file_and_methods_that_are_one_text_are_refused_first(
    cirr_root, vl, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "isa_lite.benchmarks.run.embed_files", lambda *a, **k: pytest.fail("embedded first")
    )
    (tmp_path / "file").write_text("")
    for out in ("file", "file/below"):
        with pytest.raises(ValueError, match="out="):
            run("cirr", cirr_root, vl, ["text only"], out=tmp_path / out)
    for methods in ("text only", 3, None):
        with pytest.raises(ValueError, match="methods"):
            run("cirr", cirr_root, vl, methods)
    with pytest.raises(ValueError, match="data"):
        run("cirr", cirr_root, vl, ["text only"], data=None)
    with pytest.raises(ValueError, match="template"):
        RunConfig(template="nonsense")


# ------------------------------------------------------------------------------- tiny trees,
# command line


@pytest.mark.parametrize("name", LOADERS)
def test_a_tiny_tree_is_read_by_its_reader_and_is_the_same_for_the_same_seed(tmp_path, name):
    trees = [
        write_tiny(name, tmp_path / str(i), queries=3, seed=seed, size=32)
        for i, seed in enumerate((5, 5, 6))
    ]
    content = [
        {p.relative_to(t): p.read_bytes() for p in t.rglob("*") if p.is_file()} for t in trees
    ]
    assert (
        content[0] == content[1]
        and content[0].keys() == content[2].keys()
        and content[0] != content[2]
    )
    assert LABEL in (trees[0] / "README.txt").read_text()
    for split in ("val", "test1" if name == "cirr" else "test"):
        tasks = LOADERS[name](trees[0], split)
        assert all(len(t.queries) == 3 and t.answered == (split == "val") for t in tasks)
    with pytest.raises(ValueError, match="queries"):
        write_tiny(name, tmp_path / "no", queries=1)


def test_tiny_trees_have_the_peculiarities_of_the_real_ones(tmp_path):
    dress, shirt, toptee = fashioniq.load(
        write_tiny("fashioniq", tmp_path / "f", queries=4, size=32)
    )
    assert shirt.files.keys() & toptee.files.keys() and not dress.files.keys() & shirt.files.keys()
    assert {p.suffix for p in dress.files.values()} == {".png", ".jpg"}
    assert [len(q.texts) for q in shirt.queries] == [1, 2, 2, 2] and [
        len(q.texts) for q in dress.queries
    ] == [2] * 4
    assert len(fashioniq.load(tmp_path / "f", gallery="triplets")[0].files) < len(dress.files)
    (task,) = cirr.load(write_tiny("cirr", tmp_path / "c", queries=4, size=32))
    assert all(
        len(q.subset) == 5 and q.targets[0] in q.subset and q.reference not in q.subset
        for q in task.queries
    )
    (task,) = circo.load(write_tiny("circo", tmp_path / "o", queries=4, size=32))
    assert [len(q.targets) for q in task.queries] == [1, 2, 3, 4] and all(
        q.aspects for q in task.queries
    )


@pytest.fixture
def encoder_folder(vl, tmp_path):
    QueryEncoder.for_model(vl, num_tokens=2).save(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, options, said",
    [
        (
            "fashioniq",
            ["--gallery", "triplets"],
            "protocol: gallery: only the images of the triplets",
        ),
        (
            "fashioniq",
            ["--captions", "one order"],
            "protocol: captions: joined by 'and' in the order given",
        ),
        ("cirr", [], "protocol: reference: removed from the ranking"),
        (
            "circo",
            ["--shared-concept"],
            "protocol: shared_concept: before the modifier, with a comma",
        ),
    ],
)
def test_the_command_prints_numbers_with_their_protocol(
    request, vl_folder, encoder_folder, tmp_path, capsys, name, options, said
):
    root = request.getfixturevalue(f"{name}_root")
    common = [
        "--root",
        str(root),
        "--vl-model",
        str(vl_folder),
        "--cache",
        str(tmp_path / "cache"),
        "--out",
        str(tmp_path / "out"),
    ]
    main(
        [
            "benchmarks",
            name,
            *common,
            "--encoder",
            str(encoder_folder),
            "--truncate",
            "--methods",
            "isa",
            "text only",
            *options,
        ]
    )
    printed = capsys.readouterr().out
    assert said in printed and "NOTE: " in printed and "compares with a published one" in printed
    found = json.loads((tmp_path / "out/metrics.json").read_text())
    assert set(found["methods"]) == {"isa", "text only"} and found["submissions"] == []
    assert f"protocol: prompt: {found['protocol']['prompt']}" in printed
    for values in found["methods"].values():
        assert all(0 <= v <= 100 for v in values.values())
        assert all(f"\n{metric} " in printed for metric in values)


@pytest.mark.parametrize(
    "name, split, files", [("fashioniq", "test", 3), ("cirr", "test1", 2), ("circo", "test", 1)]
)
def test_the_command_writes_submission_files_and_checks_them(
    request, vl_folder, tmp_path, capsys, name, split, files
):
    root = request.getfixturevalue(f"{name}_root")
    common = [name, "--root", str(root), "--split", split]
    folders = [
        "--vl-model",
        str(vl_folder),
        "--cache",
        str(tmp_path / "c"),
        "--out",
        str(tmp_path / "out"),
    ]
    main(["benchmarks", *common, *folders, "--methods", "text only"])
    written = sorted((tmp_path / "out/text_only").iterdir())
    assert (
        len(written) == files
        and capsys.readouterr().out.count("submission file: text_only/") == files
    )
    main(["benchmarks", *common, "--check", *map(str, written)])
    assert capsys.readouterr().out.count(": good") == files
    written[0].write_text("[]" if name != "fashioniq" else "{}")
    with pytest.raises(SystemExit):
        main(["benchmarks", *common, "--check", *map(str, written)])
    assert f"1 of {files} files would be rejected" in capsys.readouterr().err


def test_what_a_submission_of_the_validation_split_scores_is_what_the_run_printed(
    cirr_root, vl, tmp_path
):
    result = run("cirr", cirr_root, vl, ["text only"])
    (task,) = cirr.load(cirr_root)
    gallery = vl.encode_images([Image.open(p).convert("RGB") for p in task.files.values()])
    ranking = rank(task, UNTRAINED["text only"](task.embedded(vl, gallery)), gallery)
    recall, subset = cirr.write_submissions(tmp_path, [task], [ranking])
    lists = [json.loads(p.read_text()) for p in (recall, subset)]
    again = cirr.score(
        [task],
        [Ranking([lists[0][q.id] for q in task.queries], [lists[1][q.id] for q in task.queries])],
    )
    assert result.methods["text only"] == pytest.approx(again)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--encoder", "nowhere"], "nowhere holds no query_encoder.json"),
        ([], "method 'isa' needs a query encoder"),
        (["--split", "test"], "invalid choice: 'test'"),
    ],
)
def test_a_bad_argument_of_the_command_is_named(cirr_root, vl_folder, capsys, arguments, message):
    with pytest.raises(SystemExit):
        main(
            [
                "benchmarks",
                "cirr",
                "--root",
                str(cirr_root),
                "--vl-model",
                str(vl_folder),
                *arguments,
            ]
        )
    assert message in capsys.readouterr().err
