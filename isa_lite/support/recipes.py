"""Recipes: what a run is given beyond the parts that the paper's abstract names.

`recipe("core")`: the adaptive token learner, GCD within the batch, LAR and a prompt, in our
reading, and no further aids. `recipe("default")`: what ships, the same with five aids, all ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

#: A description of a scene, in the form of the captions of the shipped VL model.
START_WORDS = (
    "large red circle top left, small blue square right, large yellow star bottom, on white, flat"
    " style"
)


@dataclass(frozen=True)
class Recipe:
    """The aids, each with the value that leaves it out.

    Of the query encoder (`QueryEncoderConfig`): the words that a sentence starts from, holding
    pseudo-words to the length of real words, the weights that the backbone starts from. Of
    distillation (`DistillConfig`): noise on pseudo-words, and images outside the batch that each
    sentence is told apart from. lar_share saves time: LAR on a share of each step's images.
    """

    start_words: str = ""
    norm_matching: bool = False
    backbone_weights: str = ""
    word_noise: float = 0.0
    negatives: int = 0
    lar_share: float = 1.0

    @property
    def encoder(self) -> dict:
        """Settings for `QueryEncoder.for_model`."""
        names = ("start_words", "norm_matching", "backbone_weights")
        return {name: getattr(self, name) for name in names}

    @property
    def distillation(self) -> dict:
        """Settings for `DistillConfig`."""
        return {name: getattr(self, name) for name in ("word_noise", "negatives", "lar_share")}


RECIPES = {
    "core": Recipe(),
    "default": Recipe(START_WORDS, True, "scenes", word_noise=1.0, negatives=8192, lar_share=0.25),
}


def recipe(
    name: str, vl_model: str = "scenes-clip", backbone: str = "mobilenetv4_conv_small_050"
) -> Recipe:
    """A recipe by its name, for a VL model and a light backbone. Raises ValueError for no name.

    The start words are those of the shipped VL model, and the learned start is that of one backbone
    for it: with others, these two aids are left out.
    """
    if not isinstance(name, str) or name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; there are {', '.join(map(repr, RECIPES))}")
    found = asdict(RECIPES[name])
    if vl_model != "scenes-clip":
        found |= {"start_words": "", "backbone_weights": ""}
    if backbone != "mobilenetv4_conv_small_050":
        found["backbone_weights"] = ""
    return Recipe(**found)


def complete(settings: Mapping) -> dict:
    """Settings, and the recipe's value where an aid's setting is None."""
    chosen = asdict(recipe(settings["recipe"], settings["vl_model"], settings["backbone"]))
    return {**settings, **{n: value for n, value in chosen.items() if settings.get(n) is None}}
