"""ISA against every other method, over seeds: `python -m isa_lite compare --isa runs/long/0
runs/long/1 runs/long/2`.

For each folder with a query encoder (notebook 02 with `-p steps 800` writes one into its out_dir):
the benchmark of its seed, late fusion with weights chosen on another benchmark, the one-word
recipes trained on the same unlabeled images, each as it is and with the aids of ISA's encoder, and
the ceilings. With `--symmetric`, symmetric ISA beside it: runs with `-p backbone vl` too, the large
image tower on the query side. All but ISA do not depend on the query encoder: one file a seed keeps
them, so that an interrupted comparison goes on where it was and a new query encoder is compared in
seconds. At the end all seeds are in one file, for notebook 03. `--rivals 0 1` makes only the
former.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from isa_lite.methods.baselines import UNTRAINED, composed
from isa_lite.methods.fusion import FUSIONS, calibrated, choose_weight
from isa_lite.methods.inversion import (
    Inversion,
    lincir_like,
    optimize_words,
    pic2word_like,
    searle_like,
)
from isa_lite.models.vl_model import VLModel
from isa_lite.query_encoder import QueryEncoder
from isa_lite.retrieval.evaluate import (
    KS,
    RECALLS,
    Benchmark,
    benchmark_ranks,
    benchmark_score_ranks,
    make_benchmark,
    recall,
)
from isa_lite.support.checkpoint import read_json, write_text
from isa_lite.support.settings import CompareConfig
from isa_lite.world import scenes

# what the name of a one-word recipe ends with that was given those of the shipped query encoder
AIDED = " with our aids"
#: What files hold (`checkpoint.misfit`): what notebook 02 says of its query encoder, and what
#: `kept_rivals` keeps.
TRAINED = {
    "info": {"parameters": {"seed": int, "num_images": int, "steps": int, "batch_size": int}}
}
RIVALS = {
    "seed": int,
    "params": dict,
    "methods": RECALLS | dict.fromkeys(UNTRAINED, RECALLS[str]),
    "training_seconds": {str: float},
    "weights": {str: float},
}
# and what the command writes in the end
COMPARED = {"machine": str, "commit": str, "runs": [RIVALS, ...]}
# the benchmark on which weights are chosen has the seed of the reported one plus this
CHOSEN_ON = 1000


def _recalls(ranks: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    return {name: {f"R@{k}": round(recall(rank, k), 2) for k in KS} for name, rank in ranks.items()}


def query_encoders(
    bench: Benchmark, vl: VLModel, encoders: Mapping[str, QueryEncoder]
) -> dict[str, dict[str, float]]:
    """Recall@K in percent of each trained query encoder on the benchmark, by its name."""
    gallery = vl.encode_images(bench.images)
    return _recalls(
        {
            name: benchmark_ranks(bench, composed(bench, vl, encoder), gallery)
            for name, encoder in encoders.items()
        }
    )


def rivals(vl: VLModel, seed: int, config: CompareConfig, progress: bool = True) -> dict:
    """Recall@K of every other method on the benchmark of `seed`, in percent, with the seconds that
    each training took.
    """
    bench = make_benchmark(config.queries, config.gallery, seed, vl.image_size)
    gallery = vl.encode_images(bench.images)
    ranks = {
        name: benchmark_ranks(bench, method(bench, vl, gallery), gallery)
        for name, method in UNTRAINED.items()
    }

    image, text = gallery[torch.from_numpy(bench.reference)], vl.encode_text(bench.texts)
    chosen_on = make_benchmark(
        config.chosen_queries, config.chosen_gallery, seed + CHOSEN_ON, vl.image_size
    )
    chosen_gallery = vl.encode_images(chosen_on.images)
    weights = {
        name: choose_weight(fuse, chosen_on, vl, chosen_gallery) for name, fuse in FUSIONS.items()
    }
    for name, fuse in FUSIONS.items():
        ranks[name] = benchmark_score_ranks(bench, fuse(image, text, gallery, weights[name]))
    corpus = vl.encode_text(chosen_on.texts)
    ranks["BASIC-like"] = benchmark_score_ranks(bench, calibrated(image, text, gallery, corpus))

    # The same scenes and renderings as notebook 02 trains on, here as embeddings of the large
    # tower.
    world = scenes.sample_scenes(config.num_images, seed=seed + 1000)
    rng = np.random.default_rng(seed)
    unlabeled = vl.encode_images(
        scenes.render_many(world, rng.integers(2**31, size=len(world)), vl.image_size)
    )
    captions = [scenes.caption(scene, rng) for scene in world]
    fit = {
        "steps": config.steps,
        "batch_size": config.batch_size,
        "seed": seed,
        "progress": progress,
    }

    start, noise = {"start_words": config.start_words}, {"word_noise": config.word_noise}
    negatives = {"negatives": config.negatives}

    def searle(words: Mapping, guess: Mapping) -> Inversion:
        some = unlabeled[: config.inverted]
        return searle_like(
            vl,
            some,
            optimize_words(vl, some, seed=seed, progress=progress, **words),
            **fit,
            **guess,
        )

    trainings = {
        "Pic2Word-like": lambda: pic2word_like(vl, unlabeled, **fit),
        "SEARLE-like": lambda: searle({}, {}),
        "LinCIR-like": lambda: lincir_like(vl, captions, **fit),
        f"Pic2Word-like{AIDED}": lambda: pic2word_like(
            vl, unlabeled, **fit, **start, **noise, **negatives
        ),
        f"SEARLE-like{AIDED}": lambda: searle(start | noise, start | negatives),
        f"LinCIR-like{AIDED}": lambda: lincir_like(vl, captions, **fit, **start, **noise),
    }
    seconds = {}
    for name, train in trainings.items():
        began = time.time()
        mapping = train()
        seconds[name] = round(time.time() - began, 1)
        ranks[name] = benchmark_ranks(bench, mapping.compose(vl, image, bench.texts), gallery)
    return {
        "seed": seed,
        "data": "rendered scenes",
        "params": asdict(config),
        "weights": weights,
        "training_seconds": seconds,
        "methods": _recalls(ranks),
    }


def encoders_by_seed(
    folders: Sequence[Path], vl: VLModel, config: CompareConfig
) -> dict[int, QueryEncoder]:
    """The query encoders by the seed that each run names. Raises ValueError for a seed twice, or
    another budget than config's.
    """
    found: dict[int, QueryEncoder] = {}
    for folder in folders:
        encoder = QueryEncoder.load(folder, vl)
        parameters = read_json(
            folder / "query_encoder.json", "a query encoder of notebook 02", TRAINED
        )["info"]["parameters"]
        for name in ("num_images", "steps", "batch_size"):
            if parameters[name] != getattr(config, name):
                wanted = (
                    f"{getattr(config, name)} of all other methods; train it with -p {name}"
                    f" {getattr(config, name)}"
                )
                raise ValueError(f"{folder} had {name} {parameters[name]}, and not the {wanted}")
        seed = parameters["seed"]
        if seed in found:
            raise ValueError(f"{folder} is a second run with seed {seed}; give one a seed")
        found[seed] = encoder
    return found


def kept_rivals(vl: VLModel, seed: int, config: CompareConfig, folder: Path) -> dict:
    """`rivals`, or what an earlier call with the same model, seed and settings left in `folder`."""
    path = folder / f"{vl.fingerprint}-{seed}.json"
    done = (
        read_json(path, "results of compare; delete it, and they are measured again", RIVALS)
        if path.exists()
        else {}
    )
    if done.get("params") != asdict(config):
        done = rivals(vl, seed, config)
        write_text(path, json.dumps(done, indent=1) + "\n")
    return done


def relative(
    runs: Sequence[Mapping], k: int = 1, method: str = "isa", other: str = "symmetric isa"
) -> np.ndarray:
    """Recall@K of `method` over that of `other`, a number a seed (paired), for the runs that have
    both.
    """
    both = [run["methods"] for run in runs if method in run["methods"] and other in run["methods"]]
    return np.array(
        [methods[method][f"R@{k}"] / max(methods[other][f"R@{k}"], 1e-9) for methods in both]
    )
