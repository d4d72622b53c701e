"""The world of things, against its pictures and a grammar of this file that reads captions and
changes.
"""

import json
import re
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_dilation, binary_erosion

from isa_lite.commands import main
from isa_lite.world import WORLDS, World, load_world, sprites
from isa_lite.world.thing_pictures import INDEX, THINGS, drawing
from isa_lite.world.thing_words import GROUNDS, PLACES, a, plural
from isa_lite.world.things import (
    BACKGROUNDS,
    CLUTTER,
    COLORED,
    COLORS,
    HELD_OUT,
    KINDS,
    NOUNS,
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

SCENES = sample_scenes(400, seed=1, held_out=True)

# ------------------------------------------------------------------------------- the grammar of
# this test

SIZE_OF = {"small": "small", "little": "small", "large": "large", "big": "large"}
SIZE_OF |= {"smaller": "small", "larger": "large", "bigger": "large"}
NUMBER = {"one": 1, "two": 2, "three": 3, "four": 4}
NOUN_OF = {plural(noun): noun for noun in NOUNS} | {noun: noun for noun in NOUNS}
CELL_OF = {words: cell for cell, (places, to) in enumerate(PLACES) for words in (*places, to)}
GROUND_OF = {w: name for name, (at, to, called) in GROUNDS.items() for w in (*at, to, called)}
STYLE_OF = {"3D": "3D", "flat": "flat", "cartoon": "cartoon", "sticker": "sticker"}
STYLE_OF |= {"stickers": "sticker"}


def one_of(words) -> str:
    return "|".join(map(re.escape, sorted(words, key=len, reverse=True)))


def thing(name: str, place: str = "?") -> str:
    """A thing in words; the groups of what is said of it begin with `name`."""
    return (
        rf"(?:(?:an?|the) )?(?:(?P<{name}count>{one_of(NUMBER)}) )?"
        rf"(?:(?P<{name}size>small|little|large|big) )?(?:(?P<{name}color>{one_of(COLORS)}) )?"
        rf"(?P<{name}noun>{one_of(NOUN_OF)})\b(?: (?P<{name}cell>{one_of(CELL_OF)})){place}"
    )


COUNTED = rf"(?:only |just )?(?P<new>{one_of(NUMBER)}) (?P<noun>{one_of(NOUN_OF)})"
MORE = rf"(?P<new>another|{one_of(NUMBER)})(?: more)? (?P<noun>{one_of(NOUN_OF)}) next to the \w+"
LESS = rf"take away (?P<less>{one_of(NUMBER)}) of the (?P<noun>{one_of(NOUN_OF)})"
HOW = (
    rf"(?:in|as|drawn in|drawn as|rendered in)(?: an?)? (?P<new>{one_of(STYLE_OF)})"
    "(?: style| drawing| rendering)?"
)
WHERE, CALLED = rf"(?P<new>{one_of(GROUND_OF)})", rf"(?P<new>{one_of(GROUND_OF)})"
CHANGES = {
    "replace": [
        rf"(?:replace|swap) {thing('o')} (?:with|for) {thing('n', '{0}')}",
        rf"put {thing('n', '{0}')} where {thing('o')} (?:is|are)",
        rf"turn {thing('o')} into {thing('n', '{0}')}",
        rf"(?:with )?{thing('n', '{0}')} (?:instead|in place) of {thing('o')}",
    ],
    "add": [rf"(?:add|put|with|there should also be) {thing('n', '')}(?: as well)?"],
    "remove": [rf"(?:remove|take away|leave out|get rid of|without) {thing('o')}"],
    "color": [
        rf"make {thing('o')} (?P<new>{one_of(COLORS)})",
        rf"change the color of {thing('o')} to (?P<new>{one_of(COLORS)})",
        rf"with {thing('o')} in (?P<new>{one_of(COLORS)})",
        rf"{thing('o')} should be (?P<new>{one_of(COLORS)})",
        rf"with {thing('n', '{0}')} instead of the (?P<old>{one_of(COLORS)}) ones?",
    ],
    "move": [rf"(?:move |put |with )?{thing('o')} (?:should be )?(?P<new>{one_of(CELL_OF)})"],
    "size": [
        rf"(?:make )?{thing('o')} (?:should be )?(?P<new>{one_of(SIZE_OF)})",
        rf"with an? (?P<new>{one_of(SIZE_OF)}) (?P<onoun>{one_of(NOUN_OF)})",
    ],
    "count": [
        rf"(?:show|with|make it|there should be) {COUNTED}(?: instead of (?P<old>{one_of(NUMBER)}))?",
        rf"add {MORE}",
        LESS,
    ],
    "background": [
        rf"(?:(?:put|move) everything )?{WHERE}(?: instead)?",
        rf"change the background to {CALLED}",
        rf"with {CALLED} in the background",
        rf"the background should be {CALLED}, not (?P<old>{one_of(GROUND_OF)})",
    ],
    "style": [
        rf"(?:redraw everything |everything should be )?{HOW}",
        rf"turn the whole picture into (?:an? )?(?P<new>{one_of(STYLE_OF)})(?: drawing| rendering)?",
    ],
}
CHANGES = {kind: [re.compile(form) for form in forms] for kind, forms in CHANGES.items()}


def said(match: re.Match, name: str) -> dict:
    """The attributes of a thing that the words name."""
    found = {key: match[name + key] for key in ("count", "size", "color", "noun", "cell")}
    found = {key: word for key, word in found.items() if word}
    meant = {"count": NUMBER, "size": SIZE_OF, "noun": NOUN_OF, "cell": CELL_OF}
    return {key: meant[key][word] if key in meant else word for key, word in found.items()}


def the_one(scene: Scene, **words) -> Object:
    """The thing that the words pick out. Fails where there is none, or more than one."""
    (o,) = (o for o in scene.objects if all(getattr(o, k) == v for k, v in words.items()))
    return o


def obey(scene: Scene, kind: str, m: re.Match) -> Scene:
    """The scene after the change that a match asks for."""
    groups = m.groupdict()
    if kind == "background":
        return replace(scene, background=GROUND_OF[groups["new"]])
    if kind == "style":
        return replace(scene, style=STYLE_OF[groups["new"]])
    objects, new = list(scene.objects), None
    if kind == "add":
        words = {"count": 1, "color": ""} | said(m, "n")
        new = Object(**{"size": "small"} | words)
    elif kind == "count":
        o = the_one(scene, noun=NOUN_OF[groups["noun"]])
        if groups.get("less"):
            count = o.count - NUMBER[groups["less"]]
        elif "next to" in m[0]:
            count = o.count + NUMBER.get(groups["new"], 1)
        else:
            count = NUMBER[groups["new"]]
            assert groups["old"] in (None, {v: k for k, v in NUMBER.items()}[o.count])
        new = replace(o, count=count)
    elif "onoun" in groups and "osize" not in groups:  # "with a bigger dog"
        o = the_one(scene, noun=NOUN_OF[groups["onoun"]])
        new = replace(o, size=SIZE_OF[groups["new"]])
    elif kind == "color" and "old" in groups:  # "a red car instead of the blue one"
        words = said(m, "n")
        o = the_one(scene, noun=words["noun"], color=groups["old"])
        new = replace(o, color=words["color"])
    else:
        o = the_one(scene, **said(m, "o"))
        if kind == "replace":
            words = said(m, "n")
            assert words.get("count", 1) == o.count
            new = replace(o, noun=words["noun"], color=words.get("color", ""))
        elif kind != "remove":
            meant = {"color": COLORS, "size": SIZE_OF, "move": CELL_OF}[kind]
            field = "cell" if kind == "move" else kind
            new = replace(o, **{field: groups["new"] if kind == "color" else meant[groups["new"]]})
    if kind != "add":
        objects.remove(o)
    return replace(scene, objects=tuple(sorted(objects + ([new] if new else []))))


def readings(scene: Scene, text: str, kind: str) -> set[Scene]:
    """All scenes that a text of one change may ask for, if it is a change of this kind."""
    found = set()
    for form in CHANGES[kind]:
        if m := form.fullmatch(text):
            try:
                found.add(obey(scene, kind, m))
            except ValueError:  # the words pick out nothing, or several things
                continue
    return found


def bare(text: str) -> str:
    return re.sub("^(the same scene|the same picture, but|the same, but) ", "", text)


# ------------------------------------------------------------------------------------------- the
# world


def test_the_world_is_as_large_as_promised():
    assert len(NOUNS) >= 150 and len(COLORED) >= 30 and len(STYLES) == 4 and len(BACKGROUNDS) >= 8
    styles, colors = ({p for p in HELD_OUT if p[1] in names} for names in (STYLES, COLORS))
    assert styles | colors == HELD_OUT
    assert 0.08 < len(styles) / (len(NOUNS) * len(STYLES)) < 0.12
    assert 0.08 < len(colors) / (len(COLORED) * len(COLORS)) < 0.12
    for pairs in (styles, colors):
        assert len({noun for noun, _ in pairs}) == len(pairs)  # one of a noun
        assert len({word for _, word in pairs}) in (len(STYLES), len(COLORS))


@pytest.mark.parametrize("name", WORLDS)
def test_the_worlds_have_the_same_interface(name):
    world = load_world(name)
    wanted = set(World.__annotations__) | {n for n in vars(World) if not n.startswith("_")}
    assert wanted > {"modify", "KINDS"} and all(hasattr(world, n) for n in wanted)
    assert len(world.POSITIONS) == 9
    scenes, rng = world.sample_scenes(6, seed=0), np.random.default_rng(0)
    assert scenes == world.sample_scenes(6, 0) and not any(s.held_out for s in scenes)
    images = world.render_many(scenes, range(6))
    assert images.shape == (6, world.IMAGE_SIZE, world.IMAGE_SIZE, 3) and images.dtype == np.uint8
    for seed, scene in enumerate(scenes):
        assert np.array_equal(images[seed], world.render(scene, seed))
        masks = world.object_masks(scene, seed, 64)
        assert masks.shape == (len(scene.objects), 64, 64) and masks.dtype == bool
        assert world.caption(scene, rng) and world.caption(scene, rng, full=False)
        new, change = world.modify(scene, rng, ("background",))
        assert (
            new.background != scene.background and change.kinds == ("background",) and change.text
        )
        assert world.confuse(scene, rng) != scene
        assert scene.background in world.BACKGROUNDS and scene.style in world.STYLES
    assert len({*scenes, *scenes}) == 6


def test_an_unknown_world_is_an_error():
    with pytest.raises(ValueError, match="'world' must be shapes or things, not 'thing'"):
        load_world("thing")


def test_scenes_hold_one_to_four_things_that_can_be_told_apart():
    for scene in SCENES:
        cells = [o.cell for o in scene.objects]
        assert cells == sorted(set(cells)) and set(cells) <= set(range(9))
        for o in scene.objects:
            assert bool(o.color) == (o.noun in COLORED)
            assert o.count == 1 or o.size == "small"
    assert {len(s.objects) for s in SCENES} == {1, 2, 3, 4}
    assert {o.count for s in SCENES for o in s.objects} == {1, 2, 3, 4}
    for scene in sample_scenes(5000, seed=4):  # few nouns can be taken for others
        for o, p in combinations(scene.objects, 2):
            if o.noun == p.noun:
                assert o.size != p.size and o.count == p.count == 1
            else:
                assert not f" {o.noun}".endswith(f" {p.noun}")
                assert not f" {p.noun}".endswith(f" {o.noun}")


def pairs(scenes) -> set:
    return {p for s in scenes for o in s.objects for p in ((o.noun, s.style), (o.noun, o.color))}


def test_held_out_pairs_appear_only_on_request():
    rng = np.random.default_rng(0)
    seen = sample_scenes(3000, seed=0)
    changed = [modify(s, rng)[0] for s in seen]
    for scenes in (seen, changed, [confuse(s, rng) for s in seen]):
        assert not pairs(scenes) & HELD_OUT and not any(s.held_out for s in scenes)
    every = sample_scenes(6000, seed=0, held_out=True)
    assert pairs(every) > HELD_OUT
    assert pairs(modify(s, rng, held_out=True)[0] for s in seen) & HELD_OUT
    assert all(s.held_out == bool(pairs([s]) & HELD_OUT) for s in every[:300])


# ----------------------------------------------------------------------------------------------
# images


def test_every_noun_has_a_drawing_in_every_style_and_a_licence():
    for style in STYLES:
        with Image.open(THINGS / f"{style}.webp") as image:
            alpha = np.asarray(image.convert("RGBA"))[..., 3]
        cell = INDEX["cell"]
        for i, noun in enumerate(NOUNS):
            y, x = i // INDEX["columns"] * cell, i % INDEX["columns"] * cell
            part = alpha[y : y + cell, x : x + cell]
            assert (part > 128).mean() > 0.05, (noun, style)
            assert not part[[0, -1]].any() and not part[:, [0, -1]].any()  # nothing is cut off
    told = (THINGS / "README.md").read_text(encoding="utf-8")
    for style, (name, version) in INDEX["packages"].items():
        assert f"`{style}.webp`" in told and f"{name}@{version}" in told
    for license in ("MIT", "Apache-2.0", "CC-BY-4.0"):
        assert len((THINGS / "licenses" / f"{license}.txt").read_text()) > 1000
    assert sum(f.stat().st_size for f in THINGS.rglob("*")) < 5e6


def test_an_image_is_a_function_of_scene_seed_size_and_clutter():
    scenes, seeds = SCENES[:12], range(100, 112)
    first = render_many(scenes, seeds, 64)
    again = [np.asarray(render(s, i, 64)) for s, i in list(zip(scenes, seeds, strict=True))[::-1]]
    assert np.array_equal(first, again[::-1])
    for scene, seed, image in zip(scenes, seeds, first, strict=True):
        assert not np.array_equal(image, render(scene, seed + 1, 64))
        levels = {render(scene, seed, 64, level).tobytes() for level in CLUTTER}
        assert len(levels) == 4 and image.tobytes() in levels
    with pytest.raises(ValueError, match="clutter must be one of none, light, .* not 'some'"):
        render(SCENES[0], clutter="some")


def test_at_twice_the_size_it_is_the_same_picture_with_more_detail():
    for seed, scene in enumerate(SCENES[:20]):
        small, twice = (render(scene, seed, size) for size in (128, 256))
        close = abs(np.asarray(small, int) - np.asarray(twice.reduce(2), int)).mean()
        far = abs(np.asarray(render(SCENES[seed + 1], seed), int) - np.asarray(small, int)).mean()
        assert close < 6 and close < far / 3
        masks = zip(object_masks(scene, seed, 128), object_masks(scene, seed, 256), strict=True)
        for mask, large in masks:
            large = large.reshape(128, 2, 128, 2).mean((1, 3)) > 0.5
            assert (mask & large).sum() / (mask | large).sum() > 0.6


@pytest.mark.parametrize("style", STYLES)
def test_taking_a_thing_away_changes_its_mask_and_its_shadow(style):
    scenes = [replace(s, style=style) for s in SCENES if len(s.objects) == 4][:20]
    for seed, scene in enumerate(scenes):
        image, masks = np.asarray(render(scene, seed), int), object_masks(scene, seed)
        assert masks.sum(0).max() == 1  # disjoint
        for o, mask in zip(scene.objects, masks, strict=True):
            without = replace(scene, objects=tuple(p for p in scene.objects if p != o))
            changed = abs(image - np.asarray(render(without, seed), int)).sum(-1)
            assert (changed[binary_erosion(mask)] > 0).mean() > 0.95, (o, seed)
            others = binary_erosion(masks.sum(0) > mask)  # a soft rim lets the shadow through
            assert not (changed[others] > 20).any(), "it hides or shades another thing"
            assert not changed[~binary_dilation(mask, np.ones((3, 3)), 9)].any(), (o, seed)


def test_no_thing_leaves_its_cell():
    for seed in range(40):
        nouns = [NOUNS[(17 * seed + 5 * c) % len(NOUNS)] for c in range(9)]
        objects = [
            Object(c, n, "", *(("large", 1) if (c + seed) % 3 else ("small", 1 + seed % 4)))
            for c, n in enumerate(nouns)
        ]
        full = Scene(tuple(objects), "sky", STYLES[seed % 4])
        for o, mask in zip(full.objects, object_masks(full, seed, 192), strict=True):
            rows, columns = np.nonzero(mask)
            cell = 192 * 0.95 / 3
            for at, place in ((rows, o.cell // 3), (columns, o.cell % 3)):
                assert at.min() >= 192 * 0.025 + place * cell - 1.5
                assert at.max() <= 192 * 0.025 + (place + 1) * cell + 0.5


def test_a_thing_has_the_color_that_is_said():
    for noun in COLORED:
        for style in STYLES:
            for i, (color, rgb) in enumerate(COLORS.items()):
                if (len(noun) + i) % 3:  # a third of them is enough
                    continue
                hue = sprites.main_color(drawing(noun, style, color, 64), petals=False)[0]
                wanted = sprites.main_color(Image.new("RGBA", (9, 9), (*rgb, 255)))[0]
                petals = noun in ("tulip", "rose", "mushroom")  # leaves are green
                off = abs((hue - wanted + 0.5) % 1 - 0.5)
                assert off < 0.06 or petals, (noun, style, color, off)


def test_three_of_a_kind_are_three():
    for noun in ("balloon", "bucket", "egg"):
        areas = [
            object_masks(Scene((Object(4, noun, "", "small", n),), "sky", "flat"))[0].sum() / n
            for n in (1, 2, 3, 4)
        ]
        assert max(areas) < 2 * min(areas)


# --------------------------------------------------------------------------------------------
# captions and words


def test_a_full_caption_says_everything():
    rng = np.random.default_rng(0)
    form = re.compile(thing("o", ""))
    for scene in SCENES:
        text = caption(scene, rng)
        objects = [
            {"count": 1, "color": "", "size": "small"} | said(m, "o") for m in form.finditer(text)
        ]
        assert sorted(Object(**words) for words in objects) == list(scene.objects), text
        rest = form.sub("", text)
        rest, style = rest.rsplit(", ", 1)
        ground = rest.rsplit(", ", 1)[-1]
        assert re.fullmatch(HOW, style)["new"].rstrip("s") == scene.style
        assert GROUND_OF[ground] == scene.background
        many = next(form.finditer(text))["ocount"] is not None
        assert not text.startswith("there") or text.startswith("there are") == many


def test_a_partial_caption_says_nothing_false():
    rng = np.random.default_rng(0)
    form, left_out = re.compile(thing("o")), set()
    for scene in SCENES:
        for m in form.finditer(text := caption(scene, rng, full=False)):
            words = said(m, "o")
            fits = (all(getattr(o, k) == v for k, v in words.items()) for o in scene.objects)
            assert any(fits), text
            left_out |= {"size", "color", "cell"} - set(words)
    assert left_out == {"size", "color", "cell"}


def test_plurals_and_articles():
    assert [plural(n) for n in ("mouse", "butterfly", "monkey", "slice of pizza", "top hat")] == [
        "mice", "butterflies", "monkeys", "slices of pizza", "top hats"
    ]  # fmt: skip
    assert [plural(n) for n in ("fox", "box of fries", "loaf of bread", "snowman", "toolbox")] == [
        "foxes", "boxes of fries", "loaves of bread", "snowmen", "toolboxes"
    ]  # fmt: skip
    words = ("orange car", "unicorn", "hourglass", "umbrella", "green car", "T-shirt", "elephant")
    assert [a(w)[: a(w).index(" ")] for w in words] == ["an", "a", "an", "an", "a", "a", "an"]


def test_texts_are_spelled_as_english_is():
    rng = np.random.default_rng(0)
    for scene in SCENES * 3:
        _, change = modify(scene, rng, held_out=True)
        for text in (caption(scene, rng), caption(scene, rng, False), change.text):
            assert not re.search(r"  |^ | $| ,|\ba [aeiou](?!ni)|\ban [^aeiouh]", text), text
            assert not re.search(r"\b(a|an|the) (a|an|the|two|three|four) (?!\w+s)", text) or (
                "the two" in text or "the three" in text or "the four" in text
            )
            for number, noun in re.findall(
                rf"\b({one_of(NUMBER)}) (?:\w+ )?({one_of(NOUN_OF)})\b", text
            ):
                singular = noun in NOUNS and plural(noun) != noun
                assert singular == (number == "one"), text


# ---------------------------------------------------------------------------------------
# modifications


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_is_what_its_words_ask_for_and_nothing_else(kind):
    rng = np.random.default_rng(0)
    openings, made = set(), 0
    for scene in SCENES:
        try:
            new, change = modify(scene, rng, (kind,), held_out=True)
        except ValueError:
            continue
        assert readings(scene, bare(change.text), kind) == {new}, (scene, change.text)
        assert new != scene and change.kinds == (kind,)
        assert len({o.cell for o in new.objects}) == len(new.objects) <= 4
        openings.add(bare(change.text).split()[0])
        made += 1
    assert made > 100 and len(openings) >= 2


@pytest.mark.parametrize("kinds", list(combinations(KINDS, 2)), ids=" and ".join)
def test_two_changes_are_both_asked_for(kinds):
    rng = np.random.default_rng(0)
    made = 0
    for scene in SCENES:
        try:
            new, change = modify(scene, rng, kinds, held_out=True)
        except ValueError:
            continue
        text, found = bare(change.text), set()
        gone = [o.noun for o in set(scene.objects) - set(new.objects)]
        assert len(gone) == len(set(gone)) == len({*kinds} - {"add", "background", "style"})
        assert set(change.kinds) == set(kinds)
        for joint in re.finditer(" and |, ", text):
            first, second = text[: joint.start()], text[joint.end() :]
            for one, other in (kinds, kinds[::-1]):
                found |= {
                    last
                    for middle in readings(scene, first, one)
                    for last in readings(middle, second, other)
                }
        assert found == {new}, (scene, change.text)
        made += 1
        if made == 25:
            break
    assert made == 25


def test_without_kinds_there_are_one_or_two_of_any_kind():
    rng = np.random.default_rng(0)
    kinds = [modify(scene, rng)[1].kinds for scene in sample_scenes(400, 2)]
    assert {k for ks in kinds for k in ks} == set(KINDS)
    assert 0.6 < np.mean([len(k) == 1 for k in kinds]) < 0.8


ONE = Scene((Object(4, "dog", "", "large"),), "sky", "flat")


@pytest.mark.parametrize(
    "kinds, message",
    [
        (("colour",), "'colour'; the kinds are replace, "),
        (("remove",), "cannot apply remove to a scene of 1 thing"),
        (("color",), "cannot apply color to a scene of 1 thing.*dog"),
        (("replace", "move"), "cannot apply replace and move"),  # of one thing only one is said
        (("add", "add"), "one or two different"),
        (("move", "background", "style"), "one or two different"),
        ((), "one or two different"),
    ],
)
def test_a_change_that_cannot_be_made_is_an_error(kinds, message):
    with pytest.raises(ValueError, match=message):
        modify(ONE, np.random.default_rng(0), kinds)


def test_a_confuser_says_nearly_the_same_words_of_another_scene():
    rng = np.random.default_rng(0)
    rebound = 0
    for scene in sample_scenes(300, seed=3):
        other = confuse(scene, rng)
        assert other != scene and not other.held_out
        assert (other.background, other.style) == (scene.background, scene.style)
        assert len({o.cell for o in other.objects}) == len(scene.objects)
        assert all(bool(o.color) == (o.noun in COLORED) for o in other.objects)
        assert all(o.count == 1 or o.size == "small" for o in other.objects)
        nouns = [sorted(o.noun for o in s.objects) for s in (scene, other)]
        rebound += nouns[0] == nouns[1]
    assert 50 < rebound < 250


# -------------------------------------------------------------------------------------------
# the command


def test_the_main_color_of_a_drawing_is_that_of_its_largest_part():
    image = np.zeros((20, 20, 4), np.uint8)
    image[2:18, 2:18] = (30, 60, 220, 255)
    image[2:8, 2:18] = (230, 40, 40, 255)
    hue, saturation, value, part = sprites.main_color(Image.fromarray(image))
    assert abs(hue - 0.64) < 0.03 and saturation > 0.8 and value > 0.8 and abs(part - 0.625) < 0.01
    image[9:18, 2:18] = (60, 160, 60, 255)
    image[2:9, 2:18] = (250, 180, 210, 255)  # a pale flower over its leaves
    leaves, flower = (sprites.main_color(Image.fromarray(image), petals=p) for p in (False, True))
    assert abs(leaves[0] - 0.33) < 0.03 and abs(flower[0] - 0.93) < 0.03
    assert sprites.main_color(Image.new("RGBA", (9, 9), (90, 90, 90, 255)))[3] == 0


def test_the_index_is_what_the_command_would_write():
    assert {n: (e["code"], e["colors"]) for n, e in INDEX["nouns"].items()} == sprites.nouns()
    assert INDEX["packages"] == {style: list(p) for style, p in sprites.PACKAGES.items()}
    assert (INDEX["cell"], INDEX["columns"]) == (sprites.CELL, sprites.COLUMNS)
    assert len({code for code, _ in sprites.nouns().values()}) == len(NOUNS)


def test_a_sprite_fills_its_cell_and_a_sticker_has_a_white_border():
    image = np.zeros((200, 200, 4), np.uint8)
    image[50:150, 80:120] = (200, 0, 0, 255)
    plain, sticker = (np.asarray(sprites._sprite(Image.fromarray(image), b)) for b in (0, 4))
    rows, columns = np.nonzero(plain[..., 3])
    assert (np.ptp(rows), np.ptp(columns)) == (93, 37)
    assert tuple(sticker[48, 48]) == (200, 0, 0, 255) and sticker[5, 48].min() > 250
    assert not sticker[[0, -1], :, 3].any()


def test_a_missing_package_is_named(tmp_path, capsys):
    for name, version in sprites.PACKAGES.values():
        (tmp_path / name).mkdir(parents=True)
        text = json.dumps({"name": name, "version": version})
        (tmp_path / name / "package.json").write_text(text)
    assert set(sprites.find_packages(tmp_path)) == set(STYLES)
    file = tmp_path / "@iconify-json/noto/package.json"
    file.write_text(json.dumps({"name": "@iconify-json/noto", "version": "1.2.0"}))
    with pytest.raises(ValueError, match=r"holds no @iconify-json/noto@1\.2\.9;"):
        sprites.find_packages(tmp_path)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stopped:
        main(["sprites", "--packages", str(tmp_path), "--out", str(out)])
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
