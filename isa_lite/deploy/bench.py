"""Speed and cost: `python -m isa_lite bench cost` (the query side), `... split` (a query in parts),
`... query` (a query end to end, cut and uncut, in PyTorch and onnxruntime), `... embed` (a
gallery), `... backbones` (light encoders).

Every figure that matters is a ratio, with both sides measured in one run on one machine.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import open_clip
import pandas as pd
import torch
from PIL import Image
from torch import nn

from isa_lite.deploy.measure import multiply_adds, side_by_side
from isa_lite.deploy.query_timing import beside_tower
from isa_lite.models.backbones import LIGHT, build_backbone
from isa_lite.models.vl_model import VLModel
from isa_lite.retrieval.embed import embed_files
from isa_lite.support.images import read_image
from isa_lite.world.scenes import render_many, sample_scenes


def embedding(
    vl: VLModel, images: int = 1024, batch: int = 128, side: int = 0, rounds: int = 5
) -> pd.DataFrame:
    """Images a second of `embed_files` on JPEG files, beside the bare tower on ready tensors.

    side: of the files, in pixels (0: the model's own). They take turns, `rounds` times; medians.
    """
    world = sample_scenes(images, seed=0)
    pictures = render_many(world, range(images), side or vl.image_size)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i:06}.jpg" for i in range(images)]
        for file, picture in zip(files, pictures, strict=True):
            Image.fromarray(picture).save(file, quality=90)
        starts = range(0, images, batch)
        ready = [vl.pixels([read_image(f) for f in files[s : s + batch]]) for s in starts]
        embed = partial(embed_files, files, vl, None, batch, progress=False)
        calls = {
            "bare image tower": lambda: [vl.encode_pixels(pixels) for pixels in ready],
            "embed_files": embed,
            "embed_files, one thread reads ahead": partial(embed, num_workers=1),
        }
        times = side_by_side(calls, rounds, warm_up=1)
    table = pd.DataFrame({"images / s": {name: 1000 * images / ms for name, ms in times.items()}})
    table["of the bare tower"] = table["images / s"] / table.loc["bare image tower", "images / s"]
    return table


def backbones(
    vl: VLModel, image_size: int, names: Sequence[str] = tuple(LIGHT.values()), rounds: int = 10
) -> pd.DataFrame:
    """Light backbones up to their map, beside the VL image tower, one image at a time.

    Columns: parameters and multiply-adds in millions; the map's stride, in pixels, and its C x H x
    W; milliseconds; and how many times more the VL image tower (at its own size) takes. Random
    weights: they cost as much as trained ones.
    """
    pixels = torch.randn(1, 3, image_size, image_size)
    large = torch.randn(1, 3, vl.image_size, vl.image_size)
    networks: dict[str, nn.Module] = {"VL image tower": vl.clip.visual}
    calls, maps = {"VL image tower": lambda: vl.encode_pixels(large)}, {"VL image tower": ("", "")}
    for name in names:
        networks[name], stride, shape = build_backbone(name, image_size)
        calls[name] = partial(networks[name], pixels)
        maps[name] = stride, " x ".join(map(str, shape))
    sizes = {n: sum(p.numel() for p in m.parameters()) / 1e6 for n, m in networks.items()}
    table = pd.DataFrame({"parameters": sizes})
    table["multiply-adds"] = pd.Series({n: multiply_adds(call) for n, call in calls.items()})
    table[["stride", "map"]] = pd.DataFrame.from_dict(maps, "index")
    table["ms"] = pd.Series(side_by_side(calls, rounds))
    return beside_tower(table)


@contextmanager
def _hushed(message: str) -> Iterator[None]:
    """Inside, the root logger lets nothing through that contains `message`."""

    def other(record: logging.LogRecord) -> bool:
        return message not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(other)
    try:
        yield
    finally:
        root.removeFilter(other)


def random_model(name: str) -> VLModel:
    """A model of open_clip with random weights, for timing."""
    with _hushed("No pretrained weights"):  # on purpose here
        clip, _, preprocess = open_clip.create_model_and_transforms(name)
    return VLModel(clip, preprocess, open_clip.get_tokenizer(name), name=f"{name}, random weights")
