"""The rendered world, against pixel differences and a small grammar of its own that reads captions
and changes.
"""

import re
from dataclasses import replace
from itertools import combinations, permutations

import numpy as np
import pytest
from scipy.ndimage import binary_dilation, binary_erosion, binary_fill_holes

from isa_lite.world.scenes import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT,
    KINDS,
    POSITIONS,
    SHAPES,
    SIZES,
    STYLES,
    Object,
    Scene,
    caption,
    confuse,
    modify,
    object_masks,
    render,
    render_many,
    sample_scenes,
)

SCENES = sample_scenes(300, seed=1, held_out=True)

# ------------------------------------------------------------------------------- the grammar of
# this test

SIZE_OF = {
    "small": "small",
    "little": "small",
    "smaller": "small",
    "large": "large",
    "big": "large",
    "bigger": "large",
}
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")
CELL_OF = {
    f"{row} {column}".strip() or "center": 3 * i + j
    for i, row in enumerate(ROWS)
    for j, column in enumerate(COLUMNS)
}


def one_of(words) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


STYLE = rf"(?P<style>{one_of(STYLES)}) (?:style|drawing|colors)"
OBJECT = (
    rf"(?:(?P<size>small|little|large|big) )?(?:(?P<color>{one_of(COLORS)}) )?(?P<shape>{one_of(SHAPES)})"
    rf"(?: (?:at )?(?:the )?(?P<cell>{one_of(CELL_OF)}))?"
)
CHANGES = {
    "color": rf"(?:make |change the color of )?the {OBJECT} (?:to |is now )?(?P<new>{one_of(COLORS)})",
    "size": rf"(?:make )?the {OBJECT} (?:is now )?(?P<new>{one_of(SIZE_OF)})",
    "move": rf"(?:move |put )?the {OBJECT} (?:is now )?(?:to|at) the (?P<new>{one_of(CELL_OF)})",
    "add": rf"(?:add|with|there is also) a {OBJECT}(?: added)?",
    "remove": rf"(?:remove|without|take away) the {OBJECT}",
    "background": rf"(?:change the background to|make the background|on a) (?P<new>{one_of(BACKGROUNDS)})"
    "(?: background instead)?",
    "style": rf"(?:change it to|now in|in) {STYLE}(?: instead)?",
}


def said(match: re.Match) -> dict:
    """The attributes of an object that the words name."""
    words = {name: match[name] for name in ("size", "color", "shape", "cell") if match[name]}
    return {
        k: SIZE_OF[w] if k == "size" else CELL_OF[w] if k == "cell" else w for k, w in words.items()
    }


def fits(o: Object, words: dict) -> bool:
    return all(getattr(o, name) == value for name, value in words.items())


def obey(scene: Scene, text: str) -> tuple[Scene, list[str]]:
    """The scene after what the text asks for, clause by clause, and the kinds of its clauses.

    Fails where a clause can be read in no way or in two, or where its words pick out no object or
    several.
    """
    kinds = []
    for clause in text.split(" and "):
        ((kind, match),) = (
            (kind, m) for kind, form in CHANGES.items() if (m := re.fullmatch(form, clause))
        )
        kinds.append(kind)
        if kind == "background":
            scene = replace(scene, background=match["new"])
        elif kind == "style":
            scene = replace(scene, style=match["style"])
        else:
            objects = list(scene.objects)
            if kind == "add":
                objects.append(Object(**said(match)))
            else:
                (o,) = (o for o in objects if fits(o, said(match)))
                objects.remove(o)
            if kind == "color":
                objects.append(replace(o, color=match["new"]))
            elif kind == "size":
                objects.append(replace(o, size=SIZE_OF[match["new"]]))
            elif kind == "move":
                objects.append(replace(o, cell=CELL_OF[match["new"]]))
            scene = replace(scene, objects=tuple(sorted(objects)))
    return scene, kinds


def fewest(a: Scene, b: Scene) -> int:
    """The least number of single changes that lead from one scene to the other."""

    def cost(p: Object, q: Object) -> int:  # no more than taking p away and adding q
        return (
            2
            if p.shape != q.shape
            else min(2, sum(getattr(p, k) != getattr(q, k) for k in ("cell", "color", "size")))
        )

    short, long = sorted((a.objects, b.objects), key=len)
    pairings = (zip(short, order, strict=True) for order in permutations(long, len(short)))
    objects = (
        min(sum(cost(p, q) for p, q in pairing) for pairing in pairings) + len(long) - len(short)
    )
    return objects + (a.background != b.background) + (a.style != b.style)


def read(text: str) -> tuple[list[dict], str | None, str | None]:
    """What a caption says: objects, background, style. Fails where any other word is left."""
    objects = [said(m) for m in re.finditer(OBJECT, text)]
    rest = re.sub(OBJECT, "", text)
    ground = re.search(rf"\bon (?:a )?({one_of(BACKGROUNDS)})(?: background)?", rest)
    style = re.search(STYLE, rest)
    for found in (ground, style):
        rest = rest.replace(found[0], "") if found else rest
    assert re.fullmatch(r"(a (photo|picture) of )?(a|and|in|,| )*", rest), (
        f"{text!r} leaves {rest!r}"
    )
    return objects, ground and ground[1], style and style["style"]


# ------------------------------------------------------------------------------------------- the
# world


def test_the_world_is_as_large_as_promised():
    assert (
        len(SHAPES) >= 8
        and len(COLORS) >= 8
        and len(SIZES) == 2
        and len(BACKGROUNDS) >= 2
        and len(STYLES) >= 3
    )
    assert {name: cell for cell, name in enumerate(POSITIONS)} == CELL_OF
    assert set(KINDS) == set(CHANGES) and len(KINDS) == 7
    assert 0.05 < len(HELD_OUT) / (len(SHAPES) * len(COLORS)) < 0.15


def test_scenes_hold_one_to_three_sorted_objects_in_different_cells():
    for scene in SCENES:
        cells = [o.cell for o in scene.objects]
        assert cells == sorted(set(cells)) and set(cells) <= set(range(9))
    assert {len(s.objects) for s in SCENES} == {1, 2, 3}
    assert (
        sample_scenes(300, seed=1, held_out=True)
        == SCENES
        != sample_scenes(300, seed=2, held_out=True)
    )


def test_held_out_pairs_appear_only_on_request():
    def pairs(scenes):
        return {(o.shape, o.color) for s in scenes for o in s.objects}

    rng = np.random.default_rng(0)
    seen = sample_scenes(1000, seed=0)
    changed = [modify(s, rng)[0] for s in seen]
    every = {(shape, color) for shape in SHAPES for color in COLORS}
    assert pairs(seen) == pairs(changed) == every - HELD_OUT
    assert pairs(sample_scenes(1000, seed=0, held_out=True)) == every
    assert pairs(modify(s, rng, held_out=True)[0] for s in seen) == every
    assert [s.held_out for s in SCENES] == [bool(pairs([s]) & HELD_OUT) for s in SCENES]


# ----------------------------------------------------------------------------------------------
# images


@pytest.mark.parametrize("style", STYLES)
def test_taking_an_object_away_changes_the_pixels_of_its_mask_and_no_others(style):
    scenes = [replace(s, style=style) for s in SCENES if len(s.objects) == 3][:20]
    assert {(o.shape, o.size) for s in scenes for o in s.objects} == {
        (shape, size) for shape in SHAPES for size in SIZES
    }
    for seed, scene in enumerate(scenes):
        image = np.asarray(render(scene, seed))
        masks = object_masks(scene, seed)
        assert masks.shape == (3, 96, 96) and masks.sum(0).max() == 1  # disjoint
        for o, mask in zip(scene.objects, masks, strict=True):
            without = replace(scene, objects=tuple(p for p in scene.objects if p != o))
            changed = (image != np.asarray(render(without, seed))).any(-1)
            # A drawn line overhangs its silhouette a little; `test_a_mask_covers_an_outline` is
            # about that.
            reach = binary_dilation(mask, iterations=3) if style == "outline" else mask
            assert changed.any() and not (changed & ~reach).any(), (o, seed)
            if style != "outline":  # the inside of a drawn outline stays as it was
                inside = binary_erosion(mask)
                assert changed[inside].mean() > 0.99, (o, seed)


@pytest.mark.parametrize("style", STYLES)
def test_no_two_shapes_look_alike(style):  # a ring without its inner line would be a circle
    for size in SIZES:
        images = [
            np.asarray(render(Scene((Object(4, shape, "red", size),), "white", style)), int)
            for shape in SHAPES
        ]
        for a, b in combinations(images, 2):
            assert (abs(a - b).max(-1) > 60).sum() > 20


def test_a_mask_covers_an_outline():
    for seed, shape in enumerate(SHAPES):
        scene = Scene((Object(4, shape, "red", "large"),), "white", "outline")
        changed = (
            np.asarray(render(scene, seed)) != np.asarray(render(replace(scene, objects=()), seed))
        ).any(-1)
        assert not (changed & ~object_masks(scene, seed)[0]).any(), shape


@pytest.mark.parametrize("size", SIZES)
def test_the_hole_of_a_ring_is_not_the_ring(size):
    for seed in range(10):
        ring, circle = (
            object_masks(Scene((Object(4, s, "red", size),), "white", "flat"), seed)[0]
            for s in ("ring", "circle")
        )
        assert (binary_fill_holes(ring) == circle).all()
        assert 0.1 < 1 - ring.sum() / circle.sum() < 0.4


@pytest.mark.parametrize("style", ["flat", "outline"])
def test_no_jitter_carries_an_object_out_of_its_cell(style):
    for seed in range(48):
        size = tuple(SIZES)[seed % 2]
        full = Scene(
            tuple(Object(c, SHAPES[(seed // 2 + c) % len(SHAPES)], "red", size) for c in range(9)),
            "white",
            style,
        )
        for o, mask in zip(full.objects, object_masks(full, seed), strict=True):
            rows, columns = np.nonzero(mask)
            assert {*(rows // 32)} == {o.cell // 3} and {*(columns // 32)} == {o.cell % 3}, (
                o,
                seed,
            )


@pytest.mark.parametrize("shape", SHAPES)
def test_no_jitter_makes_a_small_object_look_large(shape):
    small, large = (
        [Scene((Object(4, shape, "red", size),), "white", "flat") for _ in range(20)]
        for size in ("small", "large")
    )
    areas = [
        [int(object_masks(s, seed).sum()) for seed, s in enumerate(scenes)]
        for scenes in (small, large)
    ]
    assert len(set(areas[0])) > 5 and max(areas[0]) < 0.7 * min(areas[1])


def test_an_image_is_a_function_of_scene_seed_and_size():
    scenes, seeds = SCENES[:12], range(100, 112)
    first = render_many(scenes, seeds, 48)
    assert first.shape == (12, 48, 48, 3) and first.dtype == np.uint8
    again = [
        np.asarray(render(s, seed, 48))
        for s, seed in reversed(list(zip(scenes, seeds, strict=True)))
    ]
    assert np.array_equal(first, again[::-1])
    for scene, seed, image in zip(scenes, seeds, first, strict=True):
        assert not np.array_equal(image, render(scene, seed + 1, 48))  # jitter
    assert len({image.tobytes() for image in first}) == 12


# --------------------------------------------------------------------------------------------
# captions


def test_a_full_caption_says_everything():
    rng = np.random.default_rng(0)
    for scene in SCENES:
        objects, ground, style = read(text := caption(scene, rng))
        assert (ground, style) == (scene.background, scene.style), text
        assert sorted(Object(**words) for words in objects) == list(scene.objects), text


def test_a_partial_caption_says_nothing_false_and_leaves_anything_out():
    rng = np.random.default_rng(0)
    left_out = set()
    for scene in SCENES:
        objects, ground, style = read(text := caption(scene, rng, full=False))
        assert ground in (None, scene.background) and style in (None, scene.style), text
        orders = permutations(scene.objects, len(objects))
        assert any(all(map(fits, order, objects)) for order in orders) and objects, text
        left_out |= {"ground"} if ground is None else {"style"} if style is None else set()
        left_out |= {
            name
            for words in objects
            for name in ("size", "color", "cell", "shape")
            if name not in words
        }
        left_out |= {"object"} if len(objects) < len(scene.objects) else set()
    assert left_out == {"ground", "style", "size", "color", "cell", "object"}


def test_captions_come_in_many_phrasings():
    rng = np.random.default_rng(0)
    texts = [caption(SCENES[0], rng) for _ in range(300)]
    assert len(set(texts)) > 150
    words = " ".join(caption(s, rng) for s in SCENES)
    assert all(
        f" {word} " in words
        for word in (
            "small",
            "little",
            "large",
            "big",
            "photo",
            "picture",
            "drawing",
            "style",
            "at the",
        )
    )


# ---------------------------------------------------------------------------------------
# modifications


def takes(scene: Scene, kinds: tuple[str, ...]) -> bool:
    return not (
        "add" in kinds and len(scene.objects) == 3 or "remove" in kinds and len(scene.objects) == 1
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_is_what_its_words_ask_for_and_nothing_else(kind):
    rng = np.random.default_rng(0)
    openings = set()
    for scene in filter(lambda s: takes(s, (kind,)), SCENES):
        new, change = modify(scene, rng, (kind,), held_out=True)
        assert obey(scene, change.text) == (new, [kind]), change.text
        assert new != scene and change.kinds == (kind,)
        assert len({o.cell for o in new.objects}) == len(new.objects)
        openings.add(change.text.split()[0])
    assert len(openings) >= 2


@pytest.mark.parametrize(
    "kinds", [k for k in combinations(KINDS, 2) if k != ("add", "remove")], ids=" and ".join
)
def test_two_changes_are_both_asked_for_and_neither_undoes_the_other(kinds):
    rng = np.random.default_rng(0)
    for scene in [s for s in SCENES if takes(s, kinds)][:60]:
        new, change = modify(scene, rng, kinds, held_out=True)
        found, read_as = obey(scene, change.text)
        assert found == new and sorted(read_as) == sorted(change.kinds) == sorted(kinds), (
            change.text
        )
        assert fewest(scene, new) == 2, change.text


def test_without_kinds_there_are_one_or_two_of_any_kind():
    rng = np.random.default_rng(0)
    kinds = []
    for scene in SCENES:
        new, change = modify(scene, rng)
        assert fewest(scene, new) == len(change.kinds) == len(change.text.split(" and ")), (
            change.text
        )
        kinds.append(change.kinds)
    assert {k for ks in kinds for k in ks} == set(KINDS)
    assert 0.6 < np.mean([len(k) == 1 for k in kinds]) < 0.8


# `modify` does not look at how many kinds it is given, and loops for ever where no scene would do.
ONE, TWO, THREE = (next(s for s in SCENES if len(s.objects) == n) for n in (1, 2, 3))


@pytest.mark.parametrize(
    "scene, kinds, message",
    [
        (TWO, ("colour",), "'colour'.* 2 object"),
        (ONE, ("remove",), "'remove'.* 1 object"),
        (THREE, ("style", "add"), "'add'.* 3 object"),
        (TWO, ("remove", "remove"), "one or two different"),  # leaves no object
        (TWO, ("add", "add"), "one or two different"),  # leaves four
        (ONE, ("color", "background", "style"), "one or two different"),
        (ONE, (), "one or two different"),
        (ONE, ("style", "style"), "one or two different"),
    ],
)
def test_a_change_that_cannot_be_made_is_an_error(scene, kinds, message):
    with pytest.raises(ValueError, match=message):
        modify(scene, np.random.default_rng(0), kinds)


def test_a_confuser_says_nearly_the_same_words_of_another_scene():
    rng = np.random.default_rng(0)
    rebound = 0
    for scene in sample_scenes(300, seed=3):
        other = confuse(scene, rng)
        assert (
            other != scene
            and not other.held_out
            and (other.background, other.style) == (scene.background, scene.style)
        )
        for name in ("cell", "color", "size"):
            assert sorted(getattr(o, name) for o in other.objects) == sorted(
                getattr(o, name) for o in scene.objects
            )
        new_shapes = [o.shape for o in other.objects]
        for o in scene.objects:
            if o.shape in new_shapes:
                new_shapes.remove(o.shape)
        assert len(new_shapes) <= 1 and len(set(scene.objects) - set(other.objects)) <= 2
        rebound += not new_shapes
    assert rebound > 50  # the same words exactly, bound otherwise
