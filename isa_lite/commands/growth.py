"""Recall and search time as the gallery grows, to a million images; run again, it goes on."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from datetime import date

from isa_lite.commands import add_output, add_shared
from isa_lite.support.parameters import file, folder, whole_number
from isa_lite.support.settings import GROWTH_SIZES


def add_arguments(parser: ArgumentParser) -> None:
    add_shared(parser, "encoder", "mapping")
    number, most = whole_number(GROWTH_SIZES[0]), GROWTH_SIZES[-1]
    parser.add_argument("--to", type=number, default=most, help="distractors at most")
    meaning = "of queries and distractors"
    parser.add_argument("--seed", type=whole_number(0), default=0, help=meaning)
    add_output(parser, "cache", folder(), "runs/growth", "folder of the embedded shards")
    add_output(parser, "out", file(), "runs/growth.json", "file of the result")


def run(args: Namespace) -> None:
    sizes = [size for size in GROWTH_SIZES if size <= args.to]

    from isa_lite.experiments.growth import growth, growth_table
    from isa_lite.models.vl_model import commit, load_vl_model, machine
    from isa_lite.query_encoder import QueryEncoder
    from isa_lite.retrieval.results import provenance
    from isa_lite.support.checkpoint import write_text

    vl = load_vl_model()
    encoder = QueryEncoder.load(args.encoder, vl, args.mapping)
    found = growth(vl, encoder, args.cache, sizes, seed=args.seed)
    found |= {"provenance": provenance(vl, encoder), "machine": machine(), "commit": commit()}
    found |= {"date": str(date.today())}
    write_text(args.out, json.dumps(found, indent=1) + "\n")
    told = f"rendered scenes, {found['queries']} queries"
    print(f"{told}; {found['machine']}\n{growth_table(found).to_string()}")
