"""ISA against every other method, over seeds, a query encoder each; gathered into one file."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

from isa_lite.commands import add_output, add_shared
from isa_lite.support.parameters import file, folder, option, whole_number
from isa_lite.support.plugins import either, load


def add_arguments(parser: ArgumentParser) -> None:
    isa = "out_dir of a run of notebook 02 with -p steps 800, one for each seed"
    symmetric = "the same of runs with -p backbone vl and the same seeds (default: none)"
    rivals = "only measure all other methods, for these seeds (default: none)"
    own = "methods of your own beside them, each as FILE.py:NAME (default: none)"
    for name, kind, meaning in (
        ("isa", Path, f"{isa} (no default: give this or --rivals)"),
        ("symmetric", Path, symmetric),
        ("rivals", whole_number(0), rivals),
        ("method", option(either()), own),
    ):
        parser.add_argument(f"--{name}", type=kind, nargs="+", default=[], help=meaning)
    add_shared(parser, "mapping")
    add_output(parser, "run", folder(), "runs/compare", "folder of the results seed by seed")
    add_output(parser, "out", file(), "runs/compare.json", "all seeds in one file")


def run(args: Namespace) -> None:
    if bool(args.isa) == bool(args.rivals):
        raise ValueError("give either --isa with folders of query encoders, or --rivals with seeds")

    from isa_lite.experiments import compare
    from isa_lite.methods.isa import Isa
    from isa_lite.methods.named import named
    from isa_lite.models.vl_model import commit, load_vl_model, machine
    from isa_lite.retrieval.metrics import seed_interval
    from isa_lite.retrieval.results import provenance, runs_table
    from isa_lite.support.checkpoint import write_text

    config, own = compare.CompareConfig(), named(args.method) if args.method else {}
    if args.mapping:
        load(args.mapping, "mapping")  # what is wrong with it shows now
    vl = load_vl_model()
    for seed in args.rivals:
        compare.kept_rivals(vl, seed, config, args.run)
    if args.rivals:
        return
    # All of them, before any work is done.
    encoders, symmetric = (
        compare.encoders_by_seed(folders, vl, config, args.mapping)
        for folders in (args.isa, args.symmetric)
    )
    if symmetric and set(symmetric) != set(encoders):
        fault = f"--symmetric has the seeds {sorted(symmetric)}, and --isa {sorted(encoders)}"
        raise ValueError(f"{fault}; they must be the same")
    runs = []
    for seed in sorted(encoders):
        found = compare.kept_rivals(vl, seed, config, args.run)
        methods = {"isa": Isa(encoders[seed])}
        if symmetric:
            methods["symmetric isa"] = Isa(symmetric[seed])
        methods |= compare.fitted(own, vl, seed, config)
        measured = compare.recalls(compare.benchmark(vl, seed, config), methods)
        of = {n: provenance(vl, m.encoder) for n, m in methods.items() if isinstance(m, Isa)}
        runs.append({**found, "methods": {**measured, **found["methods"]}, "provenance": of})
    record = {"machine": machine(), "commit": commit(), "runs": runs}
    write_text(args.out, json.dumps(record, indent=1) + "\n")
    print(runs_table(runs, None).to_string())
    if symmetric:
        shares = compare.relative(runs)
        low, high = seed_interval(shares)
        by_seed = shares.round(3).tolist()
        told = "R@1 of asymmetric / symmetric ISA"
        print(f"{told}: {shares.mean():.3f} [{low:.3f}, {high:.3f}], by seed {by_seed}")
