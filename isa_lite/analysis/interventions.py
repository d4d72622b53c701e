"""What a sentence depends on: change its reads or cover parts of the image, and see. Ours.

Attention says where weight goes, and not what would be lost without it. An intervention does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from isa_lite.models.vl_model import VLModel
from isa_lite.prompt import compose
from isa_lite.query_encoder import QueryEncoder
from isa_lite.token_learner import AdaptiveTokenLearner


@torch.no_grad()
def sentences_changed(
    encoder: QueryEncoder, images: np.ndarray | Sequence, batch_size: int = 128
) -> dict[str, Tensor]:
    """B sentences, B x L x D on the CPU, as they are and with the reads of the image changed.

    The first read is that of the maps, the second that of the blocks' cross-attention. "even maps":
    every position counts alike, so that a token still sees what is in the image, but not where it
    chose to look. "another image's maps": those of the next image. "left out": nothing is read. The
    modules are the trained ones, unchanged. Raises ValueError for an encoder without the adaptive
    token learner and for a single image, which has no next one.
    """
    learner = encoder.mapping
    if not isinstance(learner, AdaptiveTokenLearner):
        fault = "encoder: only the adaptive token learner has two kinds of reads"
        raise ValueError(f"{fault}, not {encoder.config.mapping!r}")
    if len(images) < 2:
        fault = "images: at least two are needed, since one borrows the maps of the next"
        raise ValueError(f"{fault}, not {len(images)}")
    was_training = encoder.training
    encoder.eval()
    starts = range(0, len(images), batch_size)
    pixels = (encoder.pixels(images[s : s + batch_size]) for s in starts)
    x = torch.cat([learner.placed(encoder.features(some)) for some in pixels])
    memory = x.flatten(2).transpose(1, 2)  # B x HW x width
    maps = learner.attend(x).flatten(2).softmax(-1)  # B x L x HW
    even = torch.full_like(maps, 1 / maps.shape[-1])
    # keys that are alike at every position: a query gives each the same weight
    same = torch.zeros_like(memory)

    def written(maps: Tensor, keys: Tensor | None) -> Tensor:
        tokens = maps @ memory + learner.identity
        for block in learner.blocks:
            if keys is not None:
                asked = block.norm1(tokens), keys, memory
                tokens = tokens + block.cross(*asked, need_weights=False)[0]
            tokens = block.think(tokens)
        return learner.to_word(learner.norm(tokens)).cpu()

    found = {
        "as it is": written(maps, memory),
        "first read: even maps": written(even, memory),
        "first read: another image's maps": written(maps.roll(-1, 0), memory),
        "first read: left out": written(torch.zeros_like(maps), memory),
        "second read: even maps": written(maps, same),
        "second read: left out": written(maps, None),
        "both reads: even maps": written(even, same),
    }
    encoder.train(was_training)
    return found


def covered(images: np.ndarray, regions: Tensor, share: float) -> np.ndarray:
    """Images B x H x W x 3 with a share of their pixels painted over, in each image's mean colour.

    regions: B x h x w maps, stretched over the image as in figures; the pixels with the highest
    values are covered. Raises ValueError for a share outside 0 to 1, or another number of maps.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share: the covered part of an image lies between 0 and 1, not {share}")
    if len(images) != len(regions):
        raise ValueError(f"regions: {len(regions)} maps for {len(images)} images")
    count, height, width = images.shape[:3]
    maps = F.interpolate(regions.unsqueeze(1).double(), (height, width), mode="bilinear")
    order = maps.flatten(1).argsort(1, descending=True)
    painted = images.reshape(count, -1, 3).copy()
    named = order[:, : round(share * height * width)].numpy()  # B x the covered pixels
    mean = painted.mean(1, keepdims=True).round().astype(np.uint8)
    np.put_along_axis(painted, named[..., None], mean, 1)
    return painted.reshape(images.shape)


def region_maps(images: np.ndarray, reads: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """The reads of B images, B x N x L x h x w, as regions B x h x w each: means over tokens.

    "first read", "second read" (the mean over the blocks, so N must be at least 2: else
    ValueError), "both reads" (their mean), and three controls: "random cells"; the first read of
    the next image, which has the same kind of shape; and "contrast", the distance of the colours,
    images B x H x W x 3, from each image's median colour, for which no model is needed.
    """
    if reads.shape[1] < 2:
        fault = "reads: a first and a second one are needed"
        raise ValueError(f"{fault}; these are of an encoder that reads the image once")
    first, second = reads[:, 0].mean(1), reads[:, 1:].mean((1, 2))
    chance = torch.rand(first.shape, generator=torch.Generator().manual_seed(seed))
    away = np.abs(images - np.median(images, (1, 2), keepdims=True)).mean(-1)  # B x H x W
    return {
        "random cells": chance,
        "first read, another image's": first.roll(-1, 0),
        "second read": second,
        "both reads": (first + second) / 2,
        "first read": first,
        "contrast": F.adaptive_avg_pool2d(torch.from_numpy(away), first.shape[-2:]),
    }


def cover_curves(
    encoder: QueryEncoder,
    vl: VLModel,
    images: np.ndarray,
    modifiers: Sequence[str],
    regions: Mapping[str, Tensor],
    shares: Sequence[float],
    score: Callable[[Tensor], np.ndarray],
) -> dict[str, np.ndarray]:
    """What covering the regions that maps name costs: for each kind, shares x B values.

    The light encoder sees the covered images, B x H x W x 3; the text tower composes each sentence
    with its modifier ("": the sentence alone); `score` turns the query embeddings, B x E, into B
    values: a cosine, or hits and misses. The same queries stand in every row, so differences are
    paired (`metrics.paired_interval`).
    """

    def at(maps: Tensor, share: float) -> np.ndarray:
        tokens = encoder.sentences(covered(images, maps, share)).tokens
        return np.asarray(score(compose(vl, tokens, modifiers)), float)

    return {name: np.stack([at(maps, share) for share in shares]) for name, maps in regions.items()}
