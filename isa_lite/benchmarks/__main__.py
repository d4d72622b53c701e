"""`python -m isa_lite.benchmarks fashioniq|cirr|circo --root FOLDER --encoder FOLDER --out FOLDER`: see `run`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from isa_lite.benchmarks import fashioniq
from isa_lite.benchmarks.run import BENCHMARKS, METHODS, RunConfig, report, run
from isa_lite.query_encoder import TEMPLATE, QueryEncoder
from isa_lite.vl_model import SCENES_CLIP, load_vl_model


def main(argv: Sequence[str] | None = None) -> None:
    """Score methods on a public benchmark, or write the files for its test server, or check such files."""
    parser = argparse.ArgumentParser(prog="python -m isa_lite.benchmarks", description=main.__doc__)
    kinds = parser.add_subparsers(dest="benchmark", required=True)
    for name, module in BENCHMARKS.items():
        sub = kinds.add_parser(name, help=(module.__doc__ or "").split("\n")[0])
        sub.add_argument("--root", type=Path, required=True, help="the folder with the official layout")
        sub.add_argument("--split", default="val", choices=module.SPLITS)
        sub.add_argument(
            "--partial", action="store_true", help="go on without missing images, and without the queries that need them"
        )
        sub.add_argument("--check", type=Path, nargs="+", help="only check these submission files")
        sub.add_argument("--vl-model", default=SCENES_CLIP, help="a name of open_clip, or a folder")
        sub.add_argument("--pretrained", help="tag or file of its weights")
        sub.add_argument("--encoder", type=Path, help="folder of a query encoder, for the method isa")
        sub.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
        sub.add_argument("--template", default=TEMPLATE, help="the prompt, with {sentence} and {modifier}")
        sub.add_argument("--truncate", action="store_true", help="cut modifiers that do not fit the text tower")
        sub.add_argument("--out", type=Path, help="folder of metrics.json and the submission files")
        sub.add_argument("--cache", type=Path, default=Path("runs/embeddings"), help="folder of the galleries' embeddings")
        sub.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        sub.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the large tower's products")
        sub.add_argument("--batch-size", type=int, default=128)
        sub.add_argument("--num-workers", type=int, default=1, help="threads that read images ahead")
        if name == "fashioniq":
            sub.add_argument(
                "--gallery", default="split", choices=fashioniq.GALLERIES, help="protocol: which images are searched"
            )
            sub.add_argument(
                "--captions", default="both orders", choices=fashioniq.CAPTIONS, help="protocol: how two captions join"
            )
        if name == "circo":
            sub.add_argument("--shared-concept", action="store_true", help="protocol: put the shared concept into the prompt")
    args = parser.parse_args(argv)
    options = {name: getattr(args, name) for name in ("gallery", "captions", "shared_concept", "partial") if hasattr(args, name)}
    try:
        if args.check:
            _check(args.check, args.benchmark, args.root, args.split, options)
            return
        vl = load_vl_model(args.vl_model, args.pretrained, args.device)
        encoder = QueryEncoder.load(args.encoder, vl).to(args.device) if args.encoder else None
        same = {name: getattr(args, name) for name in ("split", "template", "truncate", "batch_size", "num_workers", "dtype")}
        config = RunConfig(options=options, **same)
        result = run(args.benchmark, args.root, vl, args.methods, encoder, config, args.out, args.cache)
    except (FileNotFoundError, ConnectionError, ImportError, ValueError) as error:
        parser.error(str(error))
    print(report(result))


def _check(paths: Sequence[Path], benchmark: str, root: Path, split: str, options: dict) -> None:
    """Prints what is wrong with each file; ValueError if anything is."""
    module, bad = BENCHMARKS[benchmark], 0
    tasks = {task.name: task for task in module.load(root, split, **options)}
    for path in paths:
        name = path.name.split(".")[0] if benchmark == "fashioniq" else benchmark
        if name not in tasks:
            raise ValueError(f"{path.name}: FashionIQ's files begin with their category, one of {', '.join(tasks)}")
        problems = module.check_submission(path, tasks[name])
        bad += bool(problems)
        print(f"{path}: {'; '.join(problems) or 'good'}")
    if bad:
        raise ValueError(f"{bad} of {len(paths)} files would be rejected")


if __name__ == "__main__":
    main()
