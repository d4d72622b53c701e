"""Where retrieval goes wrong, on one HTML page: `python -m isa_lite failures`.

For every kind of change the worst first answers, each with two numbers: what it kept of the
reference, and what it followed of the words (`sentences.kept_and_followed`). The lower one says
which half of the query was ignored. Ours.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
import pandas as pd
from PIL import Image
from torch import Tensor

from isa_lite.analysis.sentences import kept_and_followed
from isa_lite.retrieval.scene_queries import Benchmark
from isa_lite.world.scenes import KINDS, POSITIONS, Scene

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --soft: #5a5a5a; --paper: #fafaf8; --card: #fff; --line: #d9d9d4;
  --kept: #0072b2; --followed: #b35900; --right: #00724f; }
@media (prefers-color-scheme: dark) { :root { --ink: #eee; --soft: #aaa; --paper: #161616; --card: #202020; --line: #3a3a3a;
  --kept: #56b4e9; --followed: #e69f00; --right: #2fc795; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem; font: 1rem/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; } h2 { font-size: 1.25rem; margin: 2.5rem 0 .25rem; }
p { max-width: 46rem; margin: .25rem 0 .75rem; } .soft { color: var(--soft); }
a { color: var(--kept); } :focus-visible { outline: 3px solid var(--followed); outline-offset: 2px; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .25rem .9rem .25rem 0; text-align: right;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
th:first-child { text-align: left; font-weight: 500; } thead th { color: var(--soft); font-weight: 500; }
fieldset { position: sticky; top: 0; z-index: 1; border: 0; margin: 0 -1.5rem; padding: .6rem 1.5rem; background: var(--paper);
  border-bottom: 1px solid var(--line); display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; }
fieldset label { cursor: pointer; } legend { float: left; padding: 0; color: var(--soft); }
article { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .9rem 1rem; margin: .8rem 0; }
article h3 { font-size: 1.05rem; margin: 0 0 .6rem; } section { scroll-margin-top: 4rem; }
.row { display: flex; flex-wrap: wrap; gap: .75rem; align-items: flex-start; }
figure { margin: 0; width: 132px; } figure img { width: 132px; height: 132px; display: block; border: 1px solid var(--line); }
figcaption { font-size: .85rem; line-height: 1.35; color: var(--soft); margin-top: .25rem; }
.asked { padding-right: .75rem; border-right: 2px solid var(--line); gap: .75rem; display: flex; }
.target img { border: 3px solid var(--right); } .target figcaption, .verdict { color: var(--ink); font-weight: 600; }
.verdict { font-size: .95rem; margin: .6rem 0 0; }
.score { display: block; } .score i { display: block; height: .35rem; margin: .1rem 0 .2rem;
  background: linear-gradient(to right, var(--kept) var(--part), var(--line) var(--part)); }
.score.followed i { background: linear-gradient(to right, var(--followed) var(--part), var(--line) var(--part)); }
@media (max-width: 40rem) { body { padding: 1rem; } .asked { border-right: 0; padding: 0; } th, td { padding-right: .5rem; }
  fieldset { position: static; margin: 0; padding: .6rem 0; } section { scroll-margin-top: 0; } }
"""
# The cards can be read without it: the script only hides those that were not asked for.
_SCRIPT = """
document.querySelectorAll("fieldset input").forEach(input => input.addEventListener("change", () => {
  let shown = 0;
  document.querySelectorAll("article").forEach(card => {
    card.hidden = input.value !== "all" && card.dataset.ignored !== input.value;
    shown += !card.hidden;
  });
  document.querySelectorAll("section").forEach(s => { s.hidden = !s.querySelector("article:not([hidden])"); });
  document.querySelector("#shown").textContent = shown + " queries shown";
}));
"""


def kind_of(kinds: Sequence[str]) -> str:
    """The name of a query's group: its kind of change, or "two changes"."""
    return kinds[0] if len(kinds) == 1 else "two changes"


def failures(bench: Benchmark, queries: Tensor, answers: int = 5) -> pd.DataFrame:
    """Queries whose first answer is wrong, worst first: a row each, by its place in the benchmark.

    queries: B x E, of a benchmark that knows its gallery. Columns: kind; rank of the best hit; kept and followed of the
    first answer (0 to 1); ignored, the half of the query that came off worse ("image", "words" or
    "both alike"); found, the gallery indices of the first answers.
    """
    ranks, found = bench.ranks(queries), bench.search(queries, answers).numpy()
    rows = {}
    for q in np.flatnonzero(ranks > 1):
        scene = [bench.scenes[i] for i in (bench.reference[q], bench.target[q], found[q, 0])]
        kept, followed = kept_and_followed(*scene)
        ignored = "both alike" if kept == followed else "image" if kept < followed else "words"
        best = kept, followed, ignored, found[q].tolist()
        rows[int(q)] = [kind_of(bench.kinds[q]), int(ranks[q]), *best]
    columns = ["kind", "rank", "kept", "followed", "ignored", "found"]
    table = pd.DataFrame.from_dict(rows, "index", columns=columns)
    order = (table["kept"] + table["followed"]).to_numpy(float)
    return table.iloc[np.lexsort((-table["rank"].to_numpy(int), order))]


def summary(bench: Benchmark, failed: pd.DataFrame) -> pd.DataFrame:
    """By kind of change: queries, wrong first answers, and what these kept and followed (%)."""
    kinds = pd.Series([kind_of(kinds) for kinds in bench.kinds])
    counts = kinds.value_counts()
    order = [kind for kind in (*KINDS, "two changes") if (failed["kind"] == kind).any()]
    means = 100 * failed.groupby("kind")[["kept", "followed"]].mean()
    table = pd.DataFrame({"queries": counts, "wrong": failed["kind"].value_counts()})
    table = table.loc[order].astype(int)
    return table.join(means)


def describe(scene: Scene) -> str:
    """A scene in words, always the same ones: the alternative text of its picture."""
    objects = [f"a {o.size} {o.color} {o.shape} at the {POSITIONS[o.cell]}" for o in scene.objects]
    return f"{', '.join(objects)}; {scene.background} background, {scene.style} style"


def _picture(bench: Benchmark, i: int, title: str, extra: str = "", style: str = "") -> str:
    data = io.BytesIO()
    Image.fromarray(bench.images[i]).save(data, "PNG", optimize=True)
    source = base64.b64encode(data.getvalue()).decode()
    alt = html.escape(f"{title}: {describe(bench.scenes[i])}", quote=True)
    return (
        f'<figure class="{style}"><img src="data:image/png;base64,{source}" width="132" height="132" alt="{alt}">'
        f"<figcaption>{html.escape(title)}{extra}</figcaption></figure>"
    )


def _bars(kept: float, followed: float) -> str:
    return "".join(
        f'<span class="score {name}">{name} {value:.0%}<i style="--part: {value:.0%}"></i></span>'
        for name, value in (("kept", kept), ("followed", followed))
    )


def _card(bench: Benchmark, q: int, row: pd.Series) -> str:
    reference, target = bench.reference[q], bench.target[q]
    answers = []
    for place, i in enumerate(row["found"], 1):
        if bench.labels[i] == bench.labels[target]:
            answers.append(_picture(bench, i, f"{place}: the target", style="target"))
        else:
            shares = kept_and_followed(*(bench.scenes[j] for j in (reference, target, i)))
            answers.append(_picture(bench, i, f"answer {place}", _bars(*shares)))
    less = "both alike" if row["ignored"] == "both alike" else f"less of the {row['ignored']}"
    return f"""<article data-ignored="{row["ignored"]}"><h3>“{html.escape(bench.texts[q])}”</h3>
<div class="row"><div class="asked">{_picture(bench, reference, "reference")}
{_picture(bench, target, f"target, at rank {row['rank']}", style="target")}</div>{"".join(answers)}</div>
<p class="verdict">First answer: {less} (kept {row["kept"]:.0%}, followed {row["followed"]:.0%}).</p></article>"""


def page(
    bench: Benchmark, failed: pd.DataFrame, each: int = 6, title: str = "Where retrieval goes wrong"
) -> str:
    """The page: a table by kind, and the `each` worst queries of every kind as cards."""
    table = summary(bench, failed)
    rows = "".join(
        f'<tr><th scope="row"><a href="#{kind.replace(" ", "-")}">{kind}</a></th><td>{row["queries"]:.0f}</td>'
        f"<td>{row['wrong']:.0f}</td><td>{row['kept']:.0f}%</td><td>{row['followed']:.0f}%</td></tr>"
        for kind, row in table.iterrows()
    )
    sections, shown = [], 0
    for kind in table.index:
        some = failed[failed["kind"] == kind].head(each)
        shown += len(some)
        cards = "\n".join(_card(bench, int(q), row) for q, row in some.iterrows())
        sections.append(
            f'<section id="{kind.replace(" ", "-")}"><h2>{kind}</h2><p class="soft">The {len(some)} worst of '
            f"{table.loc[kind, 'wrong']} wrong first answers to {table.loc[kind, 'queries']} queries.</p>{cards}</section>"
        )
    choices = {"all": "all", "image": "the image", "words": "the words", "both alike": "both alike"}
    choose = "".join(
        f'<label><input type="radio" name="ignored" value="{value}"{" checked" if value == "all" else ""}> {label}</label>'
        for value, label in choices.items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><main><h1>{html.escape(title)}</h1>
<p>{len(failed)} of {len(bench)} queries have a wrong first answer, among {len(bench.scenes)} rendered scenes.
<b>Kept</b>: of what reference and target have in common (objects, background, style), the share that an answer has too.
<b>Followed</b>: of what the words change, the share that it changed. The target has 100% in both.</p>
<table><thead><tr><th scope="col">kind of change</th><th scope="col">queries</th><th scope="col">wrong</th>
<th scope="col">kept</th><th scope="col">followed</th></tr></thead><tbody>{rows}</tbody></table>
<fieldset><legend>What came off worse:</legend>{choose}
<span id="shown" class="soft" role="status">{shown} queries shown</span></fieldset>
{"".join(sections)}</main><script>{_SCRIPT}</script></body></html>
"""
