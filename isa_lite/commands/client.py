"""Answer one query from exported files, without PyTorch: best images, with their cosines."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace

from isa_lite.support.parameters import whole_number


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", help="what python -m isa_lite export wrote")
    add("--gallery", required=True, help="a file of isa_lite.retrieval.gallery.Gallery.save")
    add("--image", required=True, help="the reference image")
    add("--modifier", default="", help="what should be different (default: nothing)")
    add("--k", type=whole_number(1), default=5, help="answers to print")


def run(args: Namespace) -> None:
    import numpy as np

    from isa_lite.deploy.client import QueryClient, read_gallery
    from isa_lite.support.images import read_image

    embeddings, ids, model = read_gallery(args.gallery)
    if not model:
        fault = f"{args.gallery} does not say which model embedded it"
        raise ValueError(f"{fault}; save the Gallery with vl_model=")
    client = QueryClient(args.folder, vl_model=model)
    query = client.encode([read_image(args.image)], [args.modifier])[0]  # E
    if embeddings.shape[1] != len(query):
        fault = f"{args.gallery} holds embeddings of {embeddings.shape[1]} numbers"
        raise ValueError(f"{fault}, and the query has {len(query)}")
    scores, encoding = embeddings @ query, sys.stdout.encoding or "utf-8"  # N
    # of equal ones, the first in the gallery
    for i in np.argsort(-scores, kind="stable")[: args.k]:
        answer = f"{scores[i]:.4f}  {ids[i]}"
        # a file name may hold what a terminal cannot show
        print(answer.encode(encoding, "backslashreplace").decode(encoding))
