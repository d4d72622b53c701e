"""The settings of every run, and what a command line needs. Nothing here imports PyTorch.

A settings dataclass holds each field's meaning beside its default, once: `--help` shows it
(`parameters.add_settings`). The module that works with the settings imports them from here, so
`from isa_lite.distill import DistillConfig` works, too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isa_lite.support.parameters import (
    Rule,
    check_settings,
    device_name,
    flag,
    number,
    scene_count,
    text,
    whole,
)
from isa_lite.support.recipes import RECIPES, recipe

_HERE = Path(__file__).resolve().parents[1]  # isa_lite/
#: The folder of shipped artefacts: inside an installed package, beside it in a checkout.
DATA = _HERE / "data" if (_HERE / "data").is_dir() else _HERE.parent / "data"
#: The name under which `load_vl_model` finds the shipped model of rendered scenes.
SCENES_CLIP = "scenes-clip"
#: The folder of the shipped query encoder in `DATA`.
SCENES_ENCODER = "scenes-query-encoder"
#: What `light_backbone` has learned on rendered scenes: short name, folder in data/, files.
SCENES, SCENES_BACKBONE, WEIGHTS = "scenes", "scenes-light-backbone", "backbone"

#: The side of a rendered scene in pixels; 32 a cell.
IMAGE_SIZE = 96
#: The words around a query's two halves (the paper's "a photo of"; its punctuation is ours).
TEMPLATE = "a photo of {sentence}, {modifier}"
#: How often the state of a run is saved.
MINUTES = 5.0
#: The names of the mapping networks; `mappings.MAPPINGS` holds the networks themselves.
MAPPING_NAMES = ("adaptive", "single vector", "average pooling", "slot attention", "resampler")
#: Numbers of distractors at which `growth` measures.
GROWTH_SIZES = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
#: Notebook 02, which a sweep runs; there is one in a checkout only.
NOTEBOOK = DATA.parent / "notebooks" / "02_distillation.ipynb"
#: Where a sweep looks for the VL model without the language of change in its captions.
WITHOUT_CHANGE = "runs/vl-without-change"

#: Of each public benchmark its splits; the methods that can be scored; and the choices that
#: FashionIQ's protocols leave.
SPLITS = {
    "fashioniq": ("train", "val", "test"),
    "cirr": ("train", "val", "test1"),
    "circo": ("val", "test"),
}
#: The rendered worlds (`isa_lite.world`).
WORLDS = ("shapes", "things")
#: Ways to compose that the benchmarks know: those of a run that names none, and late fusion.
METHODS = ("isa", "image + text", "text only", "image only")
FUSED = ("weighted sum", "spherical interpolation", "product of similarities")
GALLERIES = ("split", "triplets")
CAPTIONS = ("both orders", "one order")


def check_template(template: str) -> None:
    """Raises ValueError for a template without its two fields."""
    parts = re.findall(r"\{(\w*)\}", template) if isinstance(template, str) else []
    if sorted(parts) != ["modifier", "sentence"]:
        raise ValueError(
            "a template holds {sentence} and {modifier} once each; this one does not:"
            f" {template!r}"
        )


#: `precision.training_dtype` decides on `auto`. float16 would underflow without loss scaling.
DTYPES = ("auto", "float32", "bfloat16")
DTYPE_HELP = (
    "of the matrix products in training: auto (bfloat16 on a GPU that has it, else float32),"
    " float32 or bfloat16"
)


def check_dtype(dtype: str) -> None:
    """Raises ValueError for what is no dtype of training."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")


#: Help on what a query encoder starts from, which the command distill has, too.
START = "weights that the backbone starts from: scenes, lite0, or a folder of light_backbone"
WORDS = "a text whose words the sentence is before training"


def setting(default: Any, meaning: str) -> Any:
    """A field of a settings dataclass: its default, and the line that `--help` shows."""
    return field(default=default, metadata={"help": meaning})


#: What the settings of all trainings must be, and those of the two pre-trainings.
_LEARNING: dict[str, Rule] = {"steps": whole(1), "seed": whole(0), "device": device_name()}
_LEARNING |= {"lr": number(0, above=True), "weight_decay": number(0), "num_workers": whole(0, 256)}
_TRAINING = _LEARNING | {"batch_size": whole(2), "warmup": whole(0)}
_PRETRAINING = _LEARNING | {"matching_steps": whole(0), "warmup": whole(1), "dtype": text(*DTYPES)}
# the image tower halves five times; the text tower is cut in heads
_PRETRAINING |= {"image_size": whole(32, 4096, multiple=32), "embed_dim": whole(1, 2**14)}
_PRETRAINING |= {"vision_width": whole(2, 2**12, multiple=2), "text_layers": whole(1, 128)}
_PRETRAINING |= {"text_width": whole(32, 2**14, multiple=32), "context_length": whole(8, 4096)}


@dataclass
class QueryEncoderConfig:
    """Everything that is needed to build a query encoder again.

    word_width, word_norm: of the VL model whose words are imitated; vl_model: its fingerprint,
    checked when the encoder is loaded. backbone "vl" is the VL model's own image tower, frozen
    (symmetric ISA).

    None is replaced when the encoder is built, and the value is what is saved. image_size, mean,
    std: those of the weights' own training (timm's data config), or 96 pixels and 0.5 with random
    weights; stride: `backbones.default_stride`; width, depth: the mapping's own.
    """

    word_width: int
    word_norm: float
    vl_model: str = ""
    backbone: str = setting(
        "mobilenetv4_conv_small_050",
        "any timm model with feature maps, or vl: the VL model's own image tower",
    )
    pretrained: bool = setting(False, "start from timm's weights, which are downloaded")
    backbone_weights: str = setting("", f"{START} (default: none)")
    image_size: int | None = setting(
        None, "pixels a side for the backbone (default: as its weights were trained; 96 if random)"
    )
    stride: int | None = setting(
        None, "stride of the feature map in pixels (default: the coarsest of at least 4 x 4 places)"
    )
    mapping: str = setting("adaptive", "the network from the feature map to the sentence")
    norm_matching: bool = setting(True, "hold pseudo-words to the length of real words")
    start_words: str = setting("", f"{WORDS} (default: none)")
    num_tokens: int = setting(12, "pseudo-words of a sentence; a single vector is 1")
    width: int | None = setting(None, "channels of the mapping (default: its own, 128 or 512)")
    depth: int | None = setting(None, "blocks of the mapping network (default: its own)")
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None


@dataclass
class DistillConfig:
    """Settings of one distillation run. Raises ValueError, naming the field, for a bad value.

    With both losses off (gcd_weight and lar_weight 0) nothing is trained. Where negatives or
    word_noise is None, the recipe's value takes its place.
    """

    steps: int = setting(800, "training steps")
    batch_size: int = setting(128, "images in a step, of all processes together")
    lr: float = setting(3e-3, "highest learning rate")
    warmup: int = setting(50, "steps until the learning rate is at its highest")
    weight_decay: float = setting(0.05, "weight decay of matrices")
    temperature: float = setting(0.05, "temperature of GCD and of late interaction")
    gcd_weight: float = setting(1.0, "weight of global contrastive distillation; 0 switches it off")
    lar_weight: float = setting(0.1, "weight of local alignment regularization; 0 switches it off")
    lar_share: float | None = setting(
        None, "share of a step's images that LAR is computed on (default: the recipe's)"
    )
    freeze_stem: bool = setting(
        True, "hold the first convolution, and its norm, of a learned backbone as they are"
    )
    recipe: str = setting(
        "default", "core: the paper's abstract alone; default: also our aids (default: default)"
    )
    negatives: int | None = setting(
        None, "images outside the batch to tell a sentence from, at most (default: the recipe's)"
    )
    word_noise: float | None = setting(
        None, "Gaussian noise on pseudo-words, in lengths of a pseudo-word (default: the recipe's)"
    )
    validation: int = setting(500, "images held back to watch the recall")
    validate_every: int = setting(100, "steps between two looks at the recall")
    template: str = setting(TEMPLATE, "the prompt, with {sentence} and {modifier}")
    seed: int = setting(0, "everything random follows from it")
    device: str = setting("cpu", "cpu, cuda, cuda:1, ...")
    dtype: str = setting("auto", DTYPE_HELP)
    num_workers: int = setting(0, "processes that read images ahead")

    def __post_init__(self):
        for name, value in recipe(self.recipe).distillation.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        rules = _TRAINING | {"dtype": text(*DTYPES), "freeze_stem": flag()}
        rules |= {"validation": whole(2), "validate_every": whole(1), "negatives": whole(0)}
        rules |= dict.fromkeys(("gcd_weight", "lar_weight", "word_noise"), number(0))
        # LAR is switched off by its weight
        rules |= {"temperature": number(0, above=True), "lar_share": number(0, above=True, most=1)}
        check_settings(self, **rules)
        check_template(self.template)


@dataclass
class BackboneConfig:
    """Settings of one run of `light_backbone`; no scene has a held-out pair.

    Raises ValueError, naming the field, for a number that cannot work.
    """

    backbone: str = setting("mobilenetv4_conv_small_050", "any timm model with feature maps")
    stride: int = setting(16, "stride of the feature map that is used, in pixels")
    num_images: int = setting(32000, "scenes, drawn from the seed")
    steps: int = setting(8000, "training steps")
    batch_size: int = setting(128, "images in a step")
    lr: float = setting(3e-3, "highest learning rate")
    warmup: int = setting(100, "steps until the learning rate is at its highest")
    weight_decay: float = setting(0.05, "weight decay")
    seed: int = setting(100, "everything random follows from it")
    device: str = setting("cpu", "cpu, cuda, cuda:1, ...")
    num_workers: int = setting(0, "processes that read images ahead")

    def __post_init__(self):
        check_settings(
            self, **_TRAINING, backbone=text(), stride=whole(1, 1024), num_images=scene_count(2)
        )


@dataclass
class PretrainConfig:
    """Settings of one pre-training run. Raises ValueError, naming the field, for a bad value.

    vision_layers: blocks in each stage of a ModifiedResNet, CLIP's convolutional tower.
    """

    world: str = setting("shapes", "what is rendered: shapes or things")
    steps: int = setting(2400, "training steps of the towers")
    matching_steps: int = setting(600, "training steps of the matching encoder")
    families: int = setting(20, "families of five related scenes in a batch")
    singles: int = setting(12, "unrelated scenes in a batch")
    partial: float = setting(0.2, "share of the unrelated scenes with an incomplete caption")
    change: float = setting(1.0, "share of the edited scenes also told in the language of change")
    lr: float = setting(1e-3, "highest learning rate")
    warmup: int = setting(100, "steps until the learning rate is at its highest")
    weight_decay: float = setting(0.05, "weight decay of matrices")
    seed: int = setting(0, "everything random follows from it")
    device: str = setting("cpu", "cpu, cuda, cuda:1, ...")
    dtype: str = setting("auto", DTYPE_HELP)
    num_workers: int = setting(1, "processes that make batches ahead")

    image_size: int = setting(IMAGE_SIZE, "pixels on a side of a picture; a multiple of 32")
    embed_dim: int = setting(256, "dimensions of the joint space")
    vision_width: int = setting(24, "channels of the image tower's first stage")
    vision_layers: tuple[int, ...] = (1, 1, 1, 1)
    text_width: int = setting(192, "channels of the text tower; a multiple of 32")
    text_layers: int = setting(4, "layers of the text tower")
    context_length: int = setting(77, "tokens of a text at most")

    def __post_init__(self):
        shares = dict.fromkeys(("partial", "change"), number(0, most=1))
        shares |= dict.fromkeys(("families", "singles"), whole(0, 10_000))
        check_settings(self, **_PRETRAINING, **shares, world=text(*WORLDS))
        if 5 * self.families + self.singles < 2:
            fault = f"families and singles make {self.singles} images in a batch"
            raise ValueError(f"{fault}; two are needed to tell apart")

    def model_cfg(self) -> dict:
        """The model as open_clip describes one (`model_cfg` of open_clip_config.json)."""
        vision = {"image_size": self.image_size, "layers": list(self.vision_layers)}
        text = {"context_length": self.context_length, "vocab_size": 49408}
        text |= {"width": self.text_width, "heads": self.text_width // 32}
        return {
            "embed_dim": self.embed_dim,
            "vision_cfg": vision | {"width": self.vision_width},
            "text_cfg": text | {"layers": self.text_layers},
        }


@dataclass
class FolderConfig(PretrainConfig):
    """Settings of one run on a folder. Raises ValueError, naming the field, for a bad value.

    Pictures are not mirrored or recoloured: captions say left, right and red. data: filled in, a
    digest of what training sees.
    """

    steps: int = setting(1000, "training steps of the towers")
    matching_steps: int = setting(300, "training steps of the matching encoder; 0: without one")
    batch_size: int = setting(128, "images in a step")
    related: float = setting(
        0.5, "share of a batch's images that bring a relative: its caption differs in a few words"
    )
    change: float = setting(0.7, "share of related images also told as a change; 0: none")
    prompted: float = setting(0.25, 'share of captions that begin with "a photo of"')
    zoom: float = setting(0.15, "pictures are enlarged, reduced and shifted by up to this part")
    held_out: float = setting(0.0, "share of the captioned images that training does not see")
    num_workers: int = setting(0, "processes that make batches ahead")
    data: str = field(default="", init=False)
    world: str = field(default="", init=False)  # these four are of rendered scenes
    families: int = field(default=0, init=False)
    singles: int = field(default=0, init=False)
    partial: float = field(default=0.0, init=False)

    def __post_init__(self):
        shares = dict.fromkeys(("related", "change", "prompted"), number(0, most=1))
        halves = dict.fromkeys(("zoom", "held_out"), number(0, most=0.5))
        check_settings(self, **_PRETRAINING, **shares, **halves, batch_size=whole(8))


@dataclass
class CompareConfig:
    """Settings of one comparison: the shipped query encoder's, which every run must have.

    start_words, word_noise, negatives: the shipped query encoder's aids; each one-word recipe is
    trained once more with them.
    """

    num_images: int = 8000  # unlabeled images, and for LinCIR-like as many captions
    inverted: int = 1000  # of these images, those for which SEARLE-like first optimises a word
    steps: int = 800
    batch_size: int = 128
    queries: int = 1000
    gallery: int = 5000
    chosen_queries: int = 500
    chosen_gallery: int = 2000
    start_words: str = RECIPES["default"].start_words
    word_noise: float = RECIPES["default"].word_noise
    negatives: int = RECIPES["default"].negatives


@dataclass
class RunConfig:
    """Settings of a run on a public benchmark.

    options: of the benchmark's `load`, such as gallery="triplets"; template: the prompt of isa;
    truncate: cut modifiers that do not fit the text tower. The others are those of `embed_files`.
    """

    split: str = "val"
    options: dict[str, object] = field(default_factory=dict)
    template: str = TEMPLATE
    truncate: bool = False
    batch_size: int = 128
    num_workers: int = 1
    dtype: str = "float32"
    progress: bool = True

    def __post_init__(self):
        check_template(self.template)
