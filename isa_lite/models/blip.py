"""BLIP, a VL model with a matching encoder, through `transformers`: the extra isa_lite[blip].

BLIP (Li et al., ICML 2022) is what the paper's three parts look like in one model: an image tower,
a text tower, and the same text tower once more with cross-attention to the image's tokens, whose
head says whether text and image belong together. Here it is dressed as a model of open_clip, so
that `VLModel` needs no second code path. Ours.

Shapes: B batch, T text positions, N patches, D word-embedding width, W width, E embedding width.
"""

from __future__ import annotations

from pathlib import Path

import open_clip
from torch import Tensor, nn

from isa_lite.models.open_clip_models import check_loaded, check_preprocessing, fitting
from isa_lite.models.text_tower import EXTRA, TextTower
from isa_lite.models.tokenization import hf_tokenizer
from isa_lite.support.checkpoint import read_json
from isa_lite.support.hub import HF_WEIGHTS, repository

#: Text positions that a prompt may use. BLIP has 512; its own retrieval code uses 35.
CONTEXT = 77


class BlipImage(nn.Module):
    """The image tower: a vision transformer; its class token, projected, is the image embedding."""

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.vision_model, self.proj = model.vision_model, model.vision_proj
        self.image_size = model.config.vision_config.image_size
        self.image_mean, self.image_std = mean, std

    def forward(self, pixels: Tensor) -> Tensor:
        """B x 3 x H x W -> B x E, not normalised."""
        return self.proj(self.vision_model(pixel_values=pixels).last_hidden_state[:, 0])

    def forward_intermediates(self, pixels: Tensor, **_) -> dict:
        """The embedding, and the last layer's B x (1 + N) x W, with the class token."""
        tokens = self.vision_model(pixel_values=pixels).last_hidden_state
        return {"image_features": self.proj(tokens[:, 0]), "image_intermediates": [tokens]}

    def project_patches(self, patches: Tensor) -> Tensor:
        """Local tokens ... x W -> ... x E, as the tower projects its class token."""
        return self.proj(patches)


class BlipText(nn.Module):
    """The text tower, which is also the matching encoder."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.encoder, self.proj, self.head = model.text_encoder, model.text_proj, model.itm_head

    def as_tower(self) -> BlipTower:
        return BlipTower(self)


class BlipTower(TextTower):
    """The way into BLIP's text tower, as those in text_tower.py; the class token is pooled."""

    can_cut = True  # no position looks at the padding

    def __init__(self, text: BlipText):
        self.module, self.pad, self.context_length = text, text.encoder.config.pad_token_id, 0
        self.reserved = [self.pad]

    @property
    def table(self) -> nn.Embedding:
        return self.module.encoder.get_input_embeddings()

    def cut(self, ids: Tensor) -> Tensor:
        """B x T ids without the columns that are padding in every row."""
        return ids[:, : int((ids != self.pad).any(0).nonzero().max()) + 1]

    def tokens(self, vectors: Tensor, ids: Tensor) -> Tensor:
        """B x T x D word vectors and the ids they stand for -> contextual tokens, B x T x W."""
        # the vectors are cloned: transformers adds the positions to them in place
        mask = (ids != self.pad).long()
        read = self.module.encoder(inputs_embeds=vectors.clone(), attention_mask=mask)
        return read.last_hidden_state

    def pool(self, tokens: Tensor, ids: Tensor) -> Tensor:
        """B x T x W -> B x W, the class token."""
        return tokens[:, 0]

    def project(self, tokens: Tensor) -> Tensor:
        """... x W -> ... x E, not normalised."""
        return self.module.proj(tokens)


class Blip(nn.Module):
    """A `BlipForImageTextRetrieval` dressed as a model of open_clip, and its `match`."""

    matcher_reads_words = True

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.visual, self.text = BlipImage(model, mean, std), BlipText(model)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """B x 3 x H x W -> B x E, not normalised."""
        return self.visual(pixels)

    def encode_text(self, ids: Tensor, normalize: bool = False) -> Tensor:
        """B x T ids -> B x E, as BLIP does it itself, from ids."""
        mask = (ids != self.text.encoder.config.pad_token_id).long()
        read = self.text.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        out = self.text.proj(read[:, 0])
        return nn.functional.normalize(out, dim=-1) if normalize else out

    def match(self, vectors: Tensor, mask: Tensor, patches: Tensor) -> Tensor:
        """Does this text belong to this image? By BLIP's own matching head.

        vectors: B x T x D *word* vectors, as it reads the text anew; mask: B x T (true = a word);
        patches: B x (1 + N) x W. Returns B x 2 logits: 0 = no match, 1 = match.
        """
        read = self.text.encoder(
            inputs_embeds=vectors.clone(), attention_mask=mask.long(), encoder_hidden_states=patches
        )
        return self.text.head(read.last_hidden_state[:, 0])


def load_blip(
    name: str, device: str = "cpu"
) -> tuple[Blip, object, open_clip.tokenizer.HFTokenizer]:
    """A BLIP for image-text retrieval: model, preprocessing and tokenizer, as `VLModel` takes them.

    name: a local folder in the layout of `transformers` (config.json, weights, tokenizer), or a
    repository of the hub, such as Salesforce/blip-itm-base-coco. Raises ImportError, naming the
    extra, without `transformers`; ConnectionError at once if offline; ValueError for no whole BLIP.
    """
    try:
        from transformers import BlipForImageTextRetrieval
    except ImportError as error:
        fault = "BLIP needs the package transformers"
        raise ImportError(f"{fault}; install the extra: pip install '{EXTRA}'") from error
    folder = repository(name, "a BLIP", "config.json", HF_WEIGHTS, ("preprocessor_config.json",))
    kind = _kind(folder)
    if kind != "blip":
        says = f"says {kind!r}" if kind else "is missing"
        raise ValueError(f"{name} holds no BLIP: its config.json {says}")
    weights = next((path for name in HF_WEIGHTS if (path := folder / name).is_file()), None)
    if weights is None:
        fault = f"{name} holds no weights"
        raise ValueError(f"{fault}; one of {', '.join(HF_WEIGHTS)} must lie beside its config.json")
    settings = folder / "preprocessor_config.json"
    there = settings.exists() or settings.is_symlink()  # a link to nothing is damage, no absence
    look = read_json(settings, "how images are prepared") if there else {}
    look = {key: look[f"image_{key}"] for key in ("mean", "std") if f"image_{key}" in look}
    check_preprocessing(settings, look)
    how = {"local_files_only": True, "output_loading_info": True}
    with fitting(weights, "holds no BLIP that fits its config.json"):
        model, report = BlipForImageTextRetrieval.from_pretrained(folder, **how)
    if report["missing_keys"]:  # a BLIP for captions or questions has no matching head
        missing = sorted(report["missing_keys"])
        fault = f"{weights} is not of a BLIP for image-text retrieval: {len(missing)} weights are"
        fault = f"{fault} missing, among them {missing[0]}"
        raise ValueError(f"{fault}; take one like Salesforce/blip-itm-base-coco")
    check_loaded(weights, model)
    with fitting(folder, "holds no tokenizer that works (tokenizer.json, tokenizer_config.json)"):
        tokenizer = hf_tokenizer(folder, context_length=CONTEXT)
    mean = tuple(look.get("mean", open_clip.OPENAI_DATASET_MEAN))
    std = tuple(look.get("std", open_clip.OPENAI_DATASET_STD))
    blip = Blip(model.eval(), mean, std).to(device)
    how = {"resize_mode": "squash", "interpolation": "bicubic"}
    look = open_clip.image_transform(blip.visual.image_size, False, mean, std, **how)
    return blip, look, tokenizer


def is_blip(folder: Path) -> bool:
    """Whether a local folder holds a BLIP."""
    return _kind(folder) == "blip"


def _kind(folder: Path) -> str | None:
    config = folder / "config.json"
    found = read_json(config, "the settings of a model") if config.is_file() else {}
    return found.get("model_type")
