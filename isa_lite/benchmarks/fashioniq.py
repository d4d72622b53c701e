"""FashionIQ (Wu et al., CVPR 2021): three categories of clothes, two captions a query.

Layout: `captions/cap.{category}.{split}.json`, `image_splits/split.{category}.{split}.json`,
`images/{name}.png` or `.jpg` (`.webp` and other usual endings as well), or in `images/{category}/`.

Two things change the numbers and are named in `Task.protocol`. The gallery is either the category's
*split* file, or only the images of its *triplets* (also called the VAL split), about half as many:
recalls of the two do not compare. The two captions are joined in one order, or averaged over both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from isa_lite.benchmarks.common import (
    Query,
    Ranking,
    Task,
    by_stem,
    check_ids,
    checked_task,
    entries,
    one_of,
    read_json,
    recall_at,
)
from isa_lite.benchmarks.submission import check_lists, read_submission, write_submission
from isa_lite.support import settings
from isa_lite.support.settings import CAPTIONS, GALLERIES

CATEGORIES = ("dress", "shirt", "toptee")
SPLITS = settings.SPLITS["fashioniq"]
KS = (10, 50)
#: Of the complete validation split: queries, and images in each gallery.
SIZES = {
    "dress": (2017, {"split": 3817, "triplets": 2628}),
    "shirt": (2038, {"split": 6346, "triplets": 3089}),
    "toptee": (1961, {"split": 5373, "triplets": 2902}),
}
_LAYOUT = "FashionIQ lies there as captions/, image_splits/ and images/"


def joined(captions: Sequence[str], order: str = CAPTIONS[0]) -> tuple[str, ...]:
    """The texts of a query, from its captions without marks at their ends; an empty one adds none.

    >>> joined(["is red.", "has no sleeves"])
    ('is red and has no sleeves', 'has no sleeves and is red')
    >>> joined(["is red", ""])
    ('is red',)
    """
    said = [stripped for caption in captions if (stripped := caption.strip(".?, "))]
    orders = [said, said[::-1]] if order == CAPTIONS[0] and len(said) > 1 else [said]
    return tuple(" and ".join(texts) for texts in orders)


def load(
    root: str | Path,
    split: str = "val",
    gallery: str = "split",
    captions: str = "both orders",
    partial: bool = False,
) -> list[Task]:
    """The categories' tasks; partial: see `checked_task`. Raises FileNotFoundError, ValueError."""
    one_of("FashionIQ's split", split, SPLITS)
    one_of("gallery", gallery, GALLERIES)
    one_of("captions", captions, CAPTIONS)
    images = Path(root) / "images"
    known = {category: by_stem(images) | by_stem(images / category) for category in CATEGORIES}
    how = split, gallery, captions, partial
    return [_load(Path(root), category, *how, known[category]) for category in CATEGORIES]


def _load(
    root: Path,
    category: str,
    split: str,
    gallery: str,
    captions: str,
    partial: bool,
    files: dict[str, Path],
) -> Task:
    queries = _queries(root, category, split, captions)
    names = read_json(root, listing := f"image_splits/split.{category}.{split}.json", _LAYOUT)
    if not isinstance(names, list):
        fault = f"{listing} is no list of image names"
        raise ValueError(f"{fault}; is it another file under this name?")
    check_ids(names, str, listing)
    twice = len(names) - len(set(names))
    if gallery == "triplets":
        used = set().union(*(q.images for q in queries))
        names = [name for name in names if name in used]
    both = captions == CAPTIONS[0]
    order = "both orders, embeddings averaged" if both else "the order given"
    which = {"split": "all images of the split file", "triplets": "only the images of the triplets"}
    protocol = {"gallery": which[gallery], "reference": "stays in the ranking"}
    protocol |= {"captions": f"joined by 'and' in {order}"}
    known = SIZES[category] if split == "val" else None
    task = Task(category, split, {name: files.get(name) for name in names}, queries, protocol)
    places = [root / "images", root / "images" / category]
    complete = known and (known[0], known[1][gallery])
    task = checked_task(task, places, complete, partial=partial)
    # Where both are empty, `checked_task` says so.
    said = [q.entry["captions"] for q in task.queries if q.texts[0]]
    if empty := sum(not all(c.strip(".?, ") for c in pair) for pair in said):
        note = f"{category} {split}: an empty caption in {empty} of the queries"
        task.notes.append(f"{note}, where the other one stands alone")
    if twice:
        note = f"{category} {split}: {twice} names stand more than once in {listing}"
        task.notes.append(f"{note}; each image is in the gallery once")
    return task


def _queries(root: Path, category: str, split: str, captions: str) -> list[Query]:
    where = f"captions/cap.{category}.{split}.json"
    keys = ("candidate", "captions", "target")[: 2 + (split != "test")]
    queries = []
    for i, (record, reference, texts, *target) in enumerate(
        entries(read_json(root, where, _LAYOUT), keys, where)
    ):
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"the captions of entry {i} of {where} are no list of texts, but {texts!r}"
            )
        check_ids([reference, *target], str, f"entry {i} of {where}")
        said = joined(texts, captions)
        queries.append(Query(str(i), reference, said, tuple(target), entry=record))
    return queries


def score(tasks: Sequence[Task], rankings: Sequence[Ranking]) -> dict[str, float]:
    """R@10 and R@50 in percent of each category, and their means over the categories."""
    found = {
        f"{task.name} R@{k}": recall_at(k, ranking.top, [q.targets[0] for q in task.queries])
        for task, ranking in zip(tasks, rankings, strict=True)
        for k in KS
    }
    sums = {k: sum(found[f"{task.name} R@{k}"] for task in tasks) for k in KS}
    return found | {f"mean R@{k}": total / len(tasks) for k, total in sums.items()}


def write_submissions(
    folder: str | Path, tasks: Sequence[Task], rankings: Sequence[Ranking]
) -> list[Path]:
    """`{category}.{split}.pred.json`: the annotations' entries, each with 50 names as `ranking`."""
    written = []
    for task, ranking in zip(tasks, rankings, strict=True):
        rows = zip(task.queries, ranking.top, strict=True)
        content = [{**q.entry, "ranking": row[:50]} for q, row in rows]
        path = Path(folder) / f"{task.name}.{task.split}.pred.json"
        written.append(write_submission(path, content, check_submission, task))
    return written


def check_submission(path: str | Path, task: Task) -> list[str]:
    """What is wrong with a submission file for one category: sentences, none if it is good."""
    content = read_submission(Path(path))
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        return ["the file is no list of entries"]
    problems = []
    if len(content) != len(task.queries):
        problems.append(f"{len(content)} entries, not {len(task.queries)}")
    rows = enumerate(zip(content, task.queries, strict=False))
    changed = [i for i, (entry, q) in rows if {**entry, **q.entry} != entry]
    if changed:
        fault = f"{len(changed)} entries are not those of the annotations in their order, the first"
        problems.append(f"{fault}: {changed[0]}")
    bare = sum("ranking" not in entry for entry in content)
    if bare:
        problems.append(f"{bare} entries have no ranking")
    rows = enumerate(content[: len(task.queries)])
    lists = {str(i): entry["ranking"] for i, entry in rows if "ranking" in entry}
    found = check_lists(lists, 50, task, lambda q: task.files.keys())
    return problems + [problem for problem in found if "have no list" not in problem]
