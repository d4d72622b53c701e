"""From a benchmark on disk to numbers and submission files: `run`. Embeddings are cached.

    vl = load_vl_model("ViT-L-14", "openai")
    encoder = QueryEncoder.load("runs/02_distillation", vl)
    result = run("cirr", "CIRR", vl, ("isa", "image + text"), encoder, RunConfig(split="val"))
    print(report(result))

Every number comes with its protocol: `Result` holds both, and `report` prints both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import pandas as pd

from isa_lite.benchmarks import circo, cirr, fashioniq
from isa_lite.benchmarks.common import Task, one_of, rank
from isa_lite.benchmarks.own import OwnBenchmark
from isa_lite.methods.fusion import Fusion
from isa_lite.methods.isa import Isa
from isa_lite.methods.named import named
from isa_lite.models.vl_model import VLModel
from isa_lite.prompt import prompt_ids
from isa_lite.query_encoder import QueryEncoder
from isa_lite.retrieval.embed import embed_files
from isa_lite.retrieval.queries import Method
from isa_lite.retrieval.results import provenance
from isa_lite.support import plugins
from isa_lite.support.checkpoint import write_text
from isa_lite.support.parameters import checked, optional, path_name
from isa_lite.support.parameters import text as a_text
from isa_lite.support.settings import METHODS, RunConfig, check_template

BENCHMARKS = {"fashioniq": fashioniq, "cirr": cirr, "circo": circo}


@dataclass
class Result:
    """What a run found. methods: metrics in percent by method, empty without right answers;
    submissions: the files written; provenance: models, weights and code (`results.provenance`).
    """

    benchmark: str
    split: str
    data: str
    vl_model: str
    protocol: dict[str, str]
    notes: list[str]
    queries: dict[str, int]
    gallery: dict[str, int]
    methods: dict[str, dict[str, float]]
    submissions: list[str]
    provenance: dict[str, object]


def count_cut(task: Task, vl: VLModel, num_tokens: int, template: str, truncate: bool) -> int:
    """How many texts do not fit beside `num_tokens` words; ValueError for one unless `truncate`."""
    check_template(template)
    cut = 0
    for query in task.queries:
        for text in query.texts:
            try:
                prompt_ids(vl, num_tokens, [text], template)
            except ValueError as error:
                if not truncate:
                    raise ValueError(
                        f"query {query.id} of {task.name} {task.split}: {error} (--truncate)"
                    ) from error
                # a template may be too long by itself
                prompt_ids(vl, num_tokens, [text], template, truncate)
                cut += 1
    return cut


def _benchmark(name: str) -> ModuleType | OwnBenchmark:
    if plugins.is_spec(name):
        return OwnBenchmark(plugins.load(name, "benchmark"))
    one_of("benchmark", name, tuple(BENCHMARKS))
    return BENCHMARKS[name]


def _check_out(out: str | Path | None, tasks: Sequence[Task]) -> None:
    """Raises ValueError where the results of these tasks could not be written."""
    if out is not None:
        above = (Path(out), *Path(out).absolute().parents)
        if files := [p for p in above if p.exists() and not p.is_dir()]:
            fault = f"out= names a folder, and {files[0]} is a file"
            raise ValueError(f"{fault}; choose another folder (--out)")
    if all(task.answered for task in tasks):
        return
    if out is None:
        fault = f"the split {tasks[0].split} has no answers here"
        raise ValueError(f"{fault}; give a folder (--out) for the submission files")
    if short := [task.name for task in tasks if task.left_out]:
        raise ValueError(
            f"a submission needs every query, and images are missing from {', '.join(short)}"
        )


@checked(data=a_text(), out=optional(path_name()), cache=optional(path_name()))
def run(
    benchmark: str,
    root: str | Path,
    vl: VLModel,
    methods: Sequence[str] = METHODS,
    encoder: QueryEncoder | None = None,
    config: RunConfig | None = None,
    out: str | Path | None = None,
    cache: str | Path | None = None,
    data: str = "",
) -> Result:
    """Every method on one split: its metrics, or submission files where the split has no answers.

    benchmark: one of `BENCHMARKS`, or FILE.py:NAME (`own.OwnBenchmark`); methods: see
    `named.named`. out: folder of metrics.json and the submission files; cache: of the galleries'
    embeddings; data: what to call the data in the result. Everything that can be refused is refused
    before an image is embedded.
    """
    config, module = config or RunConfig(), _benchmark(benchmark)
    how = {"batch_size": config.batch_size, "num_workers": config.num_workers}
    how |= {"progress": config.progress}
    isa = encoder and Isa(encoder, config.template, config.truncate, **how)
    chosen = named(methods, isa)
    tasks: list[Task] = module.load(root, config.split, **config.options)
    _check_out(out, tasks)
    protocol = _protocol(tasks, vl, chosen, config)
    sets = []
    for task in tasks:
        files = list(task.files.values())
        sets.append(task.embedded(vl, embed_files(files, vl, cache, dtype=config.dtype, **how)))
    found, written = {}, []
    for name, method in chosen.items():
        pairs = zip(tasks, sets, strict=True)
        rankings = [rank(task, method(queries), queries.gallery) for task, queries in pairs]
        if all(task.answered for task in tasks):
            scored = module.score(tasks, rankings)
            found[name] = {metric: round(value, 2) for metric, value in scored.items()}
        else:
            folder = Path(out) / name.replace(" ", "_")
            paths = module.write_submissions(folder, tasks, rankings)
            written += [str(path.relative_to(out)) for path in paths]
    result = Result(
        benchmark,
        config.split,
        data or benchmark,
        vl.name,
        protocol,
        [note for task in tasks for note in task.notes],
        {task.name: len(task.queries) for task in tasks},
        {task.name: len(task.files) for task in tasks},
        found,
        written,
        provenance(vl, encoder if isa in chosen.values() else None, config.dtype),
    )
    if out is not None:
        write_text(Path(out) / "metrics.json", json.dumps(asdict(result), indent=1) + "\n")
    return result


def _protocol(
    tasks: Sequence[Task], vl: VLModel, methods: Mapping[str, Method], config: RunConfig
) -> dict[str, str]:
    """Every choice that changes the numbers. Raises ValueError for a modifier that does not fit."""
    found, prompt = dict(tasks[0].protocol), (0, "{sentence}{modifier}")
    isa = methods.get("isa")
    if isinstance(isa, Isa):  # a method of your own may have this name
        prompt = (isa.encoder.config.num_tokens, config.template)
        found["prompt"] = config.template
    cut = sum(count_cut(task, vl, *prompt, config.truncate) for task in tasks)
    found["modifiers cut to fit"] = str(cut)
    for name, method in methods.items():
        if isinstance(method, Fusion):  # no other queries are at hand to choose it on
            found[f"weight of {name}"] = f"{method.weight:g}, not fitted"
    return found


def table(result: Result) -> pd.DataFrame:
    """A row a metric, a column a method; percent."""
    return pd.DataFrame(result.methods)


def report(result: Result) -> str:
    """The table, with what makes it comparable: data, model, protocol, notes."""
    images, counts = result.gallery, result.queries.items()
    sizes = ", ".join(f"{name} {n} queries / {images[name]} images" for name, n in counts)
    lines = [f"{result.data}, split {result.split}: {sizes}", f"VL model: {result.vl_model}"]
    lines += [f"protocol: {name}: {value}" for name, value in result.protocol.items()]
    lines += [f"NOTE: {note}" for note in result.notes]
    if result.methods:
        lines += ["in percent:", table(result).to_string(float_format="{:.2f}".format)]
    lines += [f"submission file: {name}" for name in result.submissions]
    return "\n".join(lines)
