"""Into the middle of a text tower: word vectors in, text embedding out, for each family of
open_clip.

open_clip encodes token *ids*. A pseudo-word has none, so what follows the look-up in the word table
is done here: positions, mask, transformer, pooling, projection. The families differ in each of
these. `tests/parity.py` compares every one of them with open_clip's own result. Ours.

A causal tower that is pooled at the end of text need not compute all of it (`OpenClipText.embed`),
with the same result.

Shapes: B batch, T text positions, D word-embedding width, W width of the tower, H heads, E
embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import ResidualAttentionBlock, text_global_pool
from torch import Tensor, nn
from torch.nn import functional as F

from isa_lite.support.hub import repository

#: The extra of this package that brings `transformers`.
EXTRA = "isa_lite[blip]"
_POOLS = ("argmax", "eos", "first", "last")


def _layer(
    block: ResidualAttentionBlock,
    x: Tensor,
    mask: Tensor,
    past: Tensor | None = None,
    at: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One layer of a transformer: B x T x W -> the same, and the keys and values that were looked
    at, 2 x B x H x T x W / H.

    mask: T x all that are looked at; past: keys and values of positions before these; at: one
    position a row, the only one that is wanted, which gives B x 1 x W.
    """
    attention = block.attn
    # B x T x 3W
    projected = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
    # 3 x B x H x T x W / H
    heads = projected.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    queries, seen = heads[0], heads[1:]
    if past is not None:
        seen = torch.cat([past.to(seen.dtype).expand(-1, x.shape[0], -1, -1, -1), seen], 3)
    if at is not None:
        # len(x) would be a constant to the ONNX exporter
        rows = torch.arange(x.shape[0], device=x.device)
        x, queries = x[rows, at].unsqueeze(1), queries.transpose(1, 2)[rows, at].unsqueeze(2)
        mask = mask[at, None, None]
    looked = F.scaled_dot_product_attention(queries, *seen, attn_mask=mask.to(seen.dtype))
    x = x + block.ls_1(attention.out_proj(looked.transpose(1, 2).flatten(2)))
    return x + block.ls_2(block.mlp(block.ln_2(x))), seen


#: Of each layer, the keys and values of words at the start of a text, 2 x 1 x H x T x W / H.
Opening = list[Tensor]


class TextTower:
    """What every way into a text tower shares, beside its own `tokens` and `pool`."""

    def opening(self, vectors: Tensor) -> Opening | None:
        """What later positions read of the words that begin every text, 1 x T x D, without
        gradients. None for a tower whose words look ahead.
        """
        return None

    def embed(self, vectors: Tensor, ids: Tensor, opening: Opening | None = None) -> Tensor:
        """What `pool` makes of `tokens`, B x W. opening: of the words that every row begins with,
        which then are not read again.
        """
        return self.pool(self.tokens(vectors, ids), ids)


class OpenClipText(TextTower):
    """The text tower of open_clip's own make: CLIP, custom text towers (SigLIP, MobileCLIP, EVA,
    ...), CoCa.

    A plain object beside the module that it reads, so that the model's state_dict stays as it is.
    """

    def __init__(self, clip: nn.Module, name: str):
        # CustomTextCLIP keeps the text tower apart, CLIP keeps its parts itself
        self.module = text = getattr(clip, "text", clip)
        self.pool_type: str = text.text_pool_type if text is clip else text.pool_type
        self.eos_id = text.text_eos_id if text is clip else text.eos_id
        # CoCa puts a class token behind the text, and pools that
        self.appends = getattr(text, "cls_emb", None) is not None
        if self.pool_type not in _POOLS and not self.appends:
            raise ValueError(
                f"{name}: its text tower pools by {self.pool_type!r}, which gives no text embedding"
                " to search with"
            )
        self.context_length: int = text.positional_embedding.shape[0] - self.appends
        self.reserved = [i for i in (self.eos_id, getattr(text, "pad_id", 0)) if i is not None]
        # A causal tower that pools at the end of text never looks past it, so the rest need not be
        # computed.
        causal = (
            text.attn_mask is not None
            and not self.appends
            and not getattr(text, "use_pad_mask", False)
        )
        self.can_cut = causal and self.pool_type in ("argmax", "eos")
        self.plain = all(
            type(block) is ResidualAttentionBlock
            for block in getattr(text.transformer, "resblocks", [None])
        )

    @property
    def table(self) -> nn.Embedding:
        return self.module.token_embedding

    def cut(self, ids: Tensor) -> Tensor:
        """B x T ids without the columns past the longest text, where the tower allows that."""
        return ids[:, : int(self._end(ids).max()) + 1] if self.can_cut else ids

    def _end(self, ids: Tensor) -> Tensor:
        """B x T ids -> the position that is pooled, B."""
        return ids.argmax(1) if self.pool_type == "argmax" else (ids == self.eos_id).int().argmax(1)

    def tokens(self, vectors: Tensor, ids: Tensor) -> Tensor:
        """B x T x D word vectors and the ids they stand for -> contextual tokens, B x T x W (CoCa:
        one more, its class token).
        """
        text, x = self.module, vectors
        if self.can_cut and self.plain:  # as open_clip does it, in fewer and larger products
            return text.ln_final(self._layers(self._placed(x))[0])
        if self.appends:
            x = torch.cat([x, text.cls_emb.to(x.dtype).expand(len(x), 1, -1)], 1)
        length, mask = x.shape[1], text.attn_mask
        if mask is not None:
            mask = mask[:length, :length]
        # a mask for each text, that hides the padding
        if self.appends or getattr(text, "use_pad_mask", False):
            mask = text._build_additive_mask(ids, length, x.dtype) + (0 if mask is None else mask)
        return text.ln_final(text.transformer(self._placed(x), attn_mask=mask))

    def _placed(self, x: Tensor) -> Tensor:
        """B x T x D with the positions added."""
        return x + self.module.positional_embedding[: x.shape[1]].to(x.dtype)

    def _layers(
        self, x: Tensor, past: Sequence[Tensor] | None = None, at: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """All layers of a plain causal tower: B x T x W -> the same, and what `_layer` gives of
        each.

        past: the second result for the positions before these; at: B, the one position of each row
        that is wanted of the last layer, which gives B x 1 x W.
        """
        blocks, seen = self.module.transformer.resblocks, []
        start = past[0].shape[3] if past else 0
        mask = self.module.attn_mask[start : start + x.shape[1], : start + x.shape[1]]
        for block, before in zip(blocks, past or [None] * len(blocks), strict=True):
            x, looked_at = _layer(block, x, mask, before, at if block is blocks[-1] else None)
            seen.append(looked_at)
        return x, seen

    @torch.no_grad()
    def opening(self, vectors: Tensor) -> Opening | None:
        if not (self.can_cut and self.plain):
            return None
        with torch.autocast(vectors.device.type, enabled=False):
            return self._layers(self._placed(vectors))[1]

    def embed(self, vectors: Tensor, ids: Tensor, opening: Opening | None = None) -> Tensor:
        """What `pool` makes of `tokens`, B x W, without computing what a causal tower does not need
        for it: of the last layer only the end of text, and nothing of the `opening`.
        """
        if not (self.can_cut and self.plain):
            return super().embed(vectors, ids)
        known = opening[0].shape[3] if opening else 0
        x = self._placed(vectors)[:, known:]
        return self.module.ln_final(self._layers(x, opening, self._end(ids) - known)[0][:, 0])

    def pool(self, tokens: Tensor, ids: Tensor) -> Tensor:
        """Contextual tokens B x T x W -> the one that stands for the text, B x W."""
        return (
            tokens[:, -1]
            if self.appends
            else text_global_pool(tokens, ids, self.pool_type, eos_token_id=self.eos_id)
        )

    def project(self, tokens: Tensor) -> Tensor:
        """... x W -> ... x E, not normalised."""
        projection = self.module.text_projection
        if projection is None:
            return tokens
        return projection(tokens) if isinstance(projection, nn.Linear) else tokens @ projection


class HuggingFaceText(TextTower):
    """A text model of `transformers` in open_clip's wrapper (RoBERTa, XLM-R, mT5, NLLB): padding is
    masked everywhere.
    """

    can_cut = True  # no position looks at the padding

    def __init__(self, text: HFTextEncoder, name: str):
        if type(text.pooler).__name__ == "MaxPooler":
            raise ValueError(
                f"{name}: its text tower pools by 'max_pooler', with which open_clip itself fails"
            )
        self.module, self.pad, self.reserved = (
            text,
            text.config.pad_token_id,
            [text.config.pad_token_id],
        )
        # the tokenizer's; positions of these models reach further or have no end
        self.context_length = 0

    @property
    def table(self) -> nn.Embedding:
        return self.module.transformer.get_input_embeddings()

    def _mask(self, ids: Tensor) -> Tensor:
        return (ids != self.pad).long()

    def cut(self, ids: Tensor) -> Tensor:
        """B x T ids without the columns that are padding in every row."""
        return ids[:, : int(self._mask(ids).any(0).nonzero().max()) + 1]

    def tokens(self, vectors: Tensor, ids: Tensor) -> Tensor:
        """B x T x D word vectors and the ids they stand for -> contextual tokens, B x T x W."""
        return self.module.transformer(
            inputs_embeds=vectors, attention_mask=self._mask(ids)
        ).last_hidden_state

    def pool(self, tokens: Tensor, ids: Tensor) -> Tensor:
        """Contextual tokens B x T x W -> B x W, by open_clip's pooler of this model."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        first = getattr(self.module.transformer, "pooler", None)
        output = BaseModelOutputWithPooling(
            last_hidden_state=tokens, pooler_output=None if first is None else first(tokens)
        )
        return self.module.pooler(output, self._mask(ids))

    def project(self, tokens: Tensor) -> Tensor:
        """... x W -> ... x E, not normalised."""
        return self.module.proj(tokens)


def text_tower(clip: nn.Module, name: str = "") -> OpenClipText | HuggingFaceText:
    """The way into this model's text tower. Raises ValueError, with the reason, for one that has
    none.
    """
    name, text = name or type(clip).__name__, getattr(clip, "text", clip)
    if hasattr(text, "as_tower"):  # a model that we wrap ourselves (blip.py) says how
        return text.as_tower()
    if isinstance(text, HFTextEncoder):
        return HuggingFaceText(text, name)
    if all(
        hasattr(text, part)
        for part in ("token_embedding", "positional_embedding", "transformer", "ln_final")
    ):
        return OpenClipText(clip, name)
    raise ValueError(
        f"{name}: its text tower ({type(text).__name__}) cannot be entered with word vectors: it"
        " has no word table, positions and transformer that we know; take a model of open_clip,"
        " for example ViT-B-32"
    )


def text_config(config: dict, name: str) -> dict:
    """The text settings of a model (`text_cfg` of open_clip's model_cfg), checked before its
    weights are fetched or built.

    Where the text model is one of `transformers`, its own settings are found on this machine (or
    fetched), and named there. Raises ValueError for a model that cannot work; ImportError, naming
    the extra, where `transformers` is missing; ConnectionError, at once, where those settings are
    out of reach.
    """
    text = dict(config.get("text_cfg", {}))
    needs = [text[key] for key in ("hf_model_name", "hf_tokenizer_name") if text.get(key)]
    if needs:
        try:
            import transformers  # noqa: F401
        except ImportError as error:
            what = "text tower" if text.get("hf_model_name") else "tokenizer"
            raise ImportError(
                f"{name}: its {what} ({needs[0]}) needs the package transformers; install the"
                f" extra: pip install '{EXTRA}'"
            ) from error
    pool = text.get("pool_type", "argmax")
    if not text.get("hf_model_name") and not text.get("embed_cls") and pool not in _POOLS:
        raise ValueError(
            f"{name}: its text tower pools by {pool!r}, which gives no text embedding to search"
            " with"
        )
    if text.get("hf_pooler_type") == "max_pooler":
        raise ValueError(
            f"{name}: its text tower pools by 'max_pooler', with which open_clip itself fails"
        )
    if text.get("hf_model_name"):
        found = repository(text["hf_model_name"], f"the text model of {name}", "config.json")
        # the weights come with the model's own
        text |= {"hf_model_name": str(found), "hf_model_pretrained": False}
    return text
