"""Distillation: a light query encoder learns from the frozen VL model on unlabeled images alone.

The images are the only data here. There is no argument through which a caption or a triplet could come in.
What the large image tower says about each image does not change during training, so it is computed once and kept
on disk (`Targets`). A run can be killed at any moment and taken up again with the same result.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from isa_lite.checkpoint import resume_run, save_run
from isa_lite.images import Images, batch_loader, images_key
from isa_lite.losses import gcd_loss, hardest_other, late_interaction_loss, matching_loss
from isa_lite.parameters import check_whole
from isa_lite.query_encoder import TEMPLATE, QueryEncoder, check_template, prompt_ids, splice
from isa_lite.vl_model import VLModel, plain_attention


@dataclass
class DistillConfig:
    """Settings of one distillation run. Raises ValueError, naming the field, for a value that cannot work.

    batch_size: images a step; temperature: of GCD (and of late interaction); gcd_weight, lar_weight: of the two losses, 0
    switches one off, and with both off nothing is trained; negatives: targets of images outside the batch that each sentence
    is told apart from (fewer where there are fewer images); word_noise: see `blur`; validation: images held back to watch
    the recall; dtype: of the matrix products (autocast).
    """

    steps: int = 800
    batch_size: int = 128
    lr: float = 3e-3
    warmup: int = 50
    weight_decay: float = 0.05
    temperature: float = 0.05
    gcd_weight: float = 1.0
    lar_weight: float = 0.1
    negatives: int = 8192
    word_noise: float = 1.0
    validation: int = 500
    validate_every: int = 100
    template: str = TEMPLATE
    seed: int = 0
    device: str = "cpu"
    dtype: str = "bfloat16"
    num_workers: int = 0

    def __post_init__(self):
        check_whole(self, steps=1, batch_size=2, validation=2, validate_every=1, negatives=0, warmup=0, num_workers=0, seed=0)
        for name in ("lr", "temperature", "gcd_weight", "lar_weight", "word_noise", "weight_decay"):
            value, positive = getattr(self, name), name in ("lr", "temperature")
            if type(value) not in (int, float) or not 0 <= value < float("inf") or (positive and value == 0):
                raise ValueError(f"{name} must be a number {'above 0' if positive else 'of at least 0'}, not {value!r}")
        check_template(self.template)
        if self.dtype not in ("float32", "bfloat16"):  # float16 would underflow without loss scaling
            raise ValueError(f"dtype must be float32 or bfloat16, not {self.dtype!r}")


# ----------------------------------------------------------------------------------------------- targets


@dataclass
class Targets:
    """What the large image tower says: embeddings N x E (float32) and, for LAR, patch tokens N x P x width (float16)."""

    embeddings: np.ndarray
    patches: np.ndarray | None


def targets(images: Images, vl: VLModel, patches: bool, cache: str | Path | None = None, num_workers: int = 0) -> Targets:
    """The large tower's targets, computed once: later calls read them from `cache`.

    They are filed under a digest of the model, its preprocessing and every image, so a change of any of these is
    a new entry. The arrays are mapped from disk where there is a cache, and so need not fit into memory.
    """
    digest = hashlib.sha256(f"{vl.fingerprint} {images_key(images)} {vl.preprocess}".encode()).hexdigest()[:24]
    folder = Path(cache) / digest if cache else None
    wanted = ["embeddings"] + (["patches"] if patches else [])
    if folder and all((folder / f"{name}.npy").is_file() for name in wanted):
        return Targets(
            *(
                np.load(folder / f"{n}.npy", mmap_mode="r", allow_pickle=False) if n in wanted else None
                for n in ("embeddings", "patches")
            )
        )
    batches = np.array_split(np.arange(len(images)), max(1, -(-len(images) // 128)))
    out: dict[str, np.ndarray] = {}
    with torch.inference_mode():
        for rows, pixels in zip(
            tqdm(batches, desc="targets of the large tower", mininterval=1),
            batch_loader(images, batches, vl.pixels, num_workers),
            strict=True,
        ):
            pixels = pixels.to(vl.device)
            values = vl.encode_pixels_and_patches(pixels) if patches else (vl.encode_pixels(pixels),)
            for name, value, kind in zip(wanted, values, (np.float32, np.float16), strict=False):
                if name not in out:
                    out[name] = _array(folder, name, (len(images), *value.shape[1:]), kind)
                out[name][rows] = value.cpu().numpy()
    if folder:
        for name in wanted:
            out[name].flush()
            (folder / f"{name}.part.npy").rename(folder / f"{name}.npy")
    return Targets(out["embeddings"], out.get("patches"))


def _array(folder: Path | None, name: str, shape: tuple[int, ...], kind: type) -> np.ndarray:
    if folder is None:
        return np.empty(shape, kind)
    folder.mkdir(parents=True, exist_ok=True)
    return np.lib.format.open_memmap(folder / f"{name}.part.npy", "w+", kind, shape)


# ---------------------------------------------------------------------------------------------- training


@dataclass
class History:
    """One entry a step: loss terms in nats, and the share of sentences that the matching encoder puts with their own
    image; and validation points: (step, Recall@1 in percent of own image among the images held back)."""

    gcd: list[float] = field(default_factory=list)
    lar: list[float] = field(default_factory=list)
    matched: list[float] = field(default_factory=list)
    recall: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """The images of one step: a new permutation every epoch, a function of the seed and the step alone."""
    batch_size = min(batch_size, count)
    per_epoch = count // batch_size
    order = np.random.default_rng((seed, 3, step // per_epoch)).permutation(count)
    place = step % per_epoch * batch_size
    return order[place : place + batch_size]


def other_indices(count: int, batch: np.ndarray, negatives: int, step: int, seed: int) -> np.ndarray:
    """Up to `negatives` of `count` images that are not in `batch`: all there are, or drawn from the seed and the step."""
    others = np.setdiff1d(np.arange(count), batch, assume_unique=True)
    if len(others) <= negatives:
        return others
    return np.sort(np.random.default_rng((seed, 10, step)).choice(others, negatives, replace=False))


def blur(tokens: Tensor, amount: float, step: int, seed: int) -> Tensor:
    """Pseudo-words B x L x D with Gaussian noise, about `amount` times as long as each of them; drawn from the seed and the step.

    Ours, after the noise on word vectors of LinCIR (Gu et al., CVPR 2024): a sentence that is read the same from nearby
    should also be read when a modifier follows it.
    """
    if amount == 0:
        return tokens
    noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + step)).to(tokens)
    return tokens + amount * tokens.detach().norm(dim=-1, keepdim=True) / tokens.shape[-1] ** 0.5 * noise


def learning_rate(step: int, config: DistillConfig) -> float:
    """Linear warm-up, then a cosine to a hundredth."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    return config.lr * warm * (0.505 + 0.495 * float(np.cos(np.pi * step / config.steps)))


def sentence_embeddings(vl: VLModel, tokens: Tensor, template: str) -> tuple[Tensor, Tensor, Tensor]:
    """Sentences B x L x D without a modifier -> embeddings B x E, what LAR reads B x T x width, places B x T.

    LAR reads contextual tokens, except where the VL model's matching encoder wants the word vectors (BLIP's).
    """
    ids, places = prompt_ids(vl, tokens.shape[1], [""], template)
    ids, places = ids.expand(len(tokens), -1), places.expand(len(tokens), -1)
    vectors = splice(vl, tokens, ids, places)
    context = vl.text_tokens(vectors, ids)
    return vl.pool(context, ids), vectors if vl.matcher_reads_words else context[:, : ids.shape[1]], places


def _lar(
    vl: VLModel, context: Tensor, places: Tensor, patches: Tensor, other: Tensor, temperature: float
) -> tuple[Tensor, float]:
    """The LAR that the VL model allows: its matching encoder, or late interaction."""
    if vl.matcher is not None:
        mask = torch.ones_like(places)  # without a modifier every position is a word of the prompt
        loss, matched = matching_loss(vl.matcher, context, mask, patches, other)
        return loss, float(matched)
    count = int(places[0].sum())
    words = vl.project_tokens(context[places].unflatten(0, (-1, count)))
    return late_interaction_loss(words, vl.project_patches(patches), temperature), float("nan")


def distill(
    images: Images,
    vl: VLModel,
    encoder: QueryEncoder,
    config: DistillConfig,
    cache: str | Path | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    progress: bool = True,
) -> History:
    """Train `encoder` in place, on `images` alone, against the frozen `vl`.

    images: uint8 N x H x W x 3, an `ImageFolder`, or a sequence of PIL images. cache: folder of the targets.
    checkpoint: a file of this run's state; if it exists, the run goes on from there (ValueError if it belongs to
    other settings or images). Returns the history of losses and validation recall.
    """
    if len(images) < config.validation + 2:
        raise ValueError(
            f"{len(images)} images are too few to hold back {config.validation} for validation; give more, or lower validation"
        )
    if config.lar_weight > 0:
        vl.check_lar()
    device, began = torch.device(config.device), time.perf_counter()
    vl.to(device), encoder.to(device, memory_format=torch.channels_last)
    known = targets(images, vl, config.lar_weight > 0, cache, config.num_workers)
    shuffled = np.random.default_rng((config.seed, 4)).permutation(len(images))
    held_back, train = np.sort(shuffled[: config.validation]), np.sort(shuffled[config.validation :])

    weights = [p for p in encoder.parameters() if p.ndim > 1]
    vectors = [p for p in encoder.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98))

    history, start = History(), 0
    settings = {k: v for k, v in asdict(config).items() if k not in ("device", "num_workers")}
    identity = {"config": settings, "encoder": asdict(encoder.config), "images": images_key(images), "vl_model": vl.fingerprint}
    checkpoint = Path(checkpoint) if checkpoint else None
    if checkpoint and (info := resume_run(checkpoint, {"encoder": encoder}, optimizer, identity)):
        start, history = info["step"], History(**info["history"])
        history.recall = [tuple(point) for point in history.recall]
    began -= history.seconds

    def save(step: int) -> None:
        history.seconds = time.perf_counter() - began
        save_run(checkpoint, {"encoder": encoder}, optimizer, {"identity": identity, "step": step, "history": asdict(history)})

    half, mixed = getattr(torch, config.dtype), config.dtype != "float32"
    steps = config.steps if config.gcd_weight or config.lar_weight else 0  # without a loss the encoder stays untrained
    batches = [batch_indices(len(train), config.batch_size, step, config.seed) for step in range(start, steps)]  # of `train`
    chosen = [train[batch] for batch in batches]
    bank = torch.from_numpy(known.embeddings[train]).to(device)  # N x E: what every sentence is told apart from
    loader = batch_loader(images, chosen, encoder.pixels, config.num_workers)
    bar = tqdm(
        zip(batches, chosen, loader, strict=True),
        total=steps,
        initial=start,
        desc="distillation",
        mininterval=2,
        disable=not progress,
    )
    for step, (batch, rows, pixels) in enumerate(bar, start):
        encoder.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        own = bank[torch.from_numpy(batch)]  # B x E
        others = bank[torch.from_numpy(other_indices(len(train), batch, config.negatives, step, config.seed))]  # M x E
        pixels = pixels.to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, half, enabled=mixed and device.type != "cpu"):
            features = encoder.backbone(pixels)[0]  # B x C x h x w; a CPU is slow at depthwise convolutions in bfloat16
        with plain_attention(device), torch.autocast(device.type, half, enabled=mixed):
            tokens, _ = encoder.mapping(features)  # B x L x D
            tokens = blur(tokens, config.word_noise, step, config.seed)
            query, context, places = sentence_embeddings(vl, tokens, config.template)  # B x E, B x T x width
            gcd = gcd_loss(query, own, config.temperature, others)
            loss = config.gcd_weight * gcd
            if config.lar_weight > 0:
                patches = torch.from_numpy(known.patches[rows]).to(device, torch.float32)  # B x P x width
                lar, matched = _lar(vl, context, places, patches, hardest_other(query @ own.T), config.temperature)
                loss = loss + config.lar_weight * lar
                history.lar.append(lar.item()), history.matched.append(matched)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        history.gcd.append(gcd.item())
        if (step + 1) % config.validate_every == 0 or step + 1 == config.steps:
            history.recall.append((step + 1, own_image_recall(images, held_back, known.embeddings, vl, encoder, config)))
            bar.set_postfix({"GCD": f"{np.mean(history.gcd[-50:]):.2f}", "validation R@1": f"{history.recall[-1][1]:.0f}%"})
        if checkpoint and ((step + 1) % checkpoint_every == 0 or step + 1 == config.steps):
            save(step + 1)
    if not steps:
        history.recall = [(0, own_image_recall(images, held_back, known.embeddings, vl, encoder, config))]
    history.seconds = time.perf_counter() - began
    encoder.eval()
    return history


def own_image_recall(
    images: Images, rows: np.ndarray, known: np.ndarray, vl: VLModel, encoder: QueryEncoder, config: DistillConfig
) -> float:
    """Recall@1 in percent: does the sentence of a held-back image find that image among all held-back ones?"""
    picked = images[rows] if isinstance(images, np.ndarray) else [images[int(i)] for i in rows]
    with torch.inference_mode():
        tokens = encoder.sentences(picked).tokens.to(vl.device)
        found = torch.cat([sentence_embeddings(vl, part, config.template)[0] for part in tokens.split(256)])
    best = (found.cpu() @ torch.from_numpy(np.array(known[rows])).T).argmax(1)
    return 100 * float((best == torch.arange(len(rows))).float().mean())
