"""Batches of captioned images from a folder, made so that a small VL model learns to compose. Ours.

Scenes can be edited at will, a folder cannot, so both things that help in `pretrain` are looked for
in the captions. Two captions are *relatives* when they differ in one short run of words, as "man
student" and "woman student" do.

- *Families*: a batch holds images together with relatives of theirs, as hard negatives of one
another.
- *The language of change*: the second of two relatives is also described from the first, "man
  student, but a woman". The words come from the two captions and from `CHANGES`, a list of plain
  phrases; no query is read, so evaluation stays zero-shot. Where the phrases resemble the words of
  the queries ("with {b}"), composing gains more than elsewhere: write them before you look.
"""

from __future__ import annotations

import string
from collections import defaultdict
from collections.abc import Sequence
from copy import copy

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision import transforms as T

from isa_lite.support.draws import batch_indices
from isa_lite.support.images import ImageFolder
from isa_lite.support.settings import FolderConfig

#: How a caption {a}, and the words {b} in the place of its words {old}, describe another image; in
#: another language, write yours.
CHANGES = ("{a}, but {b}", "{a}, but a {b}", "{a}, now {b}", "{a}, {b} instead", "{a}, with {b}")
CHANGES += ("{a}, with a {b}", "{a}, as a {b}", "{a}, on {b}", "{a}, in {b}", "{a}, make it {b}")
CHANGES += ("{a}, change it to {b}", "{a}, {b} instead of {old}", "{a}, {b} and not {old}")
#: The same where nothing takes the place of {old}.
LOSSES = ("{a}, but without {old}", "{a}, without the {old}", "{a}, but no {old}")
LOSSES += ("{a}, not {old}", "{a}, remove the {old}")
PROMPT = "a photo of {}"  # queries begin with it, so captions must know it
_AROUND = string.punctuation + "…“”‘’«»、。，：；！？（）"
LONGEST = 3  # words that relatives may differ in
# words; longer captions have no relatives, since nearly none would differ in one place alone
TOO_LONG = 30
KEEP = 2 << 30  # bytes of pictures kept in memory at the model's size


def split(
    captions: Sequence[Sequence[str]], held_out: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the captioned images that training sees, and of the others; both sorted."""
    captioned = np.array([i for i, said in enumerate(captions) if said])
    order = np.random.default_rng((seed, 10)).permutation(captioned)
    count = round(held_out * len(captioned))
    return np.sort(order[count:]), np.sort(order[:count])


# ------------------------------------------------------------------------------------------------
# relatives


def clauses_of(caption: str) -> list[list[str]]:
    """A caption's words in lower case without punctuation, in the groups that it makes."""
    clauses: list[list[str]] = [[]]
    for token in caption.lower().split():
        word = token.strip(_AROUND)
        if token[0] in _AROUND:
            clauses.append([])
        if word:
            clauses[-1].append(word)
        if token[-1] in _AROUND:
            clauses.append([])
    return [clause for clause in clauses if clause]


def words_of(caption: str) -> list[str]:
    """The words of `clauses_of` in one list."""
    return [word for clause in clauses_of(caption) for word in clause]


class Relatives:
    """Which captions differ in one run of at most `LONGEST` words of a clause (or 0), and in which.

    Every caption is filed under each of its frames: what is left of it, at least one word, around a
    run of words. Captions of the same frame with other words in its place are relatives.
    """

    def __init__(self, captions: Sequence[str]):
        self.words = [words_of(c) for c in captions]
        # frame -> caption, first and last of the run
        filed: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        for i, (caption, words) in enumerate(zip(captions, self.words, strict=True)):
            for start, stop in self._runs(caption) if 0 < len(words) <= TOO_LONG else ():
                filed[hash((tuple(words[:start]), tuple(words[stop:])))].append((i, start, stop))

        def several(found: list[tuple[int, int, int]]) -> bool:
            return len({tuple(self.words[i]) for i, _, _ in found}) > 1

        self.frames = {key: found for key, found in filed.items() if several(found)}
        self.places: list[list[tuple[int, int, int]]] = [[] for _ in self.words]
        for key, found in self.frames.items():
            for i, start, stop in found:
                self.places[i].append((key, start, stop))

    @staticmethod
    def _runs(caption: str) -> dict[tuple[int, int], None]:
        """Runs of words that leave something, none across punctuation."""
        runs, begin, total = [], 0, len(words_of(caption))
        for clause in clauses_of(caption):
            end = begin + len(clause)
            for s in range(begin, end + 1):
                stops = range(s, min(s + LONGEST, end) + 1)
                runs += [(s, t) for t in stops if t - s < total]
            begin = end
        return dict.fromkeys(runs)  # each once, in a fixed order

    def draw(self, i: int, rng: np.random.Generator) -> tuple[int, str, str] | None:
        """A relative of caption i: its number, the words that only i has, and only the other."""
        if not self.places[i]:
            return None
        key, start, stop = self.places[i][rng.integers(len(self.places[i]))]
        own = self.words[i][start:stop]
        others = [(j, self.words[j][s:e]) for j, s, e in self.frames[key]]
        others = [(j, theirs) for j, theirs in others if theirs != own]
        j, theirs = others[rng.integers(len(others))]
        return j, " ".join(own), " ".join(theirs)


def say_change(a: str, old: str, new: str, rng: np.random.Generator) -> str:
    """Caption `a`, and that `new` takes the place of its words `old`; one may be empty."""
    possible = [phrase for phrase in CHANGES if old or "{old}" not in phrase] if new else LOSSES
    return possible[rng.integers(len(possible))].format(a=a, b=new, old=old)


# --------------------------------------------------------------------------------------------------
# batches


def jitter(images: np.ndarray, zoom: float, rng: np.random.Generator) -> np.ndarray:
    """uint8 images B x S x S x 3, each scaled and shifted by up to the part `zoom`."""
    if zoom == 0:
        return images
    count = len(images)
    scale, shift = 1 + rng.uniform(-zoom, zoom, count), rng.uniform(-zoom, zoom, (count, 2))
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = torch.from_numpy(scale)
    theta[:, :, 2] = torch.from_numpy(shift)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    return moved.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


class FolderBatches(Dataset):
    """Batch number `i`, as `towers.SceneBatches` gives it: images B x S x S x 3, captions, owners.

    No two images of a batch share the caption that was drawn for them: neither could tell its own
    text from the other's; so B is smaller where there are few different captions. A batch depends
    on the seed, the purpose and its number alone.
    """

    def __init__(
        self,
        images: ImageFolder,
        captions: Sequence[Sequence[str]],
        rows: np.ndarray,
        config: FolderConfig,
    ):
        """rows: the images to train on, each with a caption."""
        self.images, self.rows, self.config = images, rows, config
        self.texts = [text for i in rows for text in captions[i]]  # numbered through
        self.owner = [int(i) for i in rows for _ in captions[i]]
        # of each image, the numbers of its captions
        self.said: dict[int, list[int]] = defaultdict(list)
        for number, image in enumerate(self.owner):
            self.said[image].append(number)
        self.relatives = Relatives(self.texts)
        size, how = config.image_size, T.InterpolationMode.BICUBIC
        self.squared = T.Compose([T.Resize(size, how), T.CenterCrop(size)])
        self.kept: dict[int, np.ndarray] = {}
        self.purpose = self.start = self.stop = 0

    def source(self, purpose: int, start: int, stop: int) -> FolderBatches:
        """These batches from `start` to `stop`: a `towers.Source`."""
        made = copy(self)  # shallow: the pictures that are kept stay shared
        made.purpose, made.start, made.stop = purpose, start, stop
        return made

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, i: int) -> tuple[np.ndarray, list[str], list[int]]:
        shown, texts, owner = self.chosen(self.start + i)
        rng = np.random.default_rng((self.config.seed, self.purpose, self.start + i, 2))
        squares = np.stack([self.square(j) for j in shown])
        return jitter(squares, self.config.zoom, rng), texts, owner

    def square(self, i: int) -> np.ndarray:
        """Picture i at the model's size, S x S x 3, resized and cropped as open_clip does."""
        if i in self.kept:
            return self.kept[i]
        picture = np.asarray(self.squared(self.images[i]))
        if (len(self.kept) + 1) * picture.nbytes <= KEEP:
            self.kept[i] = picture
        return picture

    def chosen(self, number: int) -> tuple[list[int], list[str], list[int]]:
        """A batch: images, captions, and by its place in the batch the image of each caption."""
        c = self.config
        rng = np.random.default_rng((c.seed, self.purpose, number))
        # apart, so that `change` leaves the images as they are
        words = np.random.default_rng((c.seed, self.purpose, number, 1))
        shown: list[int] = []
        texts: list[str] = []
        owner: list[int] = []
        taken = set()

        def say(text: str) -> None:
            texts.append(PROMPT.format(text) if words.random() < c.prompted else text)
            owner.append(len(shown))

        def take(caption: int, change: tuple[int, str, str] | None = None) -> None:
            """An image with its caption and, if `change`, a caption with its loss and gain."""
            text = self.texts[caption]
            key = tuple(words_of(text)) or text
            if key in taken or self.owner[caption] in shown:
                return
            taken.add(key)
            say(text)
            if change and words.random() < c.change:
                say(say_change(self.texts[change[0]], *change[1:], words))
            shown.append(self.owner[caption])

        for row in batch_indices(len(self.rows), c.batch_size, number, c.seed):
            numbers = self.said[int(self.rows[row])]
            first = numbers[rng.integers(len(numbers))]
            related = self.relatives.draw(first, rng) if rng.random() < c.related else None
            if related is None:
                take(first)
            else:
                second, own, theirs = related
                take(first, (second, theirs, own))
                take(second, (first, own, theirs))
            if len(shown) >= c.batch_size:
                break
        return shown, texts, owner
