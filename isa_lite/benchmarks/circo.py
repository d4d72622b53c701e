"""CIRCO (Baldrati et al., ICCV 2023): several right answers a query, in COCO 2017's unlabeled set.

Layout: `annotations/{split}.json`, `COCO2017_unlabeled/annotations/image_info_unlabeled2017.json`,
`COCO2017_unlabeled/unlabeled2017/*.jpg`.

The gallery is every image of the info file, the reference included. mAP counts all right answers,
Recall only the first annotated one. `shared_concept` before the modifier says what the two images
have in common, which changes the numbers a lot: it is off by default, and `Task.protocol` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from isa_lite.benchmarks.common import (
    Query,
    Ranking,
    Task,
    average_precision_at,
    by_stem,
    check_ids,
    check_query_id,
    checked_task,
    entries,
    is_picture,
    one_of,
    read_json,
    recall_at,
)
from isa_lite.benchmarks.submission import check_lists, read_submission, write_submission
from isa_lite.support import settings

SPLITS = settings.SPLITS["circo"]
KS = (5, 10, 25, 50)
#: Queries of the complete split, and what the gallery has at least (a few thousand more): with less
#: it is incomplete.
SIZES = {"val": 220, "test": 800}
GALLERY = 120_000
_LAYOUT = (
    "CIRCO lies there as annotations/ and COCO2017_unlabeled/ with annotations/ and unlabeled2017/"
)


def load(
    root: str | Path, split: str = "val", shared_concept: bool = False, partial: bool = False
) -> list[Task]:
    """The task of a split, as a list of one; shared_concept: put it before each modifier."""
    one_of("CIRCO's split", split, SPLITS)
    queries = _queries(Path(root), split, shared_concept)
    folder = Path(root) / "COCO2017_unlabeled" / "unlabeled2017"
    protocol = {
        "gallery": "all images of the info file",
        "reference": "stays in the ranking",
        "shared_concept": "before the modifier, with a comma" if shared_concept else "not used",
    }
    task = Task("circo", split, _gallery(Path(root), folder), queries, protocol)
    return [checked_task(task, [folder], (SIZES[split], GALLERY), or_more=True, partial=partial)]


def _queries(root: Path, split: str, shared_concept: bool) -> list[Query]:
    where = f"annotations/{split}.json"
    keys = ["id", "reference_img_id", "relative_caption", "shared_concept"]
    keys += ["target_img_id", "gt_img_ids"] if split == "val" else []
    queries = []
    for record, number, reference, caption, concept, *answer in entries(
        read_json(root, where, _LAYOUT), keys, where
    ):
        target, truths = answer or (None, [])
        aspects = record.get("semantic_aspects", [])
        if not isinstance(truths, list) or not isinstance(aspects, list):
            fault = f"query {number} of {where}: gt_img_ids and semantic_aspects are lists"
            raise ValueError(f"{fault}, not {truths!r} and {aspects!r}")
        if not all(isinstance(aspect, str) for aspect in aspects):
            raise ValueError(
                f"query {number} of {where}: semantic_aspects must be texts, not {aspects!r}"
            )
        if not isinstance(caption, str) or not isinstance(concept, str):
            raise ValueError(
                f"query {number} of {where}: relative_caption and shared_concept must be texts"
            )
        check_query_id(number, "id", where)
        check_ids([reference, *answer[:1], *truths], int, f"query {number} of {where}")
        if answer and target not in truths:
            fault = f"query {number} of {where}: its target {target} is not"
            raise ValueError(f"{fault} among its ground truths {truths}")
        text = f"{concept}, {caption}" if shared_concept else caption
        targets = tuple(dict.fromkeys([target, *truths])) if answer else ()
        more = {"aspects": tuple(aspects), "entry": record}
        queries.append(Query(str(number), reference, (text,), targets, **more))
    if split == "test" and {q.id for q in queries} != {str(i) for i in range(len(queries))}:
        fault = f"the ids of {where} are not 0 to {len(queries) - 1}, which the test server expects"
        raise ValueError(f"{fault}; is the file whole?")
    return queries


def _gallery(root: Path, folder: Path) -> dict[int, Path | None]:
    """The file of each image of the info file, None where `folder` lacks it."""
    where = "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json"
    info = read_json(root, where, _LAYOUT)
    if not isinstance(info, dict) or "images" not in info:
        raise ValueError(f"{where} has no list of images; is it another file under this name?")
    pictures = [pair for _, *pair in entries(info["images"], ("id", "file_name"), where)]
    check_ids((number for number, _ in pictures), int, where)
    for _, name in pictures:
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise ValueError(
                f"{where}: the file_name {name!r} is no name of a file in {folder.name}"
            )
    found = {i: path if is_picture(path := folder / name) else None for i, name in pictures}
    if None in found.values():
        others = by_stem(folder)  # with another ending
        found = {number: found[number] or others.get(Path(name).stem) for number, name in pictures}
    if len(found) < len(pictures):
        raise ValueError(f"{where} lists an id twice: {len(pictures)} images have {len(found)} ids")
    return found


def score(tasks: Sequence[Task], rankings: Sequence[Ranking]) -> dict[str, float]:
    """In percent: mAP@K over all right answers, Recall@K of the annotated one, mAP@10 by aspect.

    The first annotation files had no aspects; with such a file there are none here.
    """
    (task,), (ranking,) = tasks, rankings
    rows = list(zip(task.queries, ranking.top, strict=True))
    by_k = {k: [average_precision_at(k, row, q.targets) for q, row in rows] for k in KS}
    precision = {k: 100 * np.array(values) for k, values in by_k.items()}
    targets = [q.targets[0] for q in task.queries]
    found = {f"mAP@{k}": float(precision[k].mean()) for k in KS}
    found |= {f"Recall@{k}": recall_at(k, ranking.top, targets) for k in KS}
    for aspect in sorted({a for q in task.queries for a in q.aspects}):
        asked = [aspect in q.aspects for q in task.queries]
        found[f"mAP@10 {aspect}"] = float(precision[10][asked].mean())
    return found


def write_submissions(
    folder: str | Path, tasks: Sequence[Task], rankings: Sequence[Ranking]
) -> list[Path]:
    """`circo.{split}.json`: for each query the numbers of its 50 best images."""
    (task,), (ranking,) = tasks, rankings
    lists = {q.id: row[:50] for q, row in zip(task.queries, ranking.top, strict=True)}
    path = Path(folder) / f"circo.{task.split}.json"
    return [write_submission(path, lists, check_submission, task)]


def check_submission(path: str | Path, task: Task) -> list[str]:
    """What is wrong with a submission file: sentences, none if it is good."""
    content = read_submission(Path(path))
    if not isinstance(content, dict):
        return ["the file is no object with a list for each query"]
    numbered = {str(i) for i in range(len(task.queries))} == {q.id for q in task.queries}
    other = ["the annotations' ids are not 0 to N-1, which the server expects"] * (not numbered)
    return other + check_lists(content, 50, task, lambda q: task.files.keys())
