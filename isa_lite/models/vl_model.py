"""The frozen vision-language (VL) model: image tower, text tower, and maybe a matching encoder.

Everything that a query or a gallery needs from a model of open_clip, or from BLIP, with one
addition to what they offer: the text tower can be entered with *word vectors* instead of token ids,
which is how pseudo-words get in (text_tower.py). The shipped model and ViT-L-14 share the code.

Shapes: B batch, T text positions, N patches, D word-embedding width, E embedding width.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.transformer import QuickGELU
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from isa_lite.models.blip import is_blip, load_blip
from isa_lite.models.open_clip_models import from_folder, from_name, unknown
from isa_lite.models.text_tower import Opening, text_tower
from isa_lite.models.tokenization import Words
from isa_lite.support.hub import WEIGHTS, repository
from isa_lite.support.images import check_images, to_pixels
from isa_lite.support.parameters import (
    check_device,
    check_texts,
    checked,
    optional,
    path_name,
    text,
    whole,
)
from isa_lite.support.settings import DATA, SCENES_CLIP


class VLModel(nn.Module):
    """A model of open_clip (or a `Blip`), frozen unless you unfreeze it, with what ISA asks of it.

    clip: the model; preprocess: PIL image -> 3 x H x W; tokenizer: list of texts -> B x T ids;
    matcher: a `MatchingEncoder`, the matching head of a BLIP, or None; name: for messages and
    cards. Raises ValueError for a text tower that cannot be entered with word vectors.
    """

    def __init__(
        self,
        clip: nn.Module,
        preprocess,
        tokenizer,
        matcher: Callable | None = None,
        name: str = "",
    ):
        super().__init__()
        called = name or type(clip).__name__
        self.tower = text_tower(clip, name)
        self.words = Words(tokenizer, called, self.tower.reserved)
        self.context_length: int = self.words.context_length
        if self.tower.context_length not in (0, self.context_length):
            fault = f"{called}: its tokenizer makes rows of {self.context_length} ids"
            raise ValueError(f"{fault}, and its text tower reads {self.tower.context_length}")
        # transformers guesses what is not there
        if self.words.pad != getattr(self.tower, "pad", self.words.pad):
            raise ValueError(
                f"{called}: its tokenizer pads with the id {self.words.pad},"
                f" and its text tower knows {self.tower.pad}; are tokenizer.json and"
                " tokenizer_config.json there, and its own?"
            )
        self.clip, self.preprocess, self.tokenizer = clip, preprocess, tokenizer
        self.matcher, self.name = matcher, name
        #: What the matching encoder reads: word vectors (BLIP's), or contextual tokens (ours).
        self.matcher_reads_words: bool = getattr(clip, "matcher_reads_words", False)
        self._hashed: tuple[list, str] = [], ""  # see `fingerprint`
        self.vocab_size, self.word_width = self.tower.table.weight.shape
        size = clip.visual.image_size
        self.image_size: int = size if isinstance(size, int) else size[0]
        self.eval().requires_grad_(False)

    # -------------------------------------------------------------------------------------------
    # text

    @property
    def device(self) -> torch.device:
        return self.tower.table.weight.device

    @property
    def word_norm(self) -> float:
        """The typical length of a word vector: the median over the words that the model has seen.

        Our pre-training leaves the vectors of words it never saw at zero; those do not count.
        """
        norms = self.tower.table.weight.detach().float().norm(dim=1)
        # NLLB's table scales its output
        return float(norms[norms > 0].median() * getattr(self.tower.table, "embed_scale", 1))

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Texts -> B x context_length ids by the model's own tokenizer, which cuts long texts."""
        return self.tokenizer(check_texts(texts)).to(self.device)

    def word_vectors(self, ids: Tensor) -> Tensor:
        """B x T ids -> B x T x D vectors of the word-embedding table."""
        return self.tower.table(ids)

    def text_tokens(self, vectors: Tensor, ids: Tensor) -> Tensor:
        """Word vectors B x T x D, and their ids B x T (for padding) -> contextual B x T x width.

        A CoCa appends a token of its own: it gives B x (T + 1) x width.
        """
        return self.tower.tokens(vectors, ids)

    def pool(self, tokens: Tensor, ids: Tensor) -> Tensor:
        """Contextual tokens B x T x width -> L2-normalised text embeddings B x E."""
        return self.project_tokens(self.tower.pool(tokens, ids))

    def project_tokens(self, tokens: Tensor) -> Tensor:
        """Contextual text tokens ... x width -> L2-normalised in the joint space, ... x E."""
        return F.normalize(self.tower.project(tokens).float(), dim=-1)

    def cut(self, ids: Tensor) -> Tensor:
        """B x T ids without the columns past the longest text, where the tower ignores those."""
        return self.tower.cut(ids)

    def opening(self, ids: Sequence[int]) -> Opening | None:
        """Words that begin every text, for `encode_vectors`; None for none, or if it looks ahead.

        It holds for as long as the weights stay.
        """
        words = torch.tensor([ids], dtype=torch.long, device=self.device)
        return self.tower.opening(self.word_vectors(words)) if len(ids) else None

    def encode_vectors(
        self, vectors: Tensor, ids: Tensor, opening: Opening | None = None
    ) -> Tensor:
        """Word vectors B x T x D, and their ids, -> L2-normalised text embeddings B x E.

        opening: of the words, not pseudo-words, that begin every row; they are not read again, and
        no gradient flows into them.
        """
        return self.project_tokens(self.tower.embed(vectors, ids, opening))

    def encode_ids(self, ids: Tensor, opening: Opening | None = None) -> Tensor:
        """B x T ids of texts -> L2-normalised text embeddings B x E."""
        return self.encode_vectors(self.word_vectors(ids), ids, opening)

    @checked(batch_size=whole(1))
    @torch.no_grad()
    def encode_text(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Texts -> L2-normalised embeddings B x E on the CPU. Raises ValueError for no list."""
        texts, parts = check_texts(texts), []
        # for a single text it would only be more work
        opening = self.opening(self.words.prefix) if len(texts) > 1 else None
        for start in range(0, len(texts), batch_size):
            ids = self.cut(self.tokenize(texts[start : start + batch_size]))
            parts.append(self.encode_ids(ids, opening).cpu())
        return self._checked(torch.cat(parts))

    def _checked(self, embeddings: Tensor) -> Tensor:
        """Embeddings B x E of length 1. Raises ValueError for others, as of damaged weights."""
        # False for nan, too
        if not ((torch.linalg.vector_norm(embeddings.float(), dim=-1) - 1).abs() <= 0.01).all():
            fault = f"{self.name or 'the model'} gives embeddings that are zero or no numbers"
            raise ValueError(f"{fault}; are its weights damaged?")
        return embeddings

    # ------------------------------------------------------------------------------------------
    # images

    def pixels(self, images: np.ndarray | Sequence[Image.Image]) -> Tensor:
        """Images -> B x 3 x H x W on the CPU, normalised as the model wants them."""
        visual = self.clip.visual
        look = self.image_size, visual.image_mean, visual.image_std
        return to_pixels(images, self.preprocess, *look)

    def _at_home(self, pixels: Tensor) -> Tensor:
        """Pixels where the image tower is, in its precision: half, for one."""
        kinds = (p.dtype for p in self.clip.visual.parameters() if p.is_floating_point())
        kind = next(kinds, pixels.dtype)
        return pixels.to(self.device, kind)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """B x 3 x H x W -> L2-normalised image embeddings B x E."""
        out = self.clip.encode_image(self._at_home(pixels))
        # some give their tokens as well
        return F.normalize((out[0] if isinstance(out, tuple) else out).float(), dim=-1)

    def encode_pixels_and_patches(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """B x 3 x H x W -> L2-normalised B x E, and the last layer's local tokens B x N x width."""
        visual, pixels = self.clip.visual, self._at_home(pixels)
        try:  # vision transformers give B x N x C, convolutional towers only B x C x H x W
            out = visual.forward_intermediates(pixels, indices=1, output_fmt="NLC")
        except (AssertionError, NotImplementedError):
            out = visual.forward_intermediates(pixels, indices=1, output_fmt="NCHW")
        local = out["image_intermediates"][-1]
        if local.ndim == 4:
            local = local.flatten(2).transpose(1, 2)  # B x C x H x W -> B x N x C
        return F.normalize(out["image_features"].float(), dim=-1), local

    def project_patches(self, patches: Tensor) -> Tensor:
        """Local tokens B x N x width -> L2-normalised B x N x E, projected as its global one.

        An attention pool projects each position as if it had all the attention (as MaskCLIP does).
        Raises ValueError for a tower that has no such projection.
        """
        project = self._patch_projection()
        if project is None:
            fault = f"{self.name}: a {type(self.clip.visual).__name__} does not project patches"
            raise ValueError(f"{fault}; set lar_weight to 0")
        return F.normalize(project(patches).float(), dim=-1)

    def _patch_projection(self) -> Callable[[Tensor], Tensor] | None:
        visual = self.clip.visual
        if hasattr(visual, "project_patches"):
            return visual.project_patches
        names = ("ln_post", "proj", "attn_pool")
        parts = [getattr(visual, name, None) is not None for name in names]
        if parts == [True, True, False]:  # CoCa's pooler stands between patches and projection
            return lambda patches: visual.ln_post(patches) @ visual.proj
        if hasattr(getattr(visual, "attnpool", None), "c_proj"):
            return lambda patches: visual.attnpool.c_proj(visual.attnpool.v_proj(patches))
        return None

    def check_lar(self) -> None:
        """Raises ValueError for a model without matching encoder and projection of patches."""
        if self.matcher is None and self._patch_projection() is None:
            self.project_patches(torch.empty(0))

    @checked(batch_size=whole(1))
    @torch.no_grad()
    def encode_images(
        self, images: np.ndarray | Sequence[Image.Image], batch_size: int = 64
    ) -> Tensor:
        """Images (PIL, or uint8 B x H x W x 3) -> L2-normalised embeddings B x E, on the CPU.

        PIL images are taken as files are (`images.decode`). Raises ValueError for no pictures.
        """
        check_images(images)
        starts = range(0, len(images), batch_size)
        parts = [self.encode_pixels(self.pixels(images[s : s + batch_size])).cpu() for s in starts]
        return self._checked(torch.cat(parts))

    @property
    def fingerprint(self) -> str:
        """A key, of caches too, that changes with any weight, activation or preprocessing."""
        tensors = sorted(self.state_dict().items())
        # which the weights do not show
        quick = any(isinstance(module, QuickGELU) for module in self.modules())
        first = repr(self.preprocess) + quick * "QuickGELU"
        state = [first, *map(_trace, tensors)]
        if self._hashed[0] != state:  # a large model takes seconds
            self._hashed = state, digest(tensors, first.encode())
        return self._hashed[1]


def digest(tensors: Iterable[tuple[str, Tensor]], *first: bytes) -> str:
    """16 hexadecimal digits that tell these weights, by name, from others; `first` counts, too."""
    found = hashlib.sha256(b"".join(first))
    for key, value in tensors:
        found.update(key.encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _trace(named: tuple[str, Tensor]) -> tuple:
    """What shows that a tensor has changed: its place, how often it was written, some values."""
    name, value = named
    some = value.detach().flatten()[:: max(1, value.numel() // 64)].tolist()
    version = 0 if value.is_inference() else value._version
    return name, value.data_ptr(), version, value.dtype, str(some)


@checked(name=path_name(), pretrained=optional(text()), device=text())
def load_vl_model(
    name: str = SCENES_CLIP, pretrained: str | None = None, device: str = "cpu"
) -> VLModel:
    """Load a VL model, frozen and in evaluation mode.

    name: `scenes-clip` (shipped); a folder in open_clip's local-dir layout, or with a BLIP of
    transformers; the name of any open_clip model; `hf-hub:ORG/NAME`, an open_clip model on the hub;
    `blip:ORG/NAME` or `blip:FOLDER`, a BLIP.
    pretrained: for the name of an open_clip model, the tag of its weights (fetched, or taken from
    the cache) or a file; every other model brings its own weights. Raises ValueError for an unknown
    name or tag (with the nearest ones), a device that is not there, a model without weights, or one
    that cannot be entered with word vectors; ImportError where a package is missing;
    ConnectionError, at once, where what you named is out of reach.
    """
    check_device(device)
    name = os.fspath(name)
    named = name == SCENES_CLIP or name.startswith(("blip:", "hf-hub:", "local-dir:"))
    if pretrained and (named or Path(name).is_dir()):
        fault = f"pretrained={pretrained!r} is for names of open_clip alone"
        raise ValueError(f"{fault}: {name} comes with its own weights")
    folder = DATA / name if name == SCENES_CLIP else Path(name.removeprefix("local-dir:"))
    if name.startswith("blip:") or is_blip(folder):
        clip, preprocess, tokenizer = load_blip(name.removeprefix("blip:"), device)
        return VLModel(clip, preprocess, tokenizer, clip.match, name)
    if name.startswith("hf-hub:"):
        wanted = "a model of open_clip", "open_clip_config.json", WEIGHTS
        folder = repository(name.removeprefix("hf-hub:"), *wanted)
    if folder.is_dir():
        return _checked(VLModel(*from_folder(folder, name, device), name))
    if name not in open_clip.list_models():
        raise unknown("VL model", name, [SCENES_CLIP, *open_clip.list_models()])
    return _checked(VLModel(*from_name(name, pretrained, device), None, f"{name}/{pretrained}"))


@torch.no_grad()
def _checked(vl: VLModel) -> VLModel:
    """The model, if its text tower agrees with itself from word vectors and ids; or ValueError."""
    ids = vl.tokenize(["a photo of a cat"])
    short, theirs = vl.cut(ids), vl.clip.encode_text(ids, normalize=True).float()
    # of queries, and of training
    ways = vl.encode_ids(short), vl.pool(vl.text_tokens(vl.word_vectors(short), short), short)
    off = max(float((ours - theirs).abs().max()) for ours in ways)
    if not off <= 1e-2:
        fault = f"{vl.name}: its text tower gives something else from word vectors than from ids"
        raise ValueError(f"{fault} (off by {off:.2g})")
    return vl


def machine() -> str:
    """The machine in words: processor, cores, threads in use, accelerator."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8").splitlines()
        named = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        cpu = next(named, cpu)
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{gpu}"


def commit() -> str:
    """The commit of the code that runs, "-dirty" if changed; "unknown" outside a checkout."""
    where = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
