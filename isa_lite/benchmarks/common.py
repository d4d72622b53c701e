"""What the three public benchmarks share: a task on disk, a ranking of its gallery, and the metrics
of a ranking.

A metric is computed from ranked ids, which is also what a submission file holds: the numbers on a
validation split are those that a test server would compute from the file.
"""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from isa_lite.retrieval.gallery import Gallery, best
from isa_lite.support import checkpoint

#: What an image is called in the annotations: FashionIQ and CIRR have names, CIRCO has numbers.
Id = str | int
#: The endings of image files, in the order in which one of several with the same name is taken.
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")


@dataclass(frozen=True)
class Query:
    """One composed query.

    texts: the modifier; several, if the protocol averages the embeddings of several. targets: the
    right answers, the annotated target first; none in a test split. subset: CIRR's candidates.
    aspects: CIRCO's semantic aspects.
    entry: the record of the annotation file.
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

    files: the gallery, the file of each id, in order. protocol: every choice that changes the
    numbers, in words.
    notes: what a reader of the numbers has to know (incomplete data and the like). left_out:
    queries without their images.
    """

    name: str
    split: str
    files: dict[Id, Path]
    queries: list[Query]
    protocol: dict[str, str]
    remove_reference: bool = False
    notes: list[str] = field(default_factory=list)
    left_out: int = 0

    @property
    def answered(self) -> bool:
        """Whether the split comes with its right answers."""
        return all(q.targets for q in self.queries)


@dataclass(frozen=True)
class Ranking:
    """For each query the best ids of the gallery, and its subset candidates in order; best
    first.
    """

    top: list[list[Id]]
    subset: list[list[Id]]


# ----------------------------------------------------------------------------------------------
# reading


def read_json(root: Path, relative: str, layout: str):
    """A JSON file below `root`. FileNotFoundError or ValueError name it; `layout` says what should
    lie there.
    """
    path = root / relative
    if not path.is_file():
        raise FileNotFoundError(f"there is no {relative} in the folder {root.absolute()}; {layout}")
    return checkpoint.read_json(path, "annotations or a submission", object)


def entries(
    records: Sequence[Mapping], keys: Sequence[str], where: str
) -> Iterator[tuple[Mapping, ...]]:
    """Of each record itself and the values of `keys`. ValueError names a record that lacks one, or
    a file without a list.
    """
    if (
        not isinstance(records, list)
        or not records
        or not all(isinstance(record, Mapping) for record in records)
    ):
        raise ValueError(f"{where} is no list of entries; is it another file under this name?")
    for i, record in enumerate(records):
        lacking = [key for key in keys if key not in record]
        if lacking:
            raise ValueError(
                f"entry {i} of {where} has no {', '.join(lacking)}; is this the annotation file of"
                " another split?"
            )
        yield (record, *(record[key] for key in keys))


def check_ids(values: Iterable[object], kind: type, where: str) -> None:
    """Raises ValueError, with `where`, for an image id that is not of the kind (str or int) that
    this benchmark's ids have.
    """
    for value in values:
        if isinstance(value, bool) or not isinstance(value, kind) or value == "":
            wanted = "a name, a text" if kind is str else "a whole number"
            raise ValueError(
                f"{where}: an image id is {wanted}, and this one is {value!r}, empty or of another"
                " type"
            )


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
    """The first file that is not empty among those called `name` in `places`, else one of that name
    with another ending.
    """
    places = list(places)
    if exact := next((p for place in places if is_picture(p := place / name)), None):
        return exact
    stem = Path(name).with_suffix("") if Path(name).suffix.lower() in ENDINGS else Path(name)
    others = (place / f"{stem}{ending}" for place in places for ending in ENDINGS)
    return next((p for p in others if is_picture(p)), None)


def by_stem(folder: Path) -> dict[str, Path]:
    """The images in `folder` by their names without ending (of several, the one whose ending comes
    first in `ENDINGS`).

    Empty files are left out.
    """
    found = (
        [p for p in folder.iterdir() if p.suffix.lower() in ENDINGS and is_picture(p)]
        if folder.is_dir()
        else []
    )
    order = sorted(found, key=lambda p: (-ENDINGS.index(p.suffix.lower()), p.name))
    return {p.stem: p for p in order}


def make_task(
    name: str,
    split: str,
    found: Mapping[Id, Path | None],
    searched: Iterable[Path],
    queries: list[Query],
    protocol: dict[str, str],
    known: tuple[int, int] | None,
    partial: bool = False,
    remove_reference: bool = False,
    or_more: bool = False,
) -> Task:
    """A task out of what was found on disk; `found` has the file of each gallery id, None for a
    missing one.

    known: queries and images (with `or_more` of them: at least so many) of the complete split; a
    difference becomes a note. Raises ValueError for two queries with one id, a query without words
    or one that names an image which the gallery does not list, and FileNotFoundError for missing
    images, unless `partial`: then they are left out, with every query that needs one of them, and a
    note says how many.
    """
    what = f"{name} {split}"
    twice = [query for query, count in Counter(q.id for q in queries).items() if count > 1]
    if twice:  # a submission has one list an id
        raise ValueError(
            f"{len(twice)} ids of {what} are those of several queries, the first: {twice[0]}; is"
            " the file whole?"
        )
    for query in queries:
        if not all(isinstance(text, str) for text in query.texts):
            raise ValueError(
                f"the caption of query {query.id} of {what} is {query.texts[0]!r}, and no text"
            )
        strange = sorted(map(str, query.images - found.keys()))
        if strange:
            raise ValueError(
                f"query {query.id} of {what} names {', '.join(strange)}, which the list of its"
                " gallery does not hold"
            )
    missing = {i for i, path in found.items() if path is None}
    notes, listed = [], len(queries)
    if missing:
        kept = [q for q in queries if not q.images & missing]
        first = next(i for i in found if i in missing)
        searched = ", ".join(str(p.absolute()) for p in searched)
        lack = (
            f"{len(missing)} of {len(found)} images of {what} are missing (the first: {first};"
            f" searched: {searched}), and {len(queries) - len(kept)} of {len(queries)} queries need"
            " one of them"
        )
        if not partial or not kept:
            go_on = (
                "with partial=True (--partial) both are left out, and no number compares with a"
                " complete run's"
            )
            raise FileNotFoundError(
                f"{lack}. Put them there (an empty file is a missing one);"
                f" {go_on if kept else 'no query is left'}"
            )
        notes.append(f"PARTIAL: {lack}; left out, so no number here compares with a complete run's")
        queries, found = kept, {i: path for i, path in found.items() if i not in missing}
    if silent := [q.id for q in queries if not any(text.strip() for text in q.texts)]:
        notes.append(
            f"{what}: the caption of {len(silent)} of the queries is empty (the first: {silent[0]})"
        )
    whole = known is None or (
        len(queries) == known[0] and (len(found) == known[1] or (or_more and len(found) > known[1]))
    )
    if not whole:
        notes.append(
            f"{what} has {len(queries)} queries and a gallery of {len(found)} here, the complete"
            f" one {known[0]} and {'at least ' * or_more}{known[1]}: no number here compares with a"
            " published one"
        )
    return Task(
        name, split, dict(found), queries, protocol, remove_reference, notes, listed - len(queries)
    )


# ----------------------------------------------------------------------------------------------
# ranking


def rank(task: Task, queries: Tensor, gallery: Tensor, k: int = 50) -> Ranking:
    """The k best images of each query by cosine, and the order of its subset: queries B x E,
    gallery N x E, L2-normalised.

    Of images with the same score, the one that stands first in the gallery comes first, in both. A
    gallery smaller than k is ranked whole. Raises ValueError for embeddings that do not belong to
    the task, or are not finite.
    """
    if (len(queries), len(gallery)) != (len(task.queries), len(task.files)):
        raise ValueError(
            f"{task.name} {task.split} has {len(task.queries)} queries and {len(task.files)}"
            f" images, not {len(queries)} and {len(gallery)} embeddings"
        )
    if not (queries.isfinite().all() and gallery.isfinite().all()):
        raise ValueError(f"{task.name} {task.split}: an embedding is not finite")
    ids = list(task.files)
    place = {name: i for i, name in enumerate(ids)}
    exclude = (
        torch.tensor([place[q.reference] for q in task.queries]) if task.remove_reference else None
    )
    _, found = Gallery(gallery, range(len(ids))).search(
        queries, min(k, len(ids) - task.remove_reference), exclude
    )
    subset = []
    for query, vector in zip(task.queries, queries, strict=True):
        among = sorted(place[name] for name in query.subset)
        order = best((gallery[among] @ vector)[None], len(among))[1][0].tolist() if among else []
        subset.append([ids[among[i]] for i in order])
    return Ranking([[ids[i] for i in row] for row in found.tolist()], subset)


# ----------------------------------------------------------------------------------------------
# metrics


def recall_at(k: int, ranked: Sequence[Sequence[Id]], targets: Sequence[Id]) -> float:
    """Recall@K in percent: the share of queries with their target among the first k.

    >>> recall_at(1, [["a", "b"], ["b", "a"]], ["a", "a"])
    50.0
    """
    return 100 * float(
        np.mean([target in row[:k] for row, target in zip(ranked, targets, strict=True)])
    )


def average_precision_at(k: int, ranked: Sequence[Id], relevant: Iterable[Id]) -> float:
    """AP@K between 0 and 1: the sum of the precision at the place of each hit, divided by
    min(number of relevant, k).

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
