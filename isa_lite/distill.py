"""Distillation: a light query encoder learns from the frozen VL model on unlabeled images alone.

The images are the only data here. There is no argument through which a caption or a triplet could
come in. What the large image tower says about each image does not change during training, so it is
computed once and kept on disk (`targets`). A run can be killed at any moment and taken up again
with the same result. `torchrun` starts one run on several GPUs or processes (`distributed`), which
share every batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from isa_lite.losses import gcd_loss, hardest_other, late_interaction_loss, matching_loss
from isa_lite.models.backbones import stem
from isa_lite.models.vl_model import VLModel
from isa_lite.prompt import read_sentences, sentence_queries
from isa_lite.query_encoder import QueryEncoder
from isa_lite.support import distributed
from isa_lite.support.checkpoint import damaged, misfit
from isa_lite.support.images import Images, batch_loader, check_images, images_key
from isa_lite.support.parameters import checked, number, optional, path_name
from isa_lite.support.precision import mixed, with_dtype
from isa_lite.support.runs import MINUTES, Keeper
from isa_lite.support.settings import DistillConfig
from isa_lite.support.training import fit
from isa_lite.targets import targets


@dataclass
class History:
    """One entry a step: loss terms in nats, and the share of sentences that the matching encoder
    puts with their own image (none where LAR is late interaction); validation points: (step,
    Recall@1 in percent of own image among those held back).
    recipe, dtype: of the run's settings."""

    gcd: list[float] = field(default_factory=list)
    lar: list[float] = field(default_factory=list)
    matched: list[float] = field(default_factory=list)
    recall: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    recipe: str = ""
    dtype: str = ""


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """The images of one step: a new permutation every epoch, a function of the seed and the step
    alone.
    """
    batch_size = min(batch_size, count)
    per_epoch = count // batch_size
    place = step % per_epoch * batch_size
    return _order(count, step // per_epoch, seed)[place : place + batch_size].copy()


@lru_cache(maxsize=2)  # two epochs, since workers are ahead of the training
def _order(count: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng((seed, 3, epoch)).permutation(count)


class Batches(Sequence):
    """This process's images of every step from `start` to `stop`, drawn when they are asked for: b
    of `rows` each.

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
        self.rows, self.batch_size, self.seed, self.steps = (
            rows,
            batch_size,
            seed,
            range(start, stop),
        )
        self.in_order = in_order
        self.place = distributed.rank(), distributed.count()  # a worker process would not know them

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, i: int) -> np.ndarray:
        chosen = self.rows[batch_indices(len(self.rows), self.batch_size, self.steps[i], self.seed)]
        return distributed.part(np.sort(chosen) if self.in_order else chosen, *self.place)


def other_indices(
    count: int, batch: np.ndarray, negatives: int, step: int, seed: int
) -> np.ndarray:
    """Up to `negatives` of `count` images that are not in `batch`: all there are, or drawn from the
    seed and the step.
    """
    others = np.setdiff1d(np.arange(count), batch, assume_unique=True)
    if len(others) <= negatives:
        return others
    return np.sort(np.random.default_rng((seed, 10, step)).choice(others, negatives, replace=False))


def blur(tokens: Tensor, amount: float, step: int, seed: int) -> Tensor:
    """Pseudo-words B x L x D with Gaussian noise, about `amount` times as long as each of them;
    drawn from the seed and the step.

    Ours, after the noise on word vectors of LinCIR (Gu et al., CVPR 2024): a sentence that is read
    the same from nearby should also be read when a modifier follows it.
    """
    if amount == 0:
        return tokens
    whole = (
        len(tokens) * distributed.count(),
        *tokens.shape[1:],
    )  # of the whole batch: the same, however many processes share it
    noise = distributed.part(
        torch.randn(whole, generator=torch.Generator().manual_seed(seed * 1_000_003 + step))
    ).to(tokens)
    return (
        tokens
        + amount * tokens.detach().norm(dim=-1, keepdim=True) / tokens.shape[-1] ** 0.5 * noise
    )


def learning_rate(step: int, config: DistillConfig) -> float:
    """Linear warm-up, then a cosine to a hundredth."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    return config.lr * warm * (0.505 + 0.495 * float(np.cos(np.pi * step / config.steps)))


def local_count(images: int, config: DistillConfig) -> int:
    """How many of the images of a step LAR is computed on; two at least, as it needs something to
    compare with.
    """
    return min(images, max(2, round(config.lar_share * images))) if config.lar_weight > 0 else 0


def frozen_stem(encoder: QueryEncoder, config: DistillConfig) -> list[nn.Module]:
    """The layers of the backbone that this run does not train; without gradients, they also keep
    their running means.

    A stem that starts from learned weights has little left to learn, and its maps are the largest.
    Common practice in detection.
    """
    learned = encoder.config.pretrained or encoder.config.backbone_weights
    layers = stem(encoder.backbone)
    frozen = layers if config.freeze_stem and learned else []
    for layer in layers:
        layer.requires_grad_(not frozen)
    return frozen


def train_mode(encoder: QueryEncoder, frozen: Sequence[nn.Module]) -> None:
    """`encoder.train()`, except for what is frozen."""
    encoder.train()
    for layer in frozen:
        layer.eval()


def lar_loss(
    vl: VLModel,
    context: Tensor,
    places: Tensor,
    patches: Callable[[np.ndarray], Tensor],
    rows: np.ndarray,
    hardest: np.ndarray,
    temperature: float,
) -> tuple[Tensor, float, list[float]]:
    """The LAR that the VL model allows, its matching encoder or late interaction: loss, its value,
    share of matched images.

    The share is a list of one number, or of none with late interaction, which judges no single
    image.

    patches: of images, by their indices; rows: the images of this process; hardest: the hardest
    other of each, which may be another process's. Of several processes each gets its share of the
    loss, so that their gradients add up.
    """
    if vl.matcher is None:
        count = int(places[0].sum())
        words = vl.project_tokens(context[places].unflatten(0, (-1, count)))
        loss = late_interaction_loss(
            distributed.gather(words),
            distributed.gather(vl.project_patches(patches(rows))),
            temperature,
        )
        return loss, loss.item(), []
    shown = np.concatenate([rows, np.setdiff1d(hardest, rows)])
    place = {image: i for i, image in enumerate(shown)}
    other = torch.tensor([place[image] for image in hardest], device=context.device)
    mask = torch.ones_like(places)  # without a modifier every position is a word of the prompt
    loss, matched = matching_loss(vl.matcher, context, mask, patches(shown), other)
    value, share = (
        distributed.total(term / distributed.count()).item() for term in (loss, matched)
    )
    return loss / distributed.count(), value, [share]


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
) -> History:
    """Train `encoder` in place, on `images` alone, against the frozen `vl`.

    images: uint8 N x H x W x 3, an `ImageFolder`, or a sequence of PIL images. cache: folder of the
    targets.
    checkpoint: a file of this run's state, written at the start, every `checkpoint_minutes`, at the
    end, and on Ctrl-C, which then is KeyboardInterrupt. If it exists, the run goes on from there
    (ValueError if it belongs to other settings or images, is damaged, or in use by another
    process). Returns the history of losses and validation recall.

    Several processes (`distributed`): each calls this with the same arguments and ends with the
    same weights; `cache` and `checkpoint` are the same files for all. Raises ValueError where they
    cannot share a batch evenly.
    """
    check_images(images)
    if len(images) < config.validation + 2:
        raise ValueError(
            f"{len(images)} images are too few to hold back {config.validation} for validation;"
            " give more, or lower validation"
        )
    if (size := min(config.batch_size, len(images) - config.validation)) % distributed.count():
        cut = (
            f", cut to the {size} images that are left to train on,"
            if size < config.batch_size
            else ""
        )
        raise ValueError(
            f"batch_size {config.batch_size}{cut} is not a multiple of {distributed.count()}, the"
            " number of processes"
        )
    if config.lar_weight > 0:
        vl.check_lar()
    with Keeper(checkpoint, checkpoint_minutes) as keeper:
        return _distill(images, vl, encoder, config, cache, keeper, progress)


def _distill(
    images: Images,
    vl: VLModel,
    encoder: QueryEncoder,
    config: DistillConfig,
    cache: str | Path | None,
    keeper: Keeper,
    progress: bool,
) -> History:
    """`distill`, whose arguments have been checked."""
    device, began = torch.device(config.device), time.perf_counter()
    config = with_dtype(config, keeper.path)
    vl.to(device), encoder.to(device, memory_format=torch.channels_last)
    known = targets(images, vl, config.lar_weight > 0, cache, config.num_workers)
    shuffled = np.random.default_rng((config.seed, 4)).permutation(len(images))
    held_back, train = (
        np.sort(shuffled[: config.validation]),
        np.sort(shuffled[config.validation :]),
    )

    frozen = frozen_stem(encoder, config)
    trained = [p for p in encoder.parameters() if p.requires_grad]
    weights, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    groups = [
        {"params": weights, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    # a GPU gains little
    optimizer = torch.optim.AdamW(
        groups, lr=config.lr, betas=(0.9, 0.98), fused=device.type == "cpu"
    )

    history = History(recipe=config.recipe, dtype=config.dtype)
    settings = {k: v for k, v in asdict(config).items() if k not in ("device", "num_workers")}
    identity = {
        "config": settings,
        "encoder": asdict(encoder.config),
        "images": images_key(images),
        "vl_model": vl.fingerprint,
    }
    # without a loss the encoder stays untrained
    steps = config.steps if config.gcd_weight or config.lar_weight else 0
    # N x E: what every sentence is told apart from
    bank = torch.from_numpy(known.embeddings[train]).to(device)

    def patches(rows: np.ndarray) -> Tensor:
        return torch.from_numpy(known.patches[rows]).to(device, torch.float32)  # n x P x width

    def batches(start: int) -> Iterable:
        chosen = Batches(train, config.batch_size, config.seed, start, steps)
        return zip(
            chosen, batch_loader(images, chosen, encoder.pixels, config.num_workers), strict=True
        )

    def loss_of(of_process: tuple[np.ndarray, Tensor], step: int) -> Tensor:
        rows, pixels = of_process  # b of B images, or all of them where there is one process
        batch = batch_indices(len(train), config.batch_size, step, config.seed)  # B, of `train`
        train_mode(encoder, frozen)
        own = bank[torch.from_numpy(batch)]  # B x E
        # M x E
        others = bank[
            torch.from_numpy(other_indices(len(train), batch, config.negatives, step, config.seed))
        ]
        local = local_count(len(rows), config)  # n
        with mixed(device, "float32" if device.type == "cpu" else config.dtype):
            # B x C x h x w; a CPU is slow at depthwise convolutions in bfloat16
            features = encoder.backbone(pixels.to(device, memory_format=torch.channels_last))[0]
        with mixed(device, config.dtype):
            tokens = encoder.mapping(features).tokens  # b x L x D
            tokens = blur(tokens, config.word_noise, step, config.seed)
            # b x E, n x T x width, n x T
            query, context, places = read_sentences(vl, tokens, config.template, local)
            query = distributed.gather(query)  # B x E
            gcd = gcd_loss(query, own, config.temperature, others)
            history.gcd.append(gcd.item())
            loss = config.gcd_weight * gcd
            if config.lar_weight > 0:
                hardest = distributed.part(
                    train[batch][hardest_other(query @ own.T).cpu().numpy()]
                )[:local]
                lar, value, matched = lar_loss(
                    vl, context, places, patches, rows[:local], hardest, config.temperature
                )
                loss = loss + config.lar_weight * lar
                history.lar.append(value)
                history.matched += matched
        return loss

    def look(done: int) -> None:
        history.recall.append(
            (done, own_image_recall(images, held_back, known.embeddings, vl, encoder, config))
        )

    def after(done: int, bar: tqdm) -> None:
        distributed.average(
            buffer for name, buffer in encoder.named_buffers() if "running_" in name
        )
        if done % config.validate_every == 0 or done == config.steps:
            look(done)
            bar.set_postfix(
                {
                    "GCD": f"{np.mean(history.gcd[-50:]):.2f}",
                    "validation R@1": f"{history.recall[-1][1]:.0f}%",
                }
            )

    def state(seconds: float) -> dict:
        return {"history": asdict(history) | {"seconds": seconds}}

    def restore(info: dict) -> None:
        vars(history).update(
            vars(_history(keeper.path, info)), recipe=config.recipe, dtype=config.dtype
        )

    history.seconds = fit(
        "distillation",
        steps,
        loss_of,
        batches,
        {"encoder": encoder},
        optimizer,
        partial(learning_rate, config=config),
        keeper,
        identity,
        state,
        restore,
        after,
        clip=1.0,
        spent=time.perf_counter() - began,
        progress=progress,
    )
    if not steps:
        look(0)
    encoder.eval()
    return history


#: What a state says of the run so far (`checkpoint.misfit`).
_HISTORY = dict.fromkeys(("gcd", "lar", "matched"), [float])
_HISTORY |= {"recall": [(int, float)], "seconds": float}


def _history(path: Path, info: dict) -> History:
    """The history in the state of a run. Raises ValueError, naming the file, for a damaged one."""
    found = info.get("history")
    if fault := misfit(found, _HISTORY, "its history"):
        raise damaged(path, fault)
    if len(found["gcd"]) != info["step"] or set(found) != {f.name for f in fields(History)}:
        raise damaged(path, "its history is not that of its steps")
    return History(**found | {"recall": [tuple(point) for point in found["recall"]]})


def own_image_recall(
    images: Images,
    rows: np.ndarray,
    known: np.ndarray,
    vl: VLModel,
    encoder: QueryEncoder,
    config: DistillConfig,
) -> float:
    """Recall@1 in percent: does the sentence of a held-back image find that image among all
    held-back ones?
    """
    chunks = [rows[s : s + 128] for s in range(0, len(rows), 128)]
    was_training = encoder.training
    encoder.eval()
    with torch.inference_mode():
        # pictures of any size come and go
        loader = batch_loader(images, chunks, encoder.pixels, config.num_workers)
        tokens = torch.cat([encoder(pixels).tokens for pixels in loader]).to(vl.device)
        found = torch.cat(
            [sentence_queries(vl, part, config.template) for part in tokens.split(256)]
        )
    encoder.train(was_training)
    best = (found.cpu() @ torch.from_numpy(np.array(known[rows])).T).argmax(1)
    return 100 * float((best == torch.arange(len(rows))).float().mean())
