"""Print the retrieval table of a metrics.json, or gather several into one file."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

from isa_lite.support.parameters import file, output


def add_arguments(parser: ArgumentParser) -> None:
    meaning = "metrics.json, as notebook 02 writes it"
    parser.add_argument("metrics", type=Path, nargs="+", help=meaning)
    meaning = "write all of them into this one JSON file (default: print them)"
    parser.add_argument("--gather", type=output(file()), help=meaning)


def run(args: Namespace) -> None:
    import pandas as pd

    from isa_lite.retrieval.metrics import KS
    from isa_lite.retrieval.results import gather, read_metrics, runs_table
    from isa_lite.support.checkpoint import write_text

    if args.gather:
        record = gather(args.metrics)
        write_text(args.gather, json.dumps(record, indent=1) + "\n")
        print(runs_table(record["runs"]).to_string())
        return
    # all of them, before anything is printed
    for found in [read_metrics(path) for path in args.metrics]:
        told = f"Retrieval, {found['data']}: {found['queries']} queries"
        print(f"{told}, gallery of {found['gallery']}, seed {found['seed']}")
        print("Recall@K in percent [95% Wilson interval over queries]")
        rows, columns = {}, [f"R@{k}" for k in KS]
        for name, values in found["methods"].items():
            ends = found["intervals"][name]
            told = "{:.1f} [{:.1f}, {:.1f}]"
            rows[name] = [told.format(values[column], *ends[column]) for column in columns]
        print(pd.DataFrame.from_dict(rows, "index", columns=columns).to_string())
