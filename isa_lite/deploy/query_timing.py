"""What one query costs, by a sentence (light or with the large tower), and by late fusion.

Every table of a query's time in this package is made of the steps that are defined here. Ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from isa_lite.deploy.measure import multiply_adds, peak_activations, side_by_side
from isa_lite.models.symmetric import LARGE_TOWER
from isa_lite.models.vl_model import VLModel
from isa_lite.prompt import TEMPLATE, opening, prompt_ids, splice
from isa_lite.query_encoder import QueryEncoder
from isa_lite.retrieval.gallery import Gallery

#: The parts of a query, in order, and all of them together. Late fusion has no token learner.
PARTS = ("picture to pixels", "image encoding", "token learner", "prompt (tokenizer)")
PARTS += ("text tower", "search")
WHOLE = "whole query"
#: A query as functions by its parts' names, each of what the one before gave; the first gets None.
Steps = dict[str, Callable]
#: What is asked, and in how many images it is searched.
MODIFIER, GALLERY = "make the circle red", 5000


def sentence_steps(
    vl: VLModel,
    encoder: QueryEncoder,
    pictures: Sequence,
    modifiers: Sequence[str],
    search: Callable[[Tensor], object],
    template: str = TEMPLATE,
    cut: bool = True,
) -> Steps:
    """A query as `compose` answers it, from pictures of any size.

    cut: False for a text tower that reads all its positions and forgets them, as open_clip does it.
    """
    encoder.eval()
    known = opening(vl, template)

    def prompt(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ids, places = prompt_ids(vl, tokens.shape[1], modifiers, template)
        if not cut:
            missing = vl.context_length - ids.shape[1]
            ids, places = F.pad(ids, (0, missing), value=vl.words.pad), F.pad(places, (0, missing))
        return tokens, ids, places

    def read(prompt: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        vectors, ids = splice(vl, *prompt), prompt[1]
        if cut:
            return vl.encode_vectors(vectors, ids, known)
        return vl.pool(vl.text_tokens(vectors, ids), ids)

    learner = (lambda x: encoder.mapping(x).tokens, prompt)
    steps = (lambda _: encoder.pixels(pictures), encoder.features, *learner, read, search)
    return dict(zip(PARTS, steps, strict=True))


def fusion_steps(
    vl: VLModel,
    pictures: Sequence,
    modifiers: Sequence[str],
    search: Callable[[Tensor], object],
    cut: bool = True,
) -> Steps:
    """A query by late fusion: the large image tower on pictures, the text tower on modifiers.

    cut: False for open_clip's own `encode_text`, which reads all positions.
    """

    known = vl.opening(vl.words.prefix)

    def ids(image: Tensor) -> tuple[Tensor, Tensor]:
        found = vl.tokenize(modifiers)
        return image, vl.cut(found) if cut else found

    def read(image_and_ids: tuple[Tensor, Tensor]) -> Tensor:
        image, ids = image_and_ids
        text = vl.encode_ids(ids, known) if cut else vl.clip.encode_text(ids, normalize=True)
        return F.normalize(image + text, dim=-1)

    steps = (lambda _: vl.pixels(pictures), vl.encode_pixels, ids, read, search)
    return dict(zip([part for part in PARTS if part != "token learner"], steps, strict=True))


def calls(steps: Steps) -> dict[str, Callable[[], object]]:
    """Each step as a call on what those before it gave, and "whole query": all in one call."""
    value, found = None, {}
    with torch.no_grad():
        for part, step in steps.items():
            found[part] = partial(step, value)
            value = step(value)
    return found | {WHOLE: lambda: reduce(lambda x, step: step(x), steps.values(), None)}


def timed(systems: dict[str, Steps], rounds: int) -> pd.DataFrame:
    """Median ms of every part and the whole (rows) of each system (columns), taking turns."""
    made = {(part, s): call for s, steps in systems.items() for part, call in calls(steps).items()}
    times = pd.Series(side_by_side(made, rounds)).unstack()
    return times.reindex(index=[*PARTS, WHOLE], columns=list(systems))


def blank(side: int, batch: int = 1) -> np.ndarray:
    """Grey images, B x side x side x 3 uint8: what is in an image does not change what it costs."""
    return np.full((batch, side, side, 3), 128, np.uint8)


def random_gallery(vl: VLModel, images: int) -> Gallery:
    """So many random embeddings of the model's width."""
    width = vl.encode_text([MODIFIER]).shape[1]
    return Gallery(F.normalize(torch.randn(images, width), dim=1), range(images))  # G x E


def _symmetric(vl: VLModel, encoder: QueryEncoder) -> QueryEncoder:
    """The VL image tower with a token learner of the same kind, untrained: it costs the same."""
    kept = ("mapping", "num_tokens", "norm_matching", "width", "depth")
    settings = {name: getattr(encoder.config, name) for name in kept}
    return QueryEncoder.for_model(vl, backbone=LARGE_TOWER, **settings)


def cost(
    vl: VLModel, encoder: QueryEncoder, batch: int = 1, rounds: int = 30, gallery: int = GALLERY
) -> pd.DataFrame:
    """Multiply-adds (millions) and time (ms) an image of a query's parts, also beside the tower.

    "query, light": by a sentence of the encoder; "query, symmetric": by late fusion. Both from
    pictures of the model's size to the ten best of `gallery` random embeddings.
    """
    search, said = partial(random_gallery(vl, gallery).search, k=10), [MODIFIER] * batch
    pictures = blank(encoder.config.image_size, batch)
    light = calls(sentence_steps(vl, encoder, pictures, said, search))
    symmetric = calls(fusion_steps(vl, blank(vl.image_size, batch), said, search))

    def sentence() -> None:
        light["image encoding"]()
        light["token learner"]()

    rows = {
        "VL image tower": symmetric["image encoding"],
        "light encoder (backbone)": light["image encoding"],
        "image to sentence (backbone + token learner)": sentence,
        "text tower, sentence and modifier": light["text tower"],
        "query, light": light[WHOLE],
        "query, symmetric": symmetric[WHOLE],
    }
    table = pd.DataFrame({"multiply-adds": {n: multiply_adds(c) / batch for n, c in rows.items()}})
    table["ms"] = pd.Series(side_by_side(rows, rounds)) / batch
    return beside_tower(table)


def beside_tower(table: pd.DataFrame) -> pd.DataFrame:
    """The table, with how many times more the row "VL image tower" takes than each."""
    for column in ("multiply-adds", "ms"):
        table[f"VL tower / {column}"] = table.loc["VL image tower", column] / table[column]
    return table


def split(
    vl: VLModel, encoder: QueryEncoder, gallery: int = GALLERY, rounds: int = 30
) -> pd.DataFrame:
    """One query (batch 1): a row a part, for the asymmetric and the symmetric query side.

    Both start from a picture of the model's size and end with the ten best of `gallery` random
    embeddings. Columns for each: ms (median), multiply-adds in millions, and MiB of weights. The
    last row is the whole query in one call, with the peak of its activations in MiB in a column of
    its own. Threads: as many as torch uses (`vl_model.machine`).
    """
    encoders = {"asymmetric": encoder, "symmetric": _symmetric(vl, encoder)}
    stored = random_gallery(vl, gallery)
    search = partial(stored.search, k=10)
    systems = {}
    for side, model in encoders.items():
        pictures = blank(model.config.image_size)
        systems[side] = sentence_steps(vl, model, pictures, [MODIFIER], search)
    made = {side: calls(steps) for side, steps in systems.items()}
    image_tower = list(vl.clip.visual.parameters())
    large = set(map(id, image_tower))
    weights = {}
    for side, model in encoders.items():
        own = model.config.backbone == LARGE_TOWER
        held = {
            "image encoding": image_tower if own else model.backbone.parameters(),
            "token learner": model.mapping.parameters(),
            # a CLIP keeps both towers in one module
            "text tower": (p for p in vl.clip.parameters() if id(p) not in large),
            "search": [stored.embeddings],
        }
        weights[side] = {part: sum(4 * w.numel() for w in ws) / 2**20 for part, ws in held.items()}
        weights[side][WHOLE] = sum(weights[side].values())
    adds = {s: {part: multiply_adds(call) for part, call in c.items()} for s, c in made.items()}
    peaks = {side: {WHOLE: peak_activations(c[WHOLE])} for side, c in made.items()}
    columns = {"ms": timed(systems, rounds), "multiply-adds": pd.DataFrame(adds)}
    columns |= {"weights, MiB": pd.DataFrame(weights), "activations, MiB": pd.DataFrame(peaks)}
    return pd.concat(columns, axis=1).reindex([*PARTS, WHOLE])


def ratios(ms: pd.DataFrame, others: Sequence[str] = ("symmetric",)) -> pd.Series:
    """How many times a light query's time the others take; columns "light, cut" and so on."""
    whole, found = ms.loc[WHOLE], {}
    for name in others:
        for other, own in (("uncut", "cut"), ("cut", "cut"), ("uncut", "uncut")):
            ratio = whole[f"{name}, {other}"] / whole[f"light, {own}"]
            found[f"{name} {other} / light {own}"] = ratio
    return pd.Series(found, name="ratio")


def end_to_end(
    vl: VLModel, encoder: QueryEncoder, rounds: int = 30, gallery: int = GALLERY
) -> tuple[pd.DataFrame, pd.Series]:
    """Milliseconds of one query and its parts (batch 1), a column a system; and ratios.

    light: by a sentence; symmetric: by late fusion with the large image tower; symmetric ISA: by a
    sentence of that tower. cut: the text tower computes what its pooled position needs
    (`VLModel.encode_vectors`), the same code for all; uncut: all positions in all layers, as
    open_clip does it and others run it. The large tower is open_clip's throughout.
    """
    search = partial(random_gallery(vl, gallery).search, k=10)
    systems, encoders = {}, {"light": encoder, "symmetric ISA": _symmetric(vl, encoder)}
    for way, cut in (("cut", True), ("uncut", False)):
        for name, model in encoders.items():
            what = blank(model.config.image_size), [MODIFIER], search
            systems[f"{name}, {way}"] = sentence_steps(vl, model, *what, cut=cut)
        what = blank(vl.image_size), [MODIFIER], search
        systems[f"symmetric, {way}"] = fusion_steps(vl, *what, cut)
    ms = timed(systems, rounds)
    return ms, ratios(ms, ("symmetric", "symmetric ISA"))
