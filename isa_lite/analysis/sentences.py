"""What a sentence holds: its reads, the words it is near, and what follows a change. Ours.

Attention says where a read's weight goes; `interventions` says what the sentence depends on.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from isa_lite.models.vl_model import VLModel
from isa_lite.prompt import TEMPLATE, compose
from isa_lite.query_encoder import QueryEncoder
from isa_lite.retrieval.queries import Queries
from isa_lite.world.scenes import (
    BACKGROUNDS,
    COLORS,
    POSITIONS,
    SHAPES,
    STYLES,
    Scene,
    object_masks,
    render_many,
    sample_scenes,
)


def object_attention(maps: Tensor, masks: np.ndarray | Tensor) -> Tensor:
    """The share of each token's attention on each object of one image: L x N, between 0 and 1.

    maps: L x h x w attention maps, each with sum 1; masks: N x H x W, true where object n is. A
    cell of a map spreads its attention evenly over the pixels it covers; H and W must be multiples
    of h and w, else ValueError.
    """
    masks = torch.as_tensor(np.asarray(masks), dtype=torch.float32)
    (height, width), (rows, columns) = masks.shape[-2:], maps.shape[-2:]
    if height % rows or width % columns:
        fault = f"masks of {height} x {width} pixels do not divide into maps"
        raise ValueError(f"{fault} of {rows} x {columns} cells")
    # N x h x w: share of each cell
    covered = F.avg_pool2d(masks.unsqueeze(1), (height // rows, width // columns)).squeeze(1)
    return torch.einsum("lhw,nhw->ln", maps.float(), covered)


def grounding(maps: Tensor, masks: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Grounding score of each token over many images: its attention on objects, relative to chance.

    maps: B x L x h x w; masks: for each image its objects' masks, N x H x W (N may differ). Chance
    is the share of the image that objects cover: what attention spread evenly gives. Both are
    summed over images before they are divided, so an image with tiny objects cannot blow the score
    up. Returns two vectors of length L: the score with all objects of an image taken together, and
    with only the one that has most of the token's attention, against that object's own area.
    """
    if len(maps) != len(masks):
        raise ValueError(f"attention maps of {len(maps)} images but masks of {len(masks)}")
    on_any, on_one = torch.zeros(maps.shape[1]), torch.zeros(maps.shape[1])
    area_any, area_one = 0.0, torch.zeros(maps.shape[1])
    for m, objects in zip(maps, masks, strict=True):
        together = np.asarray(objects).any(0, keepdims=True)
        on_any += object_attention(m, together)[:, 0]
        area_any += float(together.mean())
        best, which = object_attention(m, objects).max(1)  # L
        on_one += best
        area_one += torch.as_tensor(np.asarray(objects).mean((1, 2)), dtype=torch.float32)[which]
    return on_any / area_any, on_one / area_one


def look(encoders: Sequence[QueryEncoder], images: int = 200, seed: int = 4000) -> dict[str, dict]:
    """Several encoders over the same rendered scenes, by their number of tokens: their `maps`.

    maps: L x h x w, on one scene (`look_scene`); grounding: of each token with its best object,
    over all the scenes; elsewhere: the same with each image's maps laid over another image's
    objects. Raises ValueError for two encoders with the same number of tokens.
    """
    lengths = [encoder.config.num_tokens for encoder in encoders]
    if len(set(lengths)) < len(lengths):
        raise ValueError(
            f"the encoders are told apart by their number of tokens, and these have {lengths}"
        )
    world, found = sample_scenes(images, seed), {}
    for encoder in sorted(encoders, key=lambda e: e.config.num_tokens):
        size = encoder.config.image_size
        maps = encoder.sentences(render_many(world, range(images), size)).maps
        masks = [object_masks(scene, i, size) for i, scene in enumerate(world)]
        found[str(encoder.config.num_tokens)] = {
            "maps": np.round(maps[look_scene(images, seed)[0]].numpy(), 4).tolist(),
            "grounding": np.round(grounding(maps, masks)[1].numpy(), 3).tolist(),
            "elsewhere": np.round(grounding(maps, masks[1:] + masks[:1])[1].numpy(), 3).tolist(),
        }
    return found


def look_scene(images: int = 200, seed: int = 4000) -> tuple[int, Scene]:
    """The scene of `look`'s maps, with its place among them, which is also its rendering seed.

    The first with three filled objects on white: that shows well under a map.
    """
    for i, scene in enumerate(sample_scenes(images, seed)):
        if len(scene.objects) == 3 and (scene.style, scene.background) == ("flat", "white"):
            return i, scene
    raise ValueError(f"none of {images} scenes of seed {seed} has three filled objects on white")


def nearest_words(vl: VLModel, tokens: Tensor, k: int = 3) -> list[list[tuple[str, float]]]:
    """The k words nearest to each vector of ... x D, with cosines, best first (flattened)."""
    table = vl.word_vectors(torch.arange(vl.vocab_size, device=vl.device)).detach().float().cpu()
    # words without training keep the zero vector in our own models
    met = (table.norm(dim=1) > 0).nonzero().flatten()
    own, known = tokens.reshape(-1, tokens.shape[-1]).float().cpu(), table[met]
    likeness = F.normalize(own, dim=1) @ F.normalize(known, dim=1).T
    found = likeness.topk(k)
    return [
        [(vl.words.word(met[i]), float(c)) for i, c in zip(row, cosines, strict=True)]
        for row, cosines in zip(found.indices, found.values, strict=True)
    ]


# "top left" is two words
_PLACES = sorted({word for position in POSITIONS for word in position.split()})
#: What a word of a scene caption names. Words of size, and pieces of words, are "other".
WORD_KINDS = dict.fromkeys(BACKGROUNDS, "background") | dict.fromkeys(STYLES, "style")
WORD_KINDS |= dict.fromkeys(COLORS, "color") | dict.fromkeys(SHAPES, "shape")
WORD_KINDS |= dict.fromkeys(_PLACES, "place")


def _pieces(vl: VLModel, word: str) -> list[str]:
    return [vl.words.word(i) for i in vl.words.ids(word)]


def _piece_kinds(vl: VLModel) -> dict[str, str]:
    """`WORD_KINDS` of what the tokenizer makes of its words."""
    return {piece: kind for word, kind in WORD_KINDS.items() for piece in _pieces(vl, word)}


def word_kinds(vl: VLModel, tokens: Tensor) -> pd.DataFrame:
    """What each token's nearest word names, over B x L x D: a row a token, shares in percent.

    A word that the tokenizer splits ("checkered", "cyan") counts by any of its pieces.
    """
    pieces = _piece_kinds(vl)
    kinds = [*dict.fromkeys(WORD_KINDS.values()), "other"]
    found = [pieces.get(words[0][0], "other") for words in nearest_words(vl, tokens, 1)]
    count, length = tokens.shape[:2]
    grid = np.array(found).reshape(count, length)
    names = [f"token {i + 1}" for i in range(length)]
    return pd.DataFrame({kind: 100 * (grid == kind).mean(0) for kind in kinds}, index=names)


def word_truth(vl: VLModel, tokens: Tensor, world: Sequence[Scene]) -> pd.DataFrame:
    """Whether the tokens' nearest words are true: B x L x D and its scenes; a row a word kind.

    "words": how many of the B x L nearest words name something of this kind; "true, %": of these,
    the share that names what the own scene has (any of its objects); "true of the next image, %":
    the same words beside another scene, which is chance.
    """
    if len(tokens) != len(world):
        raise ValueError(f"{len(tokens)} sentences but {len(world)} scenes")
    kind_of = _piece_kinds(vl)

    def shown(scene: Scene) -> set[str]:
        objects = (f"{o.color} {o.shape} {POSITIONS[o.cell]}" for o in scene.objects)
        return set(_pieces(vl, " ".join((scene.background, scene.style, *objects))))

    words = [word[0][0] for word in nearest_words(vl, tokens, 1)]
    own = [said for said in map(shown, world) for _ in range(tokens.shape[1])]
    other = own[tokens.shape[1] :] + own[: tokens.shape[1]]
    true, chance = (
        [100 * (word in scene) for word, scene in zip(words, said, strict=True)]
        for said in (own, other)
    )
    names = ["true, %", "true of the next image, %"]
    table = pd.DataFrame(dict(zip(names, (true, chance), strict=True)))
    table = table.groupby(pd.Series([kind_of.get(word, "other") for word in words], name="kind"))
    kinds = list(dict.fromkeys(WORD_KINDS.values()))
    found = table.mean().assign(words=table.size()).reindex(kinds)
    return found.fillna({"words": 0}).astype({"words": int})[["words", *names]]


def ranks_rearranged(
    queries: Queries,
    tokens: Tensor,
    orders: Mapping[Hashable, Sequence[int]],
    template: str = TEMPLATE,
) -> dict[Hashable, np.ndarray]:
    """Ranks with every sentence's tokens (B x L x D, of the references) in each given order.

    An order lists places; one left out is deleted. Raises IndexError for none such.
    """
    return {
        name: queries.ranks(compose(queries.vl, tokens[:, list(order)], queries.texts, template))
        for name, order in orders.items()
    }


def ranks_without(
    queries: Queries, tokens: Tensor, template: str = TEMPLATE
) -> dict[Hashable, np.ndarray]:
    """Ranks with the whole sentences (key -1), and with token i deleted from each (key i).

    tokens: B x L x D, of the references. Raises ValueError for sentences of a single token.
    """
    length = tokens.shape[1]
    if length < 2:
        raise ValueError("a sentence of one token has none to spare")
    kept = {i: [j for j in range(length) if j != i] for i in range(-1, length)}
    return ranks_rearranged(queries, tokens, kept, template)


def moved(length: int, token: int) -> list[int]:
    """The order in which one token of a sentence, a place from 0, has gone to the farther end."""
    rest = [i for i in range(length) if i != token]
    return [*rest, token] if token < length / 2 else [token, *rest]


def _facts(scene: Scene) -> set[tuple]:
    parts = [(o, name) for o in scene.objects for name in ("shape", "color", "size")]
    facts = {("object", o.cell, name, getattr(o, name)) for o, name in parts}
    return facts | {("background", scene.background), ("style", scene.style)}


def kept_and_followed(reference: Scene, target: Scene, answer: Scene) -> tuple[float, float]:
    """What an answer did with a query: the share it keeps of the image, and follows of the words.

    A scene is a set of facts: background, style, and shape, colour and size at each place. Kept: of
    the facts that reference and target share, those that the answer has. Followed: of the facts
    that the change brings or takes away, those that the answer has or lacks as the target does.
    Both are 1 for the target itself.
    """
    old, new, found = _facts(reference), _facts(target), _facts(answer)
    followed = (new - old) & found | (old - new) - found
    return len(old & new & found) / max(1, len(old & new)), len(followed) / max(1, len(old ^ new))
