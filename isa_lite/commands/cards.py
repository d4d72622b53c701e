"""Measure the shipped models, write their cards and draw some queries."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from isa_lite.commands import add_output
from isa_lite.support.parameters import folder


def add_arguments(parser: ArgumentParser) -> None:
    meaning = "folder of the cards, laid out as data/ is"
    add_output(parser, "out", folder(), "runs/cards", meaning)


def run(args: Namespace) -> None:
    from isa_lite.experiments import cards
    from isa_lite.models.vl_model import machine

    print(machine())
    for path in cards.write_cards(args.out):
        print(path)
