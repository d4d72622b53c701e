"""Distillation: a light query encoder learns from the frozen VL model on unlabeled images alone.

Paper: sentence -> query -> GCD + LAR, `Distillation.losses_of`; neither captions nor triplets, and
no argument lets them in. Ours: optimizer, schedule, and the aids of the default recipe.

A run can be killed at any moment and taken up again with the same result. `torchrun` starts one run
on several GPUs or processes (`distributed`), which share every batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from isa_lite.losses import gcd_loss, hardest_other, lar_loss
from isa_lite.models.optimization import frozen_stem, optimize, run_identity, train_mode
from isa_lite.models.vl_model import VLModel
from isa_lite.prompt import Prompt, read_sentences
from isa_lite.query_encoder import QueryEncoder
from isa_lite.support import distributed, plugins
from isa_lite.support.draws import batch_and_others, blur, check_shares, loaded, local_count, parted
from isa_lite.support.history import History, own_image_recall
from isa_lite.support.images import Images, check_images, images_key
from isa_lite.support.parameters import checked, number, optional, path_name
from isa_lite.support.precision import mixed, with_dtype
from isa_lite.support.runs import MINUTES, Keeper
from isa_lite.support.settings import DistillConfig
from isa_lite.targets import Targets, targets


@dataclass
class Distillation:
    """What a run holds for all its steps."""

    vl: VLModel
    encoder: QueryEncoder
    config: DistillConfig
    train: np.ndarray  # N images, as rows of `known`: all but those that are held back
    known: Targets
    loss: plugins.Loss | None = None

    def __post_init__(self):
        config, self.device = self.config, torch.device(self.config.device)
        self.history = History(recipe=config.recipe, dtype=config.dtype)
        self.frozen = frozen_stem(self.encoder, config)
        self.prompt = Prompt.of(self.vl, self.encoder.config.num_tokens, config.template)
        # N x E: what every sentence is told apart from
        self.bank = torch.from_numpy(self.known.embeddings[self.train]).to(self.device)

    def losses_of(self, batch: tuple[np.ndarray, Tensor], step: int) -> Tensor:
        """The loss of this process's b of B images, as rows and as pixels b x 3 x H x W."""
        (rows, pixels), config = batch, self.config
        drawn, others = batch_and_others(len(self.train), config, step)  # B and M rows of the bank
        own, others = self.bank[drawn], self.bank[others]  # g: B x E, M x E
        n = local_count(len(rows), config)  # LAR reads the first n sentences
        with mixed(self.device, config.dtype):
            tokens = self.sentences(pixels, step)  # S: b x L x D
            query, context, places = read_sentences(self.vl, tokens, self.prompt, n)  # q: b x E
            query = distributed.gather(query)  # B x E
            gcd = gcd_loss(query, own, config.temperature, others)
            loss = config.gcd_weight * self.noted("gcd", gcd)
            if n:
                hardest = drawn[hardest_other(query @ own.T).cpu()]  # B rows of the bank
                loss = loss + config.lar_weight * self.lar(context, places, rows[:n], hardest)
            if self.loss:
                extra = self.loss(query, own, others, distributed.gather(tokens))
                loss = loss + self.noted("own", extra)
        return loss

    def noted(self, term: str, loss: Tensor) -> Tensor:
        getattr(self.history, term).append(loss.item())
        return loss

    def sentences(self, pixels: Tensor, step: int) -> Tensor:
        """b x 3 x H x W -> pseudo-words b x L x D, with the recipe's noise."""
        train_mode(self.encoder, self.frozen)
        # a CPU is slow at depthwise convolutions in bfloat16
        with mixed(self.device, "float32" if self.device.type == "cpu" else self.config.dtype):
            pixels = pixels.to(self.device, memory_format=torch.channels_last)
            features = self.encoder.backbone(pixels)[0]  # b x C x h x w
        tokens = self.encoder.mapping(features).tokens
        return blur(tokens, self.config.word_noise, step, self.config.seed)

    def lar(self, context: Tensor, places: Tensor, rows: np.ndarray, hardest: Tensor) -> Tensor:
        """LAR of n sentences, n x T x width; hardest: of all B images, the most similar other."""
        others = self.train[distributed.part(hardest)[: len(rows)].numpy()]  # n
        given = context, places, self.patches, rows, others, self.config.temperature
        loss, value, matched = lar_loss(self.vl, *given)
        self.history.lar.append(value)
        self.history.matched += matched
        return loss

    def queries(self, tokens: Tensor) -> Tensor:
        """Sentences B x L x D without a modifier -> query embeddings B x E."""
        return read_sentences(self.vl, tokens.to(self.device), self.prompt)[0]

    def patches(self, rows: np.ndarray) -> Tensor:
        """What the large tower says of the parts of n images: n x P x width."""
        return torch.from_numpy(self.known.patches[rows]).to(self.device, torch.float32)


@checked(
    cache=optional(path_name()), checkpoint=optional(path_name()), checkpoint_minutes=number(0)
)
def distill(
    images: Images,
    vl: VLModel,
    encoder: QueryEncoder,
    config: DistillConfig,
    cache: str | Path | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_minutes: float = MINUTES,
    progress: bool = True,
    loss: Callable | str | None = None,
) -> History:
    """Train `encoder` in place, on `images` alone, against the frozen `vl`. Returns the history of
    losses and validation recall.

    images: uint8 N x H x W x 3, an `ImageFolder`, or a sequence of PIL images. cache: folder of the
    targets. checkpoint: file of this run's state, written at the start, every `checkpoint_minutes`,
    at the end, and on Ctrl-C, which then is KeyboardInterrupt; if it exists, the run goes on from
    there. loss: one of your own (`plugins.Loss`), added to those that have a weight.

    Several processes (`distributed`) call this with the same arguments and files, and end with the
    same weights. Raises ValueError where they cannot share a batch evenly, for too few images, and
    for a checkpoint of other settings or images, a damaged one, or one in use.
    """
    check_images(images)
    check_shares(len(images), config)
    if config.lar_weight > 0:
        vl.check_lar()
    own = None if loss is None else plugins.Loss(loss)
    with Keeper(checkpoint, checkpoint_minutes) as keeper:
        config, began = with_dtype(config, keeper.path), time.perf_counter()
        vl.to(config.device)
        encoder.to(config.device, memory_format=torch.channels_last)
        known = targets(images, vl, config.lar_weight > 0, cache, config.num_workers)
        held_back, train = parted(len(images), config)
        run = Distillation(vl, encoder, config, train, known, own)
        identity = run_identity(config, encoder, images_key(images), vl.fingerprint, own)
        batches = partial(loaded, images, train, config, encoder.pixels)
        watched = images, held_back, known.embeddings, encoder, run.queries, config.num_workers
        recall = partial(own_image_recall, *watched)
        optimize(run, batches, recall, keeper, identity, began, progress)
    encoder.info = {"config": asdict(config)}
    return run.history
