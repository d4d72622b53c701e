"""Write a query side as ONNX files, and try them against PyTorch."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from isa_lite.commands import add_output, add_shared
from isa_lite.support.parameters import folder
from isa_lite.support.settings import check_template


def add_arguments(parser: ArgumentParser) -> None:
    add_shared(parser, "encoder", "mapping", "vl-model", "pretrained", "template")
    add_output(parser, "out", folder(), None, "folder of the exported files")
    meaning = "also with 8 bits a weight, in the subfolder int8"
    parser.add_argument("--int8", action="store_true", help=meaning)


def run(args: Namespace) -> None:
    check_template(args.template)

    import pandas as pd
    import timm

    from isa_lite.deploy.client import IMAGE, SETTINGS, TEXT, TOKENIZER, QueryClient
    from isa_lite.deploy.export import export, measured_recall
    from isa_lite.deploy.onnx_files import quantize
    from isa_lite.models.vl_model import load_vl_model
    from isa_lite.query_encoder import QueryEncoder
    from isa_lite.retrieval.scene_queries import make_benchmark

    vl = load_vl_model(args.vl_model, args.pretrained)
    # some backbones have layers that are made for tracing, and others that are not
    with timm.layers.set_exportable(True):
        encoder = QueryEncoder.load(args.encoder, vl, args.mapping)
    try:
        most = export(encoder, vl, args.out, args.template)
        folders = [args.out] + ([quantize(args.out, args.out / "int8")] if args.int8 else [])
    except RuntimeError as error:
        raise ValueError(f"{args.encoder} cannot be exported: {error}") from error
    for path in (where / name for where in folders for name in (IMAGE, TEXT, TOKENIZER, SETTINGS)):
        print(f"{path.stat().st_size / 1e6:8.2f} MB  {path}")
    print(f"largest difference from PyTorch: {most:.2g}")
    if args.int8:
        bench = make_benchmark(size=vl.image_size).embedded(vl)
        told = f"Recall@K in percent on rendered scenes, {len(bench)} queries"
        print(f"{told}, gallery of {len(bench.scenes)}")
        found = {str(where): measured_recall(QueryClient(where), bench) for where in folders}
        print(pd.DataFrame(found).T.round(1).to_string())
