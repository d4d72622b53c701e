"""Interactive panels: compose a query, look through one token, follow a training.

    panels.compose_panel(bench, vl, encoder, embeddings)  # as the last line of a cell

No panel uses `interact` or an `Output` widget, on which papermill can hang: a control's `observe`
callback sets the text of an `HTML` widget. Pictures are `<img>` inside `HTML` too, because
ipywidgets' `Image` has no alternative text. A panel displays itself without a line of plain text,
so that its output is a widget view and nothing else: papermill runs it, notebooks/execute.py strips
it, and strict nbval passes without a marker. A committed notebook therefore shows a panel only once
its cell was run; put a static figure beside it. From Python, `panel.controls[name].value = ...`
does what a hand does.

Everything goes by keyboard. There is no drop-down list, because JupyterLab takes keys away from
one: an arrow key leaves for the next cell, and the letter m turns the cell into text. Fields,
buttons and (left and right on) sliders keep theirs.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from html import escape

import ipywidgets
import numpy as np
import torch
from IPython.display import display
from ipywidgets import HTML, BoundedIntText, Button, HBox, IntSlider, Layout, Text, VBox
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from isa_lite.analysis.sentences import nearest_words
from isa_lite.course import figures
from isa_lite.distill import History
from isa_lite.models.vl_model import VLModel
from isa_lite.prompt import compose
from isa_lite.query_encoder import QueryEncoder
from isa_lite.retrieval import metrics
from isa_lite.retrieval.gallery import Gallery
from isa_lite.retrieval.scene_queries import Benchmark
from isa_lite.support.images import ImageFolder, Images
from isa_lite.world import scenes

_CSS = f"""<style>
.isa-panel .widget-html-content {{line-height: 1.35; font-size: 14px; overflow-wrap: anywhere; min-width: 0}}
.isa-panel p {{margin: 2px 0}}
.isa-panel h4 {{margin: 0 0 4px; font-size: 16px}}
.isa-panel [role=alert] {{border-left: 5px solid {figures.RED}; padding: 4px 10px; max-height: 8em; overflow: auto}}
.isa-panel [role=status] {{border-left: 5px solid {figures.BLUE}; padding: 4px 10px}}
.isa-query {{display: flex; flex-wrap: wrap; gap: 8px 24px; align-items: flex-start}}
.isa-rows {{flex: 1 1 460px; min-width: 0}}
.isa-rows b {{display: block; margin: 2px 0}}
.isa-row {{display: grid; grid-template-columns: repeat(auto-fill, minmax(76px, 1fr)); gap: 6px; max-width: 1000px}}
.isa-row {{margin-bottom: 8px}}
.isa-panel figure {{margin: 0; text-align: center; font-size: 13px; min-width: 0}}
.isa-panel figure.isa-reference {{flex: 0 0 130px; font-size: 14px}}
.isa-row img {{width: 100%; aspect-ratio: 1; object-fit: contain; box-sizing: border-box; border: 1px solid #999}}
.isa-reference img {{width: 100%; border: 1px solid #999}}
.isa-row .isa-target img {{border: 5px solid {figures.GREEN}}}
.isa-row .isa-target figcaption {{font-weight: bold}}
.isa-panel table {{border-collapse: collapse}}
.isa-panel td, .isa-panel th {{padding: 2px 12px 2px 0; text-align: left; font-variant-numeric: tabular-nums}}
.isa-panel tr.isa-chosen {{font-weight: bold}}
.isa-wide {{max-width: 100%; height: auto}}
</style>"""
_LABEL = {"description_width": "initial"}


class Panel(VBox):
    """Controls, a message, and a picture that follows them.

    controls: by name; `watch` names those whose change draws anew. compute: takes nothing, reads
    the controls, and returns the picture as HTML, the message as HTML, and what they show as data,
    for `shown`. Where it raises ValueError or OSError, the message says so, the picture is emptied
    and `shown` is {}. Whatever a user has typed must come escaped.
    """

    def __init__(
        self, title: str, hint: str, controls: Mapping, watch: Sequence, compute: Callable
    ):
        self.controls, self._watch, self._compute = dict(controls), tuple(watch), compute
        self._drawn: list | None = None
        self.status, self.picture, self.shown = HTML(), HTML(), {}
        head = HTML(f"{_CSS}<h4>{escape(title)}</h4><p>{escape(hint)}</p>")
        together = [  # a slider stays beside its field where the row wraps
            HBox([control, controls[f"{name} slider"]]) if f"{name} slider" in controls else control
            for name, control in controls.items()
            if not name.endswith(" slider")
        ]
        row = HBox(together, layout=Layout(flex_flow="row wrap"))
        super().__init__([head, row, self.status, self.picture], layout=Layout(width="100%"))
        self.add_class("isa-panel")
        for name in self._watch:
            self.controls[name].observe(self._refresh, "value")
        self._refresh()

    def _refresh(self, _change: dict | None = None) -> None:
        values = [self.controls[name].value for name in self._watch]
        if values == self._drawn:  # one control has set another, and that one has drawn already
            return
        self._drawn = values
        try:
            self.picture.value, message, self.shown = self._compute()
            self.status.value = f'<div role="status">{message}</div>'
        except (ValueError, OSError) as error:
            self.picture.value, self.shown = "", {}
            self.status.value = f'<div role="alert"><b>Not possible:</b> {escape(str(error))}</div>'

    def _ipython_display_(self, **kwargs) -> None:
        view = super()._repr_mimebundle_(**kwargs)
        display({kind: data for kind, data in view.items() if kind != "text/plain"}, raw=True)


# -----------------------------------------------------------------------------------------------
# pictures


def _picture(image) -> Image.Image:
    """An image of any kind."""
    made = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    return made.convert("RGB")


def _source(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _thumbnail(image) -> str:
    data = io.BytesIO()
    figures.shrunk(_picture(image), 192).save(data, "png")
    return _source(data.getvalue())


def _card(source: str, caption: str, alt: str, kind: str = "") -> str:
    return f'<figure class="{kind}"><img src="{source}" alt="{escape(alt)}"><figcaption>{escape(caption)}</figcaption></figure>'


def _names(images: Images) -> list[str]:
    """A name for each image: its path in the folder, or its number."""
    if isinstance(images, ImageFolder):
        return [str(file.relative_to(images.folder)) for file in images.files]
    return [str(i) for i in range(len(images))]


def _picker(label: str, count: int) -> BoundedIntText:
    return BoundedIntText(
        value=0, min=0, max=count - 1, description=f"{label} (0 to {count - 1})", style=_LABEL, layout=Layout(width="230px"),
        tooltip="Type a number, or step with the up and down arrow keys",
    )  # fmt: skip


def _number(name: str, value: int, last: int, tooltip: str, disabled: bool = False) -> dict:
    """Controls: a field for a number from 1 to `last`, and a slider that moves with it.

    A screen reader finds no label on a slider.
    """
    shared = {"value": value, "min": 1, "max": last, "tooltip": tooltip, "disabled": disabled}
    shared |= {"continuous_update": False, "style": _LABEL}
    field = BoundedIntText(**shared, description=name.capitalize(), layout=Layout(width="150px"))
    slider = IntSlider(**shared, readout=False, layout=Layout(width="240px", margin="2px 12px"))
    for trait in ("value", "max"):
        ipywidgets.link((field, trait), (slider, trait))
    return {name: field, f"{name} slider": slider}


# -------------------------------------------------------------------------------------------- 1.
# queries


class _Pictures:
    """What a panel of queries knows of somebody's pictures: nothing is suggested, nothing marked.

    reference[q]: the gallery index that query q starts from. captions: what stands below the
    gallery's images.
    """

    def __init__(self, pictures: Images, embeddings: Tensor):
        self.images, self.captions = pictures, _names(pictures)
        self.reference, self.gallery = range(len(pictures)), Gallery(embeddings, self.captions)

    def describe(self, j: int) -> str:
        """The alternative text of an image."""
        return f"picture {self.captions[j]}"

    def suggest(self, q: int) -> list[str]:
        """Modifiers for query q, its own first; as many for each, "" where there is none."""
        return []

    def hits(self, q: int, words: str) -> np.ndarray | None:
        """Which gallery images are right for these words, None if nobody knows."""
        return None


class _Scenes(_Pictures):
    """The same of a benchmark, whose targets are known for the queries' own words."""

    def __init__(self, bench: Benchmark, embeddings: Tensor):
        self.bench, self.images, self.reference = bench, bench.images, bench.reference
        self.captions = [""] * len(bench.images)
        self.gallery = Gallery(embeddings, range(len(bench.images)))

    def describe(self, j: int) -> str:
        return scenes.caption(self.bench.scenes[j], np.random.default_rng(0))

    def suggest(self, q: int) -> list[str]:
        rng, texts = np.random.default_rng((q, 9)), [self.bench.texts[q]]
        scene = self.bench.scenes[self.reference[q]]
        for kind in scenes.KINDS:
            try:
                texts.append(scenes.modify(scene, rng, (kind,), held_out=True)[1].text)
            except ValueError:  # the only object cannot be removed, a fourth cannot be added
                texts.append("")
        return texts

    def hits(self, q: int, words: str) -> np.ndarray | None:
        labels = self.bench.labels
        return labels == labels[self.bench.target[q]] if words == self.bench.texts[q] else None


def _query_controls(known: _Pictures, words: str) -> dict[str, ipywidgets.Widget]:
    """reference, another, modifier and suggestions, tied to one another."""
    count, rng = len(known.reference), np.random.default_rng()
    which = _picker("Reference", count)
    other = Button(
        description="Another one", tooltip="Take a reference by chance", disabled=count < 2
    )
    typed = Text(
        value=words, description="Modifier", placeholder="what should be different", continuous_update=False, style=_LABEL,
        tooltip="Words of your own; the Enter key searches", layout=Layout(flex="1 1 420px", max_width="640px"),
    )  # fmt: skip
    buttons = [
        Button(tooltip="Search with these words", layout=Layout(width="auto"))
        for _ in known.suggest(0)
    ]

    def another(_button) -> None:
        which.value = int((which.value + rng.integers(1, count)) % count)

    def follow_reference(_change=None) -> None:
        for button, text in zip(buttons, known.suggest(which.value), strict=True):
            button.description, button.layout.display = text, None if text else "none"
        if buttons:
            typed.value = buttons[0].description

    def take(button) -> None:
        typed.value = button.description

    other.on_click(another)
    for button in buttons:
        button.on_click(take)
    which.observe(follow_reference, "value")
    follow_reference()
    offer = HBox(buttons, layout=Layout(flex_flow="row wrap"))
    return {"reference": which, "another": other, "modifier": typed, "suggestions": offer}


def _query_panel(
    title: str, hint: str, known: _Pictures, vl: VLModel, encoder: QueryEncoder, words: str = ""
) -> Panel:
    """words: what stands in the field at first, where nothing is suggested."""
    gallery, images, captions = known.gallery, known.images, known.captions
    if len(gallery) < 2:
        raise ValueError("a search needs at least two images: the reference, and one to find")
    thumbnail = lru_cache(1024)(lambda j: _thumbnail(images[j]))
    controls = _query_controls(known, words)

    def compute() -> tuple[str, str, dict]:
        q, words = controls["reference"].value, controls["modifier"].value.strip()
        if not words:
            raise ValueError("there are no words; say what should be different")
        j = int(known.reference[q])
        try:
            sentence = compose(vl, encoder.sentences([images[j]]).tokens, [words])
        except ValueError as error:  # too long for the text tower; a panel has no `truncate`
            raise ValueError(str(error).removesuffix(" or pass truncate=True")) from error
        fused = F.normalize(gallery.embeddings[j : j + 1] + vl.encode_text([words]), dim=-1)
        queries = torch.cat([sentence, fused])
        found = gallery.search(queries, min(10, len(gallery) - 1), torch.tensor([j, j]))[1]
        found, right = (
            dict(zip(("ISA", "image + text"), found.tolist(), strict=True)),
            known.hits(q, words),
        )
        rows = ""
        for name, best in found.items():
            cards = ""
            for k, i in enumerate(best, 1):
                target, alt = right is not None and right[i], f"{k}: {known.describe(i)}"
                caption, kind = ("target", "isa-target") if target else (captions[i], "")
                cards += _card(thumbnail(i), f"{k} {caption}", alt, kind)
            rows += f'<b>{name}</b><div class="isa-row" role="group" aria-label="{name}, best first">{cards}</div>'
        alt = f"reference: {known.describe(j)}"
        start = _card(thumbnail(j), f"reference {captions[j]}", alt, "isa-reference")
        if right is None:
            message = f"“{escape(words)}”: nobody has said which image is right for these words, so none is marked."
        else:
            mask = torch.from_numpy(np.stack([right, right]))
            ranks = metrics.ranks(queries, gallery.embeddings, np.array([j, j]), mask)
            message = (
                f"“{escape(words)}”: the target is at place {ranks[0]} by ISA and at place {ranks[1]} by image + text, "
                f"of {len(gallery) - 1} images."
            )
        html = f'<div class="isa-query">{start}<div class="isa-rows">{rows}</div></div>'
        return html, message, {n: [gallery.ids[i] for i in best] for n, best in found.items()}

    return Panel(title, hint, controls, ("reference", "modifier"), compute)


def compose_panel(
    bench: Benchmark, vl: VLModel, encoder: QueryEncoder, gallery_embeddings: Tensor
) -> Panel:
    """Pick a query of the benchmark, change its words, and see the ten best images of two methods.

    The target is marked only for the query's own words. Suggested beside them: a change of each
    kind that the reference can take. Controls: reference (a query's number), another, modifier,
    suggestions. `shown`: gallery indices by method.
    """
    hint = (
        "Choose a reference, then type what should be different and press Enter, or press one of the suggestions, of which the "
        "first is the reference's own. Rendered scenes."
    )
    return _query_panel("Compose a query", hint, _Scenes(bench, gallery_embeddings), vl, encoder)


def search_panel(
    pictures: Images, vl: VLModel, encoder: QueryEncoder, embeddings: Tensor, words: str = ""
) -> Panel:
    """Pick one of your own pictures, type words, and see the ten best of the others, by ISA and by
    image + text.

    embeddings: N x E, of the same pictures in the same order, from `vl.encode_images`; words: what
    stands in the field at first. Controls: reference, another, modifier. `shown`: names of pictures
    (or their numbers) by method. Nothing is marked.
    """
    hint = "Choose a picture, type what should be different and press Enter."
    known = _Pictures(pictures, embeddings)
    return _query_panel("Search your pictures", hint, known, vl, encoder, words)


# --------------------------------------------------------------------------------------------- 2.
# tokens


def _place(attention: Tensor) -> str:
    """Where a read's map, h x w, is strongest, in words."""
    if float(attention.max() - attention.min()) < 1e-6:
        return "evenly over the whole image"
    height, width = attention.shape
    row, column = divmod(int(attention.argmax()), width)
    place = scenes.POSITIONS[3 * (3 * row // height) + 3 * column // width]
    return f"most at the {place}, where one of {height * width} cells gets {attention.max():.0%} of the weight"


def token_panel(pictures: Images, vl: VLModel, encoders: Mapping[str, QueryEncoder]) -> Panel:
    """Choose an image and a token of its sentence: how it reads the image, and its nearest words.

    encoders: by name; with several, of different numbers of tokens L, a slider goes through them,
    shortest sentence first.
    Controls: image, encoder and token (both from 1). `shown`: words, the nearest with their
    cosines, and reads, N x h x w: the weights of each of the token's N reads.
    """
    if not encoders:
        raise ValueError(
            "encoders is empty; give at least one, for example {'shipped': QueryEncoder.load(folder, vl)}"
        )
    lengths = {
        name: encoder.sentences([pictures[0]]).tokens.shape[1] for name, encoder in encoders.items()
    }
    by_length, several = sorted(lengths, key=lengths.get), len(encoders) > 1
    controls = {"image": _picker("Image", len(pictures))}
    controls |= _number("token", 1, lengths[by_length[0]], "Which token of the sentence")
    said = "Which query encoder writes the sentence"
    controls |= _number("encoder", 1, len(encoders), said, not several)
    which, token, chosen = (controls[name] for name in ("image", "token", "encoder"))
    hint = (
        "Choose an image and a token: type, use the arrow keys, or drag. Bright: where one of its reads has high weights. The "
        "sentence depends on all of them, and not on the weights alone. "
    )
    hint += (
        "With the encoder, the number L of tokens changes; more are not always better."
        if several
        else "There is one encoder here, so no L to choose: train others in notebook 02, with another num_tokens, and give "
        "token_panel a dict of them all."
    )

    def follow_encoder(change) -> None:
        token.max = lengths[by_length[change["new"] - 1]]

    chosen.observe(follow_encoder, "value")

    @lru_cache(32)
    def read(name: str, i: int):
        sentence = encoders[name].sentences([pictures[i]], reads=True)
        return sentence.reads[0], nearest_words(vl, sentence.tokens[0], 5)

    def compute() -> tuple[str, str, dict]:
        name, i, t = by_length[chosen.value - 1], which.value, token.value
        reads, words = read(name, i)  # N x L x h x w
        reads, best = reads[:, t - 1], words[t - 1]
        where = "; ".join(f"read {n}: {_place(weights)}" for n, weights in enumerate(reads, 1))
        alt = f"image {_names(pictures)[i]}, and laid over it the weights of token {t}. {where}"
        html = _token_html(_picture(pictures[i]), reads, alt, words, t)
        said = f"Token {t} of {lengths[name]}, encoder “{escape(name)}”; nearest word: “{escape(best[0][0])}”."
        message = f"{said} {where[0].upper()}{where[1:]}."
        return html, message, {"words": best, "reads": reads}

    return Panel("Look through one token", hint, controls, ("image", "encoder", "token"), compute)


def _token_html(
    picture: Image.Image, reads: Tensor, alt: str, words: Sequence[Sequence], t: int
) -> str:
    """The reads of token t (from 1), N x h x w, over the picture; its nearest words; the sentence.

    words: of each token its nearest ones, with their cosines.
    """
    # the encoder saw the square in the middle, so that is what the map is laid over
    side = min(240, *picture.size)
    square, titles = (
        ImageOps.fit(picture, (side, side)),
        [f"read {n + 1}" for n in range(len(reads))],
    )
    figure = figures.attention(square, reads.numpy(), titles, columns=len(reads) + 1, side=1.8)
    rows = "".join(
        f"<tr><td>{escape(word)}</td><td>{cosine:.2f}</td></tr>" for word, cosine in words[t - 1]
    )
    said = [f"{n} “{escape(near[0][0])}”" for n, near in enumerate(words, 1)]
    said[t - 1] = f"<b>▸ {said[t - 1]}</b>"
    return (
        f'<div class="isa-query"><img class="isa-wide" src="{_source(figures.png(figure))}" alt="{escape(alt)}">'
        f"<table><tr><th>nearest word</th><th>cosine</th></tr>{rows}</table></div>"
        f"<p>The sentence, each token by its nearest word: {' · '.join(said)}</p>"
    )


# ------------------------------------------------------------------------------------------- 3.
# training


def training_panel(history: History | Mapping[str, History]) -> Panel:
    """Loss terms and validation recall along the steps of one training, or of several by name.

    Controls: step, smoothing (steps in a running mean). `shown`: by run "GCD", "LAR" (nats, running
    means up to the step) and "recall" (validation Recall@1 in percent, the last one at or before
    the step); nan for what there is not.
    """
    runs = {"this run": history} if isinstance(history, History) else dict(history)
    if not runs or not all(h.gcd for h in runs.values()):
        fault = "a history without steps has nothing to show"
        raise ValueError(f"{fault}; train first (isa_lite.distill.distill returns it)")
    last = max(len(h.gcd) for h in runs.values())
    smooth = "How many steps a running mean goes over; 1 shows every step"
    controls = _number("step", last, last, "The step that the numbers below belong to")
    controls |= _number("smoothing", min(20, last), min(100, last), smooth)
    step, window = controls["step"], controls["smoothing"]

    def at(values: Sequence[float], s: int) -> float:
        known = values[max(0, s - window.value) : s] if s <= len(values) else [float("nan")]
        return float(np.mean(known))

    def compute() -> tuple[str, str, dict]:
        s, shown = step.value, {}
        for name, h in runs.items():
            recall = [value for point, value in h.recall if point <= s <= len(h.gcd)]
            last_one = [float("nan"), *recall][-1]
            shown[name] = {"GCD": at(h.gcd, s), "LAR": at(h.lar, s), "recall": last_one}
        rows = ""
        for name, values in shown.items():
            told = ["none" if np.isnan(value) else round(value, 2) for value in values.values()]
            cells = "".join(f"<td>{value}</td>" for value in told)
            rows += f"<tr><th>{escape(name)}</th>{cells}</tr>"
        table = f"<table><tr><th>run</th><th>GCD, nats</th><th>LAR, nats</th><th>validation Recall@1, %</th></tr>{rows}</table>"
        figure = figures.curves(runs, window.value, s)
        alt = f"GCD, LAR and validation recall along {last} steps, a dashed line at step {s}; the table below has the numbers"
        html = f'<img class="isa-wide" src="{_source(figures.png(figure))}" alt="{alt}">{table}'
        said = (
            f"At step {s} of {last}; losses are means of the {min(s, window.value)} steps up to it."
        )
        return html, said, shown

    hint = "Choose a step (the dashed line) and how much the losses are smoothed: type, use the arrow keys, or drag."
    return Panel("Follow a training", hint, controls, ("step", "smoothing"), compute)
