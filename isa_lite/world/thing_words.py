"""English for the world of things: plurals, articles, what places, grounds and styles are called,
and how people ask for a change.
"""

from __future__ import annotations

import re

NUMBERS = ("no", "one", "two", "three", "four")
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
#: Of each cell where a thing is, and where it moves to. The last words for a place leave no doubt.
PLACES = (
    (("at the top left", "in the top left corner"), "to the top left corner"),
    (("at the top", "at the top center"), "to the top"),
    (("at the top right", "in the top right corner"), "to the top right corner"),
    (("on the left", "on the left side", "in the middle on the left"), "to the left side"),
    (("in the center", "in the middle"), "to the middle"),
    (("on the right", "on the right side", "in the middle on the right"), "to the right side"),
    (("at the bottom left", "in the bottom left corner"), "to the bottom left corner"),
    (("at the bottom", "at the bottom center"), "to the bottom"),
    (("at the bottom right", "in the bottom right corner"), "to the bottom right corner"),
)
#: Of each background where things are, where they go, and what it is called.
GROUNDS = {
    "wood": (("on a wooden floor", "on a wooden table"), "onto a wooden table", "wooden boards"),
    "snow": (("in the snow", "on the snow"), "into the snow", "snow"),
    "sand": (("on the sand", "on a sandy beach"), "to a sandy beach", "sand"),
    "sky": (("against a blue sky", "up in the sky"), "up into the sky", "a blue sky"),
    "water": (("on the water", "in the water"), "into the water", "water"),
    "night": (("against a night sky", "under the stars"), "into the night sky", "a night sky"),
    "blanket": (
        ("on a picnic blanket", "on a checkered blanket"),
        "onto a picnic blanket",
        "a checkered blanket",
    ),
    "brick": (
        ("against a brick wall", "in front of a brick wall"),
        "in front of a brick wall",
        "a brick wall",
    ),
    "grass": (("on the grass", "on a lawn"), "onto the grass", "grass"),
    "gravel": (("on gravel", "on gray gravel"), "onto gravel", "gravel"),
}
#: Of each style how a picture is done, what it is turned into, and how it is drawn.
STYLES = {
    "3D": (("in 3D", "as a 3D rendering"), "a 3D rendering", "rendered in 3D"),
    "flat": (("in a flat style", "as a flat drawing"), "a flat drawing", "drawn in a flat style"),
    "cartoon": (("in cartoon style", "as a cartoon"), "a cartoon", "drawn as a cartoon"),
    "sticker": (("in sticker style", "as stickers"), "stickers", "drawn as stickers"),
}
#: Of each kind of change how it is asked for: as an order, as a description of the wanted picture,
#: and in words that cannot be joined with others.
PHRASES = {
    "replace": (
        (
            "replace {the} with {some}",
            "swap {the} for {some}",
            "turn {the} into {some}",
            "put {some} where {short} {is_}",
        ),
        ("with {some} instead of {the}", "with {some} in place of {the}"),
        ("{some} instead of {the}",),
    ),
    "add": (
        ("add {some}", "put {some}"),
        ("with {some}",),
        ("there should also be {some}", "with {some} as well"),
    ),
    "remove": (
        ("remove {the}", "take away {the}", "leave out {the}", "get rid of {the}"),
        ("without {the}",),
        (),
    ),
    "color": (
        ("make {the} {color}", "change the color of {the} to {color}"),
        ("with {short} in {color}", "with {some} instead of the {old} {ones}"),
        ("{the} should be {color}",),
    ),
    "move": (
        ("move {short} {to}", "put {short} {at}"),
        ("with {short} {at}",),
        ("{short} should be {at}",),
    ),
    "size": (
        ("make {the} {more}", "make {the} {size}"),
        ("with a {more} {noun}",),
        ("{the} should be {more}",),
    ),
    "count": (
        ("show {some} instead of {before}", "{change}"),
        ("with {some} instead of {before}", "with {some}"),
        ("make it {just}", "there should be {some}"),
    ),
    "background": (
        ("put everything {at}", "move everything {to}", "change the background to {called}"),
        ("{at}", "with {called} in the background"),
        ("{at} instead", "the background should be {called}, not {before}"),
    ),
    "style": (
        ("redraw everything {redrawn}", "turn the whole picture into {what}"),
        ("{how}", "{drawn}"),
        ("everything should be {drawn}",),
    ),
}
#: What a description may begin with.
STARTS = ("", "", "the same scene ", "the same picture, but ", "the same, but ")
_PLURALS = {
    "mouse": "mice",
    "snowman": "snowmen",
    "jellyfish": "jellyfish",
    "sheep": "sheep",
    "fish": "fish",
    "loaf": "loaves",
}


def plural(noun: str) -> str:
    """More than one of it: "butterflies", "slices of pizza", "fish"."""
    head, of, rest = noun.partition(" of ")
    start, space, word = head.rpartition(" ")
    if word in _PLURALS:
        word = _PLURALS[word]
    elif word.endswith("y") and word[-2] not in "aeou":
        word = word[:-1] + "ies"
    else:
        word += "es" if word.endswith(("s", "x", "ch", "sh")) else "s"
    return start + space + word + of + rest


def a(words: str) -> str:
    """The words with "a" or "an" as they are spoken: "an orange balloon", "a unicorn"."""
    vowel = words[0] in "aeiou" and not words.startswith("uni") or words.startswith("hour")
    return f"{'an' if vowel else 'a'} {words}"


def phrases(kind: str, slots: dict[str, str]) -> list[list[str]]:
    """Orders, descriptions and the rest for a change; without those that need an empty slot."""
    return [
        [t.format(**slots) for t in some if all(map(slots.get, re.findall(r"{(\w+)}", t)))]
        for some in PHRASES[kind]
    ]
