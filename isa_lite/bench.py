"""Speed and cost: `python -m isa_lite.bench cost` (the query side), `... split` (a query in parts), `... query` (a query end
to end, cut and uncut), `... embed` (a gallery), `... backbones` (light encoders).

Every figure that matters is a ratio, with both sides measured in one run on one machine.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import torch
from PIL import Image
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from isa_lite.backbones import LIGHT, build_backbone
from isa_lite.embed import embed_files
from isa_lite.fold import folded
from isa_lite.gallery import Gallery
from isa_lite.images import read_image
from isa_lite.query_encoder import QueryEncoder, compose, prompt_ids, splice
from isa_lite.scenes import render_many, sample_scenes
from isa_lite.symmetric import LARGE_TOWER
from isa_lite.vl_model import DATA, SCENES_CLIP, VLModel, load_vl_model, machine


def multiply_adds(call: Callable[[], object]) -> float:
    """Millions of multiply-adds of one call, by torch's flop counter (which counts two for each).

    PyTorch's fast path for attention hides work from the counter, and some versions' fused kernels do, so both are off
    while counting.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            call()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() / 2e6


def side_by_side(calls: dict[str, Callable[[], object]], rounds: int = 30, warm_up: int = 3) -> dict[str, float]:
    """Median milliseconds of each call. All are measured in turn in every round, so a noisy moment hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for r in range(rounds + warm_up):
            for name, call in calls.items():
                began = time.perf_counter()
                call()
                if r >= warm_up:
                    times[name].append(1000 * (time.perf_counter() - began))
    return {name: sorted(t)[len(t) // 2] for name, t in times.items()}


def cost(
    vl: VLModel, encoder: QueryEncoder, batch: int = 1, rounds: int = 30, modifier: str = "make the circle red"
) -> pd.DataFrame:
    """Multiply-adds (millions an image) and time (ms an image) of the parts of a query, and both relative to the VL image tower.

    "query, light": image to sentence to query embedding; "query, symmetric": the large tower on the image and the
    text tower on the modifier, as late fusion does.
    """
    encoder.eval()
    light = torch.randn(batch, 3, encoder.config.image_size, encoder.config.image_size)
    large = torch.randn(batch, 3, vl.image_size, vl.image_size)
    ids, places = prompt_ids(vl, encoder(light).tokens.shape[1], [modifier] * batch)
    alone = vl.cut(vl.tokenize([modifier] * batch))
    tokens = encoder(light).tokens.detach()

    def text_tower(sentence: Tensor) -> Tensor:
        return vl.encode_vectors(splice(vl, sentence, ids, places), ids)

    calls = {
        "VL image tower": lambda: vl.encode_pixels(large),
        "light encoder (backbone)": lambda: encoder.backbone(light),
        "image to sentence (backbone + token learner)": lambda: encoder(light),
        "text tower, sentence and modifier": lambda: text_tower(tokens),
        "query, light": lambda: text_tower(encoder(light).tokens),
        "query, symmetric": lambda: (vl.encode_pixels(large), vl.encode_vectors(vl.word_vectors(alone), alone)),
    }
    table = pd.DataFrame({"multiply-adds": {n: multiply_adds(c) / batch for n, c in calls.items()}})
    table["ms"] = pd.Series(side_by_side(calls, rounds)) / batch
    for column in ("multiply-adds", "ms"):
        table[f"VL tower / {column}"] = table.loc["VL image tower", column] / table[column]
    return table


class _Held(TorchDispatchMode):
    """Follows the memory of the tensors that operations make, in bytes: what is alive at once at most."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.given: set[int] = set()  # weights and inputs, which a view may return
        self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.given |= {t.untyped_storage()._cdata for t in self._tensors((args, kwargs))} - set(self.alive)
        out = operation(*args, **(kwargs or {}))
        for storage in (tensor.untyped_storage() for tensor in self._tensors(out)):
            if storage._cdata not in self.given:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out

    @staticmethod
    def _tensors(tree: object) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def peak_activations(call: Callable[[], object]) -> float:
    """The most memory in MiB that one call's intermediate and final tensors hold at once; weights and inputs are not among them.

    Counted, not measured: it does not depend on the machine, and knows nothing of a kernel's own scratch memory.
    """
    with torch.no_grad(), _Held() as held:
        call()
    return held.peak / 2**20


def split(
    vl: VLModel, encoder: QueryEncoder, gallery: int = 5000, rounds: int = 30, modifier: str = "make the circle red"
) -> pd.DataFrame:
    """One query (batch 1) part by part: a row a part, for the asymmetric and the symmetric query side.

    Both start from a picture of the model's size and end with the ten best of `gallery` random embeddings.
    The symmetric side is the VL image tower with an untrained token learner of the same kind: weights do not change the cost.
    Columns for each: ms (median), multiply-adds in millions, and MiB of weights. The last row is the whole query in one call,
    with the peak of its activations in MiB in a column of its own. Threads: as many as torch uses (`vl_model.machine`).
    """
    kept = {name: getattr(encoder.config, name) for name in ("mapping", "num_tokens", "norm_matching", "width", "depth")}
    symmetric = QueryEncoder.for_model(vl, backbone=LARGE_TOWER, **kept)
    stored = F.normalize(torch.randn(gallery, vl.encode_text([modifier]).shape[1]), dim=1)  # G x E
    search = Gallery(stored, range(gallery)).search
    calls, costs, weights, peaks = {}, {}, {}, {}
    for side, model in (("asymmetric", encoder.eval()), ("symmetric", symmetric.eval())):
        tower = vl.clip.visual if model is symmetric else model.backbone
        picture = np.full((1, model.config.image_size, model.config.image_size, 3), 128, np.uint8)
        parts = _query_parts(vl, model, picture, modifier, search)
        calls |= {(name, side): call for name, call in parts.items()}
        costs |= {(name, side): multiply_adds(call) for name, call in parts.items()}
        sizes = {"image encoding": tower, "token learner": model.mapping, "text tower": _TextWeights(vl)}
        weights |= {(name, side): sum(p.numel() * 4 for p in m.parameters()) / 2**20 for name, m in sizes.items()}
        weights["search", side] = stored.nbytes / 2**20
        weights["whole query", side] = sum(size for (_, s), size in weights.items() if s == side)
        peaks["whole query", side] = peak_activations(parts["whole query"])
    columns = {"ms": side_by_side(calls, rounds), "multiply-adds": costs, "weights, MiB": weights, "activations, MiB": peaks}
    table = pd.DataFrame({name: pd.Series(values) for name, values in columns.items()}).unstack()
    return table.reindex([name for name, side in calls if side == "asymmetric"])


def _query_parts(
    vl: VLModel, model: QueryEncoder, picture: np.ndarray, modifier: str, search: Callable
) -> dict[str, Callable[[], object]]:
    """The parts of a query as calls, each on the result of the one before, and the whole."""
    with torch.no_grad():
        pixels = model.pixels(picture)
        features = model.backbone(pixels)[0]
        tokens = model.mapping(features).tokens
        ids, places = prompt_ids(vl, tokens.shape[1], [modifier])
        query = vl.encode_vectors(splice(vl, tokens, ids, places), ids)
    return {
        "picture to pixels": lambda: model.pixels(picture),
        "image encoding": lambda: model.backbone(pixels),
        "token learner": lambda: model.mapping(features),
        "prompt (tokenizer)": lambda: prompt_ids(vl, tokens.shape[1], [modifier]),
        "text tower": lambda: vl.encode_vectors(splice(vl, tokens, ids, places), ids),
        "search": lambda: search(query, 10),
        "whole query": lambda: search(compose(vl, model(model.pixels(picture)).tokens, [modifier]), 10),
    }


class _TextWeights:
    """The text tower's parameters, also where a CLIP keeps them beside its image tower."""

    def __init__(self, vl: VLModel):
        large = {id(p) for p in vl.clip.visual.parameters()}
        self._parameters = [p for p in vl.clip.parameters() if id(p) not in large]

    def parameters(self) -> list[Tensor]:
        return self._parameters


def query_cost(
    vl: VLModel, encoder: QueryEncoder, rounds: int = 30, modifier: str = "make the circle red", gallery: int = 10_000
) -> tuple[pd.Series, pd.Series]:
    """Milliseconds of one query end to end and of its parts, batch 1; and the ratios of symmetric to light queries.

    A light query: pixels to sentence (encoder of fold.py), prompt, text tower, search. A symmetric one: the large image tower on
    the same picture, tokenizer and text tower on the modifier, sum, search. "Cut": the text tower reads up to the end of
    the text; "uncut": all its positions, as open_clip does it. Preparing the picture is on neither side.
    """
    encoder = folded(encoder)
    light = torch.randn(1, 3, encoder.config.image_size, encoder.config.image_size)
    large = torch.randn(1, 3, vl.image_size, vl.image_size)
    tokens = encoder(light).tokens
    found = Gallery(F.normalize(torch.randn(gallery, vl.encode_pixels(large).shape[1]), dim=1), list(range(gallery)))

    def composed(sentence: Tensor, cut: bool) -> Tensor:
        ids, places = prompt_ids(vl, sentence.shape[1], [modifier])
        if not cut:
            missing = vl.context_length - ids.shape[1]
            ids, places = F.pad(ids, (0, missing), value=vl.words.pad), F.pad(places, (0, missing))
        return vl.encode_vectors(splice(vl, sentence, ids, places), ids)

    def said(cut: bool) -> Tensor:
        ids = vl.tokenize([modifier])
        ids = vl.cut(ids) if cut else ids
        return vl.encode_vectors(vl.word_vectors(ids), ids)

    def light_query(cut: bool) -> tuple:
        return found.search(composed(encoder(light).tokens, cut), 10)

    def symmetric_query(cut: bool) -> tuple:
        return found.search(F.normalize(vl.encode_pixels(large) + said(cut), dim=-1), 10)

    calls: dict[str, Callable[[], object]] = {
        "image to sentence": lambda: encoder(light),
        "large image tower": lambda: vl.encode_pixels(large),
        "prompt and text tower, cut": lambda: composed(tokens, True),
        "prompt and text tower, uncut": lambda: composed(tokens, False),
        "modifier through the text tower, cut": lambda: said(True),
        "modifier through the text tower, uncut": lambda: said(False),
        f"search in {gallery} images": lambda: found.search(said_once, 10),
        "light query, cut": lambda: light_query(True),
        "light query, uncut": lambda: light_query(False),
        "symmetric query, cut": lambda: symmetric_query(True),
        "symmetric query, uncut": lambda: symmetric_query(False),
    }
    said_once = said(True)
    ms = pd.Series(side_by_side(calls, rounds), name="ms")
    ratios = {
        f"symmetric {other} / light {own}": ms[f"symmetric query, {other}"] / ms[f"light query, {own}"]
        for other, own in (("uncut", "cut"), ("cut", "cut"), ("uncut", "uncut"))
    }
    return ms, pd.Series(ratios, name="ratio")


def embedding(vl: VLModel, images: int = 1024, batch: int = 128, side: int = 0, rounds: int = 5) -> pd.DataFrame:
    """Images a second of `embed_files` on JPEG files, beside the bare image tower on ready tensors of the same images.

    side: of the files, in pixels (0: the model's own). They take turns, `rounds` times; medians.
    """
    world = sample_scenes(images, seed=0)
    pictures = render_many(world, range(images), side or vl.image_size)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i:06}.jpg" for i in range(images)]
        for file, picture in zip(files, pictures, strict=True):
            Image.fromarray(picture).save(file, quality=90)
        ready = [vl.pixels([read_image(f) for f in files[s : s + batch]]) for s in range(0, images, batch)]
        calls = {
            "bare image tower": lambda: [vl.encode_pixels(pixels) for pixels in ready],
            "embed_files": lambda: embed_files(files, vl, None, batch, progress=False),
            "embed_files, one thread reads ahead": lambda: embed_files(files, vl, None, batch, num_workers=1, progress=False),
        }
        times = side_by_side(calls, rounds, warm_up=1)
    table = pd.DataFrame({"images / s": {name: 1000 * images / ms for name, ms in times.items()}})
    table["of the bare tower"] = table["images / s"] / table.loc["bare image tower", "images / s"]
    return table


def backbones(vl: VLModel, image_size: int, names: Sequence[str] = tuple(LIGHT.values()), rounds: int = 10) -> pd.DataFrame:
    """Light backbones up to the map that a query encoder would use, beside the VL image tower, one image at a time.

    Columns: parameters and multiply-adds in millions; the map's stride, in pixels, and its C x H x W; milliseconds; and how many
    times more the VL image tower (at its own size) takes. Random weights: they cost as much as trained ones.
    """
    pixels, large = torch.randn(1, 3, image_size, image_size), torch.randn(1, 3, vl.image_size, vl.image_size)
    networks: dict[str, nn.Module] = {"VL image tower": vl.clip.visual}
    calls, maps = {"VL image tower": lambda: vl.encode_pixels(large)}, {"VL image tower": ("", "")}
    for name in names:
        networks[name], stride, shape = build_backbone(name, image_size)
        calls[name], maps[name] = partial(networks[name], pixels), (stride, " x ".join(map(str, shape)))
    table = pd.DataFrame({"parameters": {n: sum(p.numel() for p in m.parameters()) / 1e6 for n, m in networks.items()}})
    table["multiply-adds"] = pd.Series({n: multiply_adds(call) for n, call in calls.items()})
    table["stride"], table["map"] = pd.Series({n: m[0] for n, m in maps.items()}), pd.Series({n: m[1] for n, m in maps.items()})
    table["ms"] = pd.Series(side_by_side(calls, rounds))
    for column in ("multiply-adds", "ms"):
        table[f"VL tower / {column}"] = table.loc["VL image tower", column] / table[column]
    return table


def random_model(name: str) -> VLModel:
    """A model of open_clip with random weights, for timing."""
    clip, _, preprocess = open_clip.create_model_and_transforms(name)
    return VLModel(clip, preprocess, open_clip.get_tokenizer(name), name=f"{name}, random weights")


def peak_memory() -> float:
    """The most memory that this process has held so far, in GiB; not a number where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["cost", "query", "split", "embed", "backbones"])
    logging.getLogger().addFilter(lambda record: "No pretrained weights" not in record.getMessage())  # on purpose here
    parser.add_argument("--vl-model", default=SCENES_CLIP)
    parser.add_argument("--pretrained", default=None, help="tag or file of weights, for an open_clip model")
    parser.add_argument("--encoder", default=str(DATA / "scenes-query-encoder"), help="folder of a trained query encoder")
    parser.add_argument("--image-size", type=int, default=None, help="of the light backbones; else the VL model's")
    parser.add_argument("--rounds", type=int, default=10, help="of the timing of backbones and embed")
    args = parser.parse_args(argv)
    if args.rounds < 1 or (args.image_size is not None and args.image_size < 1):
        parser.error(f"--rounds and --image-size must be at least 1, not {args.rounds} and {args.image_size}")
    if args.what == "backbones":
        untrained = args.pretrained is None and args.vl_model in open_clip.list_models()
        vl = random_model(args.vl_model) if untrained else load_vl_model(args.vl_model, args.pretrained)
        print(f"{vl.name} at {vl.image_size} px, backbones at {args.image_size or vl.image_size} px, batch 1; {machine()}")
        print("parameters and multiply-adds in millions")
        print(backbones(vl, args.image_size or vl.image_size, rounds=args.rounds).round(2).to_string())
        return
    if args.what == "query":
        large = random_model("ViT-B-32")
        own = QueryEncoder.load(DATA / "scenes-query-encoder")
        lite = [QueryEncoder.for_model(large, backbone="tf_efficientnet_lite0", image_size=224, stride=s) for s in (32, 16)]
        for name, vl, encoder in (
            (
                "ViT-B-32 (random weights), tf_efficientnet_lite0 at 224 px (random weights), all of it (stride 32)",
                large,
                lite[0],
            ),
            ("ViT-B-32 (random weights), tf_efficientnet_lite0 at 224 px (random weights), up to stride 16", large, lite[1]),
            ("the shipped models", load_vl_model(), own),
        ):
            ms, ratios = query_cost(vl, encoder)
            print(f"\n{name}; batch 1; {machine()}\n{ms.round(1).to_string()}\n{ratios.round(2).to_string()}")
        return
    if args.what == "embed":
        for name, vl, images, side in (
            ("the shipped model", load_vl_model(), 2048, 0),
            ("ViT-B-32, random weights", random_model("ViT-B-32"), 128, 320),
        ):
            print(f"\n{name}: {images} JPEG files of {side or vl.image_size} px; {machine()}")
            print(embedding(vl, images, side=side, rounds=args.rounds).round(2).to_string())
        return
    if args.what == "split":
        large, own = random_model("ViT-B-32"), load_vl_model()
        for name, vl, encoder in (
            ("the shipped models", own, QueryEncoder.load(args.encoder, own)),
            ("ViT-B-32 and a light encoder at its size, random weights", large, QueryEncoder.for_model(large)),
        ):
            print(f"\n{name}: one query, batch 1; multiply-adds in millions; {machine()}")
            print(split(vl, encoder).round(2).to_string(na_rep="-"))
        return
    vl = load_vl_model(args.vl_model, args.pretrained)
    encoder = QueryEncoder.load(args.encoder, vl)
    print(machine())
    for batch in (1, 32):
        print(f"\nbatch {batch}; per image; multiply-adds in millions")
        print(cost(vl, encoder, batch).round(2).to_string())


if __name__ == "__main__":
    main()
