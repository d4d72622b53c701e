"""The query side: a light image encoder and a token learner give a sentence, which is composed with the modifier.

Shapes: B batch, L pseudo-words, T text positions, D word-embedding width, E embedding width.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torchvision import transforms as T

from isa_lite.backbones import build_backbone, check_backbone, start_config
from isa_lite.checkpoint import read_tensors, write_tensors, write_text
from isa_lite.images import to_pixels
from isa_lite.mappings import MAPPINGS
from isa_lite.settings import TEMPLATE, QueryEncoderConfig, check_template
from isa_lite.symmetric import LARGE_TOWER
from isa_lite.token_learner import Sentence
from isa_lite.vl_model import VLModel


def _filled(config: QueryEncoderConfig) -> QueryEncoderConfig:
    """The settings with a value in place of each None but the stride's. Raises ValueError for a value that cannot work."""
    for name in ("num_tokens", "image_size", "stride", "width"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if config.mapping not in MAPPINGS:
        raise ValueError(f"unknown mapping {config.mapping!r}; there are {', '.join(map(repr, MAPPINGS))}")
    own = inspect.signature(MAPPINGS[config.mapping]).parameters
    config = replace(config, **{n: own[n].default for n in ("width", "depth") if getattr(config, n) is None})
    check_backbone(config.backbone)
    if None in (config.image_size, config.mean, config.std):
        start = start_config(config.backbone, config.pretrained, config.backbone_weights)
        known = {name: value for name, value in start._asdict().items() if getattr(config, name) is None}
        config = replace(config, **known)
    if len(config.mean) != 3 or len(config.std) != 3 or min(config.std) <= 0:
        raise ValueError(f"mean and std are three numbers each, std above 0; not {config.mean} and {config.std}")
    return config


def _rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


class QueryEncoder(nn.Module):
    """Image -> sentence of pseudo-words. A light backbone's feature map, and a mapping network on it."""

    def __init__(self, config: QueryEncoderConfig, vl: VLModel | None = None, initial_weights: bool = True):
        """vl: needed for the backbone "vl" only. initial_weights: False where those that `config` names would be replaced
        anyway: nothing is fetched."""
        super().__init__()
        config = _filled(config)
        start = (config.pretrained, config.backbone_weights) if initial_weights else (False, "")
        self.backbone, stride, (channels, *grid) = build_backbone(config.backbone, config.image_size, config.stride, *start, vl)
        self.mapping = MAPPINGS[config.mapping](
            channels,
            tuple(grid),
            config.num_tokens,
            config.word_width,
            config.word_norm if config.norm_matching else None,
            config.width,
            config.depth,
        )
        self.config = config = replace(config, stride=stride, num_tokens=len(self.mapping.to_word.start))
        cut = [T.Resize(config.image_size, T.InterpolationMode.BICUBIC), T.CenterCrop(config.image_size)]
        ours = T.Compose([*cut, T.Lambda(_rgb), T.ToTensor(), T.Normalize(config.mean, config.std)])
        self.preprocess = getattr(self.backbone, "preprocess", ours)

    @classmethod
    def for_model(cls, vl: VLModel, **settings) -> QueryEncoder:
        """A fresh query encoder whose words fit `vl`; `settings` are fields of `QueryEncoderConfig`.

        With random weights its images are as large as those of `vl`, unless `settings` say otherwise.
        """
        if not (settings.get("pretrained") or settings.get("backbone_weights")):
            settings = {"image_size": vl.image_size} | settings
        if settings.get("backbone") == LARGE_TOWER:  # its pictures are the VL model's
            visual = vl.clip.visual
            settings |= {"image_size": vl.image_size, "mean": tuple(visual.image_mean), "std": tuple(visual.image_std)}
        config = QueryEncoderConfig(word_width=vl.word_width, word_norm=vl.word_norm, vl_model=vl.fingerprint, **settings)
        encoder = cls(config, vl)
        if config.start_words:
            encoder.mapping.to_word.start_from(start_vectors(vl, config.start_words))
        return encoder

    def forward(self, pixels: Tensor, reads: bool = False) -> Sentence:
        """pixels: B x 3 x H x W -> tokens B x L x D, attention maps B x L x h x w, and all reads if asked for."""
        return self.mapping(self.features(pixels), reads)

    def features(self, pixels: Tensor) -> Tensor:
        """pixels: B x 3 x H x W -> the backbone's map, B x C x h x w."""
        return self.backbone(pixels.to(next(self.parameters()).device))[0]

    def pixels(self, images: np.ndarray | Sequence[Image.Image]) -> Tensor:
        """Images (PIL, or uint8 B x H x W x 3) -> B x 3 x H x W on the CPU, as the backbone wants them."""
        return to_pixels(images, self.preprocess, self.config.image_size, self.config.mean, self.config.std)

    @torch.no_grad()
    def sentences(self, images: np.ndarray | Sequence[Image.Image], batch_size: int = 128, reads: bool = False) -> Sentence:
        """Images -> their sentences and attention maps, in evaluation mode, on the CPU; and all `reads` if asked for."""
        was_training = self.training
        self.eval()
        parts = [self(self.pixels(images[s : s + batch_size]), reads) for s in range(0, len(images), batch_size)]
        self.train(was_training)
        return Sentence(*(None if p[0] is None else torch.cat(p).cpu() for p in zip(*parts, strict=True)))

    def save(self, folder: str | Path, info: dict | None = None) -> None:
        """Weights as query_encoder.safetensors, settings (and `info`, for the reader) as query_encoder.json."""
        (Path(folder) / "query_encoder.json").unlink(missing_ok=True)  # old settings with new weights would be neither
        write_tensors(Path(folder) / "query_encoder.safetensors", self.state_dict())
        write_text(
            Path(folder) / "query_encoder.json", json.dumps({"config": asdict(self.config), "info": info or {}}, indent=1) + "\n"
        )

    @classmethod
    def load(cls, folder: str | Path, vl: VLModel | None = None) -> QueryEncoder:
        """What `save` wrote. Raises FileNotFoundError, or ValueError where the weights do not fit the settings or `vl`."""
        folder = Path(folder)
        if not (folder / "query_encoder.json").is_file():
            raise FileNotFoundError(
                f"{folder} holds no query_encoder.json; give the folder that QueryEncoder.save wrote "
                f"(a relative one as seen from {Path.cwd().name}/)"
            )
        try:
            config = QueryEncoderConfig(**json.loads((folder / "query_encoder.json").read_text())["config"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / 'query_encoder.json'} holds no settings of a query encoder: {error}") from error
        if vl is not None and config.vl_model != vl.fingerprint:
            raise ValueError(
                f"the query encoder in {folder} belongs to VL model {config.vl_model}, not {vl.fingerprint} ({vl.name}); "
                "its sentences mean nothing to another model: load that one, or distill again"
            )
        encoder = cls(config, vl, initial_weights=False)  # the weights follow; nothing is to be downloaded
        try:
            encoder.load_state_dict(read_tensors(folder / "query_encoder.safetensors")[0])
        except (RuntimeError, SafetensorError) as error:  # of other shapes, or a file that is cut off
            raise ValueError(f"the weights in {folder} do not fit its query_encoder.json: {error}") from error
        return encoder.eval()


def start_vectors(vl: VLModel, start_words: str) -> Tensor:
    """The word vectors of a text, N x D, on the CPU. Raises ValueError where `vl` has never seen one of its tokens."""
    words = vl.word_vectors(torch.tensor(vl.words.ids(start_words), device=vl.device)).detach().float().cpu()
    if unknown := int((words.norm(dim=1) == 0).sum()):
        raise ValueError(f"start_words: {vl.name} has never seen {unknown} of the tokens of {start_words!r}")
    return words


# ------------------------------------------------------------------------------------------ composition


def prompt_ids(
    vl: VLModel, num_tokens: int, modifiers: Sequence[str], template: str = TEMPLATE, truncate: bool = False
) -> tuple[Tensor, Tensor]:
    """Token ids of one prompt a modifier, B x T, and where the pseudo-words go, B x T bool (`num_tokens` true a row).

    The ids are put together piece by piece, so no character of a modifier can be taken for a placeholder.
    With an empty modifier the template ends behind the sentence. Raises ValueError for a template without its
    two fields, and for a modifier that does not fit, unless `truncate` allows cutting its end.
    """
    check_template(template)
    words = vl.words
    rows, marks = [], []
    for modifier in modifiers:
        wanted = template if modifier.strip() else template.replace("{modifier}", "").rstrip(" ,.;:")
        pieces = [p for p in re.split(r"(\{sentence\}|\{modifier\})", wanted) if p]
        parts, before = {}, ""  # what stands before a piece: nothing, a space, or a word that it is glued to
        for p in pieces:
            text = modifier if p == "{modifier}" else "*" if p == "{sentence}" else p
            before = "space" if before and text[:1].isspace() else before
            parts[p] = [words.placeholder] * num_tokens if p == "{sentence}" else words.ids(text, before)
            before = "space" if text[-1:].isspace() else "word"
        over = sum(len(parts[p]) for p in pieces) - words.room
        if over > 0:
            said = len(parts.get("{modifier}", []))
            if not truncate or over > said:
                raise ValueError(
                    f"the prompt is {over} token(s) too long for the text tower's {vl.context_length}; "
                    f"shorten the modifier {modifier!r} ({said} tokens) or pass truncate=True"
                )
            parts["{modifier}"] = parts["{modifier}"][: said - over]
        row = words.frame([i for p in pieces for i in parts[p]])
        mark = [False] * len(words.prefix) + [p == "{sentence}" for p in pieces for _ in parts[p]]
        rows.append(row)
        marks.append(mark + [False] * (len(row) - len(mark)))
    ids = vl.cut(torch.tensor(rows, device=vl.device))
    return ids, torch.tensor(marks, device=vl.device)[:, : ids.shape[1]]


def known_words(vl: VLModel, template: str = TEMPLATE) -> int:
    """How many positions at the start of a prompt hold the template's own words, the same for every query.

    Signs that are glued to the first field do not count: where a modifier is empty, "(" and ")" around it are one token, "()".
    """
    return len(vl.words.prefix) + len(vl.words.ids(re.sub(r"\S+$", "", template.partition("{")[0])))


def splice(vl: VLModel, tokens: Tensor, ids: Tensor, places: Tensor) -> Tensor:
    """Word vectors of the prompts with the pseudo-words in their places: tokens B x L x D, ids and places B x T -> B x T x D."""
    vectors = vl.word_vectors(ids)
    return vectors.masked_scatter(places.unsqueeze(-1), tokens.to(vectors.dtype))


@torch.no_grad()
def compose(
    vl: VLModel, tokens: Tensor, modifiers: Sequence[str], template: str = TEMPLATE, truncate: bool = False, batch_size: int = 256
) -> Tensor:
    """Sentences B x L x D and one modifier each -> L2-normalised query embeddings B x E, on the CPU."""
    if len(tokens) != len(modifiers):
        raise ValueError(f"{len(tokens)} sentences but {len(modifiers)} modifiers")
    parts, known = [], known_words(vl, template)
    for s in range(0, len(modifiers), batch_size):
        ids, places = prompt_ids(vl, tokens.shape[1], modifiers[s : s + batch_size], template, truncate)
        parts.append(vl.encode_vectors(splice(vl, tokens[s : s + batch_size].to(vl.device), ids, places), ids, known).cpu())
    return torch.cat(parts)
