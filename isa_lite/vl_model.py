"""The frozen vision-language (VL) model: image tower, text tower, and a matching encoder where there is one.

Everything that a query or a gallery needs from a CLIP of open_clip, with one addition to what open_clip
offers: the text tower can be entered with *word vectors* instead of token ids, which is how pseudo-words get
in. The small model that we ship and ViT-L-14 go through the same code.

Shapes: B batch, T text positions, N patches, D word-embedding width, E embedding width.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.transformer import text_global_pool
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

_HERE = Path(__file__).resolve().parent
#: The folder of shipped artefacts: inside the package in an installed wheel, beside it in a checkout.
DATA = _HERE / "data" if (_HERE / "data").is_dir() else _HERE.parent / "data"
#: The name under which `load_vl_model` finds the shipped model of rendered scenes.
SCENES_CLIP = "scenes-clip"


def plain_attention(device: torch.device | str) -> AbstractContextManager:
    """For training on a CPU: there, at our short lengths, PyTorch's fused attention is slow backwards in bfloat16."""
    return sdpa_kernel(SDPBackend.MATH) if torch.device(device).type == "cpu" else nullcontext()


def to_pixels(
    images: np.ndarray | Sequence[Image.Image | np.ndarray],
    preprocess: Callable[[Image.Image], Tensor],
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Images -> B x 3 x H x W on the CPU: by `preprocess`, or with the same result straight from pictures of size x size."""
    if not isinstance(images, np.ndarray):
        images = [i if isinstance(i, Image.Image) else Image.fromarray(i) for i in images]
        if all(i.mode == "RGB" and i.size == (size, size) for i in images):
            images = np.stack([np.asarray(i) for i in images])
    if isinstance(images, np.ndarray) and images.shape[1:] == (size, size, 3):
        mean, std = (torch.tensor(v)[:, None, None] for v in (mean, std))
        return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std)
    return torch.stack([preprocess(i if isinstance(i, Image.Image) else Image.fromarray(i)) for i in images])


class MatchingEncoder(nn.Module):
    """Does this text belong to this image? Text tokens look at patch tokens; a two-class head answers.

    The image-text matching branch of ALBEF/BLIP in small (paper: "matching encoder"; its size is ours): `depth`
    blocks of self-attention among text tokens, cross-attention to patch tokens and an MLP. The mean over the
    text positions goes to a linear head of two classes: 0 = no match, 1 = match.
    """

    def __init__(self, text_width: int, patch_width: int, patches: int, width: int = 128, depth: int = 2, heads: int = 4):
        super().__init__()
        self.config = dict(text_width=text_width, patch_width=patch_width, patches=patches, width=width, depth=depth, heads=heads)
        self.text_in = nn.Linear(text_width, width)
        self.patch_in = nn.Sequential(nn.LayerNorm(patch_width), nn.Linear(patch_width, width))
        self.patch_position = nn.Parameter(0.5 * torch.randn(patches, width))  # about as large as what it is added to
        self.blocks = nn.ModuleList(
            nn.TransformerDecoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2))

    def forward(self, text: Tensor, mask: Tensor, patches: Tensor) -> Tensor:
        """text: B x T x text_width, mask: B x T (true = a word), patches: B x N x patch_width. Returns B x 2 logits."""
        x = self.text_in(text)  # B x T x width
        memory = self.patch_in(patches) + self.patch_position  # B x N x width
        for block in self.blocks:
            x = block(x, memory, tgt_key_padding_mask=~mask)
        weight = mask.unsqueeze(-1).to(x.dtype)
        return self.head((x * weight).sum(1) / weight.sum(1))  # B x width -> B x 2


class VLModel(nn.Module):
    """A CLIP of open_clip, frozen unless you unfreeze it, with what ISA asks of it.

    clip: the open_clip model; preprocess: PIL image -> 3 x H x W; tokenizer: list of texts -> B x T ids;
    matcher: a `MatchingEncoder` or None; name: for messages and cards.
    Raises ValueError for a text tower that cannot be entered with word vectors.
    """

    def __init__(self, clip: nn.Module, preprocess, tokenizer, matcher: MatchingEncoder | None = None, name: str = ""):
        super().__init__()
        text = getattr(clip, "text", clip)  # CustomTextCLIP keeps the text tower apart, CLIP keeps its parts itself
        if not hasattr(text, "token_embedding") or getattr(text, "cls_emb", None) is not None:
            raise ValueError(
                f"{name or type(clip).__name__}: its text tower ({type(text).__name__}) cannot be entered with word vectors; "
                "take a CLIP-like model whose text tower pools a token, for example ViT-B-32"
            )
        if not hasattr(tokenizer, "eot_token_id"):
            raise ValueError(
                f"{name or type(clip).__name__}: prompts are composed for open_clip's own tokenizer (SimpleTokenizer), "
                f"and this model has a {type(tokenizer).__name__}"
            )
        self.clip, self.preprocess, self.tokenizer, self.matcher, self.name = clip, preprocess, tokenizer, matcher, name
        self.pool_type = getattr(text, "text_pool_type", None) or text.pool_type
        self.eos_id = getattr(text, "text_eos_id", None) if text is clip else text.eos_id
        self.word_width: int = text.token_embedding.weight.shape[1]
        self.context_length: int = text.positional_embedding.shape[0]
        size = clip.visual.image_size
        self.image_size: int = size if isinstance(size, int) else size[0]
        # A causal tower that pools at the end-of-text token never looks past it, so the rest need not be computed.
        self.can_cut = text.attn_mask is not None and self.pool_type == "argmax" and not getattr(text, "use_pad_mask", False)
        self.eval().requires_grad_(False)

    # ------------------------------------------------------------------------------------------- text

    @property
    def _text(self) -> nn.Module:
        return getattr(self.clip, "text", self.clip)

    @property
    def device(self) -> torch.device:
        return self._text.token_embedding.weight.device

    @property
    def word_norm(self) -> float:
        """The typical length of a word vector: the median over the words that the model has seen.

        Our pre-training leaves the vectors of words it never saw at zero; those do not count.
        """
        norms = self._text.token_embedding.weight.detach().float().norm(dim=1)
        return float(norms[norms > 0].median())

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Texts -> B x context_length ids, with open_clip's own tokenizer (which cuts what is too long)."""
        return self.tokenizer(list(texts)).to(self.device)

    def word_vectors(self, ids: Tensor) -> Tensor:
        """B x T ids -> B x T x D vectors of the word-embedding table."""
        return self._text.token_embedding(ids)

    def text_tokens(self, vectors: Tensor, ids: Tensor) -> Tensor:
        """Contextual tokens: B x T x D word vectors and B x T ids (for the padding) -> B x T x width, before pooling."""
        text = self._text
        length = vectors.shape[1]
        mask = text.attn_mask
        if mask is not None:
            mask = mask[:length, :length]
        if getattr(text, "use_pad_mask", False):
            mask = text._build_additive_mask(ids, length, vectors.dtype) + (0 if mask is None else mask)
        x = vectors + text.positional_embedding[:length].to(vectors.dtype)
        return text.ln_final(text.transformer(x, attn_mask=mask))

    def pool(self, tokens: Tensor, ids: Tensor) -> Tensor:
        """Contextual tokens B x T x width -> L2-normalised text embeddings B x E."""
        return self.project_tokens(text_global_pool(tokens, ids, self.pool_type, eos_token_id=self.eos_id))

    def project_tokens(self, tokens: Tensor) -> Tensor:
        """Contextual text tokens ... x width -> L2-normalised in the joint space, ... x E."""
        projection = self._text.text_projection
        if projection is not None:
            tokens = projection(tokens) if isinstance(projection, nn.Linear) else tokens @ projection
        return F.normalize(tokens.float(), dim=-1)

    def cut(self, ids: Tensor) -> Tensor:
        """B x T ids without the columns past the longest end-of-text, where the tower allows that."""
        return ids[:, : int(ids.argmax(1).max()) + 1] if self.can_cut else ids

    def encode_vectors(self, vectors: Tensor, ids: Tensor) -> Tensor:
        """Word vectors B x T x D, and the ids they stand for, -> L2-normalised text embeddings B x E."""
        return self.pool(self.text_tokens(vectors, ids), ids)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Texts -> L2-normalised embeddings, B x E, on the CPU."""
        parts = []
        for start in range(0, len(texts), batch_size):
            ids = self.cut(self.tokenize(texts[start : start + batch_size]))
            parts.append(self.encode_vectors(self.word_vectors(ids), ids).cpu())
        return torch.cat(parts)

    # ------------------------------------------------------------------------------------------ images

    def pixels(self, images: np.ndarray | Sequence[Image.Image]) -> Tensor:
        """Images -> B x 3 x H x W on the CPU, normalised as the model wants them.

        uint8 arrays of B x H x W x 3 at the model's own size take a short way round PIL, with the same result.
        """
        visual = self.clip.visual
        return to_pixels(images, self.preprocess, self.image_size, visual.image_mean, visual.image_std)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """B x 3 x H x W -> L2-normalised image embeddings B x E."""
        return F.normalize(self.clip.encode_image(pixels.to(self.device)).float(), dim=-1)

    def encode_pixels_and_patches(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """B x 3 x H x W -> L2-normalised image embeddings B x E, and the last layer's local tokens B x N x width."""
        visual, pixels = self.clip.visual, pixels.to(self.device)
        try:  # vision transformers give B x N x C, convolutional towers only B x C x H x W
            out = visual.forward_intermediates(pixels, indices=1, output_fmt="NLC")
        except (AssertionError, NotImplementedError):
            out = visual.forward_intermediates(pixels, indices=1, output_fmt="NCHW")
        local = out["image_intermediates"][-1]
        if local.ndim == 4:
            local = local.flatten(2).transpose(1, 2)  # B x C x H x W -> B x N x C
        return F.normalize(out["image_features"].float(), dim=-1), local

    def project_patches(self, patches: Tensor) -> Tensor:
        """Local tokens B x N x width -> L2-normalised in the joint space, B x N x E, as the tower projects its global one.

        An attention pool projects each position as if it had all the attention (as MaskCLIP does). Raises
        ValueError for a tower that has no such projection.
        """
        visual = self.clip.visual
        if hasattr(visual, "ln_post") and getattr(visual, "proj", None) is not None:
            patches = visual.ln_post(patches) @ visual.proj
        elif hasattr(getattr(visual, "attnpool", None), "c_proj"):
            patches = visual.attnpool.c_proj(visual.attnpool.v_proj(patches))
        else:
            raise ValueError(f"{self.name}: a {type(visual).__name__} does not project patches; set lar_weight to 0")
        return F.normalize(patches.float(), dim=-1)

    @torch.no_grad()
    def encode_images(self, images: np.ndarray | Sequence[Image.Image], batch_size: int = 128) -> Tensor:
        """Images (PIL, or uint8 B x H x W x 3) -> L2-normalised embeddings B x E, on the CPU."""
        starts = range(0, len(images), batch_size)
        return torch.cat([self.encode_pixels(self.pixels(images[s : s + batch_size])).cpu() for s in starts])

    # --------------------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """A key that changes with any weight or with the preprocessing; what is cached on disk is filed under it."""
        digest = hashlib.sha256(repr(self.preprocess).encode())
        for key, value in sorted(self.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def _unknown(what: str, name: str, known: Sequence[str]) -> ValueError:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return ValueError(f"unknown {what} {name!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))


def load_vl_model(name: str = SCENES_CLIP, pretrained: str | None = None, device: str = "cpu") -> VLModel:
    """Load a VL model, frozen and in evaluation mode.

    name: `scenes-clip` (shipped), a folder in open_clip's local-dir layout, or the name of any open_clip model.
    pretrained: for an open_clip model, the tag of its weights (downloaded by open_clip) or a file of weights.
    Raises ValueError for an unknown name or tag (with the nearest ones), or a model without weights.
    """
    folder = DATA / name if name == SCENES_CLIP else Path(name.removeprefix("local-dir:"))
    if folder.is_dir():
        if not (folder / "open_clip_config.json").is_file():
            raise ValueError(f"{folder} is a folder without open_clip_config.json, so it holds no model")
        source = f"local-dir:{folder}"
        try:
            clip, preprocess = open_clip.create_model_from_pretrained(source, device=device)
        except RuntimeError as error:
            raise ValueError(f"{folder} holds no weights that fit its open_clip_config.json: {error}") from error
        tokenizer = open_clip.get_tokenizer(source)
        matcher, config = None, folder / "matching_encoder.json"
        if config.is_file():
            matcher = MatchingEncoder(**json.loads(config.read_text()))
            matcher.load_state_dict({k: v.float() for k, v in load_file(folder / "matching_encoder.safetensors").items()})
            matcher.to(device)
        return VLModel(clip, preprocess, tokenizer, matcher, name)
    if name not in open_clip.list_models():
        raise _unknown("VL model", name, [SCENES_CLIP, *open_clip.list_models()])
    if pretrained is None:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise ValueError(f"{name} needs weights: give pretrained= a file or one of the tags {', '.join(tags) or '(none known)'}")
    if not Path(pretrained).is_file() and pretrained not in open_clip.list_pretrained_tags_by_model(name):
        raise _unknown(f"tag of weights for {name}:", pretrained, open_clip.list_pretrained_tags_by_model(name))
    logging.getLogger(__name__).info("loading %s with weights %s", name, pretrained)
    clip, preprocess = open_clip.create_model_from_pretrained(name, pretrained=pretrained, device=device)
    return VLModel(clip, preprocess, open_clip.get_tokenizer(name), None, f"{name}/{pretrained}")


def machine() -> str:
    """The machine in words: processor, cores, threads in use, accelerator."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), cpu)
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{gpu}"


def commit() -> str:
    """The commit of the code that runs, for cards; "unknown" outside a checkout, with "-dirty" where it was changed."""
    where = ["git", "-C", str(_HERE), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
