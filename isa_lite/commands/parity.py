"""Compare the text tower of open_clip's models, entered with word vectors, with open_clip's own result."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("models", nargs="*", help="names of open_clip models (default: all of them)")


def run(args: Namespace) -> None:
    import open_clip
    import torch

    from isa_lite.models.vl_model import machine
    from isa_lite.parity import LAYERS, TOLERANCE, parity

    names = args.models or open_clip.list_models()
    if unknown := sorted(set(names) - set(open_clip.list_models())):
        raise ValueError(f"open_clip has no model {', '.join(unknown)}")
    table = parity(names)
    print(f"{machine()}; open_clip {open_clip.__version__}, torch {torch.__version__}")
    print("largest differences of normalised embeddings\n")
    columns = {c: (c, "max") for c in ("words", "cut", "pseudo-words")} | {"moved, least": ("moved", "min")}
    by_family = table.groupby("family").agg(models=("equal", "size"), equal=("equal", "sum"), **columns)
    print(by_family.to_string(float_format="{:.1e}".format))
    print(f"\n{table['equal'].sum()} of {len(table)} models equal to {TOLERANCE:g} (at most {LAYERS} layers, random weights)")
    for name, reason in table.loc[~table["equal"], "reason"].items():
        print(f"  {name}: {reason}")
