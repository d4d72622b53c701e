"""CIRR (Liu et al., ICCV 2021): open-domain photographs, and a subset of six alike for each query.

Layout: `cirr/captions/cap.rc2.{split}.json`, `cirr/image_splits/split.rc2.{split}.json` (each
image's name and its path; those of the split val lie in `dev/`), the images below the same root,
its `img_raw/` or its `images/`.

The reference is removed from each ranking. The subset metrics rank the five members of `img_set`
that are not the reference. The target is `target_hard`; `target_soft` plays no part. The answers of
test1 are with the test server.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from isa_lite.benchmarks.common import (
    Query,
    Ranking,
    Task,
    check_ids,
    check_query_id,
    checked_task,
    entries,
    find_picture,
    one_of,
    read_json,
    recall_at,
)
from isa_lite.benchmarks.submission import check_lists, read_submission, write_submission
from isa_lite.support import settings

SPLITS = settings.SPLITS["cirr"]
KS = (1, 5, 10, 50)
SUBSET_KS = (1, 2, 3)
#: Of the complete split: queries and images.
SIZES = {"val": (4181, 2297), "test1": (4148, 2315)}
_LAYOUT = (
    "CIRR lies there as cirr/captions/, cirr/image_splits/ and the images (dev/, test1/, train/),"
    " or these in img_raw/ or images/"
)


def load(root: str | Path, split: str = "val", partial: bool = False) -> list[Task]:
    """The task of a split, as a list of one. `root` holds `cirr/`, or is that folder itself."""
    one_of("CIRR's split", split, SPLITS)
    root = Path(root)
    annotations = root / "cirr" if (root / "cirr").is_dir() else root
    where = f"captions/cap.rc2.{split}.json"
    keys = ("pairid", "reference", "caption", "img_set", "target_hard")[: 4 + (split != "test1")]
    queries = []
    for record, pair, reference, caption, group, *target in entries(
        read_json(annotations, where, _LAYOUT), keys, where
    ):
        if not isinstance(group, dict) or not isinstance(group.get("members"), list):
            raise ValueError(f"the img_set of query {pair} of {where} has no list of members")
        check_ids([reference, *target, *group["members"]], str, f"query {pair} of {where}")
        check_query_id(pair, "pairid", where)
        if len(set(group["members"])) < len(group["members"]):
            raise ValueError(f"the img_set of query {pair} of {where} names an image twice")
        others = tuple(name for name in group["members"] if name != reference)
        queries.append(Query(str(pair), reference, (caption,), tuple(target), others, entry=record))
    bases, below = (root, annotations, annotations.parent), ("", "img_raw", "images")
    places = list(dict.fromkeys(base / name for base in bases for name in below))
    listing = f"image_splits/split.rc2.{split}.json"
    paths = read_json(annotations, listing, _LAYOUT)
    if not isinstance(paths, dict):
        raise ValueError(f"{listing} does not give each image its path; is it another file?")
    for name, path in paths.items():
        _check_path(path, f"{listing}: the path of {name}")
    protocol = {
        "gallery": "all images of the split file",
        "reference": "removed from the ranking",
        "subset": "the members of img_set without the reference",
    }
    found = {name: find_picture(places, path) for name, path in paths.items()}
    task = Task("cirr", split, found, queries, protocol, remove_reference=True)
    task = checked_task(task, places, SIZES.get(split), partial=partial)
    if lost := sum(not set(q.targets) <= set(q.subset) for q in task.queries):
        note = f"the target of {lost} queries is not in their img_set"
        task.notes.append(f"{note}: each is a miss in every Recall_subset")
    return [task]


def _check_path(path: object, what: str) -> None:
    """Raises ValueError for what is no path, or leads out of the benchmark's folder anywhere."""
    if not isinstance(path, str) or not path or "\0" in path:
        raise ValueError(f"{what} is {path!r}, and no path")
    for kind in (PurePosixPath(path), PureWindowsPath(path)):
        if kind.is_absolute() or kind.drive or kind.root or ".." in kind.parts:
            fault = f"{what} is {path!r}, which may lie outside the folder"
            raise ValueError(f"{fault}; is it the original file?")


def score(tasks: Sequence[Task], rankings: Sequence[Ranking]) -> dict[str, float]:
    """R@1, 5, 10, 50 and Recall_subset@1, 2, 3, in percent."""
    (task,), (ranking,) = tasks, rankings
    targets = [q.targets[0] for q in task.queries]
    found = {f"R@{k}": recall_at(k, ranking.top, targets) for k in KS}
    return found | {f"Recall_subset@{k}": recall_at(k, ranking.subset, targets) for k in SUBSET_KS}


def write_submissions(
    folder: str | Path, tasks: Sequence[Task], rankings: Sequence[Ranking]
) -> list[Path]:
    """`cirr.{split}.recall.json`: 50 names a query; `..._subset.json`: 3 of its subset."""
    (task,), (ranking,) = tasks, rankings
    written = []
    for metric, rows, k in (("recall", ranking.top, 50), ("recall_subset", ranking.subset, 3)):
        lists = {q.id: row[:k] for q, row in zip(task.queries, rows, strict=True)}
        path = Path(folder) / f"cirr.{task.split}.{metric}.json"
        content = {"version": "rc2", "metric": metric} | lists
        written.append(write_submission(path, content, check_submission, task))
    return written


def check_submission(path: str | Path, task: Task) -> list[str]:
    """What is wrong with a submission file, told apart by its `metric`: sentences, none if good."""
    content = read_submission(Path(path))
    if not isinstance(content, dict):
        return ["the file is no object with a list for each pairid"]
    version, metric = content.get("version"), content.get("metric")
    problems = [] if version == "rc2" else [f'"version" must be "rc2", not {version!r}']
    if metric not in ("recall", "recall_subset"):
        return [*problems, f'"metric" must be "recall" or "recall_subset", not {metric!r}']
    if (size := Path(path).stat().st_size) > 5_000_000:
        problems.append(f"the file has {size / 1e6:.1f} MB; the server takes 5")
    lists = {key: row for key, row in content.items() if key not in ("version", "metric")}
    if metric == "recall":
        return problems + check_lists(lists, 50, task, lambda q: task.files.keys())
    return problems + check_lists(lists, 3, task, lambda q: set(q.subset))
