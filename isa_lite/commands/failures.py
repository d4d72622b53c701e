"""The worst queries of a trained query encoder on one HTML page, which needs no network."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from isa_lite.commands import add_output, add_shared
from isa_lite.support.parameters import file, whole_number


def add_arguments(parser: ArgumentParser) -> None:
    add_shared(parser, "encoder", "mapping")
    parser.add_argument("--queries", type=whole_number(1), default=1000, help="rendered queries")
    searched = "images that are searched, at least four times --queries"
    parser.add_argument("--gallery", type=whole_number(4), default=5000, help=searched)
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of queries and gallery")
    shown = "queries shown of each kind"
    parser.add_argument("--each", type=whole_number(1), default=6, help=shown)
    add_output(parser, "out", file(), "runs/failures.html", "the page")


def run(args: Namespace) -> None:
    from isa_lite.experiments.failures import failures, page, summary
    from isa_lite.methods.isa import Isa
    from isa_lite.models.vl_model import load_vl_model
    from isa_lite.query_encoder import QueryEncoder
    from isa_lite.retrieval.scene_queries import make_benchmark
    from isa_lite.support.checkpoint import write_text

    vl = load_vl_model()
    encoder = QueryEncoder.load(args.encoder, vl, args.mapping)
    bench = make_benchmark(args.queries, args.gallery, args.seed, vl.image_size).embedded(vl)
    failed = failures(bench, Isa(encoder)(bench))
    write_text(args.out, page(bench, failed, args.each))
    print(summary(bench, failed).round(0).to_string())
    print(f"{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB; open it in a browser")
