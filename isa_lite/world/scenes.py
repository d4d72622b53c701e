"""A small rendered world for composed image retrieval, in the line of TIRG's CSS scenes. Ours.

A `Scene` is a set of one to three coloured objects on a 3x3 grid, with a background and a
whole-image style. From a scene come its image (`render`), the masks of its objects
(`object_masks`), its captions (`caption`), and *modifications*: an edit with the words that ask for
it (`modify`). Everything random is drawn from a `numpy.random.Generator` that the caller seeds, so
nothing needs to be stored.

Two scenes are the same answer to a query when they are equal; jitter in place, size and colour is
drawn at rendering time and does not count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from isa_lite.support.parameters import checked, scene_count, whole
from isa_lite.support.settings import IMAGE_SIZE

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")
COLORS = {
    "red": (214, 39, 40),
    "orange": (255, 140, 20),
    "yellow": (246, 215, 40),
    "green": (48, 150, 60),
    "cyan": (50, 200, 220),
    "blue": (40, 85, 200),
    "purple": (128, 60, 170),
    "pink": (245, 140, 190),
}
SIZES = {"small": 0.27, "large": 0.43}  # half width as a part of a cell
POSITIONS = ("top left", "top", "top right", "left", "center", "right")
POSITIONS += ("bottom left", "bottom", "bottom right")
BACKGROUNDS = ("white", "gray", "black", "sand", "dotted", "checkered")
STYLES = ("flat", "outline", "shaded", "striped")
KINDS = ("color", "size", "move", "add", "remove", "background", "style")

#: About a tenth of the shape-colour pairs: seen neither in pre-training nor in distillation, only
#: in evaluation. Each of these shapes and colours is seen in every other pair, so nothing but the
#: combination is new.
HELD_OUT = frozenset(
    zip(
        ("circle", "square", "triangle", "star", "heart", "cross"),
        ("purple", "pink", "green", "red", "blue", "cyan"),
        strict=True,
    )
)


@dataclass(frozen=True, order=True)
class Object:
    """One object: `cell` is 0 to 8, row by row; the other fields are words of this module."""

    cell: int
    shape: str
    color: str
    size: str


@dataclass(frozen=True)
class Scene:
    """One to three objects, sorted by cell (at most one a cell), a background and a style."""

    objects: tuple[Object, ...]
    background: str
    style: str

    @property
    def held_out(self) -> bool:
        """Whether the scene shows a shape-colour pair that training never does."""
        return any((o.shape, o.color) in HELD_OUT for o in self.objects)


def pick(rng: np.random.Generator, items):
    """One of the items."""
    # not rng.choice, which is ten times slower on short tuples
    return items[rng.integers(len(items))]


def sample_object(rng: np.random.Generator, cell: int, held_out: bool = False) -> Object:
    """A random object in `cell`; a held-out shape-colour pair only if `held_out` is true."""
    while True:
        shape, color = pick(rng, SHAPES), pick(rng, tuple(COLORS))
        if held_out or (shape, color) not in HELD_OUT:
            return Object(cell, shape, color, pick(rng, tuple(SIZES)))


def sample_scene(rng: np.random.Generator, held_out: bool = False) -> Scene:
    """A random scene; with held-out shape-colour pairs only if `held_out` is true."""
    cells = rng.permutation(9)[: rng.integers(1, 4)]
    objects = tuple(sorted(sample_object(rng, int(c), held_out) for c in cells))
    return Scene(objects, pick(rng, BACKGROUNDS), pick(rng, STYLES))


@checked(n=scene_count(0), seed=whole(0))
def sample_scenes(n: int, seed: int, held_out: bool = False) -> list[Scene]:
    """`n` scenes from one seed."""
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, held_out) for _ in range(n)]


# ----------------------------------------------------------------------------------------------
# images


def _outline(shape: str) -> np.ndarray:
    """The shape's outer contour as N x 2 points in [-1, 1], y downwards."""
    t = np.linspace(0, 2 * math.pi, 28, endpoint=False)
    if shape in ("circle", "ring"):
        points = np.stack([np.cos(t), np.sin(t)], 1)
    elif shape == "square":
        points = np.array([(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)])
    elif shape == "triangle":
        points = np.array([(0, -0.98), (1, 0.82), (-1, 0.82)])
    elif shape == "star":
        angle = np.arange(10) * math.pi / 5 - math.pi / 2
        radius = np.where(np.arange(10) % 2, 0.44, 1.08)[:, None]
        points = np.stack([np.cos(angle), np.sin(angle)], 1) * radius
    elif shape == "heart":
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        x = 16 * np.sin(t) ** 3
        points = np.stack([x / 17, -y / 16 - 0.1], 1)
    elif shape == "cross":
        a, b = 0.34, 0.98
        arm, points = np.array([(-a, -b), (a, -b), (a, -a)]), []
        for _ in range(4):
            points, arm = [*points, *arm], arm @ [[0, 1], [-1, 0]]  # a quarter turn
        points = np.array(points)
    elif shape == "moon":
        outer = np.linspace(math.radians(50), math.radians(310), 20)
        tip = np.array([math.cos(outer[0]), math.sin(outer[0])])
        center = np.array([0.62, 0.0])  # of the circle that bites the crescent out
        bite, end = float(np.hypot(*(tip - center))), math.atan2(tip[1], tip[0] - 0.62)
        inner = np.linspace(2 * math.pi - end, end, 16)
        inside = center + bite * np.stack([np.cos(inner), np.sin(inner)], 1)
        points = np.concatenate([np.stack([np.cos(outer), np.sin(outer)], 1), inside]) + [0.2, 0]
    else:
        raise ValueError(f"unknown shape {shape!r}; the shapes are {', '.join(SHAPES)}")
    return points


_CONTOURS = {shape: _outline(shape) for shape in SHAPES}
_HOLE = 0.48  # of a ring: inner over outer radius


@cache
def _background(name: str, pixels: int) -> Image.Image:
    plain = {
        "white": (250, 250, 250),
        "gray": (150, 152, 158),
        "black": (28, 28, 34),
        "sand": (226, 205, 165),
    }
    if name in plain:
        return Image.new("RGB", (pixels, pixels), plain[name])
    image = Image.new(
        "RGB", (pixels, pixels), (232, 240, 236) if name == "dotted" else (222, 226, 240)
    )
    draw, step = ImageDraw.Draw(image), pixels / 9
    for row in range(9):
        for col in range(9):
            x, y = col * step, row * step
            if name == "dotted":
                draw.ellipse(
                    (x + step * 0.33, y + step * 0.33, x + step * 0.67, y + step * 0.67),
                    fill=(120, 150, 140),
                )
            elif (row + col) % 2:
                draw.rectangle((x, y, x + step - 1, y + step - 1), fill=(186, 194, 220))
    return image


@cache
def _stripes(pixels: int) -> Image.Image:
    """A mask of diagonal stripes, 4.5 to a cell."""
    y, x = np.mgrid[:pixels, :pixels]
    return Image.fromarray((((x + y) * 13.5 / pixels) % 1 < 0.5).astype(np.uint8) * 255)


def _mix(a, b, part: float) -> tuple[int, ...]:
    return tuple(round(x + (y - x) * part) for x, y in zip(a, b, strict=True))


def _geometry(scene: Scene, seed: int, pixels: int):
    """For each object its contour in pixels, its half width and its jittered colour."""
    rng = np.random.default_rng((seed, 7))
    cell = pixels / 3
    # Drawn for all nine cells, so that taking one object away leaves the others where they are.
    shift = rng.uniform(-0.09, 0.09, (9, 2))
    grow = rng.uniform(0.93, 1.07, 9)
    tint = rng.integers(-12, 13, (9, 3))
    for o in scene.objects:
        half = SIZES[o.size] * grow[o.cell] * cell
        slack = max(0.0, 0.49 - half / cell * 1.08)  # jitter never leaves the cell
        place = np.array([o.cell % 3, o.cell // 3]) + 0.5
        where = (place + np.clip(shift[o.cell], -slack, slack)) * cell
        color = tuple(int(c) for c in np.clip(np.array(COLORS[o.color]) + tint[o.cell], 0, 255))
        yield o, where, half, color


def _flat(points: np.ndarray) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in points]


def _silhouette(
    draw: ImageDraw.ImageDraw, shape: str, where: np.ndarray, half: float, fill, hole
) -> None:
    draw.polygon(_flat(_CONTOURS[shape] * half + where), fill=fill)
    if shape == "ring":
        draw.polygon(_flat(_CONTOURS[shape] * half * _HOLE + where), fill=hole)


def _line_width(pixels: int) -> int:
    return max(2, round(pixels * 0.018))


def _lines(
    draw: ImageDraw.ImageDraw, shape: str, where: np.ndarray, half: float, width: int, fill
) -> None:
    for scale in (1.0, _HOLE) if shape == "ring" else (1.0,):
        contour = _flat(_CONTOURS[shape] * (half * scale - width * 0.5) + where)
        draw.line([*contour, *contour[:2]], fill=fill, width=width, joint="curve")


def render(scene: Scene, seed: int = 0, size: int = IMAGE_SIZE) -> Image.Image:
    """The scene as an RGB picture of `size` x `size` pixels; `seed` draws the jitter."""
    pixels = 2 * size  # drawn at twice the size, then averaged
    ground = _background(scene.background, pixels)
    image = ground.copy()
    draw = ImageDraw.Draw(image)
    for o, where, half, color in _geometry(scene, seed, pixels):
        mask = None
        if scene.style in ("striped", "shaded") or o.shape == "ring":
            mask = Image.new("L", (pixels, pixels))
            _silhouette(ImageDraw.Draw(mask), o.shape, where, half, 255, 0)
        if scene.style == "outline":
            width = _line_width(pixels)
            _lines(draw, o.shape, where, half, width, color)
        elif scene.style == "flat" and mask is None:
            _silhouette(draw, o.shape, where, half, color, None)
        elif scene.style == "flat":
            image.paste(color, mask=mask)
        elif scene.style == "striped":
            image.paste(_mix(color, (255, 255, 255), 0.72), mask=mask)
            stripes = Image.new("L", (pixels, pixels))
            stripes.paste(_stripes(pixels), mask=mask)
            image.paste(color, mask=stripes)
        else:  # shaded: dark rim, body, soft light from the upper left, all within the silhouette
            ball = Image.new("RGB", (pixels, pixels), _mix(color, (0, 0, 0), 0.5))
            brush = ImageDraw.Draw(ball)
            lights = ((1.25, 0.25), (1.02, 0.0), (0.72, -0.22), (0.4, -0.5), (0.18, -0.8))
            x, y = where - half * 0.3
            for radius, light in lights:
                shade = _mix(color, (0, 0, 0) if light >= 0 else (255, 255, 255), abs(light))
                reach = half * radius
                brush.ellipse((x - reach, y - reach, x + reach, y + reach), fill=shade)
            image.paste(ball, mask=mask)
    return image.reduce(2)


def render_many(scenes: list[Scene], seeds, size: int = IMAGE_SIZE) -> np.ndarray:
    """Scenes as one uint8 array of N x size x size x 3; `seeds` gives one jitter seed a scene."""
    pairs = zip(scenes, seeds, strict=True)
    return np.stack([np.asarray(render(s, int(seed), size)) for s, seed in pairs])


def object_masks(scene: Scene, seed: int = 0, size: int = IMAGE_SIZE) -> np.ndarray:
    """Where each object of `scene.objects` is in `render(scene, seed, size)`: bool, N x size x
    size.

    A pixel belongs to an object when any part of it is covered; a ring's hole does not.
    """
    masks = []
    for o, where, half, _ in _geometry(scene, seed, 2 * size):
        mask = Image.new("L", (2 * size, 2 * size))
        _silhouette(ImageDraw.Draw(mask), o.shape, where, half, 255, 0)
        # the line lies a little over the silhouette's edge, and in a ring's hole
        if scene.style == "outline":
            _lines(ImageDraw.Draw(mask), o.shape, where, half, _line_width(2 * size), 255)
        masks.append(np.asarray(mask).reshape(size, 2, size, 2).max((1, 3)) > 0)
    return np.stack(masks)


# ---------------------------------------------------------------------------------------------
# language

_SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
_MORE = {"small": "smaller", "large": "bigger"}
_STYLE_WORDS = {
    "flat": ("flat style", "flat colors"),
    "outline": ("outline style", "outline drawing"),
    "shaded": ("shaded style", "shaded drawing"),
    "striped": ("striped style", "striped drawing"),
}


def _describe(o: Object, rng: np.random.Generator, size=True, color=True, position=True) -> str:
    words = []
    if size:
        words.append(pick(rng, _SIZE_WORDS[o.size]))
    if color:
        words.append(o.color)
    words.append(o.shape)
    text = " ".join(words)
    if position:
        text = f"{text} {pick(rng, ('', 'at ', 'at the '))}{POSITIONS[o.cell]}"
    return text


def caption(scene: Scene, rng: np.random.Generator, full: bool = True) -> str:
    """One of several phrasings of the scene; unless `full`, some of it is left out."""
    objects = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    if full:
        said = [_describe(o, rng) for o in objects]
        ground, style = True, True
    else:
        objects = objects[: rng.integers(1, len(objects) + 1)]
        said = [_describe(o, rng, *(rng.random() < p for p in (0.6, 0.85, 0.6))) for o in objects]
        ground, style = rng.random() < 0.4, rng.random() < 0.4
    article, joiner = pick(rng, ("", "", "a ")), pick(rng, (", ", ", ", " and "))
    parts = [joiner.join(article + text for text in said)]
    tail = []
    if ground:
        on, behind = pick(rng, ("on ", "on a ")), pick(rng, ("", " background"))
        tail.append(f"{on}{scene.background}{behind}")
    if style:
        tail.append(f"{pick(rng, ('in ', ''))}{pick(rng, _STYLE_WORDS[scene.style])}")
    if len(tail) == 2 and rng.random() < 0.3:
        tail.reverse()
    return pick(rng, ("", "a photo of ", "a picture of ")) + ", ".join(parts + tail)


# ----------------------------------------------------------------------------------------
# modifications


@dataclass(frozen=True)
class Modification:
    """An edit of a scene: `text` asks for it, `kinds` names what changed (one or two `KINDS`)."""

    text: str
    kinds: tuple[str, ...]


def _refer(o: Object, scene: Scene, rng: np.random.Generator) -> str:
    """Words that pick out `o` among the scene's objects: one of the unambiguous ways."""
    ways = []
    for way in ((0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (0, 0, 1), (0, 1, 1), (1, 1, 1)):

        def told(p: Object, way=way) -> tuple:
            parts = zip((p.size, p.color, p.cell), way, strict=True)
            return p.shape, *(part for part, said in parts if said)

        if [told(p) for p in scene.objects].count(told(o)) == 1:
            ways.append(tuple(map(bool, way)))
    # Colour and shape is what people say first; the other ways keep the language varied.
    usual = (False, True, False)
    choice = usual if usual in ways and rng.random() < 0.5 else pick(rng, ways)
    return _describe(o, rng, *choice)


def _with(scene: Scene, old: Object | None, new: Object | None) -> Scene:
    objects = [o for o in scene.objects if o != old]
    return replace(scene, objects=tuple(sorted(objects + ([new] if new else []))))


def _free_cell(scene: Scene, rng: np.random.Generator) -> int:
    taken = {o.cell for o in scene.objects}
    return pick(rng, [c for c in range(9) if c not in taken])


#: Ways to ask for each kind of edit.
_PHRASES = {
    "color": ("make the {who} {new}", "change the color of the {who} to {new}"),
    "size": ("make the {who} {more}", "make the {who} {new}", "the {who} is now {new}"),
    "move": ("move the {who} to the {new}", "put the {who} at the {new}"),
    "add": ("add a {new}", "with a {new} added", "there is also a {new}"),
    "remove": ("remove the {who}", "without the {who}", "take away the {who}"),
    "background": ("change the background to {new}", "make the background {new}"),
    "style": ("change it to {new}", "now in {new}", "in {new} instead"),
}
_PHRASES["color"] += ("the {who} is now {new}",)
_PHRASES["move"] += ("the {who} is now at the {new}",)
_PHRASES["background"] += ("on a {new} background instead",)


def _edited(kind: str, scene: Scene, rng: np.random.Generator, held_out: bool) -> tuple[Scene, str]:
    """The scene after one edit, and the words that ask for it."""
    words: dict[str, str] = {}
    if kind in ("color", "size", "move", "remove"):
        o = pick(rng, scene.objects)
    if kind == "color":
        colors = [c for c in COLORS if c != o.color and (held_out or (o.shape, c) not in HELD_OUT)]
        words["new"] = pick(rng, colors)
        new = _with(scene, o, replace(o, color=words["new"]))
    elif kind == "move":
        cell = _free_cell(scene, rng)
        words["new"], new = POSITIONS[cell], _with(scene, o, replace(o, cell=cell))
    elif kind == "remove":
        new = _with(scene, o, None)
    elif kind == "add":
        added = sample_object(rng, _free_cell(scene, rng), held_out)
        words["new"], new = _describe(added, rng), _with(scene, None, added)
    elif kind == "background":
        words["new"] = pick(rng, [b for b in BACKGROUNDS if b != scene.background])
        new = replace(scene, background=words["new"])
    elif kind == "style":
        style = pick(rng, [s for s in STYLES if s != scene.style])
        words["new"], new = pick(rng, _STYLE_WORDS[style]), replace(scene, style=style)
    if kind in ("color", "size", "move", "remove"):
        words["who"] = _refer(o, scene, rng)
    if kind == "size":
        size = "small" if o.size == "large" else "large"
        words["new"], words["more"] = pick(rng, _SIZE_WORDS[size]), _MORE[size]
        new = _with(scene, o, replace(o, size=size))
    return new, pick(rng, _PHRASES[kind]).format(**words)


def modify(
    scene: Scene,
    rng: np.random.Generator,
    kinds: tuple[str, ...] | None = None,
    held_out: bool = False,
) -> tuple[Scene, Modification]:
    """The scene after one or two changes, and the words that ask for them.

    kinds: which of `KINDS`; at random, one in seven of ten cases and two otherwise, when not given.
    Raises ValueError for a kind that is unknown or that this scene cannot take (removing its only
    object).
    """
    count = len(scene.objects)
    possible = [
        k for k in KINDS if not (k == "remove" and count == 1) and not (k == "add" and count == 3)
    ]
    if kinds is None:
        order = [possible[i] for i in rng.permutation(len(possible))]
        # An object that has just been added is not the one to talk about again.
        kinds = tuple(order[: 1 if rng.random() < 0.7 else 2])
        if set(kinds) == {"add", "remove"}:
            kinds = kinds[:1]
    if not 1 <= len(kinds) <= 2 or len(set(kinds)) < len(kinds):
        raise ValueError(f"one or two different kinds make a modification, not {kinds}")
    for kind in kinds:
        if kind not in possible:
            raise ValueError(
                f"cannot apply {kind!r} to a scene of {count} object(s); here the kinds are"
                f" {', '.join(possible)}"
            )
    while True:
        # object edits speak of the reference as it stands: what removes or adds comes last
        new, texts = scene, []
        for kind in sorted(kinds, key=lambda k: k in ("add", "remove")):
            new, text = _edited(kind, new, rng, held_out)
            texts.append(text)
        if new != scene and (len(kinds) == 1 or len(_changes(scene, new)) >= len(kinds)):
            return new, Modification(" and ".join(texts), tuple(kinds))


def confuse(scene: Scene, rng: np.random.Generator) -> Scene:
    """A hard negative: a scene with the words of this caption but one, or in another binding.

    One object gets another shape, or two trade places, colours or shapes. Never a held-out pair.
    """
    while True:
        objects = list(scene.objects)
        i, j = rng.integers(len(objects)), rng.integers(len(objects))
        field = pick(rng, ("cell", "color", "shape"))
        if i == j or rng.random() < 0.3:
            objects[i] = replace(objects[i], shape=pick(rng, SHAPES))
        else:
            a, b = objects[i], objects[j]
            objects[i] = replace(a, **{field: getattr(b, field)})
            objects[j] = replace(b, **{field: getattr(a, field)})
        new = replace(scene, objects=tuple(sorted(objects)))
        if new != scene and not new.held_out:
            return new


def _changes(a: Scene, b: Scene) -> set:
    """What differs between two scenes, to see that no change undid or hid another."""
    found = {name for name in ("background", "style") if getattr(a, name) != getattr(b, name)}
    gone, come = set(a.objects) - set(b.objects), set(b.objects) - set(a.objects)
    return found | {("object", o) for o in gone | come}
