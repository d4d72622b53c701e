"""ISA as a method: a query encoder's sentence about each reference, read with the modifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from isa_lite.prompt import TEMPLATE, compose
from isa_lite.query_encoder import QueryEncoder
from isa_lite.retrieval.embed import ahead
from isa_lite.retrieval.queries import Queries


@dataclass(frozen=True)
class Isa:
    """Composed embeddings by a query encoder.

    truncate: cut modifiers that do not fit the text tower, instead of raising ValueError. The
    others say how pictures are read (`embed.embed_files`).
    """

    encoder: QueryEncoder
    template: str = TEMPLATE
    truncate: bool = False
    batch_size: int = 128
    num_workers: int = 0
    progress: bool = False

    def sentences(self, queries: Queries) -> Tensor:
        """The sentence of each reference, B x L x D; an image of several queries is read once."""
        used, place = np.unique(queries.reference, return_inverse=True)
        batches = np.split(used, range(self.batch_size, len(used), self.batch_size))

        def pixels(rows: Sequence[int]) -> Tensor:
            return self.encoder.pixels([queries.images[int(i)] for i in rows])

        self.encoder.eval()
        read = ahead(pixels, batches, self.num_workers)
        bar = tqdm(read, total=len(batches), desc="references", disable=not self.progress)
        with torch.inference_mode():
            tokens = torch.cat([self.encoder(batch).tokens.cpu() for batch in bar])
        return tokens[place]

    def __call__(self, queries: Queries) -> Tensor:
        tokens = queries.each(self.sentences(queries))
        how = self.template, self.truncate
        return queries.joined(compose(queries.vl, tokens, queries.texts, *how))
