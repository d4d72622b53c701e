"""Cards of the shipped weights: what they were trained on, how, and what they can and cannot do.

`python -m isa_lite cards --out data` measures the shipped models and writes `data/*/README.md`;
every number in a card comes from this script or from the record of the training run. It also draws
`data/results/queries.png`, for the project's README.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from isa_lite.course import figures
from isa_lite.experiments.compare import TRAINED
from isa_lite.losses import hardest_other, matching_loss
from isa_lite.methods.baselines import UNTRAINED
from isa_lite.methods.isa import Isa
from isa_lite.models.backbones import RECORD
from isa_lite.models.vl_model import VLModel, load_vl_model
from isa_lite.pretraining.towers import TRAINED_BY, TRAINING, SceneBatches, matching_inputs
from isa_lite.query_encoder import QueryEncoder
from isa_lite.retrieval.metrics import KS, recall
from isa_lite.retrieval.scene_queries import group_table, make_benchmark
from isa_lite.support.checkpoint import read_json, read_tensors, write_bytes, write_text
from isa_lite.support.settings import (
    DATA,
    SCENES,
    SCENES_BACKBONE,
    SCENES_CLIP,
    SCENES_ENCODER,
    WEIGHTS,
    PretrainConfig,
)
from isa_lite.world import scenes

_MADE = {"machine": str, "commit": str}
#: What a card reads of the record of a training (`checkpoint.misfit`).
_ENCODER = {"info": TRAINED["info"] | _MADE | {"seconds": float}}
_BACKBONE = RECORD | _MADE | {"stride": int, "loss": float, "minutes": float}
_BACKBONE |= dict.fromkeys(("command", "date"), str)
_BACKBONE |= {"config": dict.fromkeys(("num_images", "seed", "steps", "batch_size"), int)}


@torch.inference_mode()
def matching_accuracy(
    vl: VLModel, batches: int = 20, families: bool = True, seed: int = 1
) -> float:
    """Percent of captions whose own image the matching encoder puts above the hardest other.

    families: with families of edits in the batch (others differ in one thing); or unrelated scenes.
    """
    sizes = {"families": 24, "singles": 32} if families else {"families": 0, "singles": 128}
    config = PretrainConfig(seed=seed, partial=0.0, **sizes)
    rates = []
    for i in range(batches):
        tokens, mask, patches, similarity = matching_inputs(vl, *SceneBatches(config, 9)[i])
        others = hardest_other(similarity)
        rates.append(float(matching_loss(vl.matcher, tokens, mask, patches, others)[1]))
    return 100 * float(np.mean(rates))


@torch.inference_mode()
def place_accuracy(vl: VLModel, count: int = 300, seed: int = 2) -> float:
    """Percent of captions nearer to their image than to one with one object elsewhere."""
    rng = np.random.default_rng((seed, 10))
    own = [scenes.sample_scene(rng) for _ in range(count)]
    moved = [scenes.modify(scene, rng, ("move",))[0] for scene in own]
    jitter = rng.integers(2**31, size=2 * count)
    images = vl.encode_images(scenes.render_many(own + moved, jitter, vl.image_size))  # 2N x E
    similarity = vl.encode_text([scenes.caption(scene, rng) for scene in own]) @ images.T  # N x 2N
    return 100 * float((similarity.diagonal() > similarity.diagonal(count)).float().mean())


def measure(
    vl: VLModel, encoder: QueryEncoder | None, seeds: Sequence[int] = (0, 1, 2)
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Mean Recall@K in percent over seeds, a row a method; Recall@1 by group of the first seed."""
    found: dict[str, list[list[float]]] = {}
    by_group = None
    for seed in seeds:
        bench = make_benchmark(seed=seed, size=vl.image_size).embedded(vl)
        methods = ({} if encoder is None else {"isa": Isa(encoder)}) | UNTRAINED
        ranks = {name: bench.ranks(method(bench)) for name, method in methods.items()}
        for name, rank in ranks.items():
            found.setdefault(name, []).append([recall(rank, k) for k in KS])
        if by_group is None:
            shown = {n: rank for n, rank in ranks.items() if n == "isa" or "ceiling" in n}
            by_group = group_table(bench, shown)
    rows = {name: np.mean(values, 0).round(1) for name, values in found.items()}
    return pd.DataFrame.from_dict(rows, "index", columns=[f"R@{k}" for k in KS]), by_group


def _markdown(table: pd.DataFrame) -> str:
    lines = ["| | " + " | ".join(table.columns) + " |", "|---" * (len(table.columns) + 1) + "|"]
    for row in table.itertuples():
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines)


def vl_card(folder: Path, vl: VLModel) -> str:
    """The card of a VL model that `isa_lite.pretraining.towers` wrote into `folder`."""
    record = read_json(folder / "training.json", TRAINED_BY, TRAINING)
    config = record["config"]
    recalls, by_group = measure(vl, None)
    towers = {"image": vl.clip.visual, "match": vl.matcher}
    millions = {n: sum(p.numel() for p in m.parameters()) / 1e6 for n, m in towers.items()}
    batch = 5 * config["families"] + config["singles"]
    took = [f"{value:g} minutes for the {name}" for name, value in record["minutes"].items()]
    minutes = " and ".join(took)
    return f"""# scenes-clip: the small vision-language model of rendered scenes

A CLIP in open_clip's format (`local-dir:`), with a matching encoder. Image tower: a ModifiedResNet with {millions["image"]:.1f} million
weights on {config["image_size"]} px; text tower: {config["text_layers"]} causal layers of width {config["text_width"]} with open_clip's own tokenizer;
joint space: {config["embed_dim"]} dimensions. Matching encoder: {millions["match"]:.2f} million weights. Stored as float16.

**What it saw.** Rendered scenes (`isa_lite/world/scenes.py`) with their captions: {config["steps"]} steps of {batch} images, each image new. An edited scene also
has the caption "<the scene before>, <the edit>": the language of change. It never saw a held-out shape-colour pair. It knows nothing
else: no photograph, no word beyond its captions' (their vectors are zero).

**How it was made.** `{record["command"]}` at commit `{record["commit"]}`, seed {config["seed"]}, {record["date"]}, {record["machine"]}; {minutes}.
{record.get("note", "")}
No GPU was used, so these are the times on a CPU. Versions: {", ".join(f"{k} {v}" for k, v in record["versions"].items())}.

## What it can do

Recall@K in percent on rendered scenes: 1000 queries, a gallery of 5000, mean over three benchmark seeds. Printed by `python -m isa_lite cards`.

{_markdown(recalls)}

By kind of change, Recall@1 in percent, first benchmark seed (the number of queries in brackets):

{_markdown(by_group)}

Matching encoder, own image above the hardest other of a batch: {matching_accuracy(vl, families=False):.1f}% among unrelated scenes,
{matching_accuracy(vl):.1f}% where the batch holds families of edits, so that the hardest other often differs in one thing.

Places: a caption is nearer to its own image than to the one in which a single object sits elsewhere in {place_accuracy(vl):.1f}% of scenes.

## Where it fails

Read the tables above: the kinds with the lowest composition ceiling are what its text tower understands least. Synonyms that the captions do not use, negation
other than "without" and "remove", numbers, and any image that is not a rendered scene are outside what it knows.

Licence: MIT, like the code.
"""


def encoder_card(folder: Path, vl: VLModel, encoder: QueryEncoder) -> str:
    """The card of a query encoder that notebook 02 saved into `folder`."""
    file, what = folder / "query_encoder.json", "a query encoder of notebook 02"
    info = read_json(file, what, _ENCODER)["info"]
    settings = info["parameters"]
    recalls, by_group = measure(vl, encoder)
    size = sum(p.numel() for p in encoder.parameters()) / 1e6
    # a row is "remove (73)", with a number of queries; a cell "46.6 [35.6, 58.9]"
    worst = by_group["isa"].str.split().str[0].astype(float).idxmin().split(" (")[0]
    return f"""# scenes-query-encoder: the light query side for scenes-clip

Image to sentence: `{encoder.config.backbone}` up to stride {encoder.config.stride}, and the adaptive token learner with {encoder.config.num_tokens} tokens;
{size:.2f} million weights.

**What it saw.** {settings["num_images"]} rendered scenes as images alone, and what `scenes-clip` says about them: no caption, no query, no held-out shape-colour pair.

**How it was made.** By `notebooks/02_distillation.ipynb` with `-p steps {settings["steps"]}`, seed {settings["seed"]}, and copied from its
`out_dir` ("Make it again" in the README); {settings["steps"]} steps of {settings["batch_size"]} images, {info["seconds"] / 60:.1f} minutes on {info["machine"]}, commit `{info["commit"]}`.

## What it can do

Recall@K in percent on rendered scenes: 1000 queries, a gallery of 5000, mean over three benchmark seeds. Printed by `python -m isa_lite cards`.

{_markdown(recalls)}

By kind of change, Recall@1 in percent, first benchmark seed:

{_markdown(by_group)}

## Where it fails

Of the kinds of change, most often at *{worst}* (see the table above). Of any image that is not a rendered scene it knows nothing.

Licence: MIT, like the code.
"""


def backbone_card(folder: Path) -> str:
    """The card of the weights that `isa_lite.pretraining.light_backbone` wrote into `folder`."""
    what = "what light_backbone says of its weights"
    record = read_json(folder / f"{WEIGHTS}.json", what, _BACKBONE)
    config = record["config"]
    size = sum(t.numel() for t in read_tensors(folder / f"{WEIGHTS}.safetensors")[0].values()) / 1e6
    return f"""# {folder.name}: what the light backbone starts from

`{record["backbone"]}` up to stride {record["stride"]}; {size:.2f} million numbers. `QueryEncoderConfig(backbone_weights="{SCENES}")` starts from them.

**What it saw.** {config["num_images"]} rendered scenes as images alone, none with a held-out shape-colour pair, and the local features that `scenes-clip`
(fingerprint `{record["vl_model"]}`) gives of them. No caption, no query, and none of the draws of images that notebook 02 trains on.

**How it was made.** `{record["command"]}` at commit `{record["commit"]}`, seed {config["seed"]}, {record["date"]}, {record["machine"]}:
{config["steps"]} steps of {config["batch_size"]} images, {record["minutes"]:g} minutes. At the end a linear layer on its map misses {100 * record["loss"]:.1f}% of the variance of the large tower's features,
on the images it was trained with.

**What it is good for.** Rendered scenes and `scenes-clip`; of photographs it knows nothing. What the start is worth: run notebook 02 with
`-p backbone_weights ''` and compare.

Licence: MIT, like the code.
"""


def example_queries(vl: VLModel, encoder: QueryEncoder, count: int = 4, answers: int = 6) -> bytes:
    """A PNG of the first `count` queries of benchmark seed 0, with their first answers."""
    bench = make_benchmark(size=vl.image_size).embedded(vl)
    found = bench.search(Isa(encoder)(bench), answers)[:count]
    return figures.png(figures.retrieval(bench, range(count), found.numpy()))


def write_cards(out: Path) -> list[Path]:
    """All cards and a picture of queries, into `out`, laid out as `data/`; returns the files."""
    vl = load_vl_model()
    encoder = QueryEncoder.load(DATA / SCENES_ENCODER, vl)
    cards = {
        SCENES_CLIP: vl_card(DATA / SCENES_CLIP, vl),
        SCENES_BACKBONE: backbone_card(DATA / SCENES_BACKBONE),
        SCENES_ENCODER: encoder_card(DATA / SCENES_ENCODER, vl, encoder),
    }
    files = {out / name / "README.md": text for name, text in cards.items()}
    for path, text in files.items():
        write_text(path, text)
    picture = out / "results" / "queries.png"
    write_bytes(picture, example_queries(vl, encoder))
    return [*files, picture]
