"""The settings of a query encoder: checked, filled in, and read from its folder. Ours.

What a folder asks for is checked before it takes memory, and no code is run that it names.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, replace
from operator import methodcaller
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torchvision import transforms as T

from isa_lite.models.backbones import check_backbone, start_config
from isa_lite.models.symmetric import LARGE_TOWER
from isa_lite.models.vl_model import VLModel
from isa_lite.support import plugins
from isa_lite.support.checkpoint import (
    check_weights,
    read_json,
    read_tensors,
    write_tensors,
    write_text,
)
from isa_lite.support.parameters import Rule, check_settings, number, optional, text, whole
from isa_lite.support.settings import QueryEncoderConfig

SETTINGS, WEIGHTS = "query_encoder.json", "query_encoder.safetensors"


def _flag(value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")


def _three(rule: Rule) -> Rule:
    def each(values):
        if not isinstance(values, (tuple, list)) or len(values) != 3:
            raise ValueError("must be three numbers")
        for value in values:
            rule(value)

    return optional(each)


#: What the settings must be. A larger size is a mistake, or a file that asks for all the memory.
_RULES: dict[str, Rule] = {
    "word_width": whole(1, 2**16),
    "word_norm": number(0, above=True),
    "num_tokens": whole(1, 2**10),
    "image_size": optional(whole(1, 2**11)),
    "stride": optional(whole(1, 2**11)),
    "width": optional(whole(1, 2**14)),
    "depth": optional(whole(0, 2**7)),
    "mean": _three(number(-1e6, most=1e6)),
    "std": _three(number(0, above=True, most=1e6)),
}
_RULES |= dict.fromkeys(("vl_model", "backbone", "backbone_weights", "start_words"), text())
_RULES |= {"mapping": text(), "pretrained": _flag, "norm_matching": _flag}


def settings_for(vl: VLModel, **settings) -> QueryEncoderConfig:
    """Settings whose words fit `vl`, and whose images are as large as its own where nothing else is
    said and the weights are random.
    """
    if not (settings.get("pretrained") or settings.get("backbone_weights")):
        settings = {"image_size": vl.image_size} | settings
    if settings.get("backbone") == LARGE_TOWER:  # its pictures are the VL model's
        look = {name: tuple(getattr(vl.clip.visual, f"image_{name}")) for name in ("mean", "std")}
        settings |= look | {"image_size": vl.image_size}
    words = {"word_width": vl.word_width, "word_norm": vl.word_norm}
    return QueryEncoderConfig(**words, vl_model=vl.fingerprint, **settings)


def checked(config: QueryEncoderConfig, vl: VLModel | None = None) -> QueryEncoderConfig:
    """A copy without NumPy's numbers. Raises ValueError, naming the field, for a value that cannot
    work, whatever the mapping.
    """
    values = {name: value for name, value in vars(config).items() if isinstance(value, np.generic)}
    config = replace(config, **{name: value.item() for name, value in values.items()})
    check_settings(config, **_RULES)
    check_backbone(config.backbone)
    if vl is not None and config.num_tokens > vl.words.room:
        raise ValueError(
            f"num_tokens must be at most {vl.words.room}, what the text tower reads, not"
            f" {config.num_tokens}"
        )
    return config


def filled(config: QueryEncoderConfig, network: Callable) -> QueryEncoderConfig:
    """Checked settings with a value in place of each None but the stride's: of the mapping
    `network` and of the backbone's start. Raises ValueError for a width that does not work.
    """
    own = inspect.signature(network).parameters
    if not {"width", "depth"} <= set(own):
        raise ValueError(f"mapping {config.mapping!r} takes no width and depth, with defaults")
    start = {n: own[n].default for n in ("width", "depth")}
    if None in (config.image_size, config.mean, config.std):
        start |= start_config(config.backbone, config.pretrained, config.backbone_weights)._asdict()
    config = replace(config, **{n: v for n, v in start.items() if getattr(config, n) is None})
    if config.mapping in ("adaptive", "resampler") and config.width % 32:  # heads of 32 channels
        raise ValueError(
            f"width must be a multiple of 32 for the mapping {config.mapping!r}, not {config.width}"
        )
    return config


def built(
    network: Callable,
    shapes: tuple,
    config: QueryEncoderConfig,
    stored: Mapping[str, Sequence[int]] | None,
) -> nn.Module:
    """The mapping network. Raises ValueError where its weights would have other shapes than those
    that are `stored`, before it takes any memory; and for one of your own that writes no sentence.
    """
    if stored is not None:
        with torch.device("meta"):  # shapes, and no numbers
            planned = network(shapes, width=config.width, depth=config.depth).state_dict()
        for key, tensor in planned.items():
            there = stored.get(f"mapping.{key}")
            if list(tensor.shape) != there:
                found = "not there" if there is None else there
                raise ValueError(f"mapping.{key} would be {list(tensor.shape)}, and is {found}")
    mapping = network(shapes, width=config.width, depth=config.depth)
    if plugins.is_spec(config.mapping):
        _try(mapping, shapes, config.mapping)
    return mapping


@torch.no_grad()
def _try(mapping: nn.Module, shapes: tuple, name: str) -> None:
    """Raises ValueError unless a mapping of your own writes a `Sentence` of its to_word."""
    start = getattr(getattr(mapping, "to_word", None), "start", None)
    if not isinstance(mapping, nn.Module) or start is None:
        raise ValueError(f"mapping {name!r} must be a module whose to_word is a ToWords")
    said = mapping(torch.zeros(1, shapes.channels, *shapes.grid))
    found = [tuple(getattr(getattr(said, part, 0), "shape", ())) for part in ("tokens", "maps")]
    wanted = [(1, len(start), shapes.word_width), (1, len(start), *shapes.grid)]
    if found != wanted:
        raise ValueError(
            f"mapping {name!r} must give a Sentence with tokens and maps of {wanted}, not {found}"
        )


def preprocessing(config: QueryEncoderConfig) -> Callable[[Image.Image], Tensor]:
    """A picture -> 3 x H x W as a light backbone wants it."""
    cut = [
        T.Resize(config.image_size, T.InterpolationMode.BICUBIC),
        T.CenterCrop(config.image_size),
    ]
    rgb = T.Lambda(methodcaller("convert", "RGB"))
    return T.Compose([*cut, rgb, T.ToTensor(), T.Normalize(config.mean, config.std)])


def write(folder: Path, encoder: nn.Module, info: Mapping) -> None:
    """Weights, and settings with `info` for the reader."""
    settings = folder / SETTINGS
    settings.unlink(missing_ok=True)  # old settings with new weights would be neither
    write_tensors(folder / WEIGHTS, encoder.state_dict())
    write_text(
        settings, json.dumps({"config": asdict(encoder.config), "info": info}, indent=1) + "\n"
    )


def read_settings(
    folder: Path, vl: VLModel | None = None, mapping: str | None = None
) -> tuple[QueryEncoderConfig, dict]:
    """The settings of a query encoder in `folder`, checked, and its info. mapping: in place of the
    one named there, which must be given for one of your own.

    Raises FileNotFoundError where a file is missing; ValueError naming file and setting, or where
    it belongs to another model than `vl`.
    """
    path, weights = folder / SETTINGS, folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {SETTINGS}; give the folder that QueryEncoder.save wrote (a"
            f" relative one as seen from {Path.cwd().name}/)"
        )
    if not weights.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {WEIGHTS}, which belongs to its {SETTINGS}; save it again"
        )
    content = read_json(path, "the settings of a query encoder")
    found, info = content.get("config"), content.get("info", {})
    try:
        if not isinstance(info, dict):
            raise ValueError("its info is no object")
        if not isinstance(found, dict):
            raise ValueError("it has no config")
        known = {field.name: field.default is MISSING for field in fields(QueryEncoderConfig)}
        if unknown := [name for name in found if name not in known]:
            raise ValueError(f"it names {unknown[0]!r}, which this version does not know")
        if lacking := [name for name, needed in known.items() if needed and name not in found]:
            raise ValueError(f"it lacks {lacking[0]!r}")
        config = checked(QueryEncoderConfig(**found | ({"mapping": mapping} if mapping else {})))
        # what `save` writes has no gaps
        if config.image_size is None or config.mean is None or config.std is None:
            raise ValueError("it lacks image_size, mean or std")
    except ValueError as error:
        raise ValueError(f"{path} holds no settings of a query encoder: {error}") from error
    if not mapping and plugins.is_spec(config.mapping):
        raise ValueError(
            f"{path} names a mapping of somebody's own, {config.mapping!r}, and what a file names"
            " is not run: name it yourself, mapping='FILE.py:NAME' (commands: --mapping)"
        )
    if vl is not None and config.vl_model != vl.fingerprint:
        raise ValueError(
            f"the query encoder in {folder} belongs to VL model {config.vl_model}, not"
            f" {vl.fingerprint} ({vl.name}); its sentences mean nothing to another model: load"
            " that one, or distill again"
        )
    return config, info


def read_weights(
    folder: Path, build: Callable[[Mapping[str, Sequence[int]]], nn.Module]
) -> nn.Module:
    """What `build` makes of the shapes of the weights in `folder`, with these weights. Raises
    ValueError, naming the file, for weights that do not fit, or cannot be read.
    """
    path = folder / WEIGHTS
    try:
        with safe_open(path, "pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
        encoder = build(shapes)
        tensors = read_tensors(path)[0]
        check_weights(tensors, encoder.state_dict(), WEIGHTS)
        encoder.load_state_dict(tensors)
        return encoder
    # of other shapes, or a file that is cut off
    except (RuntimeError, SafetensorError, ValueError, OSError) as error:
        said = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} does not fit its {SETTINGS}: {said}") from error
