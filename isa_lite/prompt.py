"""Composition: the sentence and the modifier in one prompt for the frozen text tower.

KNOWN: pseudo-words stand in a prompt, "a photo of", in front of the modifier, and the text tower
reads both as one text.
OURS: the punctuation, and the order of the pieces in one table of ids.

Shapes: B batch, L pseudo-words, T text positions, D word-embedding width, E embedding width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from isa_lite.models.text_tower import Opening
from isa_lite.models.vl_model import VLModel, check_texts
from isa_lite.support.parameters import checked, whole
from isa_lite.support.settings import TEMPLATE, check_template


def prompt_ids(
    vl: VLModel,
    num_tokens: int,
    modifiers: Sequence[str],
    template: str = TEMPLATE,
    truncate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Token ids of one prompt a modifier, B x T, and where the pseudo-words go, B x T bool
    (`num_tokens` true a row).

    The ids are put together piece by piece, so no character of a modifier can be taken for a
    placeholder. With an empty modifier the template ends behind the sentence. Raises ValueError for
    a template without its two fields, and for a modifier that does not fit, unless `truncate`
    allows cutting its end.
    """
    check_template(template)
    modifiers = check_texts(modifiers, "modifiers")
    if not 0 <= num_tokens <= vl.words.room:
        raise ValueError(
            f"num_tokens must be from 0 to {vl.words.room}, what the text tower reads, not"
            f" {num_tokens}"
        )
    words = vl.words
    rows, marks = [], []
    for modifier in modifiers:
        wanted = (
            template if modifier.strip() else template.replace("{modifier}", "").rstrip(" ,.;:")
        )
        pieces = [p for p in re.split(r"(\{sentence\}|\{modifier\})", wanted) if p]
        # what stands before a piece: nothing, a space, or a word that it is glued to
        parts, before = {}, ""
        for p in pieces:
            text = modifier if p == "{modifier}" else "*" if p == "{sentence}" else p
            before = "space" if before and text[:1].isspace() else before
            parts[p] = (
                [words.placeholder] * num_tokens if p == "{sentence}" else words.ids(text, before)
            )
            before = "space" if text[-1:].isspace() else "word"
        over = sum(len(parts[p]) for p in pieces) - words.room
        if over > 0:
            said = len(parts.get("{modifier}", []))
            if not truncate or over > said:
                raise ValueError(
                    f"the prompt is {over} token(s) too long for the text tower's"
                    f" {vl.context_length}; shorten the modifier {modifier[:60]!r} ({said} tokens)"
                    " or pass truncate=True"
                )
            parts["{modifier}"] = parts["{modifier}"][: said - over]
        row = words.frame([i for p in pieces for i in parts[p]])
        mark = [False] * len(words.prefix) + [p == "{sentence}" for p in pieces for _ in parts[p]]
        rows.append(row)
        marks.append(mark + [False] * (len(row) - len(mark)))
    ids = vl.cut(torch.tensor(rows, device=vl.device))
    return ids, torch.tensor(marks, device=vl.device)[:, : ids.shape[1]]


def opening(vl: VLModel, template: str = TEMPLATE) -> Opening | None:
    """What the text tower makes of the template's own words at the start of a prompt, the same for
    every query (`VLModel.opening`).

    Signs that are glued to the first field do not count: where a modifier is empty, "(" and ")"
    around it are one token, "()".
    """
    words = vl.words.ids(re.sub(r"\S+$", "", template.partition("{")[0]))
    return vl.opening([*vl.words.prefix, *words])


def splice(vl: VLModel, tokens: Tensor, ids: Tensor, places: Tensor) -> Tensor:
    """Word vectors of the prompts with the pseudo-words in their places: tokens B x L x D, ids and
    places B x T -> B x T x D.
    """
    vectors = vl.word_vectors(ids)
    return vectors.masked_scatter(places.unsqueeze(-1), tokens.to(vectors.dtype))


def start_vectors(vl: VLModel, start_words: str) -> Tensor:
    """The word vectors of a text, N x D, on the CPU. Raises ValueError where `vl` has never seen
    one of its tokens.
    """
    words = (
        vl.word_vectors(torch.tensor(vl.words.ids(start_words), device=vl.device))
        .detach()
        .float()
        .cpu()
    )
    if unknown := int((words.norm(dim=1) == 0).sum()):
        raise ValueError(
            f"start_words: {vl.name} has never seen {unknown} of the tokens of {start_words!r}"
        )
    return words


@checked(batch_size=whole(1))
@torch.no_grad()
def compose(
    vl: VLModel,
    tokens: Tensor,
    modifiers: Sequence[str],
    template: str = TEMPLATE,
    truncate: bool = False,
    batch_size: int = 64,
) -> Tensor:
    """Sentences B x L x D and one modifier each -> L2-normalised query embeddings B x E, on the
    CPU.

    Raises ValueError for sentences of another shape or width than the model's words, or not finite;
    for modifiers that are no list of as many texts ("" asks for no change); and for a modifier that
    does not fit, unless `truncate` cuts its end.
    """
    check_template(template)
    modifiers = check_texts(modifiers, "modifiers")
    if isinstance(tokens, np.ndarray):
        tokens = torch.from_numpy(np.ascontiguousarray(tokens))
    if not isinstance(tokens, Tensor) or not tokens.is_floating_point():
        raise ValueError(
            f"tokens must be a tensor of floats, B x L x {vl.word_width}, not a"
            f" {type(tokens).__name__}"
        )
    if tokens.ndim != 3 or tokens.shape[2] != vl.word_width:
        raise ValueError(
            f"tokens must have the shape B x L x {vl.word_width}, not {tuple(tokens.shape)}"
        )
    if len(tokens) != len(modifiers):
        raise ValueError(f"{len(tokens)} sentences but {len(modifiers)} modifiers")
    if not tokens.isfinite().all():
        raise ValueError(
            "tokens must be finite, and sentence"
            f" {int((~tokens.isfinite()).flatten(1).any(1).nonzero()[0])} is not"
        )
    # for a single query it would only be more work
    parts, known = [], opening(vl, template) if len(modifiers) > 1 else None
    for s in range(0, len(modifiers), batch_size):
        ids, places = prompt_ids(
            vl, tokens.shape[1], modifiers[s : s + batch_size], template, truncate
        )
        parts.append(
            vl.encode_vectors(
                splice(vl, tokens[s : s + batch_size].to(vl.device), ids, places), ids, known
            ).cpu()
        )
    return torch.cat(parts)


def _prompts(vl: VLModel, tokens: Tensor, template: str) -> tuple[Tensor, Tensor]:
    """Ids and places, B x T each, of the prompt of sentences B x L x D without a modifier."""
    return tuple(
        row.expand(len(tokens), -1) for row in prompt_ids(vl, tokens.shape[1], [""], template)
    )


def sentence_embeddings(
    vl: VLModel, tokens: Tensor, template: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Sentences B x L x D without a modifier -> embeddings B x E, what LAR reads B x T x width,
    places B x T.

    LAR reads contextual tokens, except where the VL model's matching encoder wants the word vectors
    (BLIP's).
    """
    ids, places = _prompts(vl, tokens, template)
    vectors = splice(vl, tokens, ids, places)
    context = vl.text_tokens(vectors, ids)
    return (
        vl.pool(context, ids),
        vectors if vl.matcher_reads_words else context[:, : ids.shape[1]],
        places,
    )


def sentence_queries(vl: VLModel, tokens: Tensor, template: str) -> Tensor:
    """The embeddings of `sentence_embeddings` alone, B x E. Nobody reads other positions, so the
    tower need not finish them.
    """
    ids, places = _prompts(vl, tokens, template)
    return vl.encode_vectors(splice(vl, tokens, ids, places), ids, opening(vl, template))


def read_sentences(
    vl: VLModel, tokens: Tensor, template: str, local: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sentences B x L x D -> embeddings B x E; and of the first n = `local`, what LAR reads and
    places: n x T x width, n x T.
    """
    if local == 0:
        return sentence_queries(vl, tokens, template), None, None
    query, context, places = sentence_embeddings(vl, tokens[:local], template)
    if local < len(tokens):
        query = torch.cat([query, sentence_queries(vl, tokens[local:], template)])
    return query, context, places
