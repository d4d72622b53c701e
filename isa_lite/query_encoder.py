"""The query side: a light image encoder and a token learner turn an image into a sentence; `prompt`
composes it.

Shapes: B batch, L pseudo-words, T text positions, D word-embedding width, E embedding width.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torchvision import transforms as T

from isa_lite.mappings import MAPPINGS
from isa_lite.models.backbones import build_backbone, check_backbone, start_config
from isa_lite.models.symmetric import LARGE_TOWER
from isa_lite.models.vl_model import VLModel, digest
from isa_lite.prompt import start_vectors
from isa_lite.support.checkpoint import (
    check_weights,
    read_json,
    read_tensors,
    write_tensors,
    write_text,
)
from isa_lite.support.images import check_images, to_pixels
from isa_lite.support.parameters import checked, path_name, whole
from isa_lite.support.settings import QueryEncoderConfig
from isa_lite.token_learner import Sentence

#: The sizes that a query encoder may have, least and most: more is a mistake, or a file that asks
#: for all the memory.
SIZES = {
    "word_width": (1, 2**16),
    "num_tokens": (1, 2**10),
    "image_size": (1, 2**11),
    "stride": (1, 2**11),
    "width": (1, 2**14),
    "depth": (0, 2**7),
}


def _filled(config: QueryEncoderConfig) -> QueryEncoderConfig:
    """The settings with a value in place of each None but the stride's. Raises ValueError for a
    value that cannot work.
    """
    for name, (least, most) in SIZES.items():
        value = getattr(config, name)
        if value is None and name in ("image_size", "stride", "width", "depth"):
            continue
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, np.integer))
            or not least <= value <= most
        ):
            bound = (
                f"at least {least}"
                if isinstance(value, (int, np.integer)) and value < least
                else f"from {least} to {most}"
            )
            raise ValueError(f"{name} must be {bound}, a whole number, not {value!r}")
    for name in ("vl_model", "backbone", "backbone_weights", "mapping", "start_words"):
        if not isinstance(getattr(config, name), str):
            raise ValueError(f"{name} must be a text, not {getattr(config, name)!r}")
    for name in ("pretrained", "norm_matching"):
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"{name} must be true or false, not {getattr(config, name)!r}")
    if not _finite(config.word_norm) or config.word_norm <= 0:
        raise ValueError(f"word_norm must be a number above 0, not {config.word_norm!r}")
    if config.mapping not in MAPPINGS:
        raise ValueError(
            f"unknown mapping {config.mapping!r}; there are {', '.join(map(repr, MAPPINGS))}"
        )
    own = inspect.signature(MAPPINGS[config.mapping]).parameters
    config = replace(
        config, **{n: own[n].default for n in ("width", "depth") if getattr(config, n) is None}
    )
    if config.mapping in ("adaptive", "resampler") and config.width % 32:  # heads of 32 channels
        raise ValueError(
            f"width must be a multiple of 32 for the mapping {config.mapping!r}, not {config.width}"
        )
    check_backbone(config.backbone)
    if None in (config.image_size, config.mean, config.std):
        start = start_config(config.backbone, config.pretrained, config.backbone_weights)
        known = {
            name: value for name, value in start._asdict().items() if getattr(config, name) is None
        }
        config = replace(config, **known)
    for name in ("mean", "std"):
        values = getattr(config, name)
        if (
            not isinstance(values, (tuple, list))
            or len(values) != 3
            or not all(_finite(value) and abs(value) <= 1e6 for value in values)
        ):
            raise ValueError(f"{name} must be three numbers of at most a million, not {values!r}")
    if min(config.std) <= 0:
        raise ValueError(f"std must be three numbers above 0, not {config.std!r}")
    return config


def _finite(value: object) -> bool:
    return (
        isinstance(value, (int, float, np.number))
        and not isinstance(value, bool)
        and math.isfinite(value)
    )


def _rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


class QueryEncoder(nn.Module):
    """Image -> sentence of pseudo-words. A light backbone's feature map, and a mapping network on
    it.
    """

    def __init__(
        self,
        config: QueryEncoderConfig,
        vl: VLModel | None = None,
        initial_weights: bool = True,
        shapes: Mapping[str, Sequence[int]] | None = None,
    ):
        """vl: needed for the backbone "vl" only. initial_weights: False where those that `config`
        names would be replaced
        anyway: nothing is fetched. shapes: of the weights that follow; where the mapping network
        would have others, ValueError is raised before it takes any memory."""
        super().__init__()
        config = _filled(config)
        if vl is not None and config.num_tokens > vl.words.room:
            raise ValueError(
                f"num_tokens must be at most {vl.words.room}, what the text tower reads, not"
                f" {config.num_tokens}"
            )
        start = (config.pretrained, config.backbone_weights) if initial_weights else (False, "")
        self.backbone, stride, (channels, *grid) = build_backbone(
            config.backbone, config.image_size, config.stride, *start, vl
        )
        norm = config.word_norm if config.norm_matching else None
        settings = (
            channels,
            tuple(grid),
            config.num_tokens,
            config.word_width,
            norm,
            config.width,
            config.depth,
        )
        if shapes is not None:
            with torch.device("meta"):  # shapes, and no numbers
                _check_shapes(MAPPINGS[config.mapping](*settings), shapes, "mapping.")
        self.mapping = MAPPINGS[config.mapping](*settings)
        self.info: dict = {}  # what was saved beside the settings, for the reader
        self.config = config = replace(
            config, stride=stride, num_tokens=len(self.mapping.to_word.start)
        )
        cut = [
            T.Resize(config.image_size, T.InterpolationMode.BICUBIC),
            T.CenterCrop(config.image_size),
        ]
        ours = T.Compose([*cut, T.Lambda(_rgb), T.ToTensor(), T.Normalize(config.mean, config.std)])
        self.preprocess = getattr(self.backbone, "preprocess", ours)

    @classmethod
    def for_model(cls, vl: VLModel, **settings) -> QueryEncoder:
        """A fresh query encoder whose words fit `vl`; `settings` are fields of
        `QueryEncoderConfig`.

        With random weights its images are as large as those of `vl`, unless `settings` say
        otherwise.
        """
        if not (settings.get("pretrained") or settings.get("backbone_weights")):
            settings = {"image_size": vl.image_size} | settings
        if settings.get("backbone") == LARGE_TOWER:  # its pictures are the VL model's
            visual = vl.clip.visual
            settings |= {
                "image_size": vl.image_size,
                "mean": tuple(visual.image_mean),
                "std": tuple(visual.image_std),
            }
        config = QueryEncoderConfig(
            word_width=vl.word_width, word_norm=vl.word_norm, vl_model=vl.fingerprint, **settings
        )
        encoder = cls(config, vl)
        if config.start_words:
            encoder.mapping.to_word.start_from(start_vectors(vl, config.start_words))
        return encoder

    @property
    def fingerprint(self) -> str:
        """A key that changes with any weight."""
        return digest(sorted(self.state_dict().items()))

    def forward(self, pixels: Tensor, reads: bool = False) -> Sentence:
        """pixels: B x 3 x H x W -> tokens B x L x D, attention maps B x L x h x w, and all reads if
        asked for.
        """
        return self.mapping(self.features(pixels), reads)

    def features(self, pixels: Tensor) -> Tensor:
        """pixels: B x 3 x H x W -> the backbone's map, B x C x h x w."""
        own = next(self.parameters())
        return self.backbone(pixels.to(own.device, own.dtype))[0].to(own.dtype)

    def pixels(self, images: np.ndarray | Sequence[Image.Image]) -> Tensor:
        """Images (PIL, or uint8 B x H x W x 3) -> B x 3 x H x W on the CPU, as the backbone wants
        them.
        """
        return to_pixels(
            images, self.preprocess, self.config.image_size, self.config.mean, self.config.std
        )

    @checked(batch_size=whole(1))
    @torch.no_grad()
    def sentences(
        self, images: np.ndarray | Sequence[Image.Image], batch_size: int = 128, reads: bool = False
    ) -> Sentence:
        """Images -> their sentences and attention maps, in evaluation mode, on the CPU; and all
        `reads` if asked for.

        A PIL image is taken as `images.decode` gives it, like a file. Raises ValueError for what is
        no list of pictures.
        """
        check_images(images)
        was_training = self.training
        self.eval()
        parts = [
            self(self.pixels(images[s : s + batch_size]), reads)
            for s in range(0, len(images), batch_size)
        ]
        self.train(was_training)
        return Sentence(
            *(None if p[0] is None else torch.cat(p).cpu() for p in zip(*parts, strict=True))
        )

    def save(self, folder: str | Path, info: dict | None = None) -> None:
        """Weights as query_encoder.safetensors, settings (and `info`, for the reader) as
        query_encoder.json.
        """
        # old settings with new weights would be neither
        (Path(folder) / "query_encoder.json").unlink(missing_ok=True)
        write_tensors(Path(folder) / "query_encoder.safetensors", self.state_dict())
        write_text(
            Path(folder) / "query_encoder.json",
            json.dumps({"config": asdict(self.config), "info": info or {}}, indent=1) + "\n",
        )

    @classmethod
    @checked(folder=path_name())
    def load(cls, folder: str | Path, vl: VLModel | None = None) -> QueryEncoder:
        """What `save` wrote. Raises FileNotFoundError, or ValueError naming the file, where
        settings or weights cannot be used or do not fit one another, or belong to another model
        than `vl`. What they ask for is checked before it takes memory."""
        folder = Path(folder)
        settings, weights = folder / "query_encoder.json", folder / "query_encoder.safetensors"
        if not settings.is_file():
            raise FileNotFoundError(
                f"{folder} holds no query_encoder.json; give the folder that QueryEncoder.save"
                f" wrote (a relative one as seen from {Path.cwd().name}/)"
            )
        if not weights.is_file():
            raise FileNotFoundError(
                f"{folder} holds no {weights.name}, which belongs to its {settings.name}; save it"
                " again"
            )
        config, info = _read_config(settings)
        if vl is not None and config.vl_model != vl.fingerprint:
            raise ValueError(
                f"the query encoder in {folder} belongs to VL model {config.vl_model}, not"
                f" {vl.fingerprint} ({vl.name}); its sentences mean nothing to another model: load"
                " that one, or distill again"
            )
        try:
            with safe_open(weights, "pt") as file:
                shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
            # the weights follow; nothing is to be downloaded
            encoder = cls(config, vl, initial_weights=False, shapes=shapes)
            tensors = read_tensors(weights)[0]
            check_weights(tensors, encoder.state_dict(), weights.name)
            encoder.load_state_dict(tensors)
        # of other shapes, or a file that is cut off
        except (RuntimeError, SafetensorError, ValueError, OSError) as error:
            raise ValueError(
                f"{weights} does not fit its {settings.name}: {' '.join(str(error).split())[:300]}"
            ) from error
        encoder.info = info
        return encoder.eval()


def _read_config(path: Path) -> tuple[QueryEncoderConfig, dict]:
    """The settings in a query_encoder.json. Raises ValueError naming the file and the setting."""
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
        config = QueryEncoderConfig(**found)
        # what `save` writes has no gaps
        if config.image_size is None or config.mean is None or config.std is None:
            raise ValueError("it lacks image_size, mean or std")
        return _filled(config), info
    except ValueError as error:
        raise ValueError(f"{path} holds no settings of a query encoder: {error}") from error


def _check_shapes(module: nn.Module, shapes: Mapping[str, Sequence[int]], prefix: str) -> None:
    """Raises ValueError for the first tensor of the module that would have another shape than the
    one of its name.
    """
    for key, tensor in module.state_dict(prefix=prefix).items():
        if list(tensor.shape) != list(shapes.get(key, ())):
            raise ValueError(
                f"{key} would be {list(tensor.shape)}, and is"
                f" {list(shapes[key]) if key in shapes else 'not there'}"
            )
