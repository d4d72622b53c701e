"""Figures. Each function returns a matplotlib figure; `show` puts one into a notebook.

Colours are Okabe and Ito's; what a colour says is also said by a mark or a word.
"""

from __future__ import annotations

import html
import io
import itertools
import re
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import pandas as pd
import PIL.Image
from IPython.display import Image as Picture
from IPython.display import Markdown, display
from matplotlib.figure import Figure
from PIL import ImageOps

from isa_lite.distill import History
from isa_lite.retrieval.metrics import bootstrap_interval, recall, recall_interval, seed_interval
from isa_lite.retrieval.queries import Queries

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, GREY, PALE = "#CC79A7", "#666666", "#BBBBBB"
_STYLE = {
    "font.size": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 14,
    "axes.titlelocation": "left",
    "text.parse_math": False,  # a dollar sign in somebody's words is a dollar sign
    "legend.frameon": False,
    "legend.fontsize": 12,
    "lines.linewidth": 2,
}
_styled = matplotlib.rc_context(_STYLE)


class _Figure(Figure):
    """A figure that a notebook shows as the last line of a cell, as it would one of pyplot's."""

    def _repr_png_(self) -> bytes:
        return png(self)


def _plot(width: float, height: float, rows: int = 1, columns: int = 1, **how):
    """A figure of this size in inches, and its axes, as `subplots` gives them."""
    # not pyplot: nothing to close, no double display
    figure = _Figure(figsize=(width, height), layout="constrained", dpi=110)
    return figure, figure.subplots(rows, columns, **how)


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file, cut to what is drawn."""
    data = io.BytesIO()
    figure.savefig(data, format="png", bbox_inches="tight", pad_inches=0.06)
    return data.getvalue()


def _as_text(caption: str) -> str:
    """Words that may come from a user, as Markdown that shows them as they are."""
    text = html.escape(" ".join(caption.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text)


def show(figure: Figure, caption: str, alt: str) -> None:
    """Display a figure with its alternative text, and its caption below as plain text."""
    data = png(figure)
    # 90 pixels of the page to an inch
    width = PIL.Image.open(io.BytesIO(data)).width * 90 // int(figure.dpi)
    display(Picture(data, format="png", alt=alt, width=width))
    display(Markdown(f"*{_as_text(caption)}*"))


def _picture(axes, image, title: str = "", color: str | None = None, size: int = 11) -> None:
    axes.imshow(np.asarray(image), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    weight = "bold" if color else "normal"
    axes.set_title(title, fontsize=size, loc="center", color=color or "black", fontweight=weight)
    for spine in axes.spines.values():
        spine.set(visible=True, linewidth=4 if color else 0.5, color=color or PALE)


def shrunk(image: PIL.Image.Image, side: int) -> PIL.Image.Image:
    """A picture at most `side` pixels wide and high; a smaller one as it is."""
    return ImageOps.contain(image, (side, side)) if max(image.size) > side else image


def wrap(text: str, width: int) -> str:
    """Text broken into lines of at most `width` characters at its spaces."""
    words = " ".join(text.split())
    return textwrap.fill(words, width, break_long_words=False, break_on_hyphens=False)


@_styled
def contact_sheet(
    images: Sequence, titles: Sequence[str] = (), columns: int = 8, wrap_at: int = 22
) -> Figure:
    """Images in rows, each with its title above it."""
    rows = -(-len(images) // columns)
    lines = max((wrap(t, wrap_at).count("\n") + 1 for t in titles), default=0)
    figure, grid = _plot(1.6 * columns, rows * (1.6 + 0.2 * lines), rows, columns, squeeze=False)
    for axes, image, title in itertools.zip_longest(grid.flat, images, titles):
        if image is None:
            axes.axis("off")
        else:
            _picture(axes, image, wrap(title or "", wrap_at), size=9)
    return figure


@_styled
def _rankings(rows: Sequence[tuple], title: str) -> Figure:
    """rows: of each query its reference, words, and answers, best first, each right or not."""
    columns = len(rows[0][2])
    size, widths = (1.45 * (columns + 1.5), 2.05 * len(rows) + 0.35), [1.5] + [1] * columns
    figure, grid = _plot(*size, len(rows), columns + 1, squeeze=False, width_ratios=widths)
    # so that words stay with the picture above them, not the one below
    figure.get_layout_engine().set(h_pad=0.08)
    for axes, (reference, text, answers) in zip(grid, rows, strict=True):
        _picture(axes[0], reference, "reference", size=10)
        axes[0].set_xlabel(wrap(f"“{text}”", 26), fontsize=10)
        if not any(hit for _, hit in answers):
            axes[-1].set_xlabel("no target so far", fontsize=10, color=GREY)
        for k, (a, (image, hit)) in enumerate(zip(axes[1:], answers, strict=True), 1):
            _picture(a, image, f"{k}: target" if hit else str(k), GREEN if hit else None, size=10)
    for a in grid.flat:
        a.set_anchor("N")  # pictures of a row begin at one height, though the reference is larger
    figure.suptitle(title, fontsize=14, x=0.01, ha="left")
    return figure


def retrieval(queries: Queries, rows: Sequence[int], found: np.ndarray, title: str = "") -> Figure:
    """One row per query: its reference and modifier, then the images of `found`, by gallery index.

    A right answer has a green frame and "target" above it. Photographs are at most 192 pixels wide.
    """

    def picture(i: int):
        image = queries.images[int(i)]
        return image if isinstance(image, np.ndarray) else shrunk(image, 192)

    def row(i: int, best: np.ndarray) -> tuple:
        answers = [(picture(j), int(j) in queries.targets[i]) for j in best]
        return picture(queries.reference[i]), queries.texts[i], answers

    return _rankings([row(i, best) for i, best in zip(rows, found, strict=True)], title)


@_styled
def _bars(rows: Mapping, xlabel: str, title: str, emphasis: str, pairs: bool = False) -> Figure:
    """Bars, a row a method: its mean and interval (nan: no line); `pairs`: two by two."""
    places = [i + 0.5 * (i // 2) if pairs else i for i in range(len(rows))]
    figure, axes = _plot(8.5, 0.5 * (places[-1] + 1) + 1.2)
    for i, (y, (name, (mean, low, high))) in enumerate(zip(places, rows.items(), strict=True)):
        ceiling = "ceiling" in name
        color = ORANGE if name == emphasis else "#DDDDDD" if ceiling else BLUE
        edge, pale = GREY if ceiling else "none", 0.55 if pairs and i % 2 else 1
        axes.barh(y, mean, color=color, edgecolor=edge, hatch="//" if ceiling else "", alpha=pale)
        axes.plot([low, high], [y, y], color="black")
        axes.text(min(np.nanmax([high, mean]), 101) + 1, y, f"{mean:.0f}", va="center")
    axes.set_yticks(places, list(rows))
    axes.invert_yaxis()
    axes.set(xlabel=xlabel, xlim=(0, 108), title=title)
    return figure


def recall_bars(
    methods: Mapping[str, np.ndarray],
    k: int = 1,
    title: str = "",
    emphasis: str = "isa",
    pairs: bool = False,
) -> Figure:
    """Recall@K of every method as bars with 95% Wilson intervals; ceilings are hatched.

    `pairs`: every two bars are one method in two settings; they stand together, the second paler.
    """
    rows = {name: (recall(rank, k), *recall_interval(rank, k)) for name, rank in methods.items()}
    return _bars(rows, f"Recall@{k} in % (line: 95% interval over queries)", title, emphasis, pairs)


def seed_bars(
    runs: Sequence[Mapping], k: int = 1, title: str = "", emphasis: str = "isa"
) -> Figure:
    """The same from several runs: means, 95% intervals over seeds; worst first, then ceilings."""
    values = {name: [run["methods"][name][f"R@{k}"] for run in runs] for name in runs[0]["methods"]}
    order = sorted(values, key=lambda name: ("ceiling" in name, np.mean(values[name])))
    # Student's interval of few seeds may reach below 0 or above 100, where no recall is.
    rows = {n: (np.mean(values[n]), *np.clip(seed_interval(values[n]), 0, 100)) for n in order}
    label = f"Recall@{k} in % (line: 95% interval over {len(runs)} seeds)"
    return _bars(rows, label, title, emphasis)


@_styled
def weight_curves(
    recalls: Mapping[str, Sequence[float]], weights: Sequence[float], k: int = 1
) -> Figure:
    """Recall@K along the modifier's weight, a line a fusion; its best has a larger mark."""
    figure, axes = _plot(8.5, 4.2)
    styles = [(BLUE, "-", "o"), (ORANGE, "--", "s"), (GREEN, ":", "^"), (PURPLE, "-.", "D")]
    for (name, found), (color, line, mark) in zip(recalls.items(), styles, strict=False):
        axes.plot(weights, found, color=color, linestyle=line, label=name)
        best = int(np.argmax(found))
        marked = {"marker": mark, "markersize": 12, "fillstyle": "none", "markeredgewidth": 2}
        axes.plot(weights[best], found[best], color=color, **marked)
    axes.set(xlabel="weight of the modifier", ylabel=f"Recall@{k} in %", ylim=(0, None))
    axes.set_title("How much should the words count?")
    axes.legend()
    return figure


@_styled
def token_bars(
    scores: Mapping[str, Sequence[float]], ylabel: str, title: str = "", level: float | None = None
) -> Figure:
    """A value for each token, a bar for each name in `scores`; `level`: a dashed line across."""
    figure, axes = _plot(10, 4)
    width = 0.8 / len(scores)
    fills = [(ORANGE, ""), (BLUE, "//"), (GREEN, "..")]
    for i, ((name, values), (color, hatch)) in enumerate(zip(scores.items(), fills, strict=False)):
        where = np.arange(len(values)) + (i - (len(scores) - 1) / 2) * width
        axes.bar(where, values, width, color=color, hatch=hatch, edgecolor="white", label=name)
    if level is not None:
        axes.axhline(level, color="black", linestyle="--", linewidth=1.5)
    axes.set_xticks(range(len(values)), [str(i + 1) for i in range(len(values))])
    axes.set(xlabel="token", ylabel=ylabel, title=title)
    figure.legend(loc="outside lower center", ncols=len(scores))
    return figure


@_styled
def heatmap(table: pd.DataFrame, label: str, title: str = "") -> Figure:
    """A table as coloured cells with rounded numbers, of what `label` says; if long, turned."""
    if len(table) > 12:
        table = table.T  # as wide as a page or a slide, and not higher
    values = table.to_numpy(float)
    rows, columns = values.shape
    figure, axes = _plot(min(1.1, 14 / columns) * columns + 3.2, 0.42 * rows + 1.4)
    drawn = axes.imshow(values, cmap="cividis", aspect="auto")
    middle = (values.min() + values.max()) / 2
    for y, x in np.ndindex(*values.shape):
        ink = "white" if values[y, x] < middle else "black"
        # an int knows no "-0"
        number = round(values[y, x]) if np.isfinite(values[y, x]) else values[y, x]
        axes.text(x, y, f"{number}", ha="center", va="center", color=ink, fontsize=12)
    long, many = max(len(str(c)) for c in table.columns) > 8, columns > 12
    turned = {"rotation": 40 if many else 25, "ha": "right"} if long or many else {}
    axes.set_xticks(range(columns), list(table.columns), **turned)
    axes.set_yticks(range(rows), list(table.index))
    axes.spines[:].set_visible(False)
    axes.set_title(title)
    figure.colorbar(drawn, label=label)
    return figure


@_styled
def maps(
    panels: Mapping[str, Mapping[str, np.ndarray]], ties: Sequence[tuple[str, str]] = ()
) -> Figure:
    """Points in two dimensions, a panel a title, each named set with its own colour and mark.

    ties: pairs of names whose points belong together one by one; a thin grey line joins them.
    """
    columns, rows = min(2, len(panels)), -(-len(panels) // 2)
    figure, grid = _plot(5.2 * columns, 4.6 * rows + 0.4, rows, columns, squeeze=False)
    places = iter(grid.flat)
    styles = [(BLUE, "o"), (ORANGE, "^"), (GREEN, "s"), (PURPLE, "D"), (RED, "v")]
    for (title, sets), axes in zip(panels.items(), places, strict=False):
        for a, b in ties:
            if a in sets and b in sets:
                for p, q in zip(sets[a], sets[b], strict=True):
                    axes.plot(*zip(p, q, strict=True), color=PALE, linewidth=0.5, zorder=0)
        for (name, points), (color, mark) in zip(sets.items(), styles, strict=False):
            how = {"s": 22, "color": color, "marker": mark, "alpha": 0.75, "linewidths": 0}
            axes.scatter(*points.T, label=name, **how)
        axes.set(xticks=[], yticks=[])
        axes.set_title(title)
    for axes in places:  # the place beside an odd last panel
        axes.axis("off")
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, handletextpad=0.1)
    return figure


@_styled
def growth_curves(found: Mapping, k: int = 1) -> Figure:
    """Recall@K and the time of one exact search along the gallery's size (of `growth.growth`)."""
    figure, (left, right) = _plot(12, 4.2, 1, 2)
    sizes = [point["gallery"] for point in found["points"]]
    styles = [(ORANGE, "-", "o"), (BLUE, "--", "s"), (GREY, ":", "^")]
    for name, (color, line, mark) in zip(found["points"][0]["methods"], styles, strict=False):
        recalls = [point["methods"][name][f"R@{k}"] for point in found["points"]]
        values, low, high = zip(*recalls, strict=True)
        left.plot(sizes, values, color=color, linestyle=line, marker=mark, label=name)
        left.fill_between(sizes, low, high, color=color, alpha=0.18, linewidth=0)
    left.set(ylim=(0, 100), ylabel=f"Recall@{k} in %", xscale="log")
    left.legend()
    right.plot(sizes, [point["search_ms"] for point in found["points"]], color=BLUE, marker="o")
    right.set(yscale="log", ylabel="one exact search, ms", xscale="log")
    for axes, title in ((left, "Recall as the gallery grows"), (right, "Time of one exact search")):
        axes.set(xlabel="images in the gallery", title=title)
    return figure


@_styled
def ablations(record: Mapping, only: Sequence[str] = (), k: int = 1) -> Figure:
    """Recall@K of a sweep's record, a panel an ablation: numbers are a curve, names are bars.

    only: the ablations to show, in this order, those of them that the record has; all, in its own
    order, where there are none.

    The default is orange (a diamond on a curve, "default" beside a bar). Means over seeds, with 95%
    intervals if there are several. Dashed: the composition ceiling of the same runs.
    """
    shown: dict[str, dict[str, list[Mapping]]] = {}
    for entry in record["runs"]:
        if entry["ablation"]:
            shown.setdefault(entry["ablation"], {}).setdefault(entry["label"], []).append(entry)
    shown = {name: shown[name] for name in only or shown if name in shown}
    columns = 2 if len(shown) in (2, 4) else 3
    rows = max(1, -(-len(shown) // columns))
    figure, grid = _plot(4.6 * columns, 3.4 * rows, rows, columns, squeeze=False)
    names = ("isa", "composition ceiling")
    panels = itertools.zip_longest(grid.flat, shown.items(), fillvalue=("", {}))
    for axes, (ablation, values) in panels:
        if not values:
            axes.axis("off")
            continue
        points = []  # label, default or not, and mean, low, high, ceiling
        for label, found in values.items():
            recalls, ceilings = ([e["methods"][m][f"R@{k}"] for e in found] for m in names)
            interval = np.clip(seed_interval(recalls), 0, 100)
            default = not found[0]["changed"]
            points.append((label, default, np.mean(recalls), *interval, np.mean(ceilings)))
        if all(re.fullmatch(r"[\d.e+-]+", label) for label in values):
            _ablation_curve(axes, sorted(points, key=lambda point: float(point[0])), k)
        else:
            _ablation_bars(axes, points, k)
        axes.set_title(ablation)
    return figure


def _ablation_curve(axes, points: Sequence[tuple], k: int) -> None:
    x, y = [float(point[0]) for point in points], [point[2] for point in points]
    axes.plot(x, y, color=BLUE, marker="o")
    for at, (_, default, mean, low, high, _) in zip(x, points, strict=True):
        axes.plot([at, at], [low, high], color="black", linewidth=1.5)
        if default:
            axes.plot(at, mean, color=ORANGE, marker="D", markersize=10)
    axes.plot(x, [point[5] for point in points], color=GREY, linestyle="--", linewidth=1.5)
    positive = min(x) > 0  # a logarithm has no place for 0
    # of numbers that can be read
    apart = (0.15 if max(x) >= 1000 else 0.12) * np.log(max(x) / min(x)) if positive else 0
    axes.set(xscale="log" if positive else "linear", ylim=(0, 102), ylabel=f"Recall@{k} in %")
    axes.minorticks_off()
    # the default keeps its number, whatever is beside it
    named = [at for at, point in zip(x, points, strict=True) if point[1]]
    for at in x:
        if not positive or all(abs(np.log(at / other)) > apart for other in named):
            named.append(at)
    labels = [f"{at:g}" if at in named else "" for at in x]
    axes.set_xticks(x, labels, rotation=30 if max(x) >= 1000 else 0)


def _ablation_bars(axes, points: Sequence[tuple], k: int) -> None:
    for y, (_, default, mean, low, high, ceiling) in enumerate(points):
        axes.barh(y, mean, color=ORANGE if default else BLUE)
        axes.plot([low, high], [y, y], color="black", linewidth=1.5)
        axes.plot([ceiling, ceiling], [y - 0.5, y + 0.5], color=GREY, linestyle="--", linewidth=1.5)
        # away from the ceiling's line
        text, inside = f"{mean:.1f}" + (" default" if default else ""), mean > 40
        x = np.nanmin([mean, low]) - 2 if inside else np.nanmax([mean, high]) + 2
        color = "white" if inside and not default else "black"
        side = "right" if inside else "left"
        axes.text(x, y, text, ha=side, va="center", fontsize=11, color=color)
    size = 11 if len(points) < 7 else 9.5
    axes.set_yticks(range(len(points)), [wrap(point[0], 22) for point in points], fontsize=size)
    axes.invert_yaxis()
    axes.set(xlim=(0, 102), xlabel=f"Recall@{k} in %")


def _lay_over(axes, attention: np.ndarray, image: np.ndarray) -> None:
    """A map over a picture: a dark veil where there is little attention, a thin one where much."""
    share = attention / attention.max()
    extent = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
    how = {"cmap": "cividis", "interpolation": "bilinear", "vmin": 0, "vmax": 1}
    axes.imshow(share, extent=extent, alpha=0.72 - 0.42 * share, **how)


@_styled
def attention_by_length(image, maps: Mapping[str, np.ndarray], columns: int = 12) -> Figure:
    """One image as sentences of several lengths see it: of each its maps (L x h x w) in rows."""
    image = np.asarray(image)
    blocks = []
    for length, found in maps.items():
        cut = [found[s : s + columns] for s in range(0, len(found), columns)]
        blocks += zip([f"L = {length}"] + [""] * (len(cut) - 1), cut, strict=True)
    size = columns + 1, 1.16 * len(blocks)
    figure, grid = _plot(*size, len(blocks), columns + 1, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for row, (name, found) in zip(grid, blocks, strict=True):
        where = {"ha": "right", "va": "center", "transform": row[0].transAxes}
        row[0].text(0.95, 0.5, name, fontsize=13, **where)
        for axes, one in zip(row[1:], found, strict=False):
            axes.imshow(image, interpolation="nearest")
            _lay_over(axes, np.asarray(one), image)
    return figure


@_styled
def kept_and_followed(summary: pd.DataFrame, title: str = "") -> Figure:
    """What wrong first answers kept of the image and followed of the words (%), by kind of change.

    summary: a row a kind, with the columns wrong (a count), kept and followed, as
    `failures.summary` gives it.
    """
    figure, axes = _plot(8.5, 0.55 * len(summary) + 1.6)
    for y, (kept, followed) in enumerate(zip(summary["kept"], summary["followed"], strict=True)):
        axes.plot([kept, followed], [y, y], color=PALE, linewidth=3, zorder=1)
    rows = range(len(summary))
    marks = ("kept", "image", BLUE, "o"), ("followed", "words", ORANGE, "^")
    for name, what, color, mark in marks:
        how = {"s": 110, "color": color, "marker": mark, "zorder": 2}
        axes.scatter(summary[name], rows, label=f"{name} of the {what}", **how)
    axes.set_yticks(rows, [f"{kind} ({count} wrong)" for kind, count in summary["wrong"].items()])
    axes.set(xlim=(-3, 103), ylim=(len(summary) - 0.5, -0.5), title=title)
    axes.set_xlabel("mean over the wrong first answers, in %")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@_styled
def latency(table: pd.DataFrame, title: str = "") -> Figure:
    """The parts of one query's time, stacked, a bar a system; a mark: the whole in one call.

    table: a row a part and a last one for the whole, a column a system, ms (`query_timing.timed`).
    Parts are timed one by one, so that a bar need not end at its mark.
    """
    figure, axes = _plot(9.5, 0.7 * len(table.columns) + 1.9)
    fills = [(PALE, ""), (ORANGE, ""), (GREEN, "//")]
    fills += [("#DDDDDD", ".."), (BLUE, ""), (PURPLE, "\\\\")]
    for y, system in enumerate(table.columns):
        left, whole = 0.0, table[system].iloc[-1]
        for (part, ms), (color, hatch) in zip(table[system].iloc[:-1].items(), fills, strict=False):
            how = {"color": color, "hatch": hatch, "edgecolor": "white"}
            axes.barh(y, ms, left=left, label=None if y else part, **how)
            left += ms
        label = None if y else f"{table.index[-1]}, in one call"
        how = {"color": "black", "markeredgecolor": "white", "markersize": 9}
        axes.plot(whole, y, "D", label=label, **how)
        axes.text(max(left, whole), y, f"   {whole:.1f} ms", va="center")
    axes.set_yticks(range(len(table.columns)), list(table.columns))
    axes.invert_yaxis()
    longest = max(table.iloc[:-1].sum().max(), table.iloc[-1].max())
    axes.set(xlabel="ms for one query", title=title, xlim=(0, 1.17 * float(longest)))
    figure.legend(fontsize=11, loc="outside lower center", ncols=4)
    return figure


@_styled
def curves(histories: Mapping[str, History], window: int = 20, step: int | None = None) -> Figure:
    """Loss terms (running means over `window` steps) and recall; `step`: a dashed line there."""
    figure, panels = _plot(12, 3.8, 1, 3)
    # the first is the one that a notebook is about
    styles = [(ORANGE, "-"), (BLUE, "--"), (GREEN, ":"), (PURPLE, "-.")]
    for (name, h), (color, line) in zip(histories.items(), styles, strict=False):
        look = {"color": color, "linestyle": line, "label": name}
        for axes, values in zip(panels, (h.gcd, h.lar), strict=False):
            if values:
                width = min(window, 1 + len(values) // 2)  # a run of few steps is a line too
                smooth = np.convolve(values, np.ones(width) / width, "valid")
                axes.plot(np.arange(len(smooth)) + width, smooth, **look)
        panels[2].plot(*zip(*h.recall, strict=True), marker="o", linewidth=1.5, **look)
    panels[0].set(title="GCD", ylabel="nats")
    panels[1].set(title="LAR", ylabel="nats")
    panels[2].set(title="own image found", ylabel="validation Recall@1 in %", ylim=(0, 102))
    for axes in panels:
        axes.set_xlabel("step")
        if axes.lines:
            axes.legend(fontsize=11)
            if step is not None:
                axes.axvline(step, color=GREY, linestyle=(0, (4, 3)), linewidth=1.5)
        else:
            where = {"ha": "center", "transform": axes.transAxes}
            axes.text(0.5, 0.5, "not used in this run", color=GREY, **where)
    return figure


@_styled
def attention(
    image, maps: np.ndarray, titles: Sequence[str] = (), columns: int = 7, side: float = 1.6
) -> Figure:
    """An image (`side` inches) and the weights with which each token reads it, brighter is more.

    maps: L x h x w, those of one read, token by token; or N x L x h x w, all N reads
    (`Sentence.reads`): then each token has a column of N pictures, and each band of tokens begins
    with the image. Every picture is scaled to its own highest weight.
    """
    image, maps = np.asarray(image), np.asarray(maps)
    several, reads = maps.ndim == 4, maps.reshape(-1, *maps.shape[-3:])
    count = reads.shape[1]
    bands = -(-count // (columns - 1)) if several else -(-(count + 1) // columns)
    size = side * columns, (side * len(reads) + (0.4 if several else 0.25)) * bands
    figure, grid = _plot(*size, bands * len(reads), columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for i in range(count):
        band, column = divmod(i, columns - 1) if several else divmod(i + 1, columns)
        for n, read in enumerate(reads):
            axes = grid[band * len(reads) + n, column + several]
            axes.axis("on")
            title = "" if n else titles[i] if titles else f"token {i + 1}"
            _picture(axes, image, wrap(title, 14) if several else title, size=9 if several else 11)
            _lay_over(axes, read[i], image)
            if several and column == 0:
                axes.set_ylabel(f"read {n + 1}", fontsize=10)
    for axes in grid[:: len(reads), 0] if several else grid[:1, 0]:
        axes.axis("on")
        _picture(axes, image, "image")
    return figure


@_styled
def cover_curves(
    values: Mapping[str, np.ndarray], shares: Sequence[float], ylabel: str, title: str = ""
) -> Figure:
    """What covering a growing share of the images does: means over queries with 95% intervals.

    values: by region, shares x B (`interventions.cover_curves`). A curve that falls early names
    what the sentence depends on.
    """
    figure, axes = _plot(10, 4.4)
    colors, lines = (GREY, GREEN, BLUE, PURPLE, ORANGE, RED), (":", "--", "-", "-.", "-", ":")
    styles, percent = zip(colors, lines, "x^sDov", strict=True), 100 * np.asarray(shares)
    for (name, found), (color, line, mark) in zip(values.items(), itertools.cycle(styles)):
        axes.plot(percent, found.mean(1), color=color, linestyle=line, marker=mark, label=name)
        low, high = zip(*(bootstrap_interval(row) for row in found), strict=True)
        axes.fill_between(percent, low, high, color=color, alpha=0.18, linewidth=0)
    axes.set(xlabel="share of the image that is covered, in %", ylabel=ylabel, title=title)
    axes.set_xlim(0, None)
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    figure.legend(loc="outside right center")
    return figure


@_styled
def search_curve(
    times: Mapping[str, float], found: Mapping[str, float], line: Sequence[str], title: str = ""
) -> Figure:
    """Share of the exact answers found against a search's time: points; `line` joins some in order.

    The names in `line` are a kind and a number, "IVF, 8": in the legend, and beside the points.
    """
    figure, axes = _plot(8.5, 4.4)
    kind = f"{line[0].split(', ')[0]}, with the number of lists opened"
    axes.plot([times[n] for n in line], [found[n] for n in line], "o-", color=BLUE, label=kind)
    others = sorted((n for n in times if n not in line), key=times.get)
    for name in times:
        if name in line:
            # Right below its point: the curve comes from the left.
            text, shift = name.split(", ")[-1], {"xytext": (7, -14), "ha": "left"}
        else:
            # Above its point, clear of the curve; one line higher than the last, if beside it.
            text, shift = name, {"xytext": (0, 12 + 15 * others.index(name)), "ha": "center"}
            how = {"color": ORANGE, "markersize": 10, "markeredgecolor": "white"}
            axes.plot(times[name], found[name], "s", **how)
        shift |= {"textcoords": "offset points", "fontsize": 11}
        axes.annotate(text, (times[name], found[name]), **shift)
    axes.set(xscale="log", xlabel="one search, ms (logarithmic)", ylabel="exact answers found, %")
    axes.set(ylim=(0, 122), yticks=range(0, 101, 20), title=title)
    axes.legend(loc="lower right")
    axes.margins(x=0.12)
    low, high = axes.get_xlim()
    marks = [m * 10.0**e for e in range(-5, 6) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    axes.set_xticks(marks, [f"{mark:g}" for mark in marks])
    axes.minorticks_off()
    return figure
