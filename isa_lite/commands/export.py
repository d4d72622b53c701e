"""Write a query side as ONNX files, and try them against PyTorch."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from isa_lite.support.parameters import folder, output
from isa_lite.support.settings import DATA, SCENES_CLIP, SCENES_ENCODER, TEMPLATE, check_template


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--encoder", default=str(DATA / SCENES_ENCODER), help="folder of a trained query encoder"
    )
    parser.add_argument(
        "--vl-model",
        default=SCENES_CLIP,
        help="a name of open_clip, hf-hub:..., blip:..., or a folder",
    )
    parser.add_argument(
        "--pretrained", help="tag or file of weights, for an open_clip model (default: none)"
    )
    parser.add_argument(
        "--template", default=TEMPLATE, help="the prompt, with {sentence} and {modifier}"
    )
    parser.add_argument(
        "--out", type=output(folder()), required=True, help="folder of the exported files"
    )
    parser.add_argument(
        "--int8", action="store_true", help="also with 8 bits a weight, in the subfolder int8"
    )


def run(args: Namespace) -> None:
    check_template(args.template)

    import pandas as pd
    import timm

    from isa_lite.deploy.client import IMAGE, SETTINGS, TEXT, TOKENIZER, QueryClient
    from isa_lite.deploy.export import export, measured_recall
    from isa_lite.deploy.onnx_files import quantize
    from isa_lite.models.vl_model import load_vl_model
    from isa_lite.query_encoder import QueryEncoder
    from isa_lite.retrieval.evaluate import make_benchmark

    vl = load_vl_model(args.vl_model, args.pretrained)
    # some backbones have layers that are made for tracing, and others that are not
    with timm.layers.set_exportable(True):
        encoder = QueryEncoder.load(args.encoder, vl)
    try:
        most = export(encoder, vl, args.out, args.template)
        folders = [args.out] + ([quantize(args.out, args.out / "int8")] if args.int8 else [])
    except RuntimeError as error:
        raise ValueError(f"{args.encoder} cannot be exported: {error}") from error
    for path in (where / name for where in folders for name in (IMAGE, TEXT, TOKENIZER, SETTINGS)):
        print(f"{path.stat().st_size / 1e6:8.2f} MB  {path}")
    print(f"largest difference from PyTorch: {most:.2g}")
    if args.int8:
        bench = make_benchmark(size=vl.image_size)
        gallery = vl.encode_images(bench.images)
        print(
            f"Recall@K in percent on rendered scenes, {len(bench)} queries, gallery of"
            f" {len(bench.scenes)}"
        )
        found = {
            str(where): measured_recall(QueryClient(where), bench, gallery) for where in folders
        }
        print(pd.DataFrame(found).T.round(1).to_string())
