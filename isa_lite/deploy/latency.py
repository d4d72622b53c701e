"""Where the time of one query goes (`query_timing.PARTS`), in PyTorch and in onnxruntime.

The symmetric query side runs the large image tower on the reference and the text tower on the
modifier, as late fusion does. All calls take turns in one run, so their ratios can be compared;
milliseconds belong to the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from onnxruntime import InferenceSession
from PIL import Image
from torch import Tensor, nn

from isa_lite.deploy.client import QueryClient, session
from isa_lite.deploy.measure import side_by_side
from isa_lite.deploy.onnx_files import to_onnx
from isa_lite.deploy.query_timing import (
    GALLERY,
    MODIFIER,
    Steps,
    blank,
    fusion_steps,
    random_gallery,
    ratios,
    sentence_steps,
    timed,
)
from isa_lite.models.vl_model import VLModel
from isa_lite.query_encoder import QueryEncoder
from isa_lite.retrieval.gallery import Gallery

LARGE, BACKBONE, LEARNER = "large_image_tower.onnx", "backbone.onnx", "token_learner.onnx"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """PyTorch with so many threads, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Piece(nn.Module):
    """A function of one tensor that belongs to `owner`, as a module that can be exported."""

    def __init__(self, owner: nn.Module, call: Callable[[Tensor], Tensor]):
        super().__init__()
        self.owner, self.call = owner, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def export_pieces(vl: VLModel, encoder: QueryEncoder, folder: str | Path) -> Path:
    """Backbone, token learner and large image tower as a file each, to be measured."""
    folder, axes = Path(folder), {"x": {0: torch.export.Dim("batch", min=1)}}
    folder.mkdir(parents=True, exist_ok=True)
    light = torch.zeros(2, 3, encoder.config.image_size, encoder.config.image_size)
    features = encoder.eval().backbone(light)[0].detach()
    large = torch.zeros(2, 3, vl.image_size, vl.image_size)
    for name, piece, x in (
        (BACKBONE, _Piece(encoder.backbone, lambda x: encoder.backbone(x)[0]), light),
        (LEARNER, _Piece(encoder.mapping, lambda x: encoder.mapping(x).tokens), features),
        (LARGE, _Piece(vl.clip.visual, vl.encode_pixels), large),
    ):
        to_onnx(piece, {"x": x}, ["y"], axes, folder / name)
    return folder


def _ten_best(gallery: Gallery) -> Callable[[Tensor | np.ndarray], object]:
    return lambda query: gallery.search(torch.as_tensor(query), min(10, len(gallery)))


def piece_sessions(pieces: str | Path, threads: int) -> dict[str, InferenceSession]:
    """What `export_pieces` wrote, ready to run, by the names of the files."""
    return {name: session(Path(pieces) / name, threads) for name in (LARGE, BACKBONE, LEARNER)}


def onnx_steps(
    vl: VLModel,
    client: QueryClient,
    run: Mapping[str, InferenceSession],
    pictures: Sequence,
    modifiers: Sequence[str],
    search: Callable[[np.ndarray], object],
    cut: bool = True,
) -> dict[str, Steps]:
    """A query in onnxruntime, "light" and "symmetric", as the steps are in PyTorch.

    run: what `export_pieces` wrote, as sessions. cut: False for prompts of the text tower's full
    length. Only the last layer is then still computed at the pooled position alone, as the exported
    tower does not know another way.
    """
    nothing = np.zeros((len(pictures), client.settings["num_tokens"], vl.word_width), np.float32)

    def ask(name: str) -> Callable[[np.ndarray], np.ndarray]:
        return lambda x: run[name].run(None, {"x": x})[0]

    def long(ids: np.ndarray) -> np.ndarray:
        missing = 0 if cut else vl.context_length - ids.shape[1]
        return np.pad(ids, ((0, 0), (0, missing)), constant_values=client.settings["pad_id"])

    def fused(both: np.ndarray) -> np.ndarray:
        return both / np.linalg.norm(both, axis=1, keepdims=True)

    light = {
        "picture to pixels": lambda _: client.pixels(pictures),
        "image encoding": ask(BACKBONE),
        "token learner": ask(LEARNER),
        "prompt (tokenizer)": lambda tokens: (tokens, long(client.prompts(modifiers))),
        "text tower": lambda prompt: client.compose(*prompt),
        "search": search,
    }
    symmetric = {
        "picture to pixels": lambda _: vl.pixels(pictures).numpy(),
        "image encoding": ask(LARGE),
        "prompt (tokenizer)": lambda image: (image, long(vl.cut(vl.tokenize(modifiers)).numpy())),
        "text tower": lambda pair: fused(pair[0] + client.compose(nothing, pair[1])),
        "search": search,
    }
    return {"light": light, "symmetric": symmetric}


def latency(
    vl: VLModel,
    encoder: QueryEncoder,
    exported: str | Path,
    pieces: str | Path,
    gallery: Gallery,
    image: Image.Image | np.ndarray,
    modifier: str,
    threads: int = 1,
    rounds: int = 30,
) -> pd.DataFrame:
    """Median ms of each part of a query (batch 1), and of the whole: light, symmetric; runtimes.

    exported: what `export.export` wrote; pieces: what `export_pieces` wrote. The search is
    `gallery`'s, ten best, for all alike. PyTorch keeps `threads` threads for this time only.
    """
    pictures, said, search = [image], [modifier], _ten_best(gallery)
    client, run = QueryClient(exported, threads), piece_sessions(pieces, threads)
    light = sentence_steps(vl, encoder, pictures, said, search, client.settings["template"])
    systems = {"PyTorch, light": light}
    systems["PyTorch, symmetric"] = fusion_steps(vl, pictures, said, search)
    for name, steps in onnx_steps(vl, client, run, pictures, said, search).items():
        systems[f"onnxruntime, {name}"] = steps
    with _threads(threads):
        return timed(systems, rounds).fillna(0)


def end_to_end_onnx(
    vl: VLModel,
    exported: str | Path,
    pieces: str | Path,
    threads: int = 1,
    rounds: int = 30,
    gallery: int = GALLERY,
) -> tuple[pd.DataFrame, pd.Series]:
    """`query_timing.end_to_end` with every network in onnxruntime: median ms, and ratios.

    Light (by a sentence) and symmetric (late fusion), cut and uncut, from a picture of the large
    tower's size. exported: what `export.export` wrote; pieces: what `export_pieces` wrote.
    """
    client, run = QueryClient(exported, threads), piece_sessions(pieces, threads)
    pictures, search, systems = blank(vl.image_size), _ten_best(random_gallery(vl, gallery)), {}
    for way, cut in (("cut", True), ("uncut", False)):
        steps = onnx_steps(vl, client, run, pictures, [MODIFIER], search, cut)
        systems |= {f"{name}, {way}": made for name, made in steps.items()}
    with _threads(threads):
        ms = timed(systems, rounds)
    return ms, ratios(ms)


def search_times(
    galleries: dict[str, Gallery], queries: Tensor, k: int = 10, threads: int = 1, rounds: int = 30
) -> dict[str, float]:
    """Median ms of one search for one query, a number a gallery, in turns and in two orders.

    A search after one of the whole gallery finds nothing of its own in the processor's cache; the
    better of two orders counts. PyTorch keeps `threads` threads for this time only.
    """
    calls = {name: lambda g=g: g.search(queries[:1], k) for name, g in galleries.items()}
    with _threads(threads):
        there = side_by_side(calls, rounds)
        back = side_by_side(dict(reversed(calls.items())), rounds)
    return {name: min(there[name], back[name]) for name in calls}
