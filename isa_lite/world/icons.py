"""An example of a user's own folder: icons as files, captions.csv and triplets.json. Ours.

One object of `scenes` in the middle of each picture. What the two files may hold is in `own_data`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from isa_lite.support.checkpoint import write_text
from isa_lite.support.parameters import checked, path_name, whole
from isa_lite.world import scenes
from isa_lite.world.scenes import HELD_OUT, Object, Scene, pick

#: What every figure and table of this set has to say.
LABEL = "rendered icons, an example set"
SHAPES = ("circle", "square", "star", "heart", "moon")
COLORS = ("red", "yellow", "green", "blue", "purple")
SIZES = ("small", "large")
BACKGROUNDS = ("white", "gray", "dotted")
STYLES = ("flat", "outline")
#: Ways to ask for a value of each part. Some words are in no caption, as it will be with users.
REQUESTS = {
    "shape": ("as a {}", "a {} instead", "turn it into a {}"),
    "color": ("make it {}", "in {}", "the same icon, please {}"),
    "size": ("but {}", "make it {}", "the {} version"),
    "background": ("on {}", "with a {} background"),
    "style": ("in {} style", "now {}"),
}
_VALUES = dict(zip(REQUESTS, (SHAPES, COLORS, SIZES, BACKGROUNDS, STYLES), strict=True))


def _caption(scene: Scene, rng: np.random.Generator) -> str:
    (o,) = scene.objects
    thing = f"{o.size} {o.color} {o.shape}"
    phrasings = (
        f"{thing}, {scene.style}, on {scene.background}",
        f"a {thing} on {scene.background}, {scene.style} style",
    )
    return pick(rng, phrasings)


def _changed(scene: Scene, part: str, value: str) -> Scene:
    if part in ("background", "style"):
        return replace(scene, **{part: value})
    return replace(scene, objects=(replace(scene.objects[0], **{part: value}),))


@checked(
    folder=path_name(),
    count=whole(100, 10**6),
    queries=whole(0, 10**6),
    seed=whole(0),
    size=whole(8, 4096),
)
def write_icons(
    folder: str | Path, count: int = 400, queries: int = 150, seed: int = 0, size: int = 64
) -> Path:
    """`count` icons as `images/*.png`, captions.csv and `queries` triplets; returns `folder`.

    Icons are drawn with replacement, so a query may have several right answers. Every tenth has two
    captions. Files of an earlier call are written over. Raises ValueError for fewer than 100 icons,
    among which queries find no answer.
    """
    folder, rng = Path(folder), np.random.default_rng((seed, 11))
    (folder / "images").mkdir(parents=True, exist_ok=True)
    pairs = [(s, c) for s in SHAPES for c in COLORS if (s, c) not in HELD_OUT]
    icons: dict[str, Scene] = {}
    rows = []
    for i in range(count):
        (shape, color), icon_size = pick(rng, pairs), pick(rng, SIZES)
        icon = Object(4, shape, color, icon_size)
        scene = Scene((icon,), pick(rng, BACKGROUNDS), pick(rng, STYLES))
        name = f"icon_{i:04d}.png"
        scenes.render(scene, int(rng.integers(2**31)), size).save(folder / "images" / name)
        icons[name] = scene
        rows += [(name, _caption(scene, rng)) for _ in range(2 if i % 10 == 0 else 1)]
    table = pd.DataFrame(rows, columns=["image", "caption"])
    write_text(folder / "captions.csv", table.to_csv(index=False))
    names, triplets = list(icons), []
    while len(triplets) < queries:
        reference = pick(rng, names)
        part = pick(rng, list(REQUESTS))
        value = pick(rng, _VALUES[part])
        wanted = _changed(icons[reference], part, value)
        targets = [name for name, scene in icons.items() if scene == wanted]
        if wanted != icons[reference] and targets:
            modifier = pick(rng, REQUESTS[part]).format(value)
            triplets.append({"reference": reference, "modifier": modifier, "targets": targets})
    write_text(folder / "triplets.json", json.dumps(triplets, indent=1) + "\n")
    return folder
