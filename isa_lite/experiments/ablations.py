"""What the ablations vary, and what came out: plan, record and table of a sweep. Ours.

`sweep` runs them. Everything is notebook 02 with one thing changed, at the notebook's defaults.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd

from isa_lite.mappings import MAPPINGS
from isa_lite.models.symmetric import LARGE_TOWER
from isa_lite.retrieval.metrics import seed_interval
from isa_lite.retrieval.results import RECALLS
from isa_lite.support.checkpoint import Between
from isa_lite.support.recipes import RECIPES, START_WORDS
from isa_lite.support.settings import SCENES, WITHOUT_CHANGE

#: Light families of timm, each with a feature map of stride 16.
BACKBONES = ("mobilenetv4_conv_small_050", "mobilenetv3_small_100", "tf_efficientnet_lite0")
BACKBONES += ("edgenext_xx_small", "repvit_m0_9", "resnet18")
TEMPLATES = (
    "a photo of {sentence}, {modifier}",
    "{sentence}, {modifier}",
    "{sentence} {modifier}",
    "a picture of {sentence}, but {modifier}",
)
#: What the record keeps of every run's result.
KEPT = ("methods", "training_seconds", "wall_seconds", "queries", "gallery", "machine")
KEPT += ("commit", "date")
#: What an entry of a record holds, the result.json of a run, and a record (`checkpoint.misfit`).
_RESULT = {
    "methods": RECALLS | {"isa": RECALLS[str], "composition ceiling": RECALLS[str]},
    "training_seconds": {"isa": float},
}
_RESULT |= {"wall_seconds": float, "queries": int, "gallery": int}
_RESULT |= dict.fromkeys(("machine", "commit", "date"), str)
ENTRY = _RESULT | {"ablation": str, "label": str, "seed": int, "changed": dict, "key": str}
RESULT = _RESULT | {"parameters": {"steps": int, "seed": int}}
#: What `sentences.look` tells.
_LOOK = {"maps": [[[Between(0, 1)]]], "grounding": [float], "elsewhere": [float]}
RECORD = {"defaults": {"steps": int}, "runs": [ENTRY], "attention": {str: _LOOK}}
RECORD |= {"missing": [{"ablation": str, "label": str}]}
RECORD |= dict.fromkeys(("machine", "commit", "date"), [str])
#: What a result does not depend on, apart from rounding.
ASIDE = ("device", "num_workers", "out_dir")


def ablations(defaults: Mapping) -> dict[str, dict[str, dict]]:
    """Of every ablation its labels, and the parameters of notebook 02 that each sets."""
    lar = defaults["lar_weight"] or 0.1
    numbers = {
        "tokens": ("num_tokens", (1, 2, 4, 8, 12, 16, 24)),
        "temperature": ("temperature", (0.02, 0.05, 0.1, 0.2)),
        "noise on words": ("word_noise", (0.0, 0.5, 1.0, 1.5)),
        "negatives outside the batch": ("negatives", (0, 1024, 8192)),
        "training images": ("num_images", (250, 1000, 4000, 8000, 16000, 32000)),
    }
    found: dict[str, dict[str, dict]] = {
        "losses": {
            # What is said of LAR is said of the whole of it, not of a share of each step.
            "GCD and LAR": {"gcd_weight": 1.0, "lar_weight": lar, "lar_share": 1.0},
            "GCD": {"gcd_weight": 1.0, "lar_weight": 0.0},
            "LAR": {"gcd_weight": 0.0, "lar_weight": lar, "lar_share": 1.0},
            "neither (untrained)": {"gcd_weight": 0.0, "lar_weight": 0.0},
        },
        "mapping": {name: {"mapping": name} for name in MAPPINGS},
        "recipe": {name: {"recipe": name, **asdict(aids)} for name, aids in RECIPES.items()},
        "start words": {"a description": {"start_words": START_WORDS}, "none": {"start_words": ""}},
        "norm matching": {"on": {"norm_matching": True}, "off": {"norm_matching": False}},
        # Learned weights there are for one of them only, so it is shown with and without, and all
        # others start from random ones.
        "backbone": {
            f"{defaults['backbone']}, learned start": {"backbone_weights": SCENES},
            **{name: {"backbone": name, "backbone_weights": ""} for name in BACKBONES},
            "large tower (symmetric)": {"backbone": LARGE_TOWER, "backbone_weights": ""},
        },
        "prompt": {template: {"template": template} for template in TEMPLATES},
        # The learned backbone belongs to the shipped VL model: both start from random weights.
        "captions of the VL model": {
            "with the language of change": {"backbone_weights": ""},
            "without": {"vl_model": WITHOUT_CHANGE, "backbone_weights": ""},
        },
    }
    for name, (parameter, values) in numbers.items():
        values = sorted({*values, defaults[parameter]})
        found[name] = {f"{value:g}": {parameter: value} for value in values}
    return found


def plan(defaults: Mapping, only: Sequence[str] = (), seeds: Sequence[int] = (0,)) -> list[dict]:
    """The runs: `parameters`, and `shows`, the (ablation, label) it stands for; the default first.

    Two values of the same parameters are one run. Raises ValueError for no such ablation.
    """
    everything = ablations(defaults)
    unknown = sorted(set(only) - set(everything))
    if unknown:
        fault = f"unknown ablation {', '.join(unknown)}"
        raise ValueError(f"{fault}; there are: {', '.join(everything)}")
    runs: dict[str, dict] = {}
    for seed in seeds:
        chosen = only or everything
        values = [((name, label), c) for name in chosen for label, c in everything[name].items()]
        for shown, changed in [(("", "default"), {}), *values]:
            parameters = {**defaults, "single_vector": False, **changed, "seed": seed}
            key = json.dumps(parameters, sort_keys=True)
            runs.setdefault(key, {"parameters": parameters, "shows": []})["shows"].append(shown)
    return list(runs.values())


def gather(
    runs: Sequence[Mapping],
    results: Mapping[str, Mapping],
    defaults: Mapping,
    stored: Sequence[Mapping] = (),
) -> dict:
    """All finished runs as one record, an entry a value and seed; the others under `missing`.

    stored: entries of an earlier record; those stay that are of other ablations or seeds, or of a
    VL model that is not here (no key). An ablation of which nothing but the default is finished has
    no entries: it compares nothing.
    """
    entries, missing = [], []
    for run in runs:
        result = results.get(run["key"])
        for ablation, label in run["shows"]:
            entry = {"ablation": ablation, "label": label, "seed": run["parameters"]["seed"]}
            if result is None:
                missing.append(entry)
                continue
            kept = {n: result[n] for n in KEPT} | {"key": run["key"]}
            entries.append({**entry, "changed": changed(run["parameters"], defaults), **kept})
    known = [run for run in runs if run["key"]]
    here = {(*shown, run["parameters"]["seed"]) for run in known for shown in run["shows"]}
    others = [e for e in stored if (e["ablation"], e["label"], e["seed"]) not in here]
    entries += others
    missing = [m for m in missing if all(m != {name: e[name] for name in m} for e in others)]
    labels = {(entry["ablation"], entry["label"]) for entry in entries}
    count = Counter(ablation for ablation, _ in labels)
    compared = {ablation for ablation, values in count.items() if values > 1}
    entries = [entry for entry in entries if entry["ablation"] in compared or not entry["ablation"]]
    used = [*(results[run["key"]] for run in runs if run["key"] in results), *others]
    record = {"data": "rendered scenes", "defaults": dict(defaults)}
    for name in ("machine", "commit", "date", "queries", "gallery"):
        record[name] = sorted({str(r[name]) for r in used})
    return record | {"runs": entries, "missing": missing}


def changed(parameters: Mapping, defaults: Mapping) -> dict:
    """What a run changes of the defaults, apart from the seed and what every run sets."""
    aside = (*ASIDE, "seed", "single_vector")
    return {n: v for n, v in parameters.items() if v != defaults[n] and n not in aside}


def table(record: Mapping) -> pd.DataFrame:
    """A row a value of an ablation: Recall@1 and @10 in percent, and relative to the ceiling.

    The default has one row, the first. With several seeds: means with 95% intervals.
    """
    rows: dict[tuple[str, str], list[Mapping]] = {}
    names = list(dict.fromkeys(entry["ablation"] for entry in record["runs"]))
    for entry in sorted(record["runs"], key=lambda entry: names.index(entry["ablation"])):
        if entry["changed"] or not entry["ablation"]:
            rows.setdefault((entry["ablation"] or "default", entry["label"]), []).append(entry)

    def cell(values: Sequence[float]) -> str:
        low, high = np.clip(seed_interval(values), 0, 100)
        return f"{np.mean(values):.1f}" + (f" [{low:.1f}, {high:.1f}]" if len(values) > 1 else "")

    cells = {}
    for name, found in rows.items():
        isa = {k: [f["methods"]["isa"][f"R@{k}"] for f in found] for k in (1, 10)}
        ceiling = np.mean([f["methods"]["composition ceiling"]["R@1"] for f in found])
        share = 100 * np.mean(isa[1]) / max(ceiling, 1e-9)
        cells[name] = {"R@1": cell(isa[1]), "R@10": cell(isa[10])}
        cells[name] |= {"of the composition ceiling": f"{share:.0f}%", "seeds": len(found)}
        cells[name]["training, s"] = round(np.mean([f["training_seconds"]["isa"] for f in found]))
    return pd.DataFrame.from_dict(cells, "index")
