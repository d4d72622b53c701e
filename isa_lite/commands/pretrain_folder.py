"""Train a small VL model on a folder of captioned images, and export it. The same line goes on with a run that was stopped."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from isa_lite.parameters import add_settings, settings_from
from isa_lite.settings import FolderConfig


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--captions", type=Path, required=True, help="CSV file with the columns image and caption")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--run", type=Path, help="folder of the checkpoints, to resume from (default: OUT/run)")
    add_settings(parser, FolderConfig)


def run(args: Namespace) -> None:
    config = settings_from(args, FolderConfig)

    from isa_lite.images import ImageFolder
    from isa_lite.own_data import read_captions
    from isa_lite.pretrain_folder import pretrain_folder

    images = ImageFolder(args.images)
    pretrain_folder(images, read_captions(args.captions, images), config, args.out, args.run or args.out / "run")
    print(f"{args.out}: load_vl_model({str(args.out)!r}) loads it, and so does open_clip as local-dir:{args.out}")
