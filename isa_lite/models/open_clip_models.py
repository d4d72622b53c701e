"""Models of open_clip with what belongs to them: by name and tag, or from a local-dir folder.

What comes out is made a `VLModel` by `vl_model.load_vl_model`.
"""

from __future__ import annotations

import difflib
import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path

import open_clip
import timm
from open_clip.coca_model import MultimodalCfg
from safetensors import SafetensorError, safe_open
from torch import nn

from isa_lite.models.matching_encoder import MatchingEncoder
from isa_lite.models.text_tower import text_config
from isa_lite.models.tokenization import load_tokenizer
from isa_lite.support.checkpoint import read_json, read_tensors, sound
from isa_lite.support.hub import nothing_fetched, weights_file

#: What a file of weights raises that is cut off, or of another model, or no such file at all.
_UNFIT = (RuntimeError, LookupError, EOFError, UnicodeDecodeError)
_UNFIT += (pickle.UnpicklingError, SafetensorError)


def unknown(what: str, name: str, known: Sequence[str]) -> ValueError:
    """The error for a name that is not among those known, with the nearest ones."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    return ValueError(f"unknown {what} {name!r}{hint}")


#: What a model folder may set, by section. It may come from strangers, and open_clip hands some
#: settings on: `trust_remote_code` among those of a tokenizer runs their code.
_HARMLESS = {
    "model_cfg": set(
        "embed_dim vision_cfg text_cfg multimodal_cfg custom_text quick_gelu init_logit_scale"
        " init_logit_bias nonscalar_logit_scale".split()
    ),
    "vision_cfg": {field.name for field in fields(open_clip.CLIPVisionCfg)},
    "text_cfg": {field.name for field in fields(open_clip.CLIPTextCfg)},
    "multimodal_cfg": {field.name for field in fields(MultimodalCfg)},
    "tokenizer_kwargs": {"clean", "strip_sep_token", "language", "reduction_mask"},
    "act_kwargs": {"approximate"},
    "norm_kwargs": {"eps"},
    "preprocess_cfg": {"size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color"},
}
_CHOICES = {"mode": ("RGB",), "interpolation": ("bicubic", "bilinear", "random")}
_CHOICES |= {"resize_mode": ("shortest", "longest", "squash")}
_LARGEST = 10_000_000  # of the numbers; larger ones would only fill the memory


def check_settings(path: Path, settings: object, section: str) -> dict:
    """One section of a model folder's settings, with those in it, if it is harmless.

    Raises ValueError that names the file `path` and the setting.
    """
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: {section} must be a JSON object, not {settings!r}")
    for key, value in settings.items():
        if key not in _HARMLESS.get(section, ()):
            fault = f"{path}: {section} sets {key!r}, which is not among the settings"
            raise ValueError(f"{fault} that are known to be harmless")
        if isinstance(value, dict):
            check_settings(path, value, key)
            continue
        for item in value if isinstance(value, list) else [value]:
            number = isinstance(item, (int, float))
            good = abs(item) <= _LARGEST if number else isinstance(item, (str, type(None)))
            if not good:
                told = f"{path}: {section} sets {key!r} to {str(value)[:60]}"
                raise ValueError(f"{told}, which cannot work")
    return settings


def check_preprocessing(path: Path, settings: object) -> None:
    """Raises ValueError, naming the file and the setting, for a preprocessing that cannot work."""
    for key, value in check_settings(path, settings, "preprocess_cfg").items():
        numbers = value if isinstance(value, list) else [value]
        # no bool, and no null: open_clip would take its default
        good = all(type(n) in (int, float) for n in numbers)
        if key in ("mean", "std"):
            good = good and len(numbers) == 3 and (key == "mean" or min(numbers) > 0)
            good = good and max(map(abs, numbers)) <= 1e6
        elif key == "size":
            good = len(numbers) in (1, 2) and all(type(n) is int and n > 0 for n in numbers)
        elif key in _CHOICES:
            good = value in _CHOICES[key]
        if not good:
            raise ValueError(f"{path}: preprocess_cfg sets {key!r} to {value!r}, which cannot work")


def check_loaded(path: Path, module: nn.Module) -> None:
    """Raises ValueError, naming file and tensor, for weights that are no numbers; masks hold -inf.

    Nor may whole numbers stand for others: a library turns them into such silently.
    """
    kinds = {}
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            kinds = {key: file.get_slice(key).get_dtype() for key in file.keys()}
    for name, value in module.state_dict().items():
        fault = f"{path} is damaged: its weights {name}"
        if name in kinds and kinds[name].startswith(("F", "BF")) != value.is_floating_point():
            raise ValueError(f"{fault} are {kinds[name]}, and not {value.dtype}")
        if not (value.isnan().logical_not().all() if name.endswith("mask") else sound(value)):
            raise ValueError(f"{fault} hold values that are no numbers")


@contextmanager
def fitting(path: Path, what: str) -> Iterator[None]:
    """Inside, whatever a library raises over misfits is a ValueError that names `path`."""
    try:
        yield
    except (ImportError, ConnectionError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(
            f"{path} {what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error


def from_folder(
    folder: Path, name: str, device: str
) -> tuple[nn.Module, Callable, Callable, MatchingEncoder | None]:
    """Model, preprocessing, tokenizer, and any matching encoder beside them; nothing there is run.

    Nothing is fetched either, unless `name` is of the hub. Raises ValueError for no model, a
    damaged one, and settings not known to be harmless; ConnectionError for a part that is not here.
    """
    path = folder / "open_clip_config.json"
    model = _settings(folder, path)
    with nullcontext() if name.startswith("hf-hub:") else nothing_fetched(folder):
        with fitting(path, "holds no settings that work"):
            text = text_config(model, name)
            if text.get("hf_model_name"):
                _check_kind(Path(text["hf_model_name"]) / "config.json")
            # before the weights: it is small, and may be out of reach
            tokenizer = load_tokenizer(text, name, folder)
        changed = {"text_cfg": text} if text.get("hf_model_name") else {}
        weights = folder / "open_clip_model.safetensors"
        weights = weights if weights.is_file() else folder  # open_clip knows other names, too
        with fitting(weights, "holds no weights that fit its open_clip_config.json"):
            load = open_clip.create_model_from_pretrained
            clip, preprocess = load(f"local-dir:{folder}", device=device, **changed)
    check_loaded(weights, clip)
    return clip, preprocess, tokenizer, _matcher(folder, device)


def _settings(folder: Path, path: Path) -> dict:
    """The settings of a folder's model. Raises ValueError for no model, and for harmful ones."""
    if not path.is_file():
        raise ValueError(
            f"{folder} is a folder without open_clip_config.json, so it holds no model"
        )
    config = read_json(path, "the settings of a model")
    model = check_settings(path, config.get("model_cfg"), "model_cfg")
    for section in ("vision_cfg", "text_cfg"):
        check_settings(path, model.get(section), section)
    check_preprocessing(path, config.get("preprocess_cfg", {}))
    tower = model["vision_cfg"].get("timm_model_name")
    if tower is not None and not (isinstance(tower, str) and timm.is_model(tower)):
        fault = f"{path}: vision_cfg sets 'timm_model_name' to {tower!r}"
        raise ValueError(f"{fault}, which is no model that timm itself builds")
    if tower is None and (lacking := {"layers", "width"} - set(model["vision_cfg"])):
        # open_clip would build a large tower by its own defaults
        raise ValueError(f"{path}: vision_cfg lacks {min(lacking)!r}")
    return model


def _matcher(folder: Path, device: str) -> MatchingEncoder | None:
    """Our matching encoder, where one lies beside a model. Raises ValueError for half of one."""
    settings, weights = (folder / f"matching_encoder.{end}" for end in ("json", "safetensors"))
    if not (settings.is_symlink() or settings.exists() or weights.exists()):
        return None
    record = read_json(settings, "the settings of a matching encoder")
    if any(type(value) is not int or not 0 < value <= 100_000 for value in record.values()):
        raise ValueError(
            f"{settings}: its settings must be whole numbers above 0, not {str(record)[:200]}"
        )
    with fitting(settings, "holds no settings of a matching encoder"):
        matcher = MatchingEncoder(**record)
    with fitting(weights, "holds no weights that fit its matching_encoder.json"):
        matcher.load_state_dict({k: v.float() for k, v in read_tensors(weights)[0].items()})
    check_loaded(weights, matcher)
    return matcher.to(device)


def _check_kind(path: Path) -> None:
    """Raises ValueError for a text model whose own code `transformers` would ask to run."""
    from transformers import CONFIG_MAPPING

    kind = read_json(path, "the settings of a text model").get("model_type")
    if kind not in CONFIG_MAPPING:
        fault = f"{path} is of a kind of text model that transformers does not know"
        raise ValueError(f"{fault}: model_type {kind!r}")


def from_name(
    name: str, pretrained: str | None, device: str
) -> tuple[nn.Module, Callable, Callable]:
    """Model, preprocessing and tokenizer of open_clip's name; pretrained: tag or file of weights.

    Raises ValueError for no tag, an unknown one, or a file that does not fit; ImportError for a
    missing package; ConnectionError for weights out of reach.
    """
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None:
        fault = f"{name} needs weights: give pretrained= a file"
        raise ValueError(f"{fault} or one of the tags {', '.join(tags) or '(none known)'}")
    if not Path(pretrained).is_file() and pretrained not in tags:
        # no tag has a dot or a slash
        if Path(pretrained).suffix or Path(pretrained).name != pretrained:
            raise ValueError(f"there is no file of weights {pretrained}")
        raise unknown(f"tag of weights for {name}:", pretrained, tags)
    text = text_config(open_clip.get_model_config(name), name)
    tokenizer = load_tokenizer(text, name)
    logging.getLogger(__name__).info("loading %s with weights %s", name, pretrained)
    more = {"text_cfg": text} if text.get("hf_model_name") else {}
    if not Path(pretrained).is_file():
        # how images are to be prepared goes with the weights
        look = open_clip.get_pretrained_cfg(name, pretrained)
        ways = ("mean", "std", "interpolation", "resize_mode")
        more |= {f"image_{key}": look[key] for key in ways if look.get(key)}
        # and so does the activation
        more |= {"force_quick_gelu": True} if look.get("quick_gelu") else {}
    file = pretrained if Path(pretrained).is_file() else weights_file(name, pretrained)
    try:
        load = open_clip.create_model_from_pretrained
        clip, preprocess = load(name, pretrained=str(file), device=device, **more)
    except _UNFIT as error:
        raise ValueError(
            f"{file} cannot be loaded as weights of {name}: {type(error).__name__}: {error}"
        ) from error
    return clip, preprocess, tokenizer
