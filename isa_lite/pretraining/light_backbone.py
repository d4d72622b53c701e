"""Weights for a light backbone to start from: `python -m isa_lite light_backbone`.

A light backbone usually starts from weights that were learned on photographs. Of rendered scenes
these know little, and a laptop without a network has none. So the backbone first learns to say what
the large image tower says about each part of an image (feature distillation, Romero et al.,
"FitNets", ICLR 2015). It sees images alone. `QueryEncoderConfig.backbone_weights` names the result:
"scenes" for the one that is shipped. Ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from isa_lite.models.vl_model import VLModel
from isa_lite.query_encoder import QueryEncoder
from isa_lite.support.checkpoint import damaged, misfit
from isa_lite.support.draws import loaded
from isa_lite.support.images import Images, images_key
from isa_lite.support.learning_rate import learning_rate
from isa_lite.support.runs import MINUTES, Keeper
from isa_lite.support.settings import BackboneConfig
from isa_lite.support.training import fit
from isa_lite.targets import targets


def feature_loss(features: Tensor, patches: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """MSE of predicted and true local features, each channel in units of its standard deviation.

    features: B x C x h x w, of the light backbone behind a linear layer; patches: B x N x C of the
    large tower, on a square grid; mean, std: C. Where the grids differ, the light one is averaged
    or interpolated to the other's. 1 is what the mean feature alone achieves.
    """
    side = round(patches.shape[1] ** 0.5)
    features = F.interpolate(features, (side, side), mode="area")  # B x C x side x side
    wanted = (patches - mean) / std  # B x N x C
    return F.mse_loss(features.flatten(2).transpose(1, 2), wanted)


def learn_features(
    images: Images,
    vl: VLModel,
    encoder: QueryEncoder,
    config: BackboneConfig,
    cache: Path,
    checkpoint: Path | None = None,
    checkpoint_minutes: float = MINUTES,
) -> tuple[float, float]:
    """Train `encoder.backbone` in place, or go on. Returns the last 100 steps' mean loss; seconds.

    checkpoint: written at the start, every `checkpoint_minutes`, at the end, and on Ctrl-C. Raises
    ValueError for one of another run, a damaged one, and one that another process works on, and
    where `config` tells of another backbone than the encoder's.
    """
    for name in ("backbone", "stride"):
        wanted, there = getattr(config, name), getattr(encoder.config, name)
        if wanted != there:
            raise ValueError(f"config names the {name} {wanted!r}, and the encoder's is {there!r}")
    with Keeper(checkpoint, checkpoint_minutes) as keeper:
        return _learn_features(images, vl, encoder, config, cache, keeper)


def _learn_features(
    images: Images,
    vl: VLModel,
    encoder: QueryEncoder,
    config: BackboneConfig,
    cache: Path,
    keeper: Keeper,
) -> tuple[float, float]:
    known = targets(images, vl, True, cache, config.num_workers).patches  # N x P x C, float16
    some = torch.from_numpy(known[:4000].astype(np.float32))
    # C each; a channel that never moves is not divided by nothing
    mean, std = some.mean((0, 1)), some.std((0, 1)) + 1e-3
    channels = encoder.backbone.eval()(encoder.pixels(images[:1]))[0].shape[1]
    torch.manual_seed(config.seed)
    modules = {"backbone": encoder.backbone, "head": nn.Conv2d(channels, len(mean), 1)}
    for module in modules.values():
        module.to(config.device, memory_format=torch.channels_last).train()
    weights = [p for module in modules.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=config.lr, weight_decay=config.weight_decay)
    mean, std, losses = mean.to(config.device), std.to(config.device), []

    def batches(start: int) -> Iterable:
        rows = np.arange(len(images))
        return loaded(images, rows, config, encoder.pixels, start, in_order=True)

    def loss_of(batch: tuple[np.ndarray, Tensor], step: int) -> Tensor:
        rows, pixels = batch
        pixels = pixels.to(config.device, memory_format=torch.channels_last)
        features = modules["backbone"](pixels)[0]  # B x c x h x w
        patches = torch.from_numpy(known[rows].astype(np.float32)).to(config.device)  # B x P x C
        loss = feature_loss(modules["head"](features), patches, mean, std)
        losses.append(loss.item())
        return loss

    def restore(info: dict) -> None:
        found = info.get("losses")
        if misfit(found, [float]) or len(found) != info["step"]:
            raise damaged(keeper.path, "its losses are not those of its steps")
        losses[:] = found

    def after(done: int, bar: tqdm) -> None:
        if done % 100 == 0:
            bar.set_postfix({"loss": f"{np.mean(losses[-100:]):.3f}"})

    identity = {"config": asdict(config), "images": images_key(images), "vl_model": vl.fingerprint}
    how = {"rate": partial(learning_rate, config=config), "keeper": keeper, "after": after}
    how |= {"identity": identity, "state": lambda seconds: {"losses": losses}, "restore": restore}
    seconds = fit("light backbone", config.steps, loss_of, batches, modules, optimizer, **how)
    encoder.backbone.eval()
    return float(np.mean(losses[-100:])), seconds
