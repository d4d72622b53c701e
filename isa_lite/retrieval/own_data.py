"""Your own data: what is said about the images of a folder, and queries with their answers. Ours.

Two files, both optional, beside or inside a folder of images:

- `captions.csv`, a table with the columns `image` (a path in the folder) and `caption`;
- `triplets.json`, to evaluate: a list of {"reference": file, "modifier": text, "targets": [files]}.

Whatever is wrong with them is said at once, with the file and the row, before any work is done.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import html
import io
import json
import os
import unicodedata
from bisect import bisect
from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property
from os.path import commonprefix
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
import torch

from isa_lite.models.vl_model import VLModel
from isa_lite.retrieval.queries import Queries
from isa_lite.support.checkpoint import read_json
from isa_lite.support.images import ImageFolder
from isa_lite.support.parameters import checked, path_name

DELIMITERS = ",;\t|"
SHOWN = 5  # problems of a file that a message lists
# names on either side, in the alphabet, among which one that is nearly right is looked for
NEAR = 500


# -------------------------------------------------------------------------------------------------
# reading


class _Names:
    """Finds the images of a folder by the names that a table gives them."""

    def __init__(self, images: ImageFolder):
        self.folder = images.folder.resolve()
        number = {f: i for i, f in enumerate(images.files)}
        # of what was kept
        copies = {f: number[first] for f, first in images.duplicates.items() if first in number}

        def by_key(known: Mapping[Path, object]) -> dict[str, object]:
            inside = {f.relative_to(images.folder).as_posix(): v for f, v in known.items()}
            return {self._key(name): value for name, value in inside.items()}

        self.number, self.broken = by_key(copies | number), by_key(images.broken)

    @cached_property
    def _sorted(self) -> list[str]:
        return sorted(self.number)

    #: What people change in a name or leave out: large and small letters, the folder, the ending.
    _loosened = (
        str.casefold,
        lambda name: PurePosixPath(name).name,
        lambda name: PurePosixPath(name).stem.casefold(),
    )

    @cached_property
    def _loose(self) -> list[dict[str, str]]:
        """For each of `_loosened`, the first name of the folder by what is left of it."""
        names = self._sorted[::-1]
        return [{loosen(name): name for name in names} for loosen in self._loosened]

    @staticmethod
    def _key(name: str) -> str:
        return unicodedata.normalize("NFC", name)  # macOS stores an accent apart from its letter

    def _near(self, key: str) -> str | None:
        """The name that was probably meant. Letters, which is slow, are compared nearby alone."""
        for loosen, known in zip(self._loosened, self._loose, strict=True):
            if loosen(key) in known:
                return known[loosen(key)]
        place = bisect(self._sorted, key)
        around = self._sorted[max(0, place - NEAR) : place + NEAR]
        alike = difflib.get_close_matches(key, around, n=50)
        # Of names that differ in a digit, one that begins alike.
        return max(alike, key=lambda known: len(commonprefix([known, key])), default=None)

    def find(self, name: str, hint: bool = True) -> int:
        """The number of the image in its folder. Raises ValueError: what is wrong, what to do.

        hint: look for the name that was probably meant, which only errors that are shown need.
        """
        if not name.strip():
            raise ValueError("names no image; write its path in the folder, or delete the entry")
        for path in (name, name.strip(), name.strip().replace("\\", "/")):
            path = PurePosixPath(path)
            if path.is_absolute() or ".." in path.parts:
                whole = (self.folder / path).resolve()
                if not whole.is_relative_to(self.folder):
                    fault = f"{name!r} lies outside the folder {self.folder.name}"
                    raise ValueError(f"{fault}; copy it into the folder")
                path = PurePosixPath(whole.relative_to(self.folder).as_posix())
            key = self._key(str(path))
            if key in self.number:
                return self.number[key]
            if key in self.broken:
                fault = f"{name!r} cannot be read as an image ({self.broken[key]})"
                raise ValueError(f"{fault}; replace it, or delete the entry")
        # False also for what no file can be called, such as a long caption
        if os.path.exists(self.folder / name.strip()):
            raise ValueError(f"{name!r} is no image that Pillow reads; save it as PNG or JPEG")
        near = self._near(key) if hint else None
        advice = f"did you mean {near!r}?" if near else "put it there, or delete the entry"
        raise ValueError(f"{name!r} is not in the folder {self.folder.name}; {advice}")


def _refuse(path: Path, problems: Sequence[str], what: str) -> None:
    if problems:
        more = f" ... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        first = "; ".join(problems[:SHOWN])
        raise ValueError(f"{path}: {len(problems)} {what} cannot be used: {first}{more}")


def _text_of(path: Path, name: str) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; {name}= names one, or leave it empty")
    try:
        return path.read_bytes().decode("utf-8-sig")  # with or without a byte-order mark
    except UnicodeDecodeError as error:
        fault = f"{path} is not UTF-8 (at byte {error.start})"
        raise ValueError(f"{fault}; save it as UTF-8 (Excel: 'CSV UTF-8')") from None


def plain(caption: str) -> str:
    """A caption with single spaces, in which open_clip's tokenizer finds no end of the text."""
    caption = html.unescape(html.unescape(caption)).replace("<start_of_text>", "< start_of_text>")
    return " ".join(caption.replace("<end_of_text>", "< end_of_text>").split())


def _rows(path: Path, content: str) -> np.ndarray:
    """The columns image and caption of a table, without the header: R x 2 texts."""
    head = next(iter(content.splitlines()), "")
    for delimiter in DELIMITERS:
        try:
            columns = [c.strip().lower() for c in next(csv.reader([head], delimiter=delimiter), [])]
        except csv.Error as error:
            fault = f"{path}: the first row cannot be read ({error})"
            raise ValueError(f"{fault}; save the table as CSV again") from None
        if {"image", "caption"} <= set(columns):
            break
    else:
        fault = f"{path}: the first row must name the columns image and caption"
        raise ValueError(f"{fault}; it is {head[:80]!r}")
    if columns.count("image") > 1 or columns.count("caption") > 1:
        fault = f"{path}: the first row names a column twice ({head[:80]!r})"
        raise ValueError(f"{fault}; several captions are several rows")
    # with its header, pandas would take the first column for an index where a row is too long
    plain = {"header": None, "dtype": str, "keep_default_na": False, "skip_blank_lines": False}
    try:
        table = pd.read_csv(io.StringIO(content), sep=delimiter, **plain)
    except pd.errors.ParserError as error:
        detail = str(error).removeprefix("Error tokenizing data. C error: ").strip()
        fault = f"{path}: {detail}; put a text that contains {delimiter!r}"
        raise ValueError(f"{fault} or a line break in double quotes") from None
    return table.fillna("")[[columns.index("image"), columns.index("caption")]].to_numpy()[1:]


@checked(path=path_name())
def read_captions(path: str | Path, images: ImageFolder) -> list[list[str]]:
    """The captions of each image of the folder, in the table's order; an empty list for none.

    The delimiter (comma, semicolon, tab or bar) is told from the header; other columns are ignored.
    Any Unicode is a caption, an image may have several, and a row that is there twice counts once.
    The captions of a copy that was left out go to the image that it is a copy of. Rows count like a
    spreadsheet's: the header is 1. Raises FileNotFoundError, or ValueError naming the file, the
    first rows that cannot be used, and what to do.
    """
    path, names = Path(path), _Names(images)
    rows = _rows(path, _text_of(path, "captions"))
    captions: list[list[str]] = [[] for _ in images.files]
    problems = []
    for number, (image, caption) in enumerate(rows, 2):
        if not image.strip() and not caption.strip():
            continue  # an empty line
        try:
            owner, caption = names.find(image, len(problems) < SHOWN), plain(caption)
            if not caption:
                raise ValueError(f"{image!r} has an empty caption; write one, or delete the row")
        except ValueError as error:
            problems.append(f"row {number}: {error}")
            continue
        if caption not in captions[owner]:
            captions[owner].append(caption)
    _refuse(path, problems, f"of {len(rows)} rows")
    if not any(captions):
        raise ValueError(f"{path} holds no caption; write a row an image, or leave captions= empty")
    return captions


def beside(images: ImageFolder, name: str) -> Path | None:
    """The file `name` in a folder of images, else the one right beside the folder, else None."""
    places = images.folder, images.folder.resolve().parent
    return next((place / name for place in places if (place / name).is_file()), None)


@checked(path=path_name())
def read_triplets(
    path: str | Path, images: ImageFolder, captions: Sequence[Sequence[str]] = ()
) -> Queries:
    """Queries with their answers. captions: of each image (`read_captions`), for the ceilings.

    Raises FileNotFoundError, or ValueError naming the file, the first entries, counted from 1, that
    cannot be used, and what to do.
    """
    path, names = Path(path), _Names(images)
    entries = read_json(path, "triplets", object)
    if not isinstance(entries, list) or not entries:
        shape = '{"reference": file, "modifier": text, "targets": [files]}'
        raise ValueError(f"{path} must be a list of {shape}, and not empty")
    read, problems = [], []
    for number, entry in enumerate(entries, 1):
        try:
            read.append(_entry(entry, names, len(problems) < SHOWN))
        except ValueError as error:
            problems.append(f"entry {number}: {error}")
    _refuse(path, problems, f"of {len(entries)} entries")
    reference, texts, targets = map(list, zip(*read, strict=True))
    known = {"texts": texts, "targets": targets, "said": captions}
    return Queries(images=images, reference=np.array(reference), **known)


def _entry(entry: object, names: _Names, hint: bool) -> tuple[int, str, list[int]]:
    if not isinstance(entry, Mapping):
        fault = f"is {str(entry)[:40]!r}"
        raise ValueError(f"{fault}; it must be an object with reference, modifier and targets")
    missing = [key for key in ("reference", "modifier", "targets") if key not in entry]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    if not isinstance(entry["reference"], str) or not isinstance(entry["modifier"], str):
        raise ValueError("reference and modifier must be texts")
    answers = entry["targets"]
    if not isinstance(answers, list) or not all(isinstance(t, str) for t in answers):
        raise ValueError("targets must be a list of files, also where there is only one")
    if not entry["modifier"].strip():
        raise ValueError("has an empty modifier; say what should be different")
    start = names.find(entry["reference"], hint)
    found = sorted({names.find(t, hint) for t in answers} - {start})
    if not found:
        fault = "has no target but its own reference, which a ranking leaves out"
        raise ValueError(f"{fault}; name another image")
    return start, " ".join(entry["modifier"].split()), found


def fingerprint(images: ImageFolder, captions: Sequence[Sequence[str]]) -> str:
    """A digest of the images and all that is said about them."""
    said = json.dumps([images.key, [list(c) for c in captions]])
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def part(images: ImageFolder, rows: Sequence[int]) -> ImageFolder:
    """Some images of a folder, by their numbers, as a folder."""
    made = copy(images)
    made.files = [images.files[i] for i in rows]
    made.key = hashlib.sha256(f"{images.key} {[int(i) for i in rows]}".encode()).hexdigest()
    return made


def unseen_words(vl: VLModel, texts: Sequence[str]) -> list[str]:
    """Words of the texts that a model of `pretrain_folder` has never met: the vectors of their
    pieces are zero, all of them.

    Of another model, whose every vector is something, no word is named.
    """
    norms = vl.word_vectors(torch.arange(vl.vocab_size, device=vl.device)).norm(dim=-1)
    said = {word.strip(",.;:!?\"'()").lower() for text in texts for word in text.split()}
    return [word for word in sorted(said - {""}) if not norms[vl.words.ids(word)].any()]
