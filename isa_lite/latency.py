"""Where the time of one query goes: image encoding, token learner, text tower, search; light and symmetric, in both runtimes.

The symmetric query side runs the large image tower on the reference and the text tower on the modifier, as late fusion does.
All calls take turns in one run, so their ratios can be compared; milliseconds belong to the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor, nn

from isa_lite.bench import side_by_side
from isa_lite.client import PLACEHOLDER, TEXT, QueryClient, session
from isa_lite.export import to_onnx
from isa_lite.gallery import Gallery
from isa_lite.query_encoder import QueryEncoder, prompt_ids, splice
from isa_lite.vl_model import VLModel

PARTS = ("image encoding", "token learner", "text tower", "search")
LARGE, BACKBONE, LEARNER = "large_image_tower.onnx", "backbone.onnx", "token_learner.onnx"


class _Piece(nn.Module):
    """A function of one tensor that belongs to `owner`, as a module that can be exported."""

    def __init__(self, owner: nn.Module, call: Callable[[Tensor], Tensor]):
        super().__init__()
        self.owner, self.call = owner, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def export_pieces(vl: VLModel, encoder: QueryEncoder, folder: str | Path) -> Path:
    """Backbone, token learner and large image tower as a file each, only to be measured and compared; returns `folder`."""
    folder, axes = Path(folder), {"x": {0: torch.export.Dim("batch", min=1)}}
    folder.mkdir(parents=True, exist_ok=True)
    light = torch.zeros(2, 3, encoder.config.image_size, encoder.config.image_size)
    features = encoder.eval().backbone(light)[0].detach()
    for name, piece, x in (
        (BACKBONE, _Piece(encoder.backbone, lambda x: encoder.backbone(x)[0]), light),
        (LEARNER, _Piece(encoder.mapping, lambda x: encoder.mapping(x).tokens), features),
        (LARGE, _Piece(vl.clip.visual, vl.encode_pixels), torch.zeros(2, 3, vl.image_size, vl.image_size)),
    ):
        to_onnx(piece, {"x": x}, ["y"], axes, folder / name)
    return folder


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
    """Median ms of every part of one query (batch 1), a row a part: light and symmetric, in PyTorch and in onnxruntime.

    exported: what `export.export` wrote; pieces: what `export_pieces` wrote. The search is `gallery`'s, ten best, for all alike.
    Cutting the image to size and looking up ids are not counted. PyTorch keeps `threads` threads for this time only.
    """
    client, before = QueryClient(exported, threads), torch.get_num_threads()
    light, large = encoder.pixels([image]), vl.pixels([image])
    ids, places = prompt_ids(vl, encoder(light[:1]).tokens.shape[1], [modifier], client.settings["template"])
    alone = vl.cut(vl.tokenize([modifier]))
    run = {name: session(Path(pieces) / name, threads) for name in (LARGE, BACKBONE, LEARNER)}
    text = session(Path(exported) / TEXT, threads)
    nothing = np.zeros((1, client.settings["num_tokens"], vl.word_width), np.float32)
    marked = ids.masked_fill(places, PLACEHOLDER).numpy()
    with torch.inference_mode():
        features = encoder.backbone(light)[0]
        tokens = encoder.mapping(features).tokens
        query = vl.encode_vectors(splice(vl, tokens, ids, places), ids)

    def search() -> object:
        return gallery.search(query, min(10, len(gallery)))

    columns: dict[str, dict[str, Callable]] = {
        "PyTorch, light": {
            "image encoding": lambda: encoder.backbone(light),
            "token learner": lambda: encoder.mapping(features),
            "text tower": lambda: vl.encode_vectors(splice(vl, tokens, ids, places), ids),
        },
        "PyTorch, symmetric": {
            "image encoding": lambda: vl.encode_pixels(large),
            "text tower": lambda: vl.encode_vectors(vl.word_vectors(alone), alone),
        },
        "onnxruntime, light": {
            "image encoding": lambda: run[BACKBONE].run(None, {"x": light.numpy()}),
            "token learner": lambda: run[LEARNER].run(None, {"x": features.numpy()}),
            "text tower": lambda: text.run(None, {"tokens": tokens.numpy(), "ids": marked}),
        },
        "onnxruntime, symmetric": {
            "image encoding": lambda: run[LARGE].run(None, {"x": large.numpy()}),
            "text tower": lambda: text.run(None, {"tokens": nothing, "ids": alone.numpy()}),
        },
    }
    calls = {f"{column}/{part}": call for column, parts in columns.items() for part, call in parts.items()} | {"search": search}
    try:
        torch.set_num_threads(threads)
        times = side_by_side(calls, rounds)
    finally:
        torch.set_num_threads(before)
    table = {c: {p: times["search"] if p == "search" else times.get(f"{c}/{p}", 0.0) for p in PARTS} for c in columns}
    return pd.DataFrame(table, index=list(PARTS))


def search_times(galleries: dict[str, Gallery], queries: Tensor, k: int = 10, rounds: int = 30) -> dict[str, float]:
    """Median ms of one search for one query, a number a gallery. They take turns, in this order and in the reverse one.

    A search after one of the whole gallery finds nothing of its own in the processor's cache; the better of two orders counts.
    """
    calls = {name: lambda g=g: g.search(queries[:1], k) for name, g in galleries.items()}
    there, back = (side_by_side(dict(order), rounds) for order in (calls.items(), reversed(calls.items())))
    return {name: min(there[name], back[name]) for name in calls}
