"""Make the drawings of the world of things, `data/things`, from packages of open emoji again."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from isa_lite.support.parameters import folder, output


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--packages",
        type=Path,
        required=True,
        help="folder with the unpacked npm packages; where one is missing, an error names it with"
        " its version",
    )
    parser.add_argument(
        "--out", type=output(folder()), default=Path("runs/things"), help="folder of the sheets"
    )


def run(args: Namespace) -> None:
    from isa_lite.world.sprites import write_sprites

    args.out.mkdir(parents=True, exist_ok=True)
    write_sprites(args.packages, args.out)
    for path in sorted(args.out.iterdir()):
        print(f"{path} {path.stat().st_size / 1e6:.2f} MB")
