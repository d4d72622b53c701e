"""Pre-training of the small VL model that we ship: `python -m isa_lite pretrain`.

A CLIP of open_clip is trained on rendered scenes with their captions, then a matching encoder on
top of its frozen towers. Two things make a small model good enough to compose (both ours):

- *Families.* Random negatives teach little once colours and shapes are known, and nothing about
  places: two random scenes hardly ever differ in a place alone. So a batch holds families of five
  scenes: a scene, three edits of it, of which at least one only moves an object, and one in which
  words trade places. Each is the others' hard negative.
- *The language of change.* An edited scene also gets the caption "<the scene before>, <the edit>".
  It describes the one image it belongs to, as web captions of the kind "my house, now with a red
  door" do. Without it, a text tower has no reason to understand an instruction.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from isa_lite.models.matching_encoder import MatchingEncoder
from isa_lite.models.vl_model import VLModel, commit, machine
from isa_lite.support.checkpoint import write_tensors, write_text
from isa_lite.support.parameters import command_line
from isa_lite.support.precision import mixed, with_dtype
from isa_lite.support.runs import MINUTES, Keeper
from isa_lite.support.settings import PretrainConfig
from isa_lite.support.training import fit
from isa_lite.world import load_world
from isa_lite.world.scenes import pick

POSITION_STD = 0.5
REMOVED = 0.2  # of the edits of scenes with several objects
#: What training.json says of the shipped model, and its shape (`checkpoint.misfit`).
TRAINED_BY = "what pretrain says of its model"
_SIZES = ("image_size", "embed_dim", "text_width", "text_layers", "steps", "matching_steps")
_SIZES += ("families", "singles", "seed")
TRAINING = dict.fromkeys(("command", "commit", "machine", "date"), str) | {
    "minutes": dict.fromkeys(("towers", "matching encoder"), float),
    "versions": dict.fromkeys(("torch", "open_clip", "numpy"), str),
    "config": dict.fromkeys(_SIZES, int),
}
PREPROCESS_CFG = {"mean": [0.5] * 3, "std": [0.5] * 3}
PREPROCESS_CFG |= {"interpolation": "bicubic", "resize_mode": "shortest"}


# -------------------------------------------------------------------------------------------------
# data


def _kinds(scene: Any, rng: np.random.Generator) -> tuple[str, ...] | None:
    """Kinds of the next edit, None for chance; removing, which is hard, comes more often."""
    return ("remove",) if len(scene.objects) > 1 and rng.random() < REMOVED else None


class SceneBatches(Dataset):
    """Batch number `i`: uint8 images B x S x S x 3, captions, and the image of each caption.

    Never a held-out pair. Batch `start + i` depends on the seed, the purpose (1 towers, 3 matching
    encoder, 9 measuring) and its number alone, so a run can resume.
    """

    def __init__(self, config: PretrainConfig, purpose: int, start: int = 0, stop: int = 0):
        self.config, self.purpose, self.start, self.stop = config, purpose, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, i: int) -> tuple[np.ndarray, list[str], list[int]]:
        c, scenes = self.config, load_world(self.config.world)
        rng = np.random.default_rng((c.seed, self.purpose, self.start + i))
        images, texts, owner = [], [], []
        for _ in range(c.families):
            base = scenes.sample_scene(rng)
            family = {base: None}
            while len(family) < 4:
                kinds = _kinds(base, rng) if len(family) > 1 else ("move",)
                edited, change = scenes.modify(base, rng, kinds)
                family.setdefault(edited, change)
            family.setdefault(scenes.confuse(pick(rng, list(family)), rng), None)
            for scene, change in family.items():
                texts.append(scenes.caption(scene, rng))
                owner.append(len(images))
                if change is not None and (c.change == 1 or rng.random() < c.change):
                    joiner = pick(rng, (", ", ", ", " ", ", but ", ". "))
                    texts.append(scenes.caption(base, rng) + joiner + change.text)
                    owner.append(len(images))
                images.append(scene)
        for _ in range(c.singles):
            scene = scenes.sample_scene(rng)
            texts.append(scenes.caption(scene, rng, full=rng.random() >= c.partial))
            owner.append(len(images))
            images.append(scene)
        jitter = rng.integers(2**31, size=len(images))
        return scenes.render_many(images, jitter, c.image_size), texts, owner


def scene_texts(seed: int, world: str = "shapes") -> list[str]:
    """Captions and edits of 4000 scenes: every word that `SceneBatches` may say."""
    scenes = load_world(world)
    rng = np.random.default_rng((seed, 2))
    texts = []
    for _ in range(4000):
        scene = scenes.sample_scene(rng)
        texts += [scenes.caption(scene, rng), scenes.caption(scene, rng, False)]
        texts.append(scenes.modify(scene, rng)[1].text + ", but .")
    return texts


#: Where batches come from: purpose, start and stop give a dataset like `SceneBatches`.
Source = Callable[[int, int, int], Dataset]


# ---------------------------------------------------------------------------------------------
# training


class _WordTable(torch.nn.Module):
    """The rows of the word-embedding table that `texts` use, trained apart from the 49,408 others.

    Words that never occur keep the zero vector: the model says nothing about what it has not seen,
    and the file of weights compresses well.
    """

    def __init__(self, vl: VLModel, texts: Sequence[str]):
        super().__init__()
        table = vl.tower.table.weight
        parts = [vl.tokenizer(texts[i : i + 500]).unique() for i in range(0, len(texts), 500)]
        used = torch.unique(torch.cat(parts))
        self.row = torch.zeros(table.shape[0], dtype=torch.long)
        self.row[used] = torch.arange(len(used))
        self.used, self.rows = used, torch.nn.Parameter(table[used].clone())

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows[self.row[ids]]

    def store(self, vl: VLModel) -> None:
        with torch.no_grad():
            vl.tower.table.weight.zero_()[self.used] = self.rows.detach()


def _encode_captions(vl: VLModel, table: _WordTable, texts: list[str], chunks: int = 4) -> Tensor:
    """Captions -> embeddings, in chunks of similar length, each cut at its own longest caption."""
    ids = vl.tokenize(texts)
    order = ids.argmax(1).argsort()
    rows = [vl.cut(ids[part]) for part in order.chunk(chunks)]
    return torch.cat([vl.encode_vectors(table(row), row) for row in rows])[order.argsort()]


def contrastive_loss(images: Tensor, texts: Tensor, owner: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE both ways: images B x E, captions M x E, caption m belongs to image owner[m].

    Image to text: each caption in turn is the positive, without the image's other caption.
    """
    logits = scale * texts @ images.T  # M x B
    text_to_image = F.cross_entropy(logits, owner)
    same = owner[:, None] == owner[None]  # M x M: captions of one image
    other = same & ~torch.eye(len(owner), dtype=torch.bool, device=owner.device)
    own = torch.arange(len(owner), device=owner.device)
    image_to_text = F.cross_entropy(logits.T[owner].masked_fill(other, float("-inf")), own)
    return (text_to_image + image_to_text) / 2


def _lr(step: int, steps: int, config: PretrainConfig) -> float:
    rise = float(config.lr) * min(1.0, (step + 1) / config.warmup)
    return rise * (0.5 + 0.5 * float(np.cos(np.pi * step / steps))) + 1e-6


def _optimizer(
    modules: dict[str, torch.nn.Module], config: PretrainConfig
) -> torch.optim.Optimizer:
    """AdamW, with weight decay on matrices but not on vectors, embeddings or position codes."""
    named = [(n, p) for m in modules.values() for n, p in m.named_parameters() if p.requires_grad]
    apart = ("rows", "patch_position")
    decayed = [p for n, p in named if p.ndim > 1 and "embedding" not in n and n not in apart]
    kept = {id(p) for p in decayed}
    others = [p for _, p in named if id(p) not in kept]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}]
    groups.append({"params": others, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98))


def fresh_model(config: PretrainConfig) -> VLModel:
    """The VL model before training, from the seed."""
    torch.manual_seed(config.seed)
    clip = open_clip.CLIP(**config.model_cfg()).to(config.device, memory_format=torch.channels_last)
    # The position code of the attention pool starts as large as the features it is added to. With
    # open_clip's start, less than a tenth of that, training left it as it was: the tower then knew
    # what an image shows, and hardly where.
    torch.nn.init.normal_(clip.visual.attnpool.positional_embedding, std=POSITION_STD)
    clip.visual.image_mean = clip.visual.image_std = tuple(PREPROCESS_CFG["mean"])
    tokenizer = SimpleTokenizer(context_length=config.context_length)
    return VLModel(clip, None, tokenizer, name="in training")


def _train(
    name: str,
    modules: dict[str, torch.nn.Module],
    loss_of: Callable[[tuple], tuple[Tensor, Tensor]],
    source: Callable[[int, int], Dataset],
    steps: int,
    config: PretrainConfig,
    checkpoint: Path | None,
    log: Callable[[str], None],
    checkpoint_minutes: float,
) -> float:
    """The loop of both trainings: `loss_of` a batch gives the loss and the share of right answers.
    Returns the seconds it took.

    Progress is saved in `checkpoint` and resumed. Raises ValueError for other settings.
    """
    settings, aside = asdict(config), ("device", "num_workers", "matching_steps")
    settings = {k: v for k, v in settings.items() if k not in aside} | {"steps": steps}
    found: list[tuple[Tensor, Tensor]] = []  # of the step: loss, and share of right answers

    def loss_alone(batch: tuple, step: int) -> Tensor:
        found[:] = [loss_of(batch)]
        return found[0][0]

    def after(done: int, bar: tqdm) -> None:
        if done % 100 == 0:
            loss, right = found[0]
            log(f"{name}, step {done}: loss {loss.item():.3f}, right {100 * right:.0f}%")

    def batches(start: int) -> DataLoader:
        workers = config.num_workers
        ahead = {"num_workers": workers, "prefetch_factor": 4 if workers else None}
        return DataLoader(source(start, steps), batch_size=None, **ahead)

    with Keeper(checkpoint, checkpoint_minutes) as keeper:
        how = {"rate": lambda step: _lr(step, steps, config), "after": after, "clip": 1.0}
        how |= {"keeper": keeper, "identity": settings}
        return fit(name, steps, loss_alone, batches, modules, _optimizer(modules, config), **how)


def train_towers(
    config: PretrainConfig,
    checkpoint: Path | None = None,
    log: Callable[[str], None] = tqdm.write,
    source: Source | None = None,
    texts: Sequence[str] | None = None,
    checkpoint_minutes: float = MINUTES,
) -> tuple[VLModel, float]:
    """Contrastive pre-training of both towers, resumed from `checkpoint`; also its seconds.

    source: batches of other images than scenes; texts: then all that their captions may say.
    """
    source = source or partial(SceneBatches, config)
    texts = scene_texts(config.seed, config.world) if texts is None else texts
    config = with_dtype(config, checkpoint)
    vl = fresh_model(config)
    vl.clip.train().requires_grad_(True)
    # its rows are trained as a table of their own
    vl.clip.token_embedding.weight.requires_grad_(False)
    modules = {"vl": vl, "table": _WordTable(vl, texts).to(config.device)}
    scale = vl.clip.logit_scale

    def loss_of(batch: tuple) -> tuple[Tensor, Tensor]:
        images, texts, owner = batch
        owner = torch.as_tensor(owner, device=config.device)
        pixels = vl.pixels(np.asarray(images)).to(config.device, memory_format=torch.channels_last)
        with torch.no_grad():
            scale.clamp_(0, float(np.log(100)))
        with mixed(config.device, config.dtype):
            image = vl.encode_pixels(pixels)  # B x E
            text = _encode_captions(vl, modules["table"], texts)  # M x E
        # captions nearest to their own image
        right = ((text @ image.T).argmax(1) == owner).float().mean()
        return contrastive_loss(image, text, owner, scale.exp()), right

    run = config, checkpoint, log, checkpoint_minutes
    seconds = _train("towers", modules, loss_of, partial(source, 1), config.steps, *run)
    modules["table"].store(vl)
    return vl.eval().requires_grad_(False), seconds


@torch.no_grad()
def matching_inputs(
    vl: VLModel, images: np.ndarray, texts: list[str], owner: list[int]
) -> tuple[Tensor, ...]:
    """One caption an image (the last one: of change, where there is one) through the frozen towers.

    Returns contextual tokens B x T x width, mask B x T, patches B x N x width, similarity B x B.
    """
    last = {image: text for image, text in zip(owner, texts, strict=True)}
    ids = vl.cut(vl.tokenize([last[i] for i in range(len(images))]))
    image, patches = vl.encode_pixels_and_patches(vl.pixels(np.asarray(images)))
    tokens = vl.text_tokens(vl.word_vectors(ids), ids)
    mask = torch.arange(ids.shape[1], device=ids.device) <= ids.argmax(1, keepdim=True)
    return tokens, mask, patches, vl.pool(tokens, ids) @ image.T


def candidates_loss(
    matcher: MatchingEncoder, tokens: Tensor, mask: Tensor, patches: Tensor, others: Tensor
) -> tuple[Tensor, Tensor]:
    """Each caption with its own image and its K hardest others: tokens B x T x width, patches B x N
    x width, others B x K.

    Two-class cross-entropy (own image and others weigh the same), plus the cross-entropy of picking
    the own image by its log-odds of a match. Returns the loss in nats, and the share of own images
    above all others. Ours: with the first term and one other image alone, as in ALBEF, the same
    number of steps teaches much less.
    """
    batch, k = others.shape
    own = torch.arange(batch, device=others.device)
    # (1 + K) B: own images, hardest others, second hardest ...
    shown = torch.cat([own, others.T.flatten()])
    # (1 + K) B x 2
    logits = matcher(tokens.repeat(1 + k, 1, 1), mask.repeat(1 + k, 1), patches[shown]).float()
    odds = logits.diff(dim=1).view(1 + k, batch).T  # B x (1 + K)
    match = (torch.arange(len(shown), device=others.device) < batch).long()
    two_class = F.cross_entropy(logits, match, weight=logits.new_tensor([1.0, k]))
    right = (odds.argmax(1) == 0).float().mean()
    return two_class + F.cross_entropy(odds, torch.zeros_like(own)), right


def train_matcher(
    vl: VLModel,
    config: PretrainConfig,
    checkpoint: Path | None = None,
    log: Callable[[str], None] = tqdm.write,
    source: Source | None = None,
    checkpoint_minutes: float = MINUTES,
) -> tuple[MatchingEncoder, float]:
    """The matching encoder, own image against the three hardest others; also its seconds."""
    source = source or partial(SceneBatches, config)
    config = with_dtype(config, checkpoint)
    torch.manual_seed(config.seed)
    with mixed(config.device, config.dtype):
        tokens, _, patches, _ = matching_inputs(vl, *source(3, 0, 1)[0])
    matcher = MatchingEncoder(tokens.shape[-1], patches.shape[-1], patches.shape[1])
    matcher.to(config.device)

    def loss_of(batch: tuple) -> tuple[Tensor, Tensor]:
        with mixed(config.device, config.dtype):
            tokens, mask, patches, similarity = matching_inputs(vl, *batch)
            # B x 3
            others = similarity.float().fill_diagonal_(float("-inf")).topk(3, dim=1).indices
            return candidates_loss(matcher, tokens, mask, patches, others)

    run = config, checkpoint, log, checkpoint_minutes
    modules, own = {"matcher": matcher}, partial(source, 3)
    seconds = _train("matching encoder", modules, loss_of, own, config.matching_steps, *run)
    return matcher.eval().requires_grad_(False), seconds


# ------------------------------------------------------------------------------------- shipping and
# card


def export(vl: VLModel, config: PretrainConfig, folder: Path) -> None:
    """Config and weights (float16) in open_clip's local-dir layout, and any matching encoder.

    The config, without which a folder is no model, goes first and comes back last: an export that
    is cut off leaves no half.
    """
    settings = folder / "open_clip_config.json"
    matching = {end: folder / f"matching_encoder.{end}" for end in ("json", "safetensors")}
    for old in (settings, *matching.values()):
        old.unlink(missing_ok=True)  # nor may a matching encoder of an earlier model stay
    half = {k: v.half() if v.is_floating_point() else v for k, v in vl.clip.state_dict().items()}
    write_tensors(folder / "open_clip_model.safetensors", half)
    if vl.matcher is not None:
        half = {k: v.half() for k, v in vl.matcher.state_dict().items()}
        write_tensors(matching["safetensors"], half)
        write_text(matching["json"], json.dumps(vl.matcher.config, indent=1) + "\n")
    model = {"model_cfg": config.model_cfg(), "preprocess_cfg": PREPROCESS_CFG}
    write_text(settings, json.dumps(model, indent=1) + "\n")


def write_record(folder: Path, config: PretrainConfig, seconds: dict[str, float], **more) -> None:
    """training.json: what a training was, and where it ran. seconds: of each part."""
    record = more | {
        "config": asdict(config),
        "minutes": {part: round(took / 60, 1) for part, took in seconds.items()},
        "machine": machine(),
        "versions": {m.__name__: m.__version__ for m in (torch, open_clip, np)},
        "date": time.strftime("%Y-%m-%d"),
    }
    write_text(folder / "training.json", json.dumps(record, indent=1) + "\n")


def pretrain(
    config: PretrainConfig, folder: Path, run: Path, checkpoint_minutes: float = MINUTES
) -> None:
    """Both trainings, with checkpoints in `run`; the model and its record go into `folder`."""
    made_by, config = commit(), with_dtype(config, run / "towers.safetensors")
    minutes = {"checkpoint_minutes": checkpoint_minutes}
    vl, towers = train_towers(config, run / "towers.safetensors", **minutes)
    matching = run / "matching_encoder.safetensors"
    vl.matcher, took = train_matcher(vl, config, matching, **minutes)
    export(vl, config, folder)
    seconds, line = {"towers": towers, "matching encoder": took}, command_line("pretrain", config)
    write_record(folder, config, seconds, command=line, commit=made_by)
