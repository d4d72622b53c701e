"""Pre-training of a small VL model on a folder of captioned images, without a download. Ours.

    python -m isa_lite pretrain_folder --images DIR --captions DIR/captions.csv --out DIR

The loops are those of `pretrain`, the batches come from `folder_batches`. The result is a folder in
open_clip's local-dir layout, for `load_vl_model` or open_clip itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm.auto import tqdm

from isa_lite.models.vl_model import VLModel, commit, load_vl_model
from isa_lite.pretraining.folder_batches import (
    CHANGES,
    LOSSES,
    PROMPT,
    FolderBatches,
    split,
    words_of,
)
from isa_lite.pretraining.towers import export, train_matcher, train_towers, write_record
from isa_lite.retrieval.own_data import fingerprint
from isa_lite.support.images import ImageFolder
from isa_lite.support.precision import with_dtype
from isa_lite.support.runs import MINUTES
from isa_lite.support.settings import FolderConfig

FEWEST = 8  # different captions, below which there is nothing to contrast


def _may_say(texts: Sequence[str], config: FolderConfig) -> list[str]:
    """Everything that a batch may say, piece by piece: the words whose vectors are trained."""
    said = [*texts, *(f"{t}," for t in texts), *(" ".join(words_of(t)) for t in texts)]
    if config.change > 0 and config.related > 0:
        said += [p.format(a="", b="", old="") for p in (*CHANGES, *LOSSES)]
    return said + [PROMPT.format("")] * (config.prompted > 0)


def pretrain_folder(
    images: ImageFolder,
    captions: Sequence[Sequence[str]],
    config: FolderConfig,
    out: str | Path,
    run: str | Path | None = None,
    log: Callable[[str], None] = tqdm.write,
    checkpoint_minutes: float = MINUTES,
) -> VLModel:
    """Both towers, then the matching encoder; written to `out` and loaded from there.

    captions: for each image of the folder its captions (`own_data.read_captions`). run: a folder of
    checkpoints, to resume from (see `runs.Keeper`). `out` is then a folder in open_clip's local-dir
    layout, with training.json beside the weights. Warns of captions too long for the text tower.
    Raises ValueError for too few different captions, and for a `run` of other settings or data.
    """
    out, run = Path(out), Path(run) if run else None
    rows, unseen = split(captions, config.held_out, config.seed)
    batches = FolderBatches(images, captions, rows, config)
    different = len({tuple(words_of(t)) or t for t in batches.texts})
    if different < FEWEST:
        raise ValueError(
            f"the {len(rows)} training images have {different} different captions, and {FEWEST} are"
            " needed: caption more of them, or take a trained model (vl_model)"
        )
    towers = run / "towers.safetensors" if run else None
    config = with_dtype(config, towers)
    config.data = fingerprint(images, captions)
    said = _may_say(batches.texts, config)
    vl, took = train_towers(config, towers, log, batches.source, said, checkpoint_minutes)
    seconds = {"towers": took}
    cut = sum(int(ids[-1]) != 0 for ids in vl.tokenize(batches.texts))
    if cut:
        fault = f"{cut} captions are longer than {config.context_length} tokens"
        warnings.warn(f"{fault}; the model has read their beginnings", stacklevel=2)
    if config.matching_steps:
        matching = run / "matching_encoder.safetensors" if run else None
        how = log, batches.source, checkpoint_minutes
        vl.matcher, seconds["matching encoder"] = train_matcher(vl, config, matching, *how)
    export(vl, config, out)
    data = {
        "images": len(images),
        "captioned": len(rows) + len(unseen),
        "held out": len(unseen),
        "captions": len(batches.texts),
        "captions with a relative": sum(map(bool, batches.relatives.places)),
        "captions that were cut": cut,
    }
    write_record(out, config, seconds, commit=commit(), data=data)
    return load_vl_model(str(out), device=config.device)
