"""The token ids of one prompt, put together piece by piece; how it begins; and what sentences must
be. Ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from isa_lite.models.text_tower import Opening
from isa_lite.models.tokenization import Words
from isa_lite.models.vl_model import VLModel
from isa_lite.support.settings import TEMPLATE

SENTENCE, MODIFIER = "{sentence}", "{modifier}"


def prompt_row(
    words: Words, num_tokens: int, modifier: str, template: str, truncate: bool
) -> tuple[list[int], list[bool]]:
    """Ids of a prompt, and which of them stand for pseudo-words. Raises ValueError for more of
    these than fit, and for a modifier that does not, unless `truncate` allows cutting its end.
    """
    if not 0 <= num_tokens <= words.room:
        raise ValueError(
            f"num_tokens must be from 0 to {words.room}, what the text tower reads, not"
            f" {num_tokens}"
        )
    parts = list(_parts(words, num_tokens, modifier, template))
    over = sum(len(ids) for _, ids in parts) - words.room
    if over > 0:
        said = sum(len(ids) for piece, ids in parts if piece == MODIFIER)
        if not truncate or over > said:
            raise ValueError(
                f"the prompt is {over} token(s) too long for the text tower's"
                f" {words.context_length}; shorten the modifier {modifier[:60]!r} ({said} tokens)"
                " or pass truncate=True"
            )
        parts = [(p, ids[: said - over] if p == MODIFIER else ids) for p, ids in parts]
    row = words.frame([i for _, ids in parts for i in ids])
    mark = [False] * len(words.prefix) + [piece == SENTENCE for piece, ids in parts for _ in ids]
    return row, mark + [False] * (len(row) - len(mark))


def _parts(
    words: Words, num_tokens: int, modifier: str, template: str
) -> Iterator[tuple[str, list[int]]]:
    """The two fields and what stands around them, in order, with their ids."""
    if not modifier.strip():
        template = template.replace(MODIFIER, "").rstrip(" ,.;:")
    before = ""  # what stands before a piece: nothing, a space, or a word that it is glued to
    for piece in filter(None, re.split(r"(\{sentence\}|\{modifier\})", template)):
        text = {MODIFIER: modifier, SENTENCE: "*"}.get(piece, piece)
        before = "space" if before and text[:1].isspace() else before
        own = piece == SENTENCE
        yield piece, [words.placeholder] * num_tokens if own else words.ids(text, before)
        before = "space" if text[-1:].isspace() else "word"


def checked_sentences(tokens: object, width: int, count: int) -> Tensor:
    """Sentences B x L x D as a tensor. Raises ValueError for another shape, other than `count` of
    them, and for what is not finite.
    """
    if isinstance(tokens, np.ndarray):
        tokens = torch.from_numpy(np.ascontiguousarray(tokens))
    floats = isinstance(tokens, Tensor) and tokens.is_floating_point()
    if not floats or tokens.ndim != 3 or tokens.shape[2] != width:
        found = tuple(tokens.shape) if floats else f"a {type(tokens).__name__}"
        raise ValueError(f"tokens must be a tensor of floats, B x L x {width}, not {found}")
    if len(tokens) != count:
        raise ValueError(f"{len(tokens)} sentences but {count} modifiers")
    finite = tokens.isfinite().flatten(1).all(1)  # B
    if not finite.all():
        raise ValueError(f"tokens must be finite, and sentence {int(finite.int().argmin())} is not")
    return tokens


def opening(vl: VLModel, template: str = TEMPLATE) -> Opening | None:
    """What the text tower makes of the template's own words at the start of a prompt, the same for
    every query (`VLModel.opening`).

    Signs that are glued to the first field do not count: where a modifier is empty, "(" and ")"
    around it are one token, "()".
    """
    words = vl.words.ids(re.sub(r"\S+$", "", template.partition("{")[0]))
    return vl.opening([*vl.words.prefix, *words])
