"""Score methods on a public benchmark, or write or check the files for its test server."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from isa_lite.commands import add_output, add_shared
from isa_lite.support.parameters import folder, option, output, whole_number
from isa_lite.support.plugins import either
from isa_lite.support.settings import CAPTIONS, FUSED, GALLERIES, METHODS, SPLITS, RunConfig


def add_arguments(parser: ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="benchmark", required=True)
    for name, splits in SPLITS.items():
        sub = kinds.add_parser(name, help=f"splits {', '.join(splits)}")
        sub.add_argument("--split", default="val", choices=splits, help="which queries")
        without = "go on without missing images, and without the queries that need them"
        sub.add_argument("--partial", action="store_true", help=without)
        only = "only check these submission files (default: none)"
        sub.add_argument("--check", type=Path, nargs="+", help=only)
        _add_run(sub)
        if name == "fashioniq":
            which, how = "protocol: which images are searched", "protocol: how two captions join"
            sub.add_argument("--gallery", default=GALLERIES[0], choices=GALLERIES, help=which)
            sub.add_argument("--captions", default=CAPTIONS[0], choices=CAPTIONS, help=how)
        if name == "circo":
            meaning = "protocol: put the shared concept into the prompt"
            sub.add_argument("--shared-concept", action="store_true", help=meaning)
    own = kinds.add_parser("own", help="a benchmark of your own")
    meaning = "FILE.py:NAME, a function of the root and the split that returns a Task"
    own.add_argument("--read", required=True, type=option(either()), help=meaning)
    own.add_argument("--split", default="val", help="which queries")
    own.set_defaults(check=None)
    _add_run(own)


def _add_run(sub: ArgumentParser) -> None:
    """What every benchmark can be told."""
    add = sub.add_argument
    add("--root", type=Path, required=True, help="the folder that the benchmark is in")
    add_shared(sub, "vl-model", "pretrained", "mapping")
    add("--encoder", type=Path, help="folder of a query encoder, for the method isa (no default)")
    methods = {"type": option(either(*METHODS, *FUSED)), "default": list(METHODS)}
    add("--methods", nargs="+", **methods, help="methods to score, your own as FILE.py:NAME")
    add_shared(sub, "template")
    add("--truncate", action="store_true", help="cut modifiers that do not fit the text tower")
    meaning = "folder of metrics.json and the submission files (default: none are written)"
    add("--out", type=output(folder()), help=meaning)
    add_output(sub, "cache", folder(), "runs/embeddings", "folder of the galleries' embeddings")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is a GPU)")
    dtypes = {"default": "float32", "choices": ("float32", "bfloat16")}
    add("--dtype", **dtypes, help="of the large tower's products")
    add("--batch-size", type=whole_number(1), default=128, help="images at a time")
    ahead = "threads that read images ahead"
    add("--num-workers", type=whole_number(0, 256), default=1, help=ahead)


def run(args: Namespace) -> None:
    import torch

    from isa_lite.benchmarks.run import report, run
    from isa_lite.models.vl_model import load_vl_model
    from isa_lite.query_encoder import QueryEncoder

    known = ("gallery", "captions", "shared_concept", "partial")
    options = {name: getattr(args, name) for name in known if hasattr(args, name)}
    if args.check:
        _check(args.check, args.benchmark, args.root, args.split, options)
        return
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    vl = load_vl_model(args.vl_model, args.pretrained, device)
    encoder = None
    if args.encoder:
        encoder = QueryEncoder.load(args.encoder, vl, args.mapping).to(device)
    same = ("split", "template", "truncate", "batch_size", "num_workers", "dtype")
    config = RunConfig(options=options, **{name: getattr(args, name) for name in same})
    name = args.read if args.benchmark == "own" else args.benchmark
    result = run(name, args.root, vl, args.methods, encoder, config, args.out, args.cache)
    print(report(result))


def _check(paths: Sequence[Path], benchmark: str, root: Path, split: str, options: dict) -> None:
    """Prints what is wrong with each file; ValueError if anything is."""
    from isa_lite.benchmarks.run import BENCHMARKS

    module, bad = BENCHMARKS[benchmark], 0
    tasks = {task.name: task for task in module.load(root, split, **options)}
    for path in paths:
        name = path.name.split(".")[0] if benchmark == "fashioniq" else benchmark
        if name not in tasks:
            fault = f"{path.name}: FashionIQ's files begin with their category"
            raise ValueError(f"{fault}, one of {', '.join(tasks)}")
        problems = module.check_submission(path, tasks[name])
        bad += bool(problems)
        print(f"{path}: {'; '.join(problems) or 'good'}")
    if bad:
        raise ValueError(f"{bad} of {len(paths)} files would be rejected")
