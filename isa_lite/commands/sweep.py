"""Run the ablations: notebook 02 with one thing changed at a time; run again, it goes on."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

from isa_lite.commands import add_output
from isa_lite.support import parameters
from isa_lite.support.parameters import file, folder, option, output, whole_number
from isa_lite.support.recipes import RECIPES
from isa_lite.support.settings import NOTEBOOK, WITHOUT_CHANGE


def _seeds(text: str) -> list[int]:
    try:
        return [parameters.whole(0)(int(part)) for part in text.split(",")]
    except ValueError:
        fault = "seeds are whole numbers with commas between them, such as 0,1,2"
        raise ArgumentTypeError(f"{fault}; not {text!r}") from None


def add_arguments(parser: ArgumentParser) -> None:
    only = "an ablation; may be given several times (default: all)"
    parser.add_argument("--only", action="append", default=[], help=only)
    parser.add_argument("--seeds", type=_seeds, default="0", help="such as 0,1,2")
    steps = "training steps of every run; give --out too (default: the notebook's)"
    parser.add_argument("--steps", type=whole_number(1), help=steps)
    quick = "runs of seconds, whose numbers mean nothing; give --out too"
    parser.add_argument("--smoke", action="store_true", help=quick)
    recipe = "core or default, of every run that does not vary it (default: the notebook's)"
    parser.add_argument("--recipe", choices=tuple(RECIPES), help=recipe)
    device = "cpu, cuda, cuda:1, ... (default: the notebook's)"
    parser.add_argument("--device", type=option(parameters.device_name()), help=device)
    shared = "runs at a time, sharing the cores; if interrupted, those that run are finished first"
    parser.add_argument("--jobs", type=whole_number(1, 256), default=1, help=shared)
    missing = f"also train the VL model for {WITHOUT_CHANGE}, if it is missing"
    parser.add_argument("--pretrain", action="store_true", help=missing)
    parser.add_argument("--notebook", type=Path, default=NOTEBOOK, help="the notebook that is run")
    add_output(parser, "runs", folder(), "runs/sweep", "folder of the runs")
    out = "the gathered record; a figure is written beside it (default: runs/sweep.json)"
    parser.add_argument("--out", type=output(file()), help=out)
    parser.add_argument("--dry-run", action="store_true", help="print the plan and run nothing")
    finished = "run nothing, and write the record of what is finished"
    parser.add_argument("--gather", action="store_true", help=finished)
    kept = "keep what the record at --out holds already, of any ablation and seed, and run only"
    parser.add_argument("--add", action="store_true", help=f"{kept} the rest")


def run(args: Namespace) -> None:
    from isa_lite.experiments.sweep import sweep

    sweep(args)
