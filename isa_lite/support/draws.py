"""What a training draws: the images of each step, further negatives, noise on words. All of it
follows from the seed and the step alone, so that a run which was stopped goes on alike. Ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from isa_lite.support import distributed
from isa_lite.support.images import Images, batch_loader
from isa_lite.support.settings import BackboneConfig, DistillConfig


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """The items of one step, B of `count`: a new permutation every epoch."""
    batch_size = min(batch_size, count)
    per_epoch = count // batch_size
    place = step % per_epoch * batch_size
    return _order(count, step // per_epoch, seed)[place : place + batch_size].copy()


@lru_cache(maxsize=2)  # two epochs, since workers are ahead of the training
def _order(count: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng((seed, 3, epoch)).permutation(count)


def other_indices(
    count: int, batch: np.ndarray, negatives: int, step: int, seed: int
) -> np.ndarray:
    """Up to `negatives` of `count` items that are not in `batch`: all there are, or drawn."""
    others = np.setdiff1d(np.arange(count), batch, assume_unique=True)
    if len(others) <= negatives:
        return others
    return np.sort(np.random.default_rng((seed, 10, step)).choice(others, negatives, replace=False))


def parted(count: int, config: DistillConfig) -> tuple[np.ndarray, np.ndarray]:
    """Which of so many images are held back for validation, and which are trained on."""
    shuffled = np.random.default_rng((config.seed, 4)).permutation(count)
    return np.sort(shuffled[: config.validation]), np.sort(shuffled[config.validation :])


def batch_and_others(count: int, config: DistillConfig, step: int) -> tuple[Tensor, Tensor]:
    """The items of one step of a distillation, B of `count`, and M further ones as negatives."""
    batch = batch_indices(count, config.batch_size, step, config.seed)
    others = other_indices(count, batch, config.negatives, step, config.seed)
    return torch.from_numpy(batch), torch.from_numpy(others)


class Batches(Sequence):
    """This process's rows of every step from `start` to `stop`, b each, drawn when asked for.

    in_order: each batch sorted.
    """

    def __init__(
        self,
        rows: np.ndarray,
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        in_order: bool = False,
    ):
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.steps, self.in_order = range(start, stop), in_order
        self.place = distributed.rank(), distributed.count()  # a worker process would not know them

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, i: int) -> np.ndarray:
        chosen = self.rows[batch_indices(len(self.rows), self.batch_size, self.steps[i], self.seed)]
        return distributed.part(np.sort(chosen) if self.in_order else chosen, *self.place)


def loaded(
    images: Images,
    rows: np.ndarray,
    config: DistillConfig | BackboneConfig,
    to_pixels: Callable,
    start: int,
    in_order: bool = False,
) -> Iterable[tuple[np.ndarray, Tensor]]:
    """Of each step from `start` on, this process's b of `rows`, and their pixels b x 3 x H x W."""
    chosen = Batches(rows, config.batch_size, config.seed, start, config.steps, in_order)
    return zip(chosen, batch_loader(images, chosen, to_pixels, config.num_workers), strict=True)


def local_count(images: int, config: DistillConfig) -> int:
    """How many of a step's images LAR is computed on; two at least, as it needs something to
    compare with.
    """
    return min(images, max(2, round(config.lar_share * images))) if config.lar_weight > 0 else 0


def check_shares(images: int, config: DistillConfig) -> None:
    """Raises ValueError for too few images, and for a batch that processes cannot share evenly."""
    if images < config.validation + 2:
        raise ValueError(
            f"{images} images are too few to hold back {config.validation} for validation; give"
            " more, or lower validation"
        )
    if (size := min(config.batch_size, images - config.validation)) % distributed.count():
        left = f", cut to the {size} images that are left to train on,"
        raise ValueError(
            f"batch_size {config.batch_size}{left if size < config.batch_size else ''} is not a"
            f" multiple of {distributed.count()}, the number of processes"
        )


def blur(tokens: Tensor, amount: float, step: int, seed: int) -> Tensor:
    """Pseudo-words B x L x D with Gaussian noise, about `amount` times as long as each of them.

    After the noise on word vectors of LinCIR (Gu et al., CVPR 2024): a sentence that is read the
    same from nearby should also be read when a modifier follows it.
    """
    if amount == 0:
        return tokens
    # of the whole batch: the same, however many processes share it
    whole = (len(tokens) * distributed.count(), *tokens.shape[1:])
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    noise = distributed.part(torch.randn(whole, generator=generator)).to(tokens)
    length = amount * tokens.detach().norm(dim=-1, keepdim=True)  # B x L x 1
    return tokens + length / tokens.shape[-1] ** 0.5 * noise
