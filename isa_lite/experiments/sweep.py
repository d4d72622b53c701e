"""The ablations: `python -m isa_lite sweep`; with `--dry-run` it prints its plan and how long that
will take, and runs nothing.

Every run is notebook 02 by papermill, with one thing changed (`ablations`): the losses, the number
of tokens, the mapping network, norm matching, the temperature, the number of training images, the
backbone, the prompt, or the captions that the VL model was trained on. A finished run has a result
file in a folder named after its parameters and the VL model's weights, not after the commit; it is
not run again. A run that was stopped goes on where it was. With `--add`, what the record has is not
run again either, though its folder is gone: so a sweep can take several days or machines. Ours.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import date
from pathlib import Path

import numpy as np
import papermill
from papermill.exceptions import PapermillExecutionError
from tqdm.auto import tqdm

from isa_lite.analysis.sentences import look
from isa_lite.course import figures
from isa_lite.experiments.ablations import ASIDE, RECORD, RESULT, changed, gather, plan, table
from isa_lite.models.vl_model import commit, load_vl_model, machine
from isa_lite.pretraining.towers import TRAINED_BY, TRAINING, pretrain
from isa_lite.query_encoder import QueryEncoder
from isa_lite.support.checkpoint import Between, read_json, write_bytes, write_text
from isa_lite.support.parameters import command_line
from isa_lite.support.recipes import complete
from isa_lite.support.settings import DATA, NOTEBOOK, SCENES_CLIP, WITHOUT_CHANGE, PretrainConfig

_STORED = {"training_seconds": {"isa": float}, "params": {"steps": Between(1, 1e9)}}
_STORED = {"runs": [_STORED, ...]}


def notebook_defaults(notebook: Path = NOTEBOOK) -> dict:
    """A notebook's parameters with their defaults. Raises FileNotFoundError or ValueError."""
    if not notebook.is_file():
        fault = f"there is no notebook {notebook}"
        raise FileNotFoundError(f"{fault}; run this in a checkout, or give --notebook")
    try:
        found = papermill.inspect_notebook(str(notebook))
        defaults = {name: ast.literal_eval(about["default"]) for name, about in found.items()}
    except Exception as error:  # whatever nbformat throws at a file that is none
        raise ValueError(
            f"{notebook} is no notebook that can be read: {type(error).__name__}: {error}"
        ) from error
    if not {"recipe", "steps", "num_tokens", "vl_model"} <= set(defaults):
        fault = f"{notebook} has not the parameters of notebook 02, of which every run is one"
        raise ValueError(f"{fault}; see --notebook")
    return defaults


def key(parameters: Mapping, vl_fingerprint: str) -> str:
    """What a run's folder is called: a digest of its parameters and of the VL model's weights."""
    kept = {name: value for name, value in parameters.items() if name not in ASIDE}
    digest = hashlib.sha256(json.dumps([kept, vl_fingerprint], sort_keys=True).encode())
    return digest.hexdigest()[:16]


def execute(notebook: Path, parameters: Mapping, folder: Path) -> dict:
    """One run of the notebook, its results in `folder`, where little is left; returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    began = time.time()
    given = {**parameters, "out_dir": str(folder)}
    how = {"progress_bar": False, "cwd": Path.cwd()}
    papermill.execute_notebook(notebook, folder / "executed.ipynb", given, **how)
    found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    kept = (
        "methods",
        "intervals",
        "training_seconds",
        "queries",
        "gallery",
        "machine",
        "provenance",
    )
    result = {name: found[name] for name in kept}
    result |= {"parameters": dict(parameters), "wall_seconds": round(time.time() - began, 1)}
    result |= {"commit": commit(), "date": str(date.today())}
    # from now on this run is done
    write_text(folder / "result.json", json.dumps(result, indent=1) + "\n")
    # targets of the large tower: large, and made again in seconds
    shutil.rmtree(folder / "cache", ignore_errors=True)
    for state in folder.glob("*.state.safetensors"):
        state.unlink()
    return result


def execute_all(
    notebook: Path, waiting: Sequence[Mapping], folder: Path, jobs: int = 1
) -> Iterator[tuple[Mapping, object]]:
    """Runs with their results, or with the error that stopped them, as they end; `jobs` at a time.

    Each is a process of its own. Several share the cores evenly.
    """

    def one(run: Mapping) -> tuple[Mapping, object]:
        try:
            return run, execute(notebook, run["parameters"], folder / run["key"])
        except PapermillExecutionError as error:  # the others can still be run
            return run, error

    if jobs == 1:
        yield from map(one, waiting)
        return
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    pool = ThreadPoolExecutor(jobs)
    try:
        for ended in as_completed([pool.submit(one, run) for run in waiting]):
            yield ended.result()
    finally:
        # after an interruption, what has not begun does not begin
        pool.shutdown(cancel_futures=True)


def seconds_ahead(waiting: Sequence[Mapping], done: Sequence[Mapping]) -> tuple[float, str]:
    """An estimate for the runs that wait, and what it is made from."""
    if done:
        each = np.mean([r["wall_seconds"] / r["parameters"]["steps"] for r in done])
        source = f"{len(done)} finished runs"
    else:
        file, what = DATA / "results" / "02_distillation.json", "the stored runs of notebook 02"
        stored = read_json(file, what, _STORED)["runs"]
        each = np.mean([r["training_seconds"]["isa"] / r["params"]["steps"] for r in stored])
        source = "the stored training of notebook 02, without its evaluation"
    return float(each * sum(run["parameters"]["steps"] for run in waiting)), source


def sweep(args: Namespace) -> None:
    """Run what is missing, gather everything. Raises ValueError for bad `args` or runs."""
    defaults = _defaults(args)
    runs = plan(defaults, args.only, args.seeds)
    models = _models(args, runs, defaults)
    out = args.out or Path("runs/sweep.json")
    stored = {"runs": [], "attention": {}}
    if args.add and out.exists():
        stored = read_json(out, "the record of a sweep", RECORD)
    if stored["runs"] and (why := _foreign(stored, defaults, models)):
        fault = f"--add: the record {out} is of {why}"
        raise ValueError(f"{fault}; choose another --out, or leave out --add to write over it")
    results = _finished(runs, models, stored, args.runs)
    waiting = [run for run in runs if run["key"] and run["key"] not in results]
    _print_plan(runs, waiting, results, defaults, args.jobs)
    if args.dry_run:
        return
    if args.gather:
        waiting = []
        if not results:
            raise ValueError(f"--gather: none of these runs is finished in {args.runs}")
    failed = []
    ended = execute_all(args.notebook, waiting, args.runs, args.jobs)
    for run, result in tqdm(ended, desc="runs", unit="run", total=len(waiting)):
        if isinstance(result, dict):
            results[run["key"]] = result
        else:
            where = args.runs / run["key"] / "executed.ipynb"
            failed.append(f"{run['shows']}: {result.ename}: {result.evalue} (see {where})")
            tqdm.write(f"FAILED {failed[-1]}")
    record = gather(runs, results, defaults, stored["runs"])
    first = min((entry["seed"] for entry in record["runs"]), default=0)
    looked = _attention(runs, results, args.runs, first, stored["attention"])
    record["attention"] = looked or stored["attention"]
    picture = out.with_suffix(".png")
    write_text(out, json.dumps(record) + "\n")
    write_bytes(picture, figures.png(figures.ablations(record)))
    print(table(record).to_string())
    print(f"{len(results)} of {len(runs)} runs; written to {out} and {picture.name}")
    if failed:
        raise ValueError(f"{len(failed)} runs failed: {'; '.join(failed)}")


def _defaults(args: Namespace) -> dict:
    """The notebook's parameters with what was given in their place, complete."""
    defaults = notebook_defaults(args.notebook)
    shorter = args.smoke or args.steps not in (None, defaults["steps"])
    if shorter and args.out is None and not args.dry_run:
        fault = "a sweep of other steps does not replace one of full length"
        raise ValueError(f"{fault}: say with --out where its record goes")
    given = {"steps": args.steps, "smoke": args.smoke or None}
    given |= {"device": args.device, "recipe": args.recipe}
    return complete(defaults | {name: v for name, v in given.items() if v is not None})


def _models(args: Namespace, runs: Sequence[Mapping], defaults: Mapping) -> dict[str, str]:
    """Fingerprints of the runs' VL models that are there, or that --pretrain makes."""
    names = dict.fromkeys(run["parameters"]["vl_model"] for run in runs)
    if WITHOUT_CHANGE in names and not Path(WITHOUT_CHANGE).is_dir():
        training = read_json(DATA / SCENES_CLIP / "training.json", TRAINED_BY, TRAINING)
        kept = {name: training["config"][name] for name in ("steps", "matching_steps")}
        config, folder = PretrainConfig(change=0.0, **kept), "runs/pretrain-without-change"
        took = sum(training["minutes"].values())
        told = f"{WITHOUT_CHANGE} is missing"
        print(f"{told}; the shipped model's training took {took:.0f} minutes. Make it by")
        print(f"  {command_line('pretrain', config)} --out={WITHOUT_CHANGE} --run={folder}")
        print("  (or give --pretrain)")
        if args.pretrain and not (args.dry_run or args.gather):
            pretrain(config, Path(WITHOUT_CHANGE), Path(folder))
    there = [name for name in names if name != WITHOUT_CHANGE or Path(name).is_dir()]
    tag = defaults["pretrained"] or None
    return {name: load_vl_model(name, tag).fingerprint for name in there}


def _finished(runs: Sequence[dict], models: Mapping, stored: Mapping, folder: Path) -> dict:
    """Gives each run its key (None without its VL model); the results that are there, by key."""
    kept, results = {entry["key"]: entry for entry in stored["runs"]}, {}
    for run in runs:
        model = models.get(run["parameters"]["vl_model"])
        run["key"] = key(run["parameters"], model) if model else None
        done = folder / str(run["key"]) / "result.json"
        if model and done.is_file():
            what = "the result of a run; delete it, and it is run again"
            results[run["key"]] = read_json(done, what, RESULT)
        elif run["key"] in kept:
            results[run["key"]] = {**kept[run["key"]], "parameters": run["parameters"]}
    return results


def _foreign(stored: Mapping, defaults: Mapping, models: Mapping) -> str:
    """What makes a record one that this sweep cannot go on with; "" if nothing does."""
    told = stored["defaults"]
    if other := [n for n, v in defaults.items() if n not in ASIDE and told.get(n) != v]:
        return f"another default of {', '.join(other)}"
    for entry in stored["runs"]:
        default = {**defaults, "single_vector": False, "seed": entry["seed"]}
        if (
            "key" not in entry
            or not entry["ablation"]
            and entry["key"] != key(default, models[defaults["vl_model"]])
        ):
            return "another VL model, or was written by an earlier version"
    return ""


def _print_plan(
    runs: Sequence[Mapping],
    waiting: Sequence[Mapping],
    results: Mapping,
    defaults: Mapping,
    jobs: int,
) -> None:
    for run in runs:
        state = "done" if run["key"] in results else "to run" if run["key"] else "no VL model"
        set_here = changed(run["parameters"], defaults)
        what = ", ".join(f"{n}={v!r}" for n, v in set_here.items()) or "defaults"
        print(f"{state:12} seed {run['parameters']['seed']}  {what}")
    ahead, source = seconds_ahead(waiting, list(results.values()))
    told = f"{len(waiting)} of {len(runs)} runs to go"
    print(f"{told}: about {ahead / jobs / 3600:.1f} hours ({source}); {machine()}")


def _attention(
    runs: Sequence[Mapping], results: Mapping, folder: Path, seed: int, stored: Mapping
) -> dict:
    """What one seed's encoders of several lengths look at (`sentences.look`), by their length.

    stored: the same from an earlier record, for encoders that are gone.
    """
    found, encoders, vl = {}, [], None
    for run in runs:
        given, shown = run["parameters"], any(a == "tokens" for a, _ in run["shows"])
        if run["key"] in results and given["seed"] == seed and shown:
            # a folder without is that of a run that was stopped
            if (folder / run["key"] / "result.json").is_file():
                vl = vl or load_vl_model(given["vl_model"], given["pretrained"] or None)
                encoders.append(QueryEncoder.load(folder / run["key"], vl))
            elif (length := str(given["num_tokens"])) in stored:
                found[length] = stored[length]
    found |= look(encoders) if encoders else {}
    return dict(sorted(found.items(), key=lambda item: int(item[0])))
