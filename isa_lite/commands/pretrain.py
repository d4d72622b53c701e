"""Train the VL model of rendered scenes, and export it; then `python -m isa_lite cards`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from isa_lite.commands import add_output, add_shared
from isa_lite.support.parameters import add_settings, folder, settings_from
from isa_lite.support.settings import SCENES_CLIP, WORLDS, PretrainConfig


def add_arguments(parser: ArgumentParser) -> None:
    add_output(parser, "out", folder(), f"runs/{SCENES_CLIP}", "folder of the model")
    meaning = "folder of the checkpoint, to resume from"
    add_output(parser, "run", folder(), "runs/pretrain", meaning)
    add_shared(parser, "checkpoint-minutes")
    add_settings(parser, PretrainConfig, world=WORLDS)


def run(args: Namespace) -> None:
    config = settings_from(args, PretrainConfig)

    from isa_lite.pretraining.towers import pretrain

    pretrain(config, args.out, args.run, args.checkpoint_minutes)
    print(f"{args.out}: load_vl_model({str(args.out)!r}) loads it")
