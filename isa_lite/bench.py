"""Speed and cost: `python -m isa_lite.bench cost` (the query side), `... split` (a query in parts), `... query` (a query end
to end, cut and uncut, in PyTorch and onnxruntime), `... embed` (a gallery), `... backbones` (light encoders).

Every figure that matters is a ratio, with both sides measured in one run on one machine.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import open_clip
import pandas as pd
import torch
from PIL import Image
from torch import nn

from isa_lite.backbones import LIGHT, build_backbone
from isa_lite.embed import embed_files
from isa_lite.export import export
from isa_lite.images import read_image
from isa_lite.latency import end_to_end_onnx, export_pieces
from isa_lite.measure import multiply_adds, side_by_side
from isa_lite.query_encoder import QueryEncoder
from isa_lite.query_timing import cost, end_to_end, split
from isa_lite.scenes import render_many, sample_scenes
from isa_lite.vl_model import DATA, SCENES_CLIP, VLModel, load_vl_model, machine


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


@contextmanager
def _hushed(message: str) -> Iterator[None]:
    """Inside, the root logger lets nothing through that contains `message`; afterwards it is as it was."""

    def other(record: logging.LogRecord) -> bool:
        return message not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(other)
    try:
        yield
    finally:
        root.removeFilter(other)


def random_model(name: str) -> VLModel:
    """A model of open_clip with random weights, for timing."""
    with _hushed("No pretrained weights"):  # on purpose here
        clip, _, preprocess = open_clip.create_model_and_transforms(name)
    return VLModel(clip, preprocess, open_clip.get_tokenizer(name), name=f"{name}, random weights")


def _named(parser: argparse.ArgumentParser, args: argparse.Namespace) -> VLModel:
    """The VL model that the command names; what is wrong with it ends the command in a line."""
    try:
        return load_vl_model(args.vl_model, args.pretrained)
    except (ConnectionError, ImportError, ValueError) as error:
        parser.error(str(error))


def _trained(parser: argparse.ArgumentParser, args: argparse.Namespace, vl: VLModel) -> QueryEncoder:
    """The query encoder that the command names, likewise."""
    try:
        return QueryEncoder.load(args.encoder, vl)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))


def _print_times(runtime: str, ms: pd.DataFrame, ratios: pd.Series) -> None:
    print(f"{runtime}\n{ms.round(1).to_string(na_rep='-')}\n{ratios.round(2).to_string()}")


#: What each measurement listens to.
_OPTIONS = {
    "cost": ("vl_model", "pretrained", "encoder"),
    "query": (),
    "split": ("encoder",),
    "embed": ("rounds",),
    "backbones": ("vl_model", "pretrained", "image_size", "rounds"),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.replace("`", ""))
    parser.add_argument("what", choices=list(_OPTIONS))
    parser.add_argument("--vl-model", default=SCENES_CLIP)
    parser.add_argument("--pretrained", default=None, help="tag or file of weights, for an open_clip model")
    parser.add_argument("--encoder", default=str(DATA / "scenes-query-encoder"), help="folder of a trained query encoder")
    parser.add_argument("--image-size", type=int, default=None, help="of the light backbones; else the VL model's")
    parser.add_argument("--rounds", type=int, default=10, help="of the timing of backbones and embed")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if value != parser.get_default(name) and name not in ("what", *_OPTIONS[args.what]):
            parser.error(f"{args.what} does not use --{name.replace('_', '-')}; leave it out")
    if args.rounds < 1 or (args.image_size is not None and args.image_size < 1):
        parser.error(f"--rounds and --image-size must be at least 1, not {args.rounds} and {args.image_size}")
    if args.what == "backbones":
        untrained = args.pretrained is None and args.vl_model in open_clip.list_models()
        vl = random_model(args.vl_model) if untrained else _named(parser, args)
        print(f"{vl.name} at {vl.image_size} px, backbones at {args.image_size or vl.image_size} px, batch 1; {machine()}")
        print("parameters and multiply-adds in millions")
        print(backbones(vl, args.image_size or vl.image_size, rounds=args.rounds).round(2).to_string())
        return
    if args.what == "query":
        large, pairs = random_model("ViT-B-32"), {}
        for stride in (32, 16):
            encoder = QueryEncoder.for_model(large, backbone="tf_efficientnet_lite0", image_size=224, stride=stride)
            pairs[f"ViT-B-32 and tf_efficientnet_lite0 up to stride {stride}, random weights"] = large, encoder
        pairs["the shipped models"] = load_vl_model(), QueryEncoder.load(DATA / "scenes-query-encoder")
        print("light: by a sentence; symmetric: late fusion with the large image tower; symmetric ISA: by a sentence of it")
        for name, (vl, encoder) in pairs.items():
            print(f"\n{name}; {encoder.config.image_size} px, {encoder.config.num_tokens} tokens, batch 1, ms; {machine()}")
            _print_times("PyTorch", *end_to_end(vl, encoder))
            with tempfile.TemporaryDirectory() as folder:
                export(encoder, vl, folder)
                export_pieces(vl, encoder, folder)
                for threads in sorted({1, torch.get_num_threads()}):
                    runtime = f"onnxruntime, {threads} thread{'s'[: threads > 1]}"
                    _print_times(runtime, *end_to_end_onnx(vl, folder, folder, threads))
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
            ("the shipped models", own, _trained(parser, args, own)),
            ("ViT-B-32 and a light encoder at its size, random weights", large, QueryEncoder.for_model(large)),
        ):
            print(f"\n{name}: one query, batch 1; multiply-adds in millions; {machine()}")
            print(split(vl, encoder).round(2).to_string(na_rep="-"))
        return
    vl = _named(parser, args)
    encoder = _trained(parser, args, vl)
    print(machine())
    for batch in (1, 32):
        print(f"\nbatch {batch}; per image; multiply-adds in millions")
        print(cost(vl, encoder, batch).round(2).to_string())


if __name__ == "__main__":
    main()
