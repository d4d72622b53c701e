"""What the three public benchmarks share: a task on disk, a ranking of its gallery, the metrics.

A metric is computed from ranked ids, which is also what a submission file holds: the numbers on a
validation split are those that a test server would compute from the file.
"""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from isa_lite.models.vl_model import VLModel
from isa_lite.retrieval.gallery import best
from isa_lite.retrieval.queries import Queries, Scores
from isa_lite.support import checkpoint
from isa_lite.support.images import ImageFiles

#: What an image is called in the annotations: FashionIQ and CIRR have names, CIRCO has numbers.
Id = str | int
#: The endings of image files, in the order in which one of several with the same name is taken.
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")


@dataclass(frozen=True)
class Query:
    """One composed query.

    texts: the modifier; several, if the protocol averages the embeddings of several. targets: the
    right answers, the annotated target first; none in a test split. subset: CIRR's candidates.
    aspects: CIRCO's semantic aspects. entry: the record of the annotation file.
    """

    id: str
    reference: Id
    texts: tuple[str, ...]
    targets: tuple[Id, ...] = ()
    subset: tuple[Id, ...] = ()
    aspects: tuple[str, ...] = ()
    entry: Mapping = field(default_factory=dict)

    @property
    def images(self) -> set[Id]:
        """Every image that the query names."""
        return {self.reference, *self.targets, *self.subset}


@dataclass(frozen=True)
class Task:
    """A gallery and the queries over it, under one protocol.

    files: the gallery, the file of each id, in order (None, until `checked_task`: missing).
    protocol: every choice that changes the numbers, in words.
    notes: what a reader of the numbers has to know (incomplete data and the like). left_out:
    queries without their images.
    """

    name: str
    split: str
    files: dict[Id, Path | None]
    queries: list[Query]
    protocol: dict[str, str]
    remove_reference: bool = False
    notes: list[str] = field(default_factory=list)
    left_out: int = 0

    @property
    def answered(self) -> bool:
        """Whether the split comes with its right answers."""
        return all(q.targets for q in self.queries)

    def embedded(self, vl: VLModel | None, gallery: Tensor) -> Queries:
        """The queries by their places in the gallery, N x E, L2-normalised, in `files`' order."""
        place = {name: i for i, name in enumerate(self.files)}
        reference = np.array([place[q.reference] for q in self.queries])
        return Queries(
            images=ImageFiles(list(self.files.values())),
            reference=reference,
            texts=[text for q in self.queries for text in q.texts],
            owner=np.array([i for i, q in enumerate(self.queries) for _ in q.texts]),
            targets=[[place[name] for name in q.targets] for q in self.queries],
            excluded=reference if self.remove_reference else np.full(len(reference), -1),
            vl=vl,
            gallery=gallery,
        )


@dataclass(frozen=True)
class Ranking:
    """For each query the best ids of the gallery, and its subset candidates; best first."""

    top: list[list[Id]]
    subset: list[list[Id]]


# ----------------------------------------------------------------------------------------------
# reading


def read_json(root: Path, relative: str, layout: str):
    """A JSON file below `root`, laid out as `layout` says. Raises FileNotFoundError, ValueError."""
    path = root / relative
    if not path.is_file():
        raise FileNotFoundError(f"there is no {relative} in the folder {root.absolute()}; {layout}")
    return checkpoint.read_json(path, "annotations or a submission", object)


def entries(
    records: Sequence[Mapping], keys: Sequence[str], where: str
) -> Iterator[tuple[Mapping, ...]]:
    """Each record with its values of `keys`. Raises ValueError for no list, or for one lacking."""
    good = isinstance(records, list) and all(isinstance(record, Mapping) for record in records)
    if not good or not records:
        raise ValueError(f"{where} is no list of entries; is it another file under this name?")
    for i, record in enumerate(records):
        lacking = [key for key in keys if key not in record]
        if lacking:
            fault = f"entry {i} of {where} has no {', '.join(lacking)}"
            raise ValueError(f"{fault}; is this the annotation file of another split?")
        yield (record, *(record[key] for key in keys))


def check_ids(values: Iterable[object], kind: type, where: str) -> None:
    """Raises ValueError, with `where`, for an image id that is not of the kind, str or int."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, kind) or value == "":
            wanted = "a name, a text" if kind is str else "a whole number"
            fault = f"{where}: an image id is {wanted}, and this one is {value!r}"
            raise ValueError(f"{fault}, empty or of another type")


def check_query_id(value: object, what: str, where: str) -> None:
    """Raises ValueError for the id of a query that is neither a number nor a text."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"the {what} {value!r} of {where} is neither a number nor a text")


def one_of(what: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, choices))}, not {value!r}")


def is_picture(path: Path) -> bool:
    """Whether a file lies there that is not empty, as a download that was broken off leaves it."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # not there, or a name that no file can have
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size > 0


def find_picture(places: Iterable[Path], name: str) -> Path | None:
    """The first file of that name in `places` that is not empty, else with another ending."""
    places = list(places)
    if exact := next((p for place in places if is_picture(p := place / name)), None):
        return exact
    stem = Path(name).with_suffix("") if Path(name).suffix.lower() in ENDINGS else Path(name)
    others = (place / f"{stem}{ending}" for place in places for ending in ENDINGS)
    return next((p for p in others if is_picture(p)), None)


def by_stem(folder: Path) -> dict[str, Path]:
    """Files in `folder` that are not empty, by name without ending (the first of `ENDINGS`)."""
    listed = folder.iterdir() if folder.is_dir() else ()
    found = [p for p in listed if p.suffix.lower() in ENDINGS and is_picture(p)]
    order = sorted(found, key=lambda p: (-ENDINGS.index(p.suffix.lower()), p.name))
    return {p.stem: p for p in order}


def checked_task(
    task: Task,
    searched: Iterable[Path] = (),
    known: tuple[int, int] | None = None,
    or_more: bool = False,
    partial: bool = False,
) -> Task:
    """A task as it was read, whose `files` may have None for an image that is missing from the
    folders `searched`, checked and completed.

    known: queries and images (with `or_more` of them: at least so many) of the complete split; a
    difference becomes a note. Raises ValueError for two queries with one id, a text that is none,
    or a query that names an image which the gallery does not list, and FileNotFoundError for
    missing images, unless `partial`: then they are left out, with every query that needs one of
    them, and a note says how many.
    """
    what = f"{task.name} {task.split}"
    _check_queries(task, what)
    listed = len(task.queries)
    task = _without_missing(task, what, searched, partial)
    queries, images, notes = len(task.queries), len(task.files), list(task.notes)
    if silent := [q.id for q in task.queries if not any(text.strip() for text in q.texts)]:
        note = f"{what}: the caption of {len(silent)} of the queries is empty"
        notes.append(f"{note} (the first: {silent[0]})")
    enough = known and (images == known[1] or (or_more and images > known[1]))
    if known and not (queries == known[0] and enough):
        note = f"{what} has {queries} queries and a gallery of {images} here, the complete one"
        note = f"{note} {known[0]} and {'at least ' * or_more}{known[1]}"
        notes.append(f"{note}: no number here compares with a published one")
    return replace(task, notes=notes, left_out=listed - queries)


def _check_queries(task: Task, what: str) -> None:
    twice = [query for query, count in Counter(q.id for q in task.queries).items() if count > 1]
    if twice:  # a submission has one list an id
        fault = f"{len(twice)} ids of {what} are those of several queries, the first: {twice[0]}"
        raise ValueError(f"{fault}; is the file whole?")
    for query in task.queries:
        if not all(isinstance(text, str) for text in query.texts):
            raise ValueError(
                f"the caption of query {query.id} of {what} is {query.texts[0]!r}, and no text"
            )
        if strange := sorted(map(str, query.images - task.files.keys())):
            fault = f"query {query.id} of {what} names {', '.join(strange)}"
            raise ValueError(f"{fault}, which the list of its gallery does not hold")


def _without_missing(task: Task, what: str, searched: Iterable[Path], partial: bool) -> Task:
    missing = {i for i, path in task.files.items() if path is None}
    if not missing:
        return task
    kept = [q for q in task.queries if not q.images & missing]
    first = next(i for i in task.files if i in missing)
    lack = (
        f"{len(missing)} of {len(task.files)} images of {what} are missing (the first: {first};"
        f" searched: {', '.join(str(p.absolute()) for p in searched)}), and"
        f" {len(task.queries) - len(kept)} of {len(task.queries)} queries need one of them"
    )
    if not partial or not kept:
        go_on = "with partial=True (--partial) both are left out"
        go_on = f"{go_on}, and no number compares with a complete run's"
        fault = f"{lack}. Put them there (an empty file is a missing one)"
        raise FileNotFoundError(f"{fault}; {go_on if kept else 'no query is left'}")
    note = f"PARTIAL: {lack}; left out, so no number here compares with a complete run's"
    files = {i: path for i, path in task.files.items() if i not in missing}
    return replace(task, files=files, queries=kept, notes=[note, *task.notes])


# ----------------------------------------------------------------------------------------------
# ranking


def rank(task: Task, answer: Tensor | Scores, gallery: Tensor, k: int = 50) -> Ranking:
    """The k best images of each query by what a method answered, and the order of its subset.
    gallery: N x E, L2-normalised, in the order of `task.files`.

    Of images with the same score, the one that stands first in the gallery comes first, in both. A
    gallery smaller than k is ranked whole. Raises ValueError for an answer or embeddings that do
    not belong to the task, or are not finite.
    """
    values = answer.values if isinstance(answer, Scores) else answer
    if (len(values), len(gallery)) != (len(task.queries), len(task.files)):
        fault = f"{task.name} {task.split} has {len(task.queries)} queries and {len(task.files)}"
        raise ValueError(f"{fault} images, not {len(values)} and {len(gallery)} embeddings")
    if not (values.isfinite().all() and gallery.isfinite().all()):
        raise ValueError(f"{task.name} {task.split}: an embedding is not finite")
    queries = task.embedded(None, gallery)
    ids = list(task.files)
    place = {name: i for i, name in enumerate(ids)}
    subset = []
    for query, row in zip(task.queries, values, strict=True):
        among = sorted(place[name] for name in query.subset)
        likes = row[among] if isinstance(answer, Scores) else gallery[among] @ row
        order = best(likes[None], len(among))[1][0].tolist() if among else []
        subset.append([ids[among[i]] for i in order])
    return Ranking([[ids[i] for i in row] for row in queries.search(answer, k).tolist()], subset)


# ----------------------------------------------------------------------------------------------
# metrics


def recall_at(k: int, ranked: Sequence[Sequence[Id]], targets: Sequence[Id]) -> float:
    """Recall@K in percent: the share of queries with their target among the first k.

    >>> recall_at(1, [["a", "b"], ["b", "a"]], ["a", "a"])
    50.0
    """
    rows = zip(ranked, targets, strict=True)
    return 100 * float(np.mean([target in row[:k] for row, target in rows]))


def average_precision_at(k: int, ranked: Sequence[Id], relevant: Iterable[Id]) -> float:
    """AP@K, 0 to 1: the sum of the precision at each hit's place, over min(number of relevant, k).

    Hits at places 1 and 3 out of two relevant: (1/1 + 2/3) / 2.

    >>> round(average_precision_at(3, ["a", "x", "b"], ["a", "b"]), 4)
    0.8333
    """
    relevant, hits, total = set(relevant), 0, 0.0
    if len(set(ranked[:k])) < len(ranked[:k]):
        raise ValueError("a ranking names an image twice")
    for place, name in enumerate(ranked[:k], 1):
        if name in relevant:
            hits += 1
            total += hits / place
    return total / min(len(relevant), k)
