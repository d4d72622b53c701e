"""ISA against every other method, over seeds: `python -m isa_lite compare --isa runs/0 runs/1`.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from isa_lite.methods.baselines import UNTRAINED
from isa_lite.methods.fusion import FITTED, FUSIONS
from isa_lite.methods.inversion import (
    Inversion,
    OneWord,
    lincir_like,
    optimize_words,
    pic2word_like,
    searle_like,
)
from isa_lite.models.vl_model import VLModel
from isa_lite.query_encoder import QueryEncoder
from isa_lite.retrieval.metrics import KS, recall
from isa_lite.retrieval.queries import Method, Queries
from isa_lite.retrieval.results import RECALLS
from isa_lite.retrieval.scene_queries import Benchmark, make_benchmark
from isa_lite.support.checkpoint import read_json, write_text
from isa_lite.support.settings import CompareConfig
from isa_lite.world import scenes

# what the name of a one-word recipe ends with that was given those of the shipped query encoder
AIDED = " with our aids"
#: What files hold (`checkpoint.misfit`): what notebook 02 says of an encoder, and `kept_rivals`.
_SETTINGS = dict.fromkeys(("seed", "num_images", "steps", "batch_size"), int)
TRAINED = {"info": {"parameters": _SETTINGS}}
RIVALS = {"seed": int, "params": dict}
RIVALS |= {"methods": RECALLS | dict.fromkeys(UNTRAINED, RECALLS[str])}
RIVALS |= {"training_seconds": {str: float}, "weights": {str: float}}
# and what the command writes in the end
COMPARED = {"machine": str, "commit": str, "runs": [RIVALS, ...]}
# the benchmark on which weights are chosen has the seed of the reported one plus this
CHOSEN_ON = 1000


def recalls(queries: Queries, methods: Mapping[str, Method]) -> dict[str, dict[str, float]]:
    """Recall@K of each method in percent."""
    found = {}
    for name, method in methods.items():
        rank = queries.ranks(method(queries))
        found[name] = {f"R@{k}": round(recall(rank, k), 2) for k in KS}
    return found


def benchmark(vl: VLModel, seed: int, config: CompareConfig) -> Benchmark:
    """The queries on which every method of a seed is measured."""
    return make_benchmark(config.queries, config.gallery, seed, vl.image_size).embedded(vl)


def _chosen_on(vl: VLModel, seed: int, config: CompareConfig) -> Benchmark:
    """Other queries, on which a method may choose what it has to choose (`queries.Method`)."""
    size = config.chosen_queries, config.chosen_gallery
    return make_benchmark(*size, seed + CHOSEN_ON, vl.image_size).embedded(vl)


def trainings(
    vl: VLModel, seed: int, config: CompareConfig, progress: bool = True
) -> dict[str, Callable[[], Inversion]]:
    """The one-word recipes by name, each as it is and with the aids of ISA's encoder. They learn
    from the same scenes and renderings as notebook 02, here as embeddings of the large tower.
    """
    world = scenes.sample_scenes(config.num_images, seed=seed + 1000)
    rng = np.random.default_rng(seed)
    jitter = rng.integers(2**31, size=len(world))
    unlabeled = vl.encode_images(scenes.render_many(world, jitter, vl.image_size))
    captions = [scenes.caption(scene, rng) for scene in world]
    some = unlabeled[: config.inverted]
    fit = {"steps": config.steps, "batch_size": config.batch_size}
    fit |= {"seed": seed, "progress": progress}
    start, noise = {"start_words": config.start_words}, {"word_noise": config.word_noise}
    negatives = {"negatives": config.negatives}

    def searle(of_words: Mapping, of_guess: Mapping) -> Inversion:
        words = optimize_words(vl, some, seed=seed, progress=progress, **of_words)
        return searle_like(vl, some, words, **fit, **of_guess)

    found = {}
    for name, s, n, m in (("", {}, {}, {}), (AIDED, start, noise, negatives)):
        how = fit | s | n
        found |= {
            f"Pic2Word-like{name}": partial(pic2word_like, vl, unlabeled, **how, **m),
            f"SEARLE-like{name}": partial(searle, s | n, s | m),
            f"LinCIR-like{name}": partial(lincir_like, vl, captions, **how),
        }
    return found


def rivals(vl: VLModel, seed: int, config: CompareConfig, progress: bool = True) -> dict:
    """Recall@K in percent of every other method on `seed`'s benchmark; seconds of training."""
    bench, chosen_on = benchmark(vl, seed, config), _chosen_on(vl, seed, config)
    fusions = {name: method.fit(chosen_on) for name, method in FITTED.items()}
    words, seconds = {}, {}
    for name, train in trainings(vl, seed, config, progress).items():
        began = time.time()
        words[name] = OneWord(train())
        seconds[name] = round(time.time() - began, 1)
    return {
        "seed": seed,
        "data": "rendered scenes",
        "params": asdict(config),
        "weights": {name: fusions[name].weight for name in FUSIONS},
        "training_seconds": seconds,
        "methods": recalls(bench, UNTRAINED | fusions | words),
    }


def fitted(
    methods: Mapping[str, Method], vl: VLModel, seed: int, config: CompareConfig
) -> dict[str, Method]:
    """Methods of the user's own, fitted as late fusion is, those that have something to fit."""
    fits = any(hasattr(method, "fit") for method in methods.values())
    other = _chosen_on(vl, seed, config) if fits else None  # rendered and embedded once for all
    return {n: m.fit(other) if hasattr(m, "fit") else m for n, m in methods.items()}


def encoders_by_seed(
    folders: Sequence[Path], vl: VLModel, config: CompareConfig, mapping: str | None = None
) -> dict[int, QueryEncoder]:
    """Query encoders by seed. Raises ValueError for a seed twice, or another budget."""
    found: dict[int, QueryEncoder] = {}
    for folder in folders:
        encoder = QueryEncoder.load(folder, vl, mapping)
        found_in = folder / "query_encoder.json"
        said = read_json(found_in, "a query encoder of notebook 02", TRAINED)
        parameters = said["info"]["parameters"]
        for name in ("num_images", "steps", "batch_size"):
            if parameters[name] != (wanted := getattr(config, name)):
                fault = f"{folder} had {name} {parameters[name]}, and not the {wanted} of all other"
                raise ValueError(f"{fault} methods; train it with -p {name} {wanted}")
        seed = parameters["seed"]
        if seed in found:
            raise ValueError(f"{folder} is a second run with seed {seed}; give one a seed")
        found[seed] = encoder
    return found


def kept_rivals(vl: VLModel, seed: int, config: CompareConfig, folder: Path) -> dict:
    """`rivals`, or what an earlier call with the same model, seed and settings left in `folder`."""
    path = folder / f"{vl.fingerprint}-{seed}.json"
    what = "results of compare; delete it, and they are measured again"
    done = read_json(path, what, RIVALS) if path.exists() else {}
    if done.get("params") != asdict(config):
        done = rivals(vl, seed, config)
        write_text(path, json.dumps(done, indent=1) + "\n")
    return done


def relative(
    runs: Sequence[Mapping], k: int = 1, method: str = "isa", other: str = "symmetric isa"
) -> np.ndarray:
    """Recall@K of `method` over `other`'s, a number a seed (paired), where both were run."""
    both = [run["methods"] for run in runs if {method, other} <= set(run["methods"])]
    pairs = [(found[method][f"R@{k}"], found[other][f"R@{k}"]) for found in both]
    return np.array([own / max(theirs, 1e-9) for own, theirs in pairs])
