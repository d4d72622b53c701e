"""A rendered world of things that have names: animals, food, vehicles, toys, tools.

A `Scene` is one to four things in nine cells, on a ground with texture, all drawn in one style. A
thing is alone, or small and one of two to four of its kind in a cell. The interface is that of
`scenes`, the world of shapes: `isa_lite.world.World` lists it.

Two scenes are the same answer to a query when they are equal. Jitter, the part of the ground, and
the clutter around the things are drawn at rendering time and do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image

from isa_lite.support.parameters import checked, scene_count, whole
from isa_lite.world import thing_pictures as pictures
from isa_lite.world import thing_words as words
from isa_lite.world.scenes import POSITIONS as POSITIONS
from isa_lite.world.scenes import Modification, pick
from isa_lite.world.thing_pictures import BACKGROUNDS, CLUTTER, COLORS
from isa_lite.world.thing_words import NUMBERS, a, plural

IMAGE_SIZE = 128  # the side of a scene in pixels
NOUNS = tuple(pictures.INDEX["nouns"])
#: Nouns whose drawings take a color. The others look as they are drawn, and nobody speaks of it.
COLORED = tuple(noun for noun, entry in pictures.INDEX["nouns"].items() if entry["colors"])
SIZES = {"small": 0.58, "large": 0.95}  # the longer side as a part of a cell
STYLES = tuple(words.STYLES)
KINDS = ("replace", "add", "remove", "color", "move", "size", "count", "background", "style")
_MOST = 4  # things in a scene, and of a kind in a cell

#: About a tenth of the pairs of noun and style, and of noun and color: seen neither in pre-training
#: nor in distillation, only in evaluation. No noun misses more than one style and one color.
HELD_OUT = frozenset(
    {(noun, STYLES[i // 5 * 2 % 4 + i % 2]) for i, noun in enumerate(NOUNS) if i % 5 < 2}
    | {(noun, tuple(COLORS)[i % 7]) for i, noun in enumerate(COLORED) if i % 10 < 7}
)


@dataclass(frozen=True, order=True)
class Object:
    """One thing, or `count` of them side by side, which are always small. `cell` is 0 to 8, row by
    row; `color` is "" for a noun that takes none.
    """

    cell: int
    noun: str
    color: str
    size: str
    count: int = 1


@dataclass(frozen=True)
class Scene:
    """One to four things, sorted by cell (at most one a cell), a background and a style."""

    objects: tuple[Object, ...]
    background: str
    style: str

    @property
    def held_out(self) -> bool:
        """Whether the scene shows a pair of noun and style, or noun and color, that training never
        does.
        """
        return any(
            (o.noun, self.style) in HELD_OUT or (o.noun, o.color) in HELD_OUT for o in self.objects
        )


@cache
def _nouns(style: str, held_out: bool) -> tuple[str, ...]:
    return tuple(noun for noun in NOUNS if held_out or (noun, style) not in HELD_OUT)


@cache
def _colors(noun: str, held_out: bool) -> tuple[str, ...]:
    """The colors that a noun may have; one that takes none has the color ""."""
    colors = COLORS if noun in COLORED else ("",)
    return tuple(c for c in colors if held_out or (noun, c) not in HELD_OUT)


def _clash(noun: str, other: str) -> bool:
    """Whether one of the two may be taken for the other: "the truck" may be a pickup truck."""
    return noun == other or noun.endswith(" " + other) or other.endswith(" " + noun)


def _new_noun(rng: np.random.Generator, scenes: tuple[Scene, ...], held_out: bool) -> str:
    """A noun that is in none of the scenes and may be seen in the style of the last."""
    there = [o.noun for scene in scenes for o in scene.objects]
    while True:
        noun = pick(rng, _nouns(scenes[-1].style, held_out))
        if not any(_clash(noun, other) for other in there):
            return noun


def _sample_object(rng: np.random.Generator, noun: str, cell: int, held_out: bool) -> Object:
    size = pick(rng, tuple(SIZES))
    count = int(rng.integers(2, _MOST + 1)) if size == "small" and rng.random() < 0.4 else 1
    return Object(cell, noun, pick(rng, _colors(noun, held_out)), size, count)


def sample_scene(rng: np.random.Generator, held_out: bool = False) -> Scene:
    """A random scene; with held-out pairs only if `held_out` is true."""
    scene = Scene((), pick(rng, BACKGROUNDS), pick(rng, STYLES))
    for cell in rng.permutation(9)[: pick(rng, (1, 2, 2, 3, 3, 3, 4, 4))].tolist():
        single = [o for o in scene.objects if o.count == 1 and _alone(o, scene)]
        if single and rng.random() < 0.15:  # a second one, which size tells from the first
            twin = pick(rng, single)
            size = "small" if twin.size == "large" else "large"
            o = Object(cell, twin.noun, pick(rng, _colors(twin.noun, held_out)), size)
        else:
            o = _sample_object(rng, _new_noun(rng, (scene,), held_out), cell, held_out)
        scene = _with(scene, None, o)
    return scene


@checked(n=scene_count(0), seed=whole(0))
def sample_scenes(n: int, seed: int, held_out: bool = False) -> list[Scene]:
    """`n` scenes from one seed."""
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, held_out) for _ in range(n)]


# ----------------------------------------------------------------------------------------------
# images

_MARGIN = 0.025  # of the picture's side, around the nine cells
_GROW = (0.94, 0.97, 1.0)
#: Of so many things in a cell the centers, and the longer side: parts of the cell.
_GROUPS = {
    1: (((0.0, 0.0),), 1.0),
    2: (((-0.22, -0.2), (0.22, 0.2)), 0.56),
    3: (((0.0, -0.22), (-0.24, 0.22), (0.24, 0.22)), 0.5),
    4: (((-0.24, -0.24), (0.24, -0.24), (-0.24, 0.24), (0.24, 0.24)), 0.48),
}


def _placed(
    scene: Scene, rng: np.random.Generator, size: int
) -> Iterator[tuple[Object, Image.Image, int, int, int]]:
    """For each drawing of each thing: the thing, the drawing, x and y of its upper left corner,
    and its longer side.
    """
    # Drawn for all nine cells, so that taking one thing away leaves the others where they are.
    shift, grow = rng.uniform(-1, 1, (9, 2)), rng.integers(0, len(_GROW), 9)
    cell = size * (1 - 2 * _MARGIN) / 3
    for o in scene.objects:
        centers, part = _GROUPS[o.count]
        side = int((SIZES[o.size] * _GROW[grow[o.cell]] if o.count == 1 else part) * cell)
        image = pictures.drawing(o.noun, scene.style, o.color or None, side)
        reach = np.abs(centers).max(0) * cell + np.array(image.size) / 2
        free = np.maximum(0, cell / 2 - reach) * shift[o.cell]  # jitter never leaves the cell
        middle = size * _MARGIN + (np.array([o.cell % 3, o.cell // 3]) + 0.5) * cell + free
        for center in centers:
            x, y = middle + np.array(center) * cell - np.array(image.size) / 2
            yield o, image, int(x + 0.5), int(y + 0.5), side


def render(
    scene: Scene, seed: int = 0, size: int = IMAGE_SIZE, clutter: str = "medium"
) -> Image.Image:
    """The scene as an RGB picture of `size` x `size` pixels. `seed` draws the jitter, the part of
    the ground and the litter; `clutter` is one of `CLUTTER`. Twice the size is the same picture
    with twice the detail.
    """
    if clutter not in CLUTTER:
        raise ValueError(f"clutter must be one of {', '.join(CLUTTER)}, not {clutter!r}")
    rng = np.random.default_rng((seed, 7))
    placed = list(_placed(scene, rng, size))
    variant, kind = rng.integers(pictures.VARIANTS), pick(rng, pictures.LITTER)
    image = pictures.ground(scene.background, int(variant), size).copy()
    spots = rng.random((max(CLUTTER.values()), 3))[: CLUTTER[clutter]]
    for number, x, y in (spots * (pictures.BITS, size, size)).astype(int).tolist():
        bit = pictures.litter(kind, number, size)
        image.paste(bit, (x - bit.width // 2, y - bit.height // 2), bit)
    color, blur = pictures.SHADOWS.get(scene.background, (0, 0, 0)), size / 64
    # all shadows come first: none falls on another thing
    for o, _, x, y, side in placed:
        dark, pad = pictures.shadow(o.noun, scene.style, side, blur)
        image.paste(color, (x - pad + round(size / 128), y - pad + round(size / 64)), dark)
    for _, drawing, x, y, _ in placed:
        image.paste(drawing, (x, y), drawing)
    return image


def render_many(
    scenes: list[Scene], seeds, size: int = IMAGE_SIZE, clutter: str = "medium"
) -> np.ndarray:
    """Scenes as one uint8 array of N x size x size x 3; `seeds` gives one jitter seed a scene."""
    images = np.empty((len(scenes), size, size, 3), np.uint8)
    for image, scene, seed in zip(images, scenes, seeds, strict=True):
        image[:] = render(scene, int(seed), size, clutter)
    return images


def object_masks(scene: Scene, seed: int = 0, size: int = IMAGE_SIZE) -> np.ndarray:
    """Where each of `scene.objects` is in `render(scene, seed, size)`: bool, N x size x size.

    A pixel belongs to a thing when any part of it is covered; a shadow belongs to none.
    """
    masks = {o: Image.new("L", (size, size)) for o in scene.objects}
    for o, drawing, x, y, _ in _placed(scene, np.random.default_rng((seed, 7)), size):
        alpha = drawing.getchannel("A")
        masks[o].paste(255, (x, y), alpha.point(lambda p: 255 * (p > 0)))
    return np.stack([np.asarray(mask) > 0 for mask in masks.values()])


# ---------------------------------------------------------------------------------------------
# language


def _named(o: Object, rng: np.random.Generator, size: bool = True, color: bool = True) -> str:
    """A thing without article: "small red car", "three red cars"."""
    said = [pick(rng, words.SIZE_WORDS[o.size])] if size and o.count == 1 else []
    said += [o.color] if color and o.color else []
    return " ".join([*said, o.noun if o.count == 1 else plural(o.noun)])


def _some(o: Object, rng: np.random.Generator, size: bool = True, color: bool = True) -> str:
    """A thing that is new to the reader: "a small red car", "three red cars"."""
    name = _named(o, rng, size, color)
    return a(name) if o.count == 1 else f"{NUMBERS[o.count]} {name}"


def _at(o: Object, rng: np.random.Generator) -> str:
    return pick(rng, words.PLACES[o.cell][0][:2])


def caption(scene: Scene, rng: np.random.Generator, full: bool = True) -> str:
    """One of several phrasings of the scene; with `full` false, some of what can be said is left
    out.
    """
    objects = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    if not full:
        objects = objects[: rng.integers(1, len(objects) + 1)]
    chances = (1, 1, 1, 1, 1) if full else (0.5, 0.85, 0.6, 0.4, 0.4)
    things = []
    for o in objects:
        size, color, place = (rng.random() < chance for chance in chances[:3])
        things.append(_some(o, rng, size, color) + (f" {_at(o, rng)}" if place else ""))
    text = _list(things)
    ground, style = (rng.random() < chance for chance in chances[3:])
    where, how = (
        pick(rng, words.GROUNDS[scene.background][0]),
        pick(rng, words.STYLES[scene.style][0]),
    )
    tail = [where] * ground + [how] * style
    start = pick(
        rng, ("", "", "a picture of ", "there is " if objects[0].count == 1 else "there are ")
    )
    return start + ", ".join([text, *tail])


def _list(items: list[str]) -> str:
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


# ----------------------------------------------------------------------------------------
# modifications


def _with(scene: Scene, old: Object | None, new: Object | None) -> Scene:
    objects = [o for o in scene.objects if o != old]
    return replace(scene, objects=tuple(sorted(objects + ([new] if new else []))))


def _alone(o: Object, scene: Scene) -> bool:
    return sum(p.noun == o.noun for p in scene.objects) == 1


def _the(o: Object, scene: Scene, rng: np.random.Generator) -> dict[str, str]:
    """Words that pick out `o` among the things of the scene: `the` may say its place, `short` does
    not, and is "" where that picks out more than one.
    """
    ways = []
    for size, color in ((0, 0), (0, 1), (1, 0), (1, 1)):
        same = [
            p
            for p in scene.objects
            if p.noun == o.noun
            and (not size or p.size == o.size)
            and (not color or p.color == o.color)
        ]
        if len(same) == 1 and (o.color or not color) and (o.count == 1 or not size):
            ways.append((size, color))
    short, alone = "", _alone(o, scene)
    number = f"{NUMBERS[o.count]} " if o.count > 1 and rng.random() < 0.5 else ""
    if ways:
        # the shortest way is what people say first; the others keep the language varied
        size, color = ways[0] if rng.random() < 0.7 else pick(rng, ways)
        short = f"the {number}{_named(o, rng, size, color)}"
        if rng.random() < (0.92 if alone else 0.75):
            return {"the": short, "short": short}
    where = _at(o, rng) if alone else words.PLACES[o.cell][0][-1]
    return {"the": f"the {number}{_named(o, rng, False, False)} {where}", "short": short}


def _chosen(ref: Scene, now: Scene, rng: np.random.Generator, fits=lambda o: True) -> Object | None:
    """A thing that is in both scenes, of a noun of which nothing has changed."""
    changed = {o.noun for o in set(ref.objects) ^ set(now.objects)}
    there = [o for o in now.objects if o.noun not in changed and fits(o)]
    return pick(rng, there) if there else None


def _free_cell(ref: Scene, now: Scene, rng: np.random.Generator) -> int:
    taken = {o.cell for o in ref.objects + now.objects}
    return pick(rng, [c for c in range(9) if c not in taken])


# An edit changes the scene `now`, and speaks of the reference `ref`, which is all that the reader
# sees. It gives the new scene and what fills the slots of `thing_words.PHRASES`; None where there
# is nothing to change.
Edit = tuple[Scene, dict[str, str]]


def _replace(ref: Scene, now: Scene, rng: np.random.Generator, held_out: bool) -> Edit | None:
    if (o := _chosen(ref, now, rng)) is None:
        return None
    noun = _new_noun(rng, (ref, now), held_out)
    new = replace(o, noun=noun, color=pick(rng, _colors(noun, held_out)))
    slots = {"some": _some(new, rng, size=False), "is_": "is" if o.count == 1 else "are"}
    return _with(now, o, new), slots | _the(o, ref, rng)


def _add(ref: Scene, now: Scene, rng: np.random.Generator, held_out: bool) -> Edit | None:
    if len(now.objects) == _MOST:
        return None
    noun, cell = _new_noun(rng, (ref, now), held_out), _free_cell(ref, now, rng)
    new = _sample_object(rng, noun, cell, held_out)
    return _with(now, None, new), {"some": f"{_some(new, rng)} {_at(new, rng)}"}


def _remove(ref: Scene, now: Scene, rng: np.random.Generator, held_out: bool) -> Edit | None:
    if len(now.objects) == 1 or (o := _chosen(ref, now, rng)) is None:
        return None
    return _with(now, o, None), _the(o, ref, rng)


def _color(ref: Scene, now: Scene, rng: np.random.Generator, held_out: bool) -> Edit | None:
    if (o := _chosen(ref, now, rng, lambda o: o.color)) is None:
        return None
    new = replace(o, color=pick(rng, [c for c in _colors(o.noun, held_out) if c != o.color]))
    slots = {"color": new.color, "old": o.color, "ones": "one" if o.count == 1 else "ones"}
    slots["some"] = _some(new, rng, size=False) if _alone(o, ref) else ""
    return _with(now, o, new), slots | _the(o, ref, rng)


def _move(ref: Scene, now: Scene, rng: np.random.Generator, held_out: bool) -> Edit | None:
    if (o := _chosen(ref, now, rng)) is None or not (the := _the(o, ref, rng))["short"]:
        return None
    new = replace(o, cell=_free_cell(ref, now, rng))
    return _with(now, o, new), {"at": _at(new, rng), "to": words.PLACES[new.cell][1]} | the


def _size(ref: Scene, now: Scene, rng: np.random.Generator, held_out: bool) -> Edit | None:
    if (o := _chosen(ref, now, rng, lambda o: o.count == 1)) is None:
        return None
    new = replace(o, size="small" if o.size == "large" else "large")
    size, more = ("small", "smaller") if new.size == "small" else ("big", "bigger")
    slots = {"size": size, "more": more, "noun": o.noun if _alone(o, ref) else ""}
    return _with(now, o, new), slots | _the(o, ref, rng)


def _count(ref: Scene, now: Scene, rng: np.random.Generator, held_out: bool) -> Edit | None:
    o = _chosen(ref, now, rng, lambda o: o.size == "small" and _alone(o, ref))
    if o is None:
        return None
    new = replace(o, count=pick(rng, [n for n in range(1, _MOST + 1) if n != o.count]))
    many, one, more = plural(o.noun), o.noun, NUMBERS[abs(new.count - o.count)]
    if new.count < o.count:
        change = f"take away {more} of the {many}"
    else:
        change = f"add another {one}" if more == "one" else f"add {more} more {many}"
        change += f" next to the {'first' if o.count == 1 else 'others'}"
    some = f"only one {one}" if new.count == 1 else f"{NUMBERS[new.count]} {many}"
    slots = {"some": some, "just": some.replace("only", "just"), "change": change}
    return _with(now, o, new), slots | {"before": NUMBERS[o.count]}


def _ground(ref: Scene, now: Scene, rng: np.random.Generator, held_out: bool) -> Edit | None:
    new = pick(rng, [b for b in BACKGROUNDS if b != now.background])
    places, to, called = words.GROUNDS[new]
    slots = {"at": pick(rng, places), "to": to, "called": called}
    return replace(now, background=new), slots | {"before": words.GROUNDS[now.background][2]}


def _restyle(ref: Scene, now: Scene, rng: np.random.Generator, held_out: bool) -> Edit | None:
    seen = [s for s in STYLES if held_out or not any((o.noun, s) in HELD_OUT for o in now.objects)]
    if not (styles := [s for s in seen if s != now.style]):
        return None
    new = pick(rng, styles)
    hows, what, drawn = words.STYLES[new]
    slots = {"how": pick(rng, hows), "redrawn": hows[0], "what": what, "drawn": drawn}
    return replace(now, style=new), slots


_EDITS: dict[str, Callable[[Scene, Scene, np.random.Generator, bool], Edit | None]] = {
    "replace": _replace,
    "add": _add,
    "remove": _remove,
    "color": _color,
    "move": _move,
    "size": _size,
    "count": _count,
    "background": _ground,
    "style": _restyle,
}


def modify(
    scene: Scene,
    rng: np.random.Generator,
    kinds: tuple[str, ...] | None = None,
    held_out: bool = False,
) -> tuple[Scene, Modification]:
    """The scene after one or two changes, and the words that ask for them.

    kinds: which of `KINDS`; at random, one in seven of ten cases and two otherwise, when not given.
    Two changes are never about the same noun. Raises ValueError for a kind that is unknown or that
    this scene cannot take (removing its only thing).
    """
    if kinds is not None and (not 1 <= len(kinds) <= 2 or len(set(kinds)) < len(kinds)):
        raise ValueError(f"one or two different kinds make a modification, not {kinds}")
    for kind in kinds or ():
        if kind not in KINDS:
            raise ValueError(f"cannot apply {kind!r}; the kinds are {', '.join(KINDS)}")
    for _ in range(100):
        # the ground and the style are spoken of last
        chosen = kinds or [KINDS[i] for i in rng.permutation(9)[: 1 if rng.random() < 0.7 else 2]]
        if kinds is None and set(chosen) == {"add", "remove"}:
            continue
        now, phrasings = scene, []
        for kind in sorted(chosen, key=KINDS.index):
            edit = _EDITS[kind](scene, now, rng, held_out)
            if edit is None:
                break
            now, slots = edit
            phrasings.append(words.phrases(kind, slots))
        else:
            return now, Modification(_said(phrasings, rng), tuple(chosen))
    raise ValueError(
        f"cannot apply {' and '.join(kinds or KINDS)} to a scene of {len(scene.objects)} thing(s):"
        f" {caption(scene, rng)}"
    )


def _said(phrasings: list[list[list[str]]], rng: np.random.Generator) -> str:
    """One text for one or two edits: all orders, or all descriptions, or words that stand alone."""
    how = rng.random()
    if len(phrasings) == 1 and how < 0.2 and phrasings[0][2]:
        return pick(rng, phrasings[0][2])
    if how < 0.6 or not all(described for _, described, _ in phrasings):
        return " and ".join(pick(rng, orders) for orders, _, _ in phrasings)
    texts = [pick(rng, described) for _, described, _ in phrasings]
    both = all(text.startswith("with") for text in texts)
    return pick(rng, words.STARTS) + (" and " if both else ", ").join(texts)


def confuse(scene: Scene, rng: np.random.Generator) -> Scene:
    """A scene that shares the words of this one's caption but one, or all of them in another
    binding: a hard negative. Another noun, or two things trade places, colors or sizes. Never a
    held-out pair.
    """
    while True:
        objects = list(scene.objects)
        i, j = rng.integers(len(objects)), rng.integers(len(objects))
        a, b, field = objects[i], objects[j], pick(rng, ("cell", "color", "size"))
        if i == j or rng.random() < 0.3:
            noun = _new_noun(rng, (scene,), False)
            color = a.color if a.color in _colors(noun, False) else pick(rng, _colors(noun, False))
            objects[i] = replace(a, noun=noun, color=color)
        elif field == "cell" or (
            a.color and b.color if field == "color" else a.count == b.count == 1
        ):
            objects[i] = replace(a, **{field: getattr(b, field)})
            objects[j] = replace(b, **{field: getattr(a, field)})
        new = replace(scene, objects=tuple(sorted(objects)))
        if new != scene and not new.held_out:
            return new
