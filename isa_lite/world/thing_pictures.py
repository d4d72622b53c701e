"""What pictures of things are put together from: drawings, shadows, grounds, and litter.

Everything is made once for a size and kept, because pasting is quick and drawing is not. Sizes are
parts of the picture's side: at twice the side the same picture has twice the detail.
"""

from __future__ import annotations

import json
import math
from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from isa_lite.support.settings import DATA

THINGS = DATA / "things"
INDEX = json.loads((THINGS / "index.json").read_text(encoding="utf-8"))
COLORS = {
    "red": (222, 40, 44),
    "orange": (250, 132, 22),
    "yellow": (250, 206, 40),
    "green": (52, 160, 70),
    "blue": (38, 104, 214),
    "purple": (132, 68, 190),
    "pink": (246, 124, 182),
}
LITTER = ("leaves", "pebbles", "confetti")
#: How many bits of litter lie in a picture.
CLUTTER = {"none": 0, "light": 7, "medium": 16, "heavy": 36}
#: The color of what lies around a thing; black where there is none: a dark ground takes a glow.
SHADOWS = {"night": (140, 160, 226)}
VARIANTS = 8  # of each ground
_SIDE = 256  # pixels of a ground before it is resized


# ---------------------------------------------------------------------------------------------
# drawings


@cache
def _sheet(style: str) -> Image.Image:
    with Image.open(THINGS / f"{style}.webp") as image:
        return image.convert("RGBA")


def _hsv(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB").convert("HSV"), np.float32) / 255


def _paint(drawing: Image.Image, main: list[float], color: str) -> Image.Image:
    """The drawing with its main hue turned to a color; saturation and value are scaled alike, so
    that shades and lights stay. Other hues, grays and outlines stay as they are.
    """
    hsv = _hsv(drawing)
    off = (hsv[..., 0] - main[0] + 0.5) % 1 - 0.5
    part = np.clip((0.13 - abs(off)) / 0.04, 0, 1) * np.clip(10 * hsv[..., 1] - 1, 0, 1)
    target = _hsv(Image.new("RGB", (1, 1), COLORS[color]))[0, 0]
    new = np.stack(
        [(target[0] + 0.3 * off) % 1, *(hsv[..., i] * target[i] / main[i] for i in (1, 2))], -1
    )
    new = Image.fromarray((255 * new.clip(0, 1)).round().astype(np.uint8), "HSV").convert("RGB")
    mask = Image.fromarray((255 * part).round().astype(np.uint8))
    painted = Image.composite(new, drawing.convert("RGB"), mask)
    painted.putalpha(drawing.getchannel("A"))
    return painted


@lru_cache(512)
def _drawing(noun: str, style: str, color: str | None) -> Image.Image:
    at, cell, columns = list(INDEX["nouns"]).index(noun), INDEX["cell"], INDEX["columns"]
    x, y = at % columns * cell, at // columns * cell
    drawing = _sheet(style).crop((x, y, x + cell, y + cell))
    drawing = drawing.crop(drawing.getchannel("A").getbbox())
    return _paint(drawing, INDEX["nouns"][noun]["main"][style], color) if color else drawing


@cache
def drawing(noun: str, style: str, color: str | None, side: int) -> Image.Image:
    """The drawing as RGBA, its longer side `side` pixels. What is nearly clear is clear."""
    image = _drawing(noun, style, color)
    scale = side / max(image.size)
    image = image.resize(
        tuple(max(1, round(x * scale)) for x in image.size), Image.Resampling.LANCZOS
    )
    image.putalpha(image.getchannel("A").point(lambda a: a if a >= 16 else 0))
    return image


@cache
def shadow(noun: str, style: str, side: int, blur: float) -> tuple[Image.Image, int]:
    """The soft shadow of a drawing as an opacity, and by how many pixels it is wider all round."""
    alpha = drawing(noun, style, None, side).getchannel("A")
    pad = math.ceil(2.5 * blur)
    wide = Image.new("L", (alpha.width + 2 * pad, alpha.height + 2 * pad))
    wide.paste(alpha, (pad, pad))
    return wide.filter(ImageFilter.GaussianBlur(blur)).point(lambda a: a * 0.7), pad


# ---------------------------------------------------------------------------------------------
# grounds


def _noise(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Smooth noise about 0, with so many bumps down and across."""
    bumps = Image.fromarray(rng.standard_normal((rows, columns)).astype(np.float32))
    return np.asarray(bumps.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC))


def _clouds(rng: np.random.Generator) -> np.ndarray:
    return sum(_noise(rng, n, n) / n**0.7 for n in (3, 6, 12, 24, 48)) * 2


def _blend(low: tuple, high: tuple, part: np.ndarray) -> np.ndarray:
    """Colors from `low`, where `part` is 0, to `high`, where it is 1: H x W x 3."""
    part = part.clip(0, 1)[..., None]
    return np.array(low) * (1 - part) + np.array(high) * part


def _photo(rng: np.random.Generator, name: str, contrast: float) -> np.ndarray:
    """A random part of a gray photograph, about 0.5."""
    with Image.open(THINGS / f"{name}.webp") as image:
        gray = np.asarray(image.convert("L"), np.float32)
    y, x = rng.integers(0, gray.shape[0] - _SIDE, 2)
    part = gray[y : y + _SIDE, x : x + _SIDE]
    return 0.5 + contrast * (part - part.mean()) / part.std()


def _wood(rng):
    boards = 5
    at = np.arange(_SIDE) * boards // _SIDE
    grain = _noise(rng, 120, 5) * 0.5 + _noise(rng, 40, 3) * 0.5
    tone = rng.uniform(-0.5, 0.5, boards)[at][:, None] + 0.28 * grain
    seam = (np.arange(_SIDE) * boards % _SIDE < 2 * boards)[:, None]
    return (
        _blend((176, 128, 84), (222, 184, 138), 0.5 + 0.5 * tone)
        * np.where(seam, 0.72, 1)[..., None]
    )


def _snow(rng):
    drifts = 0.6 + 0.22 * _clouds(rng) + 0.05 * rng.standard_normal((_SIDE, _SIDE))
    return _blend((196, 212, 232), (246, 250, 254), drifts)


def _sand(rng):
    y = np.mgrid[:_SIDE, :_SIDE][0] / _SIDE
    ripples = np.sin(2 * math.pi * (9 * y + 0.5 * _noise(rng, 4, 4)))
    grains = rng.standard_normal((_SIDE, _SIDE))
    return _blend((204, 172, 120), (240, 216, 168), 0.5 + 0.16 * ripples + 0.13 * grains)


def _sky(rng):
    height = np.mgrid[:_SIDE, :_SIDE][0] / _SIDE
    cloud = (_noise(rng, 4, 3) + 0.6 * _noise(rng, 10, 6) + 0.3 * _noise(rng, 26, 18) - 0.7) * 0.8
    blue = _blend((104, 172, 232), (178, 216, 246), height)
    return blue + (np.array((250, 252, 255)) - blue) * cloud.clip(0, 0.85)[..., None]


def _water(rng):
    y, x = np.mgrid[:_SIDE, :_SIDE] / _SIDE
    waves = sum(
        abs(np.sin(math.pi * (n * y + 0.3 * n * x * (-1) ** n + 0.8 * _noise(rng, 7, 7))))
        for n in (5, 8)
    )
    return _blend((92, 174, 204), (178, 230, 240), 0.28 + 0.62 * (1 - waves / 2) ** 2)


def _night(rng):
    image = _blend((34, 44, 96), (70, 84, 148), np.mgrid[:_SIDE, :_SIDE][0] / _SIDE)
    image += 7 * _clouds(rng)[..., None]
    for y, x in rng.integers(2, _SIDE - 2, (70, 2)):
        image[y : y + rng.integers(1, 4), x : x + 2] += rng.uniform(60, 150)
    return image


def _blanket(rng):
    y, x = (np.mgrid[:_SIDE, :_SIDE] + rng.integers(0, 64, 2)[:, None, None]) // 32 % 2
    threads = 0.04 * rng.standard_normal((_SIDE, _SIDE))
    return _blend((250, 246, 238), (234, 142, 138), (x + y) * 0.42 + 0.04 + threads)


_GROUNDS = {
    "wood": _wood,
    "snow": _snow,
    "sand": _sand,
    "sky": _sky,
    "water": _water,
    "night": _night,
    "blanket": _blanket,
    "brick": lambda rng: _blend((186, 122, 102), (236, 190, 168), _photo(rng, "brick", 0.2).T),
    "grass": lambda rng: _blend((116, 162, 84), (188, 220, 136), _photo(rng, "grass", 0.17)),
    "gravel": lambda rng: _blend((150, 151, 156), (222, 221, 218), _photo(rng, "gravel", 0.17)),
}
BACKGROUNDS = tuple(_GROUNDS)


@lru_cache(8)
def _texture(name: str, variant: int) -> Image.Image:
    rng = np.random.default_rng((BACKGROUNDS.index(name), variant))
    return Image.fromarray(_GROUNDS[name](rng).clip(0, 255).astype(np.uint8))


@cache
def ground(name: str, variant: int, size: int) -> Image.Image:
    """One of the `VARIANTS` of a background, RGB, `size` x `size` pixels."""
    return _texture(name, variant).resize((size, size), Image.Resampling.LANCZOS)


# ---------------------------------------------------------------------------------------------
# litter

_TINTS = {
    "leaves": ((196, 112, 52), (172, 138, 54), (128, 140, 70), (150, 84, 54)),
    "pebbles": ((150, 146, 142), (118, 116, 118), (176, 168, 156), (134, 124, 112)),
    "confetti": ((236, 96, 108), (84, 160, 226), (250, 210, 88), (140, 200, 120), (188, 128, 216)),
}
BITS = 16  # pictures of each kind of litter


@cache
def litter(kind: str, number: int, size: int) -> Image.Image:
    """A leaf, a pebble or a snip of confetti, RGBA, number 0 to 15, for a picture of `size`
    pixels.
    """
    rng = np.random.default_rng((LITTER.index(kind), number))
    tint = tuple(_TINTS[kind][number % len(_TINTS[kind])])
    dark = tuple(int(0.72 * c) for c in tint)
    image = Image.new("RGBA", (64, 64), (*tint, 0))
    draw = ImageDraw.Draw(image)
    if kind == "leaves":
        t = np.linspace(0, math.pi, 20)
        rim = [(6 + 52 * s / math.pi, 32 - 15 * math.sin(s) ** 1.4) for s in t]
        draw.polygon(rim + [(x, 64 - y) for x, y in rim[::-1]], fill=(*tint, 235))
        draw.line((2, 32, 56, 32), fill=(*dark, 235), width=3)
    elif kind == "pebbles":
        flat = rng.uniform(0, 8)
        draw.ellipse((10, 14 + flat, 54, 50 - flat), fill=(*dark, 235))
        draw.ellipse((10, 12 + flat, 52, 46 - flat), fill=(*tint, 235))
    else:
        draw.rectangle((18, 26, 46, 38), fill=(*tint, 235))
    side = round(size * rng.uniform(0.065, 0.1))
    turned = image.rotate(rng.uniform(0, 360), Image.Resampling.BICUBIC)
    return turned.resize((side, side), Image.Resampling.LANCZOS)
