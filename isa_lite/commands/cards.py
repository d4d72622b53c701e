"""Measure the shipped models, write their cards and draw some queries."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from isa_lite.support.parameters import folder, output


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=output(folder()),
        default=Path("runs/cards"),
        help="folder of the cards, laid out as data/ is",
    )


def run(args: Namespace) -> None:
    from isa_lite.experiments import cards
    from isa_lite.models.vl_model import machine

    print(machine())
    for path in cards.write_cards(args.out):
        print(path)
