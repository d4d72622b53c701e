"""The query side: a light image encoder and a token learner turn an image into a sentence; `prompt`
composes it.

Paper: a light visual encoder with a token learner stands in for the large visual encoder of a
vision-language (VL) model. Ours: which light encoder, and all about files.

Shapes: B batch, C x h x w the light encoder's map, L pseudo-words, D word-embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from isa_lite.mappings import MAPPINGS
from isa_lite.models import encoder_files
from isa_lite.models.backbones import build_backbone
from isa_lite.models.start_words import start_from, start_vectors
from isa_lite.models.vl_model import VLModel, digest
from isa_lite.support import plugins
from isa_lite.support.images import check_images, to_pixels
from isa_lite.support.parameters import checked, optional, path_name, text, whole
from isa_lite.support.settings import QueryEncoderConfig
from isa_lite.token_learner import Sentence, Shapes


class QueryEncoder(nn.Module):
    """Image -> sentence of pseudo-words: a light backbone's feature map, and a mapping network on
    it.
    """

    #: Images (PIL, or uint8 B x H x W x 3) -> B x 3 x H x W on the CPU, as the backbone wants them.
    pixels: Callable[[np.ndarray | Sequence[Image.Image]], Tensor]

    def __init__(
        self,
        config: QueryEncoderConfig,
        vl: VLModel | None = None,
        initial_weights: bool = True,
        shapes: Mapping[str, Sequence[int]] | None = None,
    ):
        """vl: needed for the backbone "vl" only. initial_weights: False where those that `config`
        names would be replaced anyway: nothing is fetched. shapes: of the weights that follow.

        A mapping FILE.py:NAME is run. Raises ValueError for settings that cannot work, and where
        the mapping network would have other `shapes`, before it takes any memory.
        """
        super().__init__()
        config = encoder_files.checked(config, vl)
        network = plugins.find(config.mapping, MAPPINGS, "mapping")
        config = encoder_files.filled(config, network)
        start = (config.pretrained, config.backbone_weights) if initial_weights else (False, "")
        self.backbone, stride, (channels, *grid) = build_backbone(
            config.backbone, config.image_size, config.stride, *start, vl
        )
        norm = config.word_norm if config.norm_matching else None
        fits = Shapes(channels, tuple(grid), config.num_tokens, config.word_width, norm)
        self.mapping = encoder_files.built(network, fits, config, shapes)
        self.info: dict = {}  # what was saved beside the settings, for the reader
        count = len(self.mapping.to_word.start)
        self.config = replace(config, stride=stride, num_tokens=count)
        own = encoder_files.preprocessing(config)
        self.preprocess = getattr(self.backbone, "preprocess", own)
        look = {"size": config.image_size, "mean": config.mean, "std": config.std}
        self.pixels = partial(to_pixels, preprocess=self.preprocess, **look)

    @classmethod
    def for_model(cls, vl: VLModel, **settings) -> QueryEncoder:
        """A fresh query encoder whose words fit `vl`; `settings` are fields of
        `QueryEncoderConfig`. With random weights its images are as large as those of `vl`.
        """
        config = encoder_files.settings_for(vl, **settings)
        encoder = cls(config, vl)
        if config.start_words:
            start_from(encoder.mapping.to_word, start_vectors(vl, config.start_words))
        return encoder

    @property
    def fingerprint(self) -> str:
        """A key that changes with any weight."""
        return digest(sorted(self.state_dict().items()))

    def forward(self, pixels: Tensor, reads: bool = False) -> Sentence:
        """B x 3 x H x W -> tokens B x L x D, maps B x L x h x w, and all reads if asked for."""
        return self.mapping(self.features(pixels), reads)

    def features(self, pixels: Tensor) -> Tensor:
        """B x 3 x H x W -> the backbone's map, B x C x h x w."""
        own = next(self.parameters())
        return self.backbone(pixels.to(own.device, own.dtype))[0].to(own.dtype)

    @checked(batch_size=whole(1))
    @torch.no_grad()
    def sentences(
        self, images: np.ndarray | Sequence[Image.Image], batch_size: int = 128, reads: bool = False
    ) -> Sentence:
        """Images -> a `Sentence` on the CPU, in evaluation mode, with all `reads` if asked for. A
        PIL image is taken as `images.decode` gives it. Raises ValueError for no list of pictures.
        """
        check_images(images)
        was_training = self.training
        self.eval()
        starts = range(0, len(images), batch_size)
        parts = [self(self.pixels(images[s : s + batch_size]), reads) for s in starts]
        self.train(was_training)
        whole = (None if p[0] is None else torch.cat(p).cpu() for p in zip(*parts, strict=True))
        return Sentence(*whole)  # B x L x D, B x L x h x w

    def save(self, folder: str | Path, info: dict | None = None) -> None:
        """Weights and settings, query_encoder.safetensors and .json; `info` is for the reader."""
        encoder_files.write(Path(folder), self, info or {})

    @classmethod
    @checked(folder=path_name(), mapping=optional(text()))
    def load(
        cls, folder: str | Path, vl: VLModel | None = None, mapping: str | None = None
    ) -> QueryEncoder:
        """What `save` wrote, in evaluation mode. mapping: FILE.py:NAME, where it has one of your
        own; the name in the folder is never run.

        Raises FileNotFoundError, or ValueError naming the file, where settings or weights cannot be
        used or do not fit one another, or belong to another model than `vl`.
        """
        config, info = encoder_files.read_settings(Path(folder), vl, mapping)
        # the weights follow; nothing is to be downloaded
        encoder = encoder_files.read_weights(Path(folder), partial(cls, config, vl, False))
        encoder.info = info
        return encoder.eval()
