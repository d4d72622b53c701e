"""How a distillation trains: the stem that stays as it is, AdamW, the learning rate, the loop with
its checkpoints and validation. Ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from isa_lite.models.backbones import stem
from isa_lite.support import distributed
from isa_lite.support.history import History
from isa_lite.support.learning_rate import learning_rate
from isa_lite.support.plugins import Loss
from isa_lite.support.runs import Keeper
from isa_lite.support.settings import DistillConfig
from isa_lite.support.training import fit


def frozen_stem(encoder: nn.Module, config: DistillConfig) -> list[nn.Module]:
    """The layers of a query encoder's backbone that this run does not train; without gradients,
    they also keep their running means.

    A stem that starts from learned weights has little left to learn, and its maps are the largest.
    Common practice in detection.
    """
    learned = encoder.config.pretrained or encoder.config.backbone_weights
    layers = stem(encoder.backbone)
    frozen = layers if config.freeze_stem and learned else []
    for layer in layers:
        layer.requires_grad_(not frozen)
    return frozen


def train_mode(encoder: nn.Module, frozen: Sequence[nn.Module]) -> None:
    """`encoder.train()`, except for what is frozen."""
    encoder.train()
    for layer in frozen:
        layer.eval()


def adamw(encoder: nn.Module, config: DistillConfig) -> torch.optim.Optimizer:
    """AdamW for what has gradients, with weight decay on matrices alone."""
    trained = [p for p in encoder.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = torch.device(config.device).type == "cpu"  # a GPU gains little
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=fused)


def run_identity(
    config: DistillConfig, encoder: nn.Module, images: str, vl_model: str, loss: Loss | None
) -> dict:
    """What tells a run from others: settings, and keys of its images and VL model."""
    settings = {k: v for k, v in asdict(config).items() if k not in ("device", "num_workers")}
    identity = {"config": settings, "encoder": asdict(encoder.config), "images": images}
    return identity | {"vl_model": vl_model} | ({"loss": loss.name} if loss else {})


class Run(Protocol):
    """What `optimize` needs of a distillation."""

    encoder: nn.Module
    config: DistillConfig
    history: History
    loss: Loss | None

    def losses_of(self, batch: Any, step: int) -> Tensor: ...


def optimize(
    run: Run,
    batches: Callable[[int], Iterable],
    recall: Callable[[], float],
    keeper: Keeper,
    identity: Mapping,
    began: float,
    progress: bool,
) -> None:
    """Train `run.encoder`, and fill `run.history`; without a loss it stays untrained.

    batches: those from a step on; recall: what is validated; began: the `time.perf_counter` of the
    run. The others are those of `fit`.
    """
    config, history = run.config, run.history
    steps = config.steps if config.gcd_weight or config.lar_weight or run.loss else 0

    def look(done: int) -> None:
        history.recall.append((done, recall()))

    def after(done: int, bar: tqdm) -> None:
        buffers = run.encoder.named_buffers()
        distributed.average(buffer for name, buffer in buffers if "running_" in name)
        if done % config.validate_every == 0 or done == config.steps:
            look(done)
            gcd, found = np.mean(history.gcd[-50:]), history.recall[-1][1]
            bar.set_postfix({"GCD": f"{gcd:.2f}", "validation R@1": f"{found:.0f}%"})

    history.seconds = fit(
        "distillation",
        steps,
        run.losses_of,
        batches if steps else lambda start: (),
        {"encoder": run.encoder},
        adamw(run.encoder, config),
        partial(learning_rate, config=config),
        keeper,
        identity,
        lambda seconds: {"history": asdict(history) | {"seconds": seconds}},
        lambda info: history.restore(keeper.path, info),
        after,
        clip=1.0,
        spent=time.perf_counter() - began,
        progress=progress,
    )
    if not steps:
        look(0)
    run.encoder.eval()
