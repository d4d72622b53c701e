"""The rendered worlds: images, captions and changes in words, everything from a seed.

There are two, `scenes` (shapes) and `things` (drawings of things that have names). Each is a module
with the names that `World` lists, so that whatever is made from one can be made from the other.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import numpy as np
from PIL import Image

#: By the name that a parameter gives, the module.
WORLDS = {"shapes": "scenes", "things": "things"}


class World(Protocol):
    """What a world has. A `Scene` is hashable, and equal to another where both are the same answer;
    it has `objects`, `background`, `style` and `held_out`. A `Modification` has `text` and `kinds`.
    """

    IMAGE_SIZE: int  # the side of a picture in pixels, where none is given
    KINDS: tuple[str, ...]  # of changes
    POSITIONS: tuple[str, ...]  # the nine cells in words, row by row
    BACKGROUNDS: tuple[str, ...]
    STYLES: tuple[str, ...]
    HELD_OUT: frozenset[tuple[str, str]]  # pairs that training never sees

    def sample_scene(self, rng: np.random.Generator, held_out: bool = False) -> Any: ...

    def sample_scenes(self, n: int, seed: int, held_out: bool = False) -> list[Any]: ...

    def render(self, scene: Any, seed: int = 0, size: int = ...) -> Image.Image: ...

    def render_many(self, scenes: list[Any], seeds: Any, size: int = ...) -> np.ndarray: ...

    def object_masks(self, scene: Any, seed: int = 0, size: int = ...) -> np.ndarray: ...

    def caption(self, scene: Any, rng: np.random.Generator, full: bool = True) -> str: ...

    def modify(
        self,
        scene: Any,
        rng: np.random.Generator,
        kinds: tuple[str, ...] | None = None,
        held_out: bool = False,
    ) -> tuple[Any, Any]: ...

    def confuse(self, scene: Any, rng: np.random.Generator) -> Any: ...


def load_world(name: str) -> World:
    """The world called "shapes" or "things". Raises ValueError for another name."""
    if name not in WORLDS:
        raise ValueError(f"parameter 'world' must be {' or '.join(WORLDS)}, not {name!r}")
    return importlib.import_module(f"isa_lite.world.{WORLDS[name]}")
