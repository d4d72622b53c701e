"""Speed and cost. What matters are ratios, both sides measured in one run on one machine."""

from __future__ import annotations

import tempfile
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from isa_lite.commands import add_shared
from isa_lite.support.parameters import add_settings, whole_number
from isa_lite.support.settings import DATA, SCENES_ENCODER, DistillConfig

if TYPE_CHECKING:
    import pandas as pd

#: Of a training step, what can be chosen.
STEP = ("batch_size", "lar_weight", "lar_share", "freeze_stem", "negatives")


def _cost(args: Namespace) -> None:
    from isa_lite.deploy.query_timing import cost
    from isa_lite.models.vl_model import load_vl_model, machine
    from isa_lite.query_encoder import QueryEncoder

    vl = load_vl_model(args.vl_model, args.pretrained)
    encoder = QueryEncoder.load(args.encoder, vl, args.mapping)
    print(machine())
    for batch in (1, 32):
        print(f"\nbatch {batch}; per image; multiply-adds in millions")
        print(cost(vl, encoder, batch).round(2).to_string())


def _step(args: Namespace) -> None:
    from isa_lite.deploy.step_cost import step_cost
    from isa_lite.models.vl_model import load_vl_model, machine
    from isa_lite.query_encoder import QueryEncoder
    from isa_lite.support.recipes import recipe

    config, vl = DistillConfig(**{name: getattr(args, name) for name in STEP}), load_vl_model()
    encoder = QueryEncoder.for_model(vl, stride=16, num_tokens=20, **recipe("default").encoder)
    table = step_cost(vl, encoder, config, args.rounds)
    told = "one step of notebook 02"
    print(f"{told}: {config.batch_size} images, LAR on {config.lar_share:g} of them; {machine()}")
    print(f"float32 products of this machine, in this run: {table.attrs['rate']:.0f} GFLOP/s")
    print(table.round(3).to_string())


def _split(args: Namespace) -> None:
    from isa_lite.deploy.bench import random_model
    from isa_lite.deploy.query_timing import split
    from isa_lite.models.vl_model import load_vl_model, machine
    from isa_lite.query_encoder import QueryEncoder

    own = load_vl_model()
    trained = QueryEncoder.load(args.encoder, own, args.mapping)
    large = random_model("ViT-B-32")
    light, name = QueryEncoder.for_model(large), "ViT-B-32 and a light encoder at its size"
    pairs = {"the shipped models": (own, trained), f"{name}, random weights": (large, light)}
    for name, (vl, encoder) in pairs.items():
        print(f"\n{name}: one query, batch 1; multiply-adds in millions; {machine()}")
        print(split(vl, encoder).round(2).to_string(na_rep="-"))


def _query(args: Namespace) -> None:
    import torch

    from isa_lite.deploy.bench import random_model
    from isa_lite.deploy.export import export
    from isa_lite.deploy.latency import end_to_end_onnx, export_pieces
    from isa_lite.deploy.query_timing import end_to_end
    from isa_lite.models.vl_model import load_vl_model, machine
    from isa_lite.query_encoder import QueryEncoder

    large, pairs = random_model("ViT-B-32"), {}
    for stride in (32, 16):
        kind = "tf_efficientnet_lite0"
        encoder = QueryEncoder.for_model(large, backbone=kind, image_size=224, stride=stride)
        name = f"ViT-B-32 and {kind} up to stride {stride}, random weights"
        pairs[name] = large, encoder
    pairs["the shipped models"] = load_vl_model(), QueryEncoder.load(DATA / SCENES_ENCODER)
    told = "light: by a sentence; symmetric: late fusion with the large image tower"
    print(f"{told}; symmetric ISA: by a sentence of it")
    for name, (vl, encoder) in pairs.items():
        told = f"\n{name}; {encoder.config.image_size} px"
        print(f"{told}, {encoder.config.num_tokens} tokens, batch 1, ms; {machine()}")
        _print_times("PyTorch", *end_to_end(vl, encoder))
        with tempfile.TemporaryDirectory() as folder:
            export(encoder, vl, folder)
            export_pieces(vl, encoder, folder)
            for threads in sorted({1, torch.get_num_threads()}):
                runtime = f"onnxruntime, {threads} thread{'s'[: threads > 1]}"
                _print_times(runtime, *end_to_end_onnx(vl, folder, folder, threads))


def _print_times(runtime: str, ms: pd.DataFrame, ratios: pd.Series) -> None:
    print(f"{runtime}\n{ms.round(1).to_string(na_rep='-')}\n{ratios.round(2).to_string()}")


def _embed(args: Namespace) -> None:
    from isa_lite.deploy.bench import embedding, random_model
    from isa_lite.models.vl_model import load_vl_model, machine

    shipped = "the shipped model", load_vl_model(), 2048, 0
    large = "ViT-B-32, random weights", random_model("ViT-B-32"), 128, 320
    for name, vl, images, side in (shipped, large):
        print(f"\n{name}: {images} JPEG files of {side or vl.image_size} px; {machine()}")
        print(embedding(vl, images, side=side, rounds=args.rounds).round(2).to_string())


def _backbones(args: Namespace) -> None:
    import open_clip

    from isa_lite.deploy.bench import backbones, random_model
    from isa_lite.models.vl_model import load_vl_model, machine

    untrained = args.pretrained is None and args.vl_model in open_clip.list_models()
    vl = random_model(args.vl_model) if untrained else load_vl_model(args.vl_model, args.pretrained)
    told = f"{vl.name} at {vl.image_size} px"
    print(f"{told}, backbones at {args.image_size or vl.image_size} px, batch 1; {machine()}")
    print("parameters and multiply-adds in millions")
    print(backbones(vl, args.image_size or vl.image_size, rounds=args.rounds).round(2).to_string())


MEASUREMENTS = {
    "cost": (_cost, "the query side"),
    "step": (_step, "a training step part by part, and the machine's rate of matrix products"),
    "split": (_split, "a query part by part"),
    "query": (_query, "a query end to end, cut and uncut, in PyTorch and onnxruntime"),
    "embed": (_embed, "a gallery of files"),
    "backbones": (_backbones, "light backbones"),
}


def add_arguments(parser: ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="what", required=True)
    for name, (_, what) in MEASUREMENTS.items():
        sub = kinds.add_parser(name, help=what)
        if name in ("cost", "backbones"):
            add_shared(sub, "vl-model", "pretrained")
        if name in ("cost", "split"):
            add_shared(sub, "encoder", "mapping")
        if name == "backbones":
            meaning = "in pixels, of the light backbones (default: the VL model's)"
            sub.add_argument("--image-size", type=whole_number(1, 2**11), help=meaning)
        if name == "step":
            add_settings(sub, DistillConfig, STEP)
        if name in ("embed", "backbones", "step"):
            sub.add_argument("--rounds", type=whole_number(1), default=10, help="rounds of timing")


def run(args: Namespace) -> None:
    MEASUREMENTS[args.what][0](args)
