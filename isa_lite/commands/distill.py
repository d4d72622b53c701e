"""A folder of images in, a query encoder out. The same line goes on with a run that was stopped."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path

from isa_lite.commands import add_output, add_shared
from isa_lite.support import plugins
from isa_lite.support.parameters import add_settings, folder, option, settings_from
from isa_lite.support.recipes import RECIPES, recipe
from isa_lite.support.settings import MAPPING_NAMES, START, WORDS, DistillConfig, QueryEncoderConfig

#: Of the query encoder, what can be chosen here.
ENCODER = ("backbone", "pretrained", "image_size", "stride", "num_tokens", "width", "depth")
AIDS = {"backbone_weights": START, "start_words": f"{WORDS}; '' for none"}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    meaning = "folder of the query encoder; targets and states are in OUT/run"
    add_output(parser, "out", folder(), None, meaning)
    add_shared(parser, "vl-model")
    meaning = "of the VL model's weights, where it is named by an open_clip model (default: none)"
    parser.add_argument("--tag", help=meaning)
    add_shared(parser, "checkpoint-minutes")
    add_settings(parser, QueryEncoderConfig, ENCODER)
    names = f"{', '.join(map(repr, MAPPING_NAMES))}, or FILE.py:NAME"
    meaning = f"the network from the feature map to the sentence: {names}"
    how = {"type": option(plugins.either(*MAPPING_NAMES)), "default": QueryEncoderConfig.mapping}
    parser.add_argument("--mapping", **how, help=meaning)
    meaning = "FILE.py:NAME of a loss of your own, added to those that have a weight"
    parser.add_argument("--loss", help=f"{meaning} (default: none)")
    for name, meaning in AIDS.items():
        option_name = "--" + name.replace("_", "-")
        parser.add_argument(option_name, help=f"{meaning} (default: the recipe's)")
    add_settings(parser, DistillConfig, recipe=tuple(RECIPES))


def encoder_settings(args: Namespace) -> dict:
    """What `QueryEncoder.for_model` is asked for: what was given, and otherwise the recipe's."""
    backbone = "" if args.pretrained else args.backbone  # timm's weights are a start of their own
    given = {name: getattr(args, name) for name in ("mapping", *ENCODER, *AIDS)}
    return recipe(args.recipe, args.vl_model, backbone).encoder | {
        n: value for n, value in given.items() if value is not None
    }


def run(args: Namespace) -> None:
    config = settings_from(args, DistillConfig)

    import torch

    from isa_lite.distill import distill
    from isa_lite.models.vl_model import commit, load_vl_model, machine
    from isa_lite.query_encoder import QueryEncoder
    from isa_lite.support import distributed
    from isa_lite.support.checkpoint import write_text
    from isa_lite.support.images import ImageFolder

    if plugins.is_spec(args.mapping):
        plugins.load(args.mapping, "mapping")  # a fault shows before anything that takes long
    loss = plugins.Loss(args.loss) if args.loss else None
    with distributed.joined(config.device):
        images, vl = ImageFolder(args.images), load_vl_model(args.vl_model, args.tag, config.device)
        torch.manual_seed(config.seed)
        encoder = QueryEncoder.for_model(vl, **encoder_settings(args))
        run = args.out / "run"
        kept = run, run / "distill.safetensors", args.checkpoint_minutes
        history = distill(images, vl, encoder, config, *kept, loss=loss)
        if distributed.rank() == 0:
            info = {"images": len(images), "config": asdict(config), "commit": commit()}
            info |= {"loss": loss.name} if loss else {}
            info |= {"machine": machine(), "seconds": round(history.seconds, 1)}
            encoder.cpu().save(args.out, info | {"processes": distributed.count()})
            write_text(args.out / "history.json", json.dumps(asdict(history)) + "\n")
            told = f"{args.out}: own image found in {history.recall[-1][1]:.0f}% of those held back"
            print(f"{told}; QueryEncoder.load reads it")
