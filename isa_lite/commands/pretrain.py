"""Train the VL model of rendered scenes, and export it. `python -m isa_lite cards` then measures it
and writes its card.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from isa_lite.support.parameters import add_settings, folder, number, option, output, settings_from
from isa_lite.support.settings import MINUTES, SCENES_CLIP, PretrainConfig


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=output(folder()),
        default=Path("runs") / SCENES_CLIP,
        help="folder of the model",
    )
    parser.add_argument(
        "--run",
        type=output(folder()),
        default=Path("runs/pretrain"),
        help="folder of the checkpoint, to resume from",
    )
    parser.add_argument(
        "--checkpoint-minutes",
        type=option(number(0), float),
        default=MINUTES,
        help="how often the state of the run is saved",
    )
    add_settings(parser, PretrainConfig)


def run(args: Namespace) -> None:
    config = settings_from(args, PretrainConfig)

    from isa_lite.pretraining.towers import pretrain

    pretrain(config, args.out, args.run, args.checkpoint_minutes)
    print(f"{args.out}: load_vl_model({str(args.out)!r}) loads it")
