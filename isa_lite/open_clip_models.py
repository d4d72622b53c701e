"""Models of open_clip with what belongs to them: by name and tag of weights, or from a folder in its local-dir layout.

What comes out is made a `VLModel` by `vl_model.load_vl_model`.
"""

from __future__ import annotations

import difflib
import json
import logging
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import open_clip
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from isa_lite.hub import weights_file
from isa_lite.matching_encoder import MatchingEncoder
from isa_lite.text_tower import text_config
from isa_lite.words import load_tokenizer

#: What a file of weights raises that is cut off, or of another model, or no such file at all.
_UNFIT = (RuntimeError, LookupError, EOFError, UnicodeDecodeError, pickle.UnpicklingError, SafetensorError)


def unknown(what: str, name: str, known: Sequence[str]) -> ValueError:
    """The error for a name that is not among those known, with the nearest ones."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return ValueError(f"unknown {what} {name!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))


def from_folder(folder: Path, name: str, device: str) -> tuple[nn.Module, Callable, Callable, MatchingEncoder | None]:
    """Model, preprocessing, tokenizer, and our matching encoder where one lies beside them. Raises ValueError for no model."""
    if not (folder / "open_clip_config.json").is_file():
        raise ValueError(f"{folder} is a folder without open_clip_config.json, so it holds no model")
    source = f"local-dir:{folder}"
    try:
        config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{folder / 'open_clip_config.json'} is no JSON: {error}") from error
    text = text_config(config.get("model_cfg", config), name)
    tokenizer = load_tokenizer(source, text, name, folder)  # before the weights: it is small, and may be out of reach
    changed = {"text_cfg": text} if text.get("hf_model_name") else {}
    try:
        clip, preprocess = open_clip.create_model_from_pretrained(source, device=device, **changed)
    except _UNFIT as error:
        raise ValueError(f"{folder} holds no weights that fit its open_clip_config.json: {error}") from error
    matcher, settings = None, folder / "matching_encoder.json"
    if settings.is_file():
        matcher = MatchingEncoder(**json.loads(settings.read_text()))
        try:
            weights = load_file(folder / "matching_encoder.safetensors")
            matcher.load_state_dict({k: v.float() for k, v in weights.items()})
        except (*_UNFIT, FileNotFoundError) as error:
            raise ValueError(f"{folder} holds no weights that fit its matching_encoder.json: {error}") from error
        matcher.to(device)
    return clip, preprocess, tokenizer, matcher


def from_name(name: str, pretrained: str | None, device: str) -> tuple[nn.Module, Callable, Callable]:
    """Model, preprocessing and tokenizer of a name that open_clip knows; pretrained: tag or file of its weights.

    Raises ValueError for no tag, an unknown one, or a file that does not fit; ImportError for a missing package; ConnectionError
    for weights out of reach.
    """
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None:
        raise ValueError(f"{name} needs weights: give pretrained= a file or one of the tags {', '.join(tags) or '(none known)'}")
    if not Path(pretrained).is_file() and pretrained not in tags:
        if Path(pretrained).suffix or Path(pretrained).name != pretrained:  # no tag has a dot or a slash
            raise ValueError(f"there is no file of weights {pretrained}")
        raise unknown(f"tag of weights for {name}:", pretrained, tags)
    text = text_config(open_clip.get_model_config(name), name)
    tokenizer = load_tokenizer(name, text, name)
    logging.getLogger(__name__).info("loading %s with weights %s", name, pretrained)
    more = {"text_cfg": text} if text.get("hf_model_name") else {}
    if not Path(pretrained).is_file():
        look = open_clip.get_pretrained_cfg(name, pretrained)  # how images are to be prepared goes with the weights
        more |= {f"image_{key}": look[key] for key in ("mean", "std", "interpolation", "resize_mode") if look.get(key)}
        more |= {"force_quick_gelu": True} if look.get("quick_gelu") else {}  # and so does the activation
    file = pretrained if Path(pretrained).is_file() else weights_file(name, pretrained)
    try:
        clip, preprocess = open_clip.create_model_from_pretrained(name, pretrained=str(file), device=device, **more)
    except _UNFIT as error:
        raise ValueError(f"{file} cannot be loaded as weights of {name}: {type(error).__name__}: {error}") from error
    return clip, preprocess, tokenizer
