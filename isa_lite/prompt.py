"""Composition: the sentence and the modifier in one prompt for the frozen text tower.

Paper: pseudo-words stand in a prompt, "a photo of", in front of the modifier, and the text encoder
reads both as one text; its output is the query embedding. Ours: the punctuation, and how the token
ids are put together.

Shapes: B batch, L pseudo-words, T text positions, D word-embedding width, E embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from isa_lite.models.prompt_rows import checked_sentences, opening, prompt_row
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
    rows = [prompt_row(vl.words, num_tokens, said, template, truncate) for said in modifiers]
    ids, places = (torch.tensor(part, device=vl.device) for part in zip(*rows, strict=True))
    ids = vl.cut(ids)  # B x T
    return ids, places[:, : ids.shape[1]]


def splice(vl: VLModel, tokens: Tensor, ids: Tensor, places: Tensor) -> Tensor:
    """Word vectors of the prompts with the pseudo-words in their places: tokens B x L x D, ids and
    places B x T -> B x T x D.
    """
    vectors = vl.word_vectors(ids)  # B x T -> B x T x D
    return vectors.masked_scatter(places.unsqueeze(-1), tokens.to(vectors.dtype))


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
    tokens = checked_sentences(tokens, vl.word_width, len(modifiers))
    # for a single query it would only be more work
    known = opening(vl, template) if len(modifiers) > 1 else None
    parts = []
    for s in range(0, len(modifiers), batch_size):
        said, some = modifiers[s : s + batch_size], tokens[s : s + batch_size].to(vl.device)
        ids, places = prompt_ids(vl, tokens.shape[1], said, template, truncate)
        vectors = splice(vl, some, ids, places)  # B x T x D
        parts.append(vl.encode_vectors(vectors, ids, known).cpu())
    return torch.cat(parts)


class Prompt(NamedTuple):
    """The prompt of a sentence without a modifier, as training reads it; made once for a run."""

    ids: Tensor  # 1 x T
    places: Tensor  # 1 x T, true where the L pseudo-words go
    opening: Opening | None

    @classmethod
    def of(cls, vl: VLModel, num_tokens: int, template: str = TEMPLATE) -> Prompt:
        """Raises ValueError where L = `num_tokens` pseudo-words do not fit."""
        return cls(*prompt_ids(vl, num_tokens, [""], template), opening(vl, template))


def read_sentences(
    vl: VLModel, tokens: Tensor, prompt: Prompt, local: int = 0
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sentences B x L x D -> embeddings B x E; and of the first n = `local`, what LAR reads and
    places: n x T x width, n x T.

    LAR reads contextual tokens, except where the VL model's matching encoder wants the word vectors
    (BLIP's). Of the other sentences nobody reads more than the embedding, so the tower need not
    finish them.
    """
    ids, places = (row.expand(len(tokens), -1) for row in (prompt.ids, prompt.places))  # B x T
    vectors = splice(vl, tokens, ids, places)  # B x T x D
    if local == 0:
        return vl.encode_vectors(vectors, ids, prompt.opening), None, None
    context = vl.text_tokens(vectors[:local], ids[:local])  # n x T x width
    query = vl.pool(context, ids[:local])  # n x E
    if local < len(tokens):
        rest = vl.encode_vectors(vectors[local:], ids[local:], prompt.opening)
        query = torch.cat([query, rest])  # B x E
    read = vectors[:local] if vl.matcher_reads_words else context[:, : ids.shape[1]]
    return query, read, places[:local]


def sentence_embeddings(vl: VLModel, tokens: Tensor, template: str) -> tuple[Tensor, ...]:
    """`read_sentences` with a fresh prompt, and LAR on all B of them."""
    return read_sentences(vl, tokens, Prompt.of(vl, tokens.shape[1], template), len(tokens))
