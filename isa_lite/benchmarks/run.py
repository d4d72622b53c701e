"""From a benchmark on disk to numbers and submission files: `run`. The galleries are embedded once
and kept in a cache.

    vl = load_vl_model("ViT-L-14", "openai")
    encoder = QueryEncoder.load("runs/02_distillation", vl)
    result = run("cirr", "CIRR", vl, ("isa", "image + text"), encoder, RunConfig(split="val"))
    print(report(result))

Every number comes with its protocol: `Result` holds both, and `report` prints both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from isa_lite.benchmarks import circo, cirr, fashioniq
from isa_lite.benchmarks.common import Ranking, Task, one_of, rank
from isa_lite.models.vl_model import VLModel
from isa_lite.prompt import compose, prompt_ids
from isa_lite.query_encoder import QueryEncoder
from isa_lite.retrieval.embed import ahead, embed_files
from isa_lite.support.checkpoint import write_text
from isa_lite.support.images import read_image
from isa_lite.support.parameters import checked, optional, path_name
from isa_lite.support.parameters import text as a_text
from isa_lite.support.settings import METHODS, RunConfig, check_template

BENCHMARKS = {"fashioniq": fashioniq, "cirr": cirr, "circo": circo}


@dataclass
class Result:
    """What a run found. methods: metrics in percent by method, empty without right answers;
    submissions: the files written.
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


def reference_sentences(task: Task, encoder: QueryEncoder, config: RunConfig) -> Tensor:
    """The sentence of each query's reference, B x L x D; an image that several queries share is
    read once.
    """
    names = list(dict.fromkeys(q.reference for q in task.queries))
    batches = [names[s : s + config.batch_size] for s in range(0, len(names), config.batch_size)]

    def pixels(batch: Sequence) -> Tensor:
        return encoder.pixels([read_image(task.files[name]) for name in batch])

    encoder.eval()
    read = ahead(pixels, batches, config.num_workers)
    with torch.inference_mode():
        bar = tqdm(read, total=len(batches), desc="references", disable=not config.progress)
        tokens = torch.cat([encoder(batch).tokens.cpu() for batch in bar])
    row = {name: i for i, name in enumerate(names)}
    return tokens[[row[q.reference] for q in task.queries]]


def query_embeddings(
    task: Task,
    method: str,
    vl: VLModel,
    gallery: Tensor,
    encoder: QueryEncoder | None = None,
    config: RunConfig | None = None,
) -> Tensor:
    """The queries of a task by one of `METHODS`, B x E, L2-normalised. gallery: N x E, in the order
    of `task.files`.

    isa: the reference's sentence and the modifier through the frozen text tower. image only, text
    only: one of the two, by the large towers; image + text: the sum of both. A query with several
    texts gets the mean of their embeddings.
    """
    one_of("method", method, METHODS)
    config = config or RunConfig()
    place = {name: i for i, name in enumerate(task.files)}
    image = gallery[[place[q.reference] for q in task.queries]]
    if method == "image only":
        return image
    texts = [text for q in task.queries for text in q.texts]
    owner = torch.tensor([i for i, q in enumerate(task.queries) for _ in q.texts])
    if method == "isa":
        if encoder is None:
            raise ValueError("method 'isa' needs a query encoder")
        each = compose(
            vl,
            reference_sentences(task, encoder, config)[owner],
            texts,
            config.template,
            config.truncate,
        )
    else:
        each = vl.encode_text(texts)
    text = F.normalize(torch.zeros_like(image).index_add(0, owner, each), dim=-1)
    return F.normalize(image + text, dim=-1) if method == "image + text" else text


def count_cut(task: Task, vl: VLModel, num_tokens: int, template: str, truncate: bool) -> int:
    """How many texts do not fit the text tower beside `num_tokens` pseudo-words. ValueError for
    one, unless it may be cut.
    """
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
    """Every method on one split, with its metrics where the split has answers, and submission files
    where it has none.

    out: folder of metrics.json and the submission files; cache: of the galleries' embeddings; data:
    what to call the data in the result. Everything that can be refused is refused before an image
    is embedded.
    """
    one_of("benchmark", benchmark, tuple(BENCHMARKS))
    if isinstance(methods, str) or not isinstance(methods, Sequence) or not methods:
        raise ValueError(f"methods must be a list of some of {', '.join(METHODS)}, not {methods!r}")
    for method in methods:
        one_of("method", method, METHODS)
    if "isa" in methods and encoder is None:
        raise ValueError(
            "method 'isa' needs a query encoder (--encoder), the folder that notebook 02 writes"
        )
    if out is not None and (
        files := [
            p for p in (Path(out), *Path(out).absolute().parents) if p.exists() and not p.is_dir()
        ]
    ):
        raise ValueError(
            f"out= names a folder, and {files[0]} is a file; choose another folder (--out)"
        )
    config, module = config or RunConfig(), BENCHMARKS[benchmark]
    tasks: list[Task] = module.load(root, config.split, **config.options)
    if not all(task.answered for task in tasks) and out is None:
        raise ValueError(
            f"{benchmark} {config.split} has no answers here; give a folder (--out) for the"
            " submission files"
        )
    if (
        out is not None
        and not tasks[0].answered
        and (short := [task.name for task in tasks if task.left_out])
    ):
        raise ValueError(
            f"a submission needs every query, and images are missing from {', '.join(short)}"
        )
    prompt = (
        (encoder.config.num_tokens, config.template)
        if encoder and "isa" in methods
        else (0, "{sentence}{modifier}")
    )
    cut = sum(count_cut(task, vl, *prompt, config.truncate) for task in tasks)
    protocol = dict(tasks[0].protocol)
    if "isa" in methods:
        protocol["prompt"] = config.template
    protocol["modifiers cut to fit"] = str(cut)

    how = {
        name: getattr(config, name) for name in ("batch_size", "num_workers", "dtype", "progress")
    }
    galleries = [embed_files(list(task.files.values()), vl, cache, **how) for task in tasks]
    found, written = {}, []
    for method in methods:
        rankings: list[Ranking] = []
        for task, gallery in zip(tasks, galleries, strict=True):
            queries = query_embeddings(task, method, vl, gallery, encoder, config)
            rankings.append(rank(task, queries, gallery))
        if all(task.answered for task in tasks):
            found[method] = {
                name: round(value, 2) for name, value in module.score(tasks, rankings).items()
            }
        else:
            folder = Path(out) / method.replace(" ", "_")
            written += [
                str(path.relative_to(out))
                for path in module.write_submissions(folder, tasks, rankings)
            ]
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
    )
    if out is not None:
        write_text(Path(out) / "metrics.json", json.dumps(asdict(result), indent=1) + "\n")
    return result


def table(result: Result) -> pd.DataFrame:
    """A row a metric, a column a method; percent."""
    return pd.DataFrame(result.methods)


def report(result: Result) -> str:
    """The table with everything beside it that a reader needs to compare it: data, model, protocol,
    notes.
    """
    sizes = ", ".join(
        f"{name} {n} queries / {result.gallery[name]} images" for name, n in result.queries.items()
    )
    lines = [f"{result.data}, split {result.split}: {sizes}", f"VL model: {result.vl_model}"]
    lines += [f"protocol: {name}: {value}" for name, value in result.protocol.items()]
    lines += [f"NOTE: {note}" for note in result.notes]
    if result.methods:
        lines += ["in percent:", table(result).to_string(float_format="{:.2f}".format)]
    lines += [f"submission file: {name}" for name in result.submissions]
    return "\n".join(lines)
