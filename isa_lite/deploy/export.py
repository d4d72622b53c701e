"""The query side as ONNX files: `python -m isa_lite export --encoder DIR --out DIR`.

Two networks, because an image's sentence can be kept while its owner tries several modifiers:
`image_to_sentence.onnx` (light backbone and token learner) and `sentence_to_query.onnx` (the frozen
text tower, entered with word vectors). With them `tokenizer.json`, and `query.json` with everything
else that a client needs. `isa_lite.deploy.client` runs the folder without PyTorch. Ours.

Shapes: B batch, L pseudo-words, T text positions, D word-embedding width, E embedding width.
"""

from __future__ import annotations

import json
import re
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor, nn

from isa_lite.deploy.client import (
    IMAGE,
    PLACEHOLDER,
    SETTINGS,
    TEXT,
    TOKENIZER,
    QueryClient,
    checksum,
)
from isa_lite.deploy.onnx_files import to_onnx
from isa_lite.models.vl_model import VLModel, commit
from isa_lite.prompt import compose, prompt_ids
from isa_lite.query_encoder import QueryEncoder
from isa_lite.retrieval.metrics import KS, recall
from isa_lite.retrieval.queries import Queries
from isa_lite.support.checkpoint import write_bytes, write_text
from isa_lite.support.parameters import checked, number, path_name
from isa_lite.support.settings import TEMPLATE, check_template
from isa_lite.world.scenes import render_many, sample_scenes

#: Modifiers that every export is tried on: none, short, long, and hard for tokenizers.
TRIED = (
    "",
    "make the circle red",
    "it’s the “blue” one &amp; has 12 ÉTOILES!?",
    "a smaller star, then another one " * 4,
)


class ImageToSentence(nn.Module):
    """pixels B x 3 x H x W -> tokens B x L x D and attention maps B x L x h x w."""

    def __init__(self, encoder: QueryEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(self.encoder(pixels)[:2])  # the other reads are for those who study it


class SentenceToQuery(nn.Module):
    """tokens B x L x D and prompts B x T, -1 in the places of the tokens -> query embeddings B x E.

    A prompt without a -1 is a text as it stands, and gives what `VLModel.encode_text` does.
    """

    def __init__(self, vl: VLModel):
        super().__init__()
        self.vl = vl

    def forward(self, tokens: Tensor, ids: Tensor) -> Tensor:
        places = ids == PLACEHOLDER
        words = torch.where(places, 1, ids)  # 1: any word; 0 would be padding to some towers
        # masked_scatter in words that ONNX has: the first place takes token 0, and so on.
        which = (places.long().cumsum(1) - 1).clamp(0, tokens.shape[1] - 1)  # B x T
        said = tokens.gather(1, which.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))  # B x T x D
        vectors = torch.where(places.unsqueeze(-1), said, self.vl.word_vectors(words))
        return self.vl.encode_vectors(vectors, words)


def tokenizer_of(vl: VLModel) -> Tokenizer:
    """open_clip's tokenizer as one of the `tokenizers` library, which needs no PyTorch.

    It does not repair text (ftfy, HTML entities) as open_clip does; a client does that before.
    Raises ValueError for a tokenizer that cleans text in another way than by lower-casing.
    """
    ours = vl.tokenizer
    if not hasattr(ours, "bpe_ranks"):
        fault = f"{vl.name}: only open_clip's own tokenizer can be exported"
        raise ValueError(f"{fault}, and this model has a {type(ours).__name__}")
    if ours.clean_fn("An  Ä, b") != "an ä, b":
        fault = f"{vl.name}: its tokenizer cleans texts in a way of its own"
        raise ValueError(f"{fault}, which isa_lite.deploy.client does not know")
    merges = [pair for pair, _ in sorted(ours.bpe_ranks.items(), key=lambda item: item[1])]
    made = Tokenizer(models.BPE(dict(ours.encoder), merges, end_of_word_suffix="</w>"))
    made.normalizer = normalizers.Lowercase()
    # Words, single digits, and runs of anything else; English endings such as 's stand alone.
    pieces = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    split = pre_tokenizers.Split(pieces, "removed", invert=True)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    made.decoder = decoders.ByteLevel()
    return made


def prompt_of(vl: VLModel, template: str) -> list[list[int] | str]:
    """A template as ids and, between them, "sentence" and "modifier"; with start and end."""
    tokenizer = vl.tokenizer
    parts: list[list[int] | str] = [[tokenizer.sot_token_id]]
    for piece in re.split(r"(\{sentence\}|\{modifier\})", template):
        words = piece.startswith("{")
        parts.append(piece[1:-1] if words else tokenizer.encode(tokenizer.clean_fn(piece)))
    return [part for part in [*parts, [tokenizer.eot_token_id]] if part]


def _fits(vl: VLModel, encoder: QueryEncoder, modifier: str, template: str) -> bool:
    try:
        prompt_ids(vl, encoder.config.num_tokens, [modifier], template)
    except ValueError:
        return False
    return True


def difference(
    client: QueryClient, encoder: QueryEncoder, vl: VLModel, template: str, seed: int = 0
) -> float:
    """The largest difference from PyTorch, over sentences (in lengths of a word) and queries.

    On rendered scenes and noise of several sizes, each with every modifier of `TRIED` that fits, in
    batches of 1, 2 and 5. Raises ValueError where a prompt's ids differ.
    """
    rng = np.random.default_rng(seed)
    size = encoder.config.image_size
    world = render_many(sample_scenes(3, seed=seed), range(3), size)
    shapes = ((size + 41, 2 * size, 3), (size // 2, size, 3))
    noise = [rng.integers(0, 256, shape, np.uint8) for shape in shapes]
    pictures, most = [Image.fromarray(i) for i in (*world, *noise)], 0.0
    modifiers = [text for text in TRIED if text == "" or _fits(vl, encoder, text, template)]
    for batch in (1, 2, 5):
        images = pictures[-batch:]
        tokens = encoder.sentences(images).tokens
        found = client.sentences(client.pixels(images))
        most = max(most, float(np.abs(found - tokens.numpy()).max()) / vl.word_norm)
        for modifier in modifiers:
            said = [""] * (batch - 1) + [modifier]
            ids, places = prompt_ids(vl, tokens.shape[1], said, template)
            prompts = client.prompts(said)
            if not np.array_equal(ids.masked_fill(places, PLACEHOLDER).cpu().numpy(), prompts):
                fault = "the exported tokenizer gives other ids than open_clip's"
                raise ValueError(f"{fault} for {modifier!r} in {template!r}")
            query = compose(vl, tokens, said, template).numpy()
            most = max(most, float(np.abs(client.compose(found, prompts) - query).max()))
    return most


@checked(folder=path_name(), tolerance=number(0))
def export(
    encoder: QueryEncoder,
    vl: VLModel,
    folder: str | Path,
    template: str = TEMPLATE,
    tolerance: float = 1e-3,
) -> float:
    """Write the query side into `folder`, try it there, and return the largest difference found.

    What was in the folder before is replaced only after that. Raises ValueError for an encoder of
    another VL model, a template without its fields, a tokenizer that a client cannot have, or a
    difference above `tolerance`; RuntimeError for a network that cannot be exported.
    """
    check_template(template)
    if encoder.config.vl_model != vl.fingerprint:
        fault = f"the query encoder belongs to VL model {encoder.config.vl_model}"
        raise ValueError(f"{fault}, not {vl.fingerprint} ({vl.name})")
    # before the networks, which take minutes
    folder, tokenizer = Path(folder), tokenizer_of(vl)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as part:
        part = Path(part)
        length, width = _write_networks(encoder.eval(), vl, part)
        write_text(part / TOKENIZER, tokenizer.to_str() + "\n")
        settings = _settings(encoder, vl, template) | {"num_tokens": length, "word_width": width}
        settings["files"] = {name: checksum(part / name) for name in (IMAGE, TEXT, TOKENIZER)}
        write_text(part / SETTINGS, json.dumps(settings))
        most = difference(QueryClient(part), encoder, vl, template)
        if not most <= tolerance:  # also where it is not a number
            fault = f"the files differ from PyTorch by {most:.2g}, more than {tolerance:g}"
            raise ValueError(f"{fault}; {folder} is as it was")
        libraries = ("torch", "onnx", "onnxscript", "onnxruntime")
        settings["made"] = {"difference": most, "date": str(date.today()), "commit": commit()}
        settings["made"] |= {"versions": {name: version(name) for name in libraries}}
        for name in settings["files"]:
            write_bytes(folder / name, (part / name).read_bytes())
        # last: without it there is no export
        write_text(folder / SETTINGS, json.dumps(settings, indent=1) + "\n")
    return most


def _write_networks(encoder: QueryEncoder, vl: VLModel, folder: Path) -> tuple[int, int]:
    """Both networks as files, traced on two examples; returns a sentence's L and D."""
    size, length = encoder.config.image_size, vl.context_length
    axes = {0: torch.export.Dim("batch", min=1)}
    pixels, free = {"pixels": torch.zeros(2, 3, size, size)}, dict(axes)
    tokens = encoder(pixels["pixels"]).tokens.detach()
    to_onnx(ImageToSentence(encoder), pixels, ["tokens", "maps"], {"pixels": axes}, folder / IMAGE)
    if vl.tower.can_cut:
        free[1] = torch.export.Dim("length", min=2, max=length)
        length //= 2
    said = {"tokens": tokens, "ids": torch.full((2, length), PLACEHOLDER)}
    dynamic = {"tokens": axes, "ids": free}
    to_onnx(SentenceToQuery(vl), said, ["query"], dynamic, folder / TEXT)
    return tokens.shape[1:]


def _settings(encoder: QueryEncoder, vl: VLModel, template: str) -> dict:
    """What a client needs to know beside the networks and the tokenizer."""
    config, alone = encoder.config, template.replace("{modifier}", "").rstrip(" ,.;:")
    words = "tokenizer.json is read by the tokenizers library; before it: ftfy.fix_text, HTML"
    return {
        "vl_model": vl.fingerprint,
        "image_size": config.image_size,
        "mean": list(config.mean),
        "std": list(config.std),
        "context_length": vl.context_length,
        "can_cut": vl.tower.can_cut,
        "pad_id": 0,
        "placeholder": PLACEHOLDER,
        "template": template,
        "prompt": prompt_of(vl, template),
        "prompt_without_modifier": prompt_of(vl, alone),
        "tokenizer": f"{words} entities, lower case",
        # what a client compares its own tokenizer with
        "read": {text: vl.tokenizer.encode(vl.tokenizer.clean_fn(text)) for text in TRIED},
    }


def measured_recall(client: QueryClient, queries: Queries) -> dict[str, float]:
    """Recall@K in percent of an exported query side; the queries know their gallery."""
    pictures = [queries.images[i] for i in queries.reference]
    rank = queries.ranks(torch.from_numpy(client.encode(pictures, queries.texts)))
    return {f"R@{k}": recall(rank, k) for k in KS}
