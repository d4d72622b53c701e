"""What runs of notebook 02 leave on disk: one as metrics.json, several gathered into a record.

`python -m isa_lite evaluate runs/02_distillation/metrics.json` prints the table of a finished run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from isa_lite.models.vl_model import VLModel, commit, machine
from isa_lite.query_encoder import QueryEncoder
from isa_lite.retrieval.metrics import KS, recall, recall_interval, seed_interval
from isa_lite.retrieval.scene_queries import Benchmark, groups
from isa_lite.support.checkpoint import Between, misfit, read_json

#: What a results file holds (`checkpoint.misfit`): of each method its recall in percent; a run; a
#: run as notebook 02 writes it.
RECALLS = {str: {f"R@{k}": Between(0, 100) for k in KS}}
RUN = dict.fromkeys(("seed", "queries", "gallery"), int) | {"params": dict, "methods": RECALLS}
RUN |= {"training_seconds": {str: float}}
METRICS = RUN | {"intervals": {str: {f"R@{k}": (Between(0, 100), Between(0, 100)) for k in KS}}}
METRICS |= {"data": str, "machine": str, "groups": dict}
#: Several runs of notebook 02 as `gather` puts them together.
NAMED = ("isa", "image + text", "composition ceiling", "target ceiling")
GATHERED = RUN | {"methods": RECALLS | dict.fromkeys(NAMED, RECALLS[str])}
GATHERED = {"machine": str, "runs": [GATHERED | {"params": {"lar_weight": float}}, ...]}


def provenance(vl: VLModel, encoder: QueryEncoder | None = None, dtype: str = "float32") -> dict:
    """What a result says of its models, weights and code, so that it can be told from another.

    recipe: of the run that trained the encoder, as its file says; num_tokens: L.
    """
    found = {"vl_model": vl.name, "vl_fingerprint": vl.fingerprint, "dtype": dtype}
    if encoder is not None:
        found |= {
            "encoder": encoder.config.backbone,
            "encoder_fingerprint": encoder.fingerprint,
            "mapping": encoder.config.mapping,
            "num_tokens": encoder.config.num_tokens,
            "recipe": _recipe(encoder.info),
        }
    return found | {"commit": commit(), "machine": machine()}


def _recipe(info: Mapping) -> str:
    """The recipe that notebook 02, or the command distill, wrote beside an encoder's settings."""
    settings = info.get("parameters", info.get("config"))
    return str(settings.get("recipe", "unknown")) if isinstance(settings, Mapping) else "unknown"


def of_run(bench: Benchmark, methods: Mapping[str, np.ndarray], seed: int, params: Mapping) -> dict:
    """What a run's metrics.json says: every method's recall in percent, intervals, groups."""

    def recalls(mask: np.ndarray) -> dict:
        return {m: {f"R@{k}": round(recall(r[mask], k), 2) for k in KS} for m, r in methods.items()}

    def intervals(mask: np.ndarray) -> dict:
        return {
            m: {f"R@{k}": [round(v, 2) for v in recall_interval(r[mask], k)] for k in KS}
            for m, r in methods.items()
        }

    found = {name: mask for name, mask in groups(bench).items() if mask.any()}
    return {
        "queries": len(bench),
        "gallery": len(bench.scenes),
        "data": "rendered scenes",
        "seed": seed,
        "params": dict(params),
        "methods": recalls(found["all"]),
        "intervals": intervals(found["all"]),
        "groups": {
            n: {"queries": int(m.sum()), "methods": recalls(m), "intervals": intervals(m)}
            for n, m in found.items()
        },
    }


def read_metrics(path: str | Path) -> dict:
    """A metrics.json of notebook 02. Raises FileNotFoundError, or ValueError naming the file."""
    what = "the results of notebook 02 (metrics.json in its out_dir)"
    found = read_json(Path(path), what, METRICS)
    if without := sorted(set(found["methods"]) ^ set(found["intervals"])):
        fault = f"{path} has only a recall or only its interval of {without[0]!r}"
        raise ValueError(f"{fault}; run notebook 02 again")
    return found


def read_alike(path: Path, what: str, shape: dict, rows: str = "runs") -> dict:
    """`checkpoint.read_json` of a record whose `rows` name the same methods, times and weights."""
    found = read_json(path, what, shape)
    first = found[rows][0]
    for i, row in enumerate(found[rows]):
        for key in ("methods", "training_seconds", "weights"):
            if key in shape[rows][0] and (other := set(row[key]) ^ set(first[key])):
                fault = f"{path} should hold {what}, but {min(other)!r} is not"
                raise ValueError(f"{fault} in the {key} of all {rows}, see {rows}[{i}]")
    return found


def gather(paths: Sequence[Path]) -> dict:
    """Several runs' metrics.json as one record, with the machine. Raises as `read_metrics`."""
    paths = list(paths)
    runs = [read_metrics(path) for path in paths]
    for path, run in zip(paths, runs, strict=True):
        if misfit(run["params"], {"lar_weight": float}):
            raise ValueError(f"{path} does not say its lar_weight; run notebook 02 again")
        run["params"].pop("out_dir", None)  # where a run wrote is of no interest to others
    kept = ("seed", "queries", "gallery", "params", "methods", "training_seconds", "groups")
    machines = " / ".join(sorted({r["machine"] for r in runs}))
    return {"machine": machines, "runs": [{k: r[k] for k in kept} for r in runs]}


def runs_table(
    runs: Sequence[Mapping],
    parameter: str | None = "lar_weight",
    methods: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Mean Recall@K over seeds with its 95% interval: a row a method, ISA's by `parameter`."""
    # of each row, the recalls by seed: a seed counts once
    rows: dict[str, dict[int, Mapping[str, float]]] = {}
    for run in sorted(runs, key=lambda r: r["params"][parameter] if parameter else 0):
        for name, found in run["methods"].items():
            row = name
            if parameter and name == "isa":
                row = f"{name}, {parameter} {run['params'][parameter]:g}"
            if methods is None or name in methods:
                rows.setdefault(row, {})[run["seed"]] = found
    cells = {}
    for name, found in rows.items():
        values = {k: [f[f"R@{k}"] for f in found.values()] for k in KS}
        cells[f"{name} ({len(found)} seeds)"] = [_mean(values[k]) for k in KS]
    return pd.DataFrame.from_dict(cells, "index", columns=[f"R@{k}" for k in KS])


def _mean(values: Sequence[float]) -> str:
    # Student's interval may reach where no recall is
    low, high = np.clip(seed_interval(values), 0, 100)
    return f"{np.mean(values):.1f} [{low:.1f}, {high:.1f}]"


def effect(
    runs: Sequence[Mapping], k: int = 1, parameter: str = "lar_weight", method: str = "isa"
) -> np.ndarray:
    """What the higher of two values of `parameter` adds to Recall@K, in points, a number a seed
    (paired: same seed, same data).

    Raises ValueError unless there are exactly two values, each run with the same seeds.
    """
    found: dict[float, dict[int, float]] = {}
    for run in runs:
        by_seed = found.setdefault(run["params"][parameter], {})
        by_seed[run["seed"]] = run["methods"][method][f"R@{k}"]
    if len(found) != 2 or len({frozenset(by_seed) for by_seed in found.values()}) != 1:
        seeds = {value: sorted(by_seed) for value, by_seed in found.items()}
        raise ValueError(f"two values of {parameter} with the same seeds are needed, not {seeds}")
    low, high = (found[value] for value in sorted(found))
    return np.array([high[seed] - low[seed] for seed in sorted(low)])
