"""Train a small VL model on a folder of captioned images, and export it; run again, it goes on."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from isa_lite.commands import add_output, add_shared
from isa_lite.support.parameters import add_settings, folder, output, settings_from
from isa_lite.support.settings import FolderConfig


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    meaning = "CSV file with the columns image and caption"
    parser.add_argument("--captions", type=Path, required=True, help=meaning)
    add_output(parser, "out", folder(), None, "folder of the model")
    resumed = "folder of the checkpoints, to resume from (default: OUT/run)"
    parser.add_argument("--run", type=output(folder()), help=resumed)
    add_shared(parser, "checkpoint-minutes")
    add_settings(parser, FolderConfig)


def run(args: Namespace) -> None:
    config = settings_from(args, FolderConfig)

    from isa_lite.pretraining.folder import pretrain_folder
    from isa_lite.retrieval.own_data import read_captions
    from isa_lite.support.images import ImageFolder

    images = ImageFolder(args.images)
    captions, run = read_captions(args.captions, images), args.run or args.out / "run"
    minutes = args.checkpoint_minutes
    pretrain_folder(images, captions, config, args.out, run, checkpoint_minutes=minutes)
    told = f"{args.out}: load_vl_model({str(args.out)!r}) loads it"
    print(f"{told}, and so does open_clip as local-dir:{args.out}")
