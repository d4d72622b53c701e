"""Train weights for a light backbone to start from, on rendered scenes."""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser, Namespace
from dataclasses import asdict

from isa_lite.commands import add_output, add_shared
from isa_lite.support.parameters import add_settings, command_line, folder, settings_from
from isa_lite.support.settings import SCENES_BACKBONE, WEIGHTS, BackboneConfig


def add_arguments(parser: ArgumentParser) -> None:
    add_output(parser, "out", folder(), f"runs/{SCENES_BACKBONE}", "folder of the weights")
    add_output(parser, "run", folder(), "runs/light_backbone", "folder of cache and checkpoint")
    add_shared(parser, "checkpoint-minutes")
    add_settings(parser, BackboneConfig)


def run(args: Namespace) -> None:
    config = settings_from(args, BackboneConfig)

    import numpy as np
    import torch

    from isa_lite.models.vl_model import commit, load_vl_model, machine
    from isa_lite.pretraining.light_backbone import learn_features
    from isa_lite.query_encoder import QueryEncoder
    from isa_lite.support.checkpoint import write_tensors, write_text
    from isa_lite.world import scenes

    made_by = commit()
    vl = load_vl_model(device=config.device)
    torch.manual_seed(config.seed)
    encoder = QueryEncoder.for_model(vl, backbone=config.backbone, stride=config.stride)
    world = scenes.sample_scenes(config.num_images, seed=config.seed + 1000)
    jitter = np.random.default_rng(config.seed).integers(2**31, size=config.num_images)
    images = scenes.render_many(world, jitter, vl.image_size)
    where = args.run / "cache", args.run / "state.safetensors"
    loss, seconds = learn_features(images, vl, encoder, config, *where, args.checkpoint_minutes)
    write_tensors(args.out / f"{WEIGHTS}.safetensors", encoder.backbone.model.state_dict())
    kept = ("backbone", "stride", "image_size", "mean", "std")
    record = {name: getattr(encoder.config, name) for name in kept} | {
        "vl_model": vl.fingerprint,
        "config": asdict(config),
        "loss": round(loss, 4),
        "minutes": round(seconds / 60, 1),
        "command": command_line("light_backbone", config),
        "commit": made_by,
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
    }
    write_text(args.out / f"{WEIGHTS}.json", json.dumps(record, indent=1) + "\n")
    told = f"{args.out}: loss {loss:.3f} of the features' variance left"
    print(f"{told}; {seconds / 60:.0f} minutes on {machine()}")
