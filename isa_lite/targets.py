"""What the frozen large image tower says of each training image: computed once, then read.

Paper: the gallery side's large visual encoder is frozen, and its embedding of the same image is
what a sentence is to be aligned with. Ours: since it never changes, it is kept on disk.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from isa_lite.models.vl_model import VLModel
from isa_lite.support import distributed
from isa_lite.support.images import Images, batch_loader, images_key
from isa_lite.support.shards import Rows, Shards

SHARD = 128  # images at most: a batch of the large tower, and what is lost when a run is killed


@dataclass
class Targets:
    """What the large image tower says of N images."""

    embeddings: np.ndarray  # N x E, float32
    patches: np.ndarray | Rows | None  # N x P x width, float16; what LAR reads


def targets(
    images: Images,
    vl: VLModel,
    patches: bool,
    cache: str | Path | None = None,
    num_workers: int = 0,
) -> Targets:
    """The large tower's targets, from the folder `cache` where a run, killed or not, has left them;
    patches are then read when they are asked for, and need not fit into memory.

    Any change of the model, its preprocessing or an image is a new entry. Runs may share a cache;
    the processes of one run (`distributed`) share the work, and need one. Raises ValueError where
    they have none, or `cache` is a file; OSError for a full disk.
    """
    if distributed.count() > 1 and not cache:
        raise ValueError(
            "several processes exchange the targets through files: give a cache folder"
        )
    if cache and Path(cache).exists() and not Path(cache).is_dir():
        raise ValueError(f"cache= names a folder, and {cache} is a file")
    key = f"{vl.fingerprint} {images_key(images)} {vl.preprocess}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:24]
    kinds = {"embeddings": np.float32} | ({"patches": np.float16} if patches else {})
    batches = np.array_split(np.arange(len(images)), -(-len(images) // SHARD))
    shards = Shards(Path(cache) / digest if cache else None, kinds, [len(b) for b in batches])

    missing = shards.missing()
    what = f"their images, or in whether they see the targets of these in {cache}"
    distributed.same((digest, len(missing)), what)
    own = distributed.told(missing)[distributed.rank() :: distributed.count()]
    hidden = distributed.rank() > 0 or not own
    bar = tqdm(own, desc="targets of the large tower", mininterval=1, disable=hidden)
    loader = batch_loader(images, [batches[shard] for shard in own], vl.pixels, num_workers)
    with torch.inference_mode():
        for shard, pixels in zip(bar, loader, strict=True):  # n x 3 x H x W
            pixels = pixels.to(vl.device)
            # n x E, n x P x width
            said = vl.encode_pixels_and_patches(pixels) if patches else [vl.encode_pixels(pixels)]
            shards.put(shard, [value.cpu().numpy() for value in said])
    if missing:
        distributed.wait()  # for the shards of the others
    known = {name: shards.rows(name) for name in kinds}
    return Targets(np.asarray(known["embeddings"]), known.get("patches"))
