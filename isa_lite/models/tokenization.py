"""A model's tokenizer as a prompt needs it: the ids of a piece of text, and the frame around.

open_clip has two kinds of tokenizers: its own (`SimpleTokenizer`), and a wrapper of one of
`transformers` (`HFTokenizer`). They differ in what stands before and behind a text and in what
fills the rest of the row, and text towers look at all of it. The frame is therefore read off the
tokenizer's own rows, not assumed. Ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import open_clip

from isa_lite.support.checkpoint import read_json
from isa_lite.support.hub import tokenizer_folder

#: A word before a piece that does not start the prompt, while that is encoded; its ids are dropped.
ANCHOR = "a"


def _settled(text: str, clean: Callable[[str], str]) -> str:
    """Cleaned until nothing changes: "&lt;" becomes "<", and "&amp;lt;" on the second go."""
    while (cleaned := clean(text)) != text:
        text = cleaned
    return text


class Words:
    """Text -> ids without a frame (`ids`), ids -> a whole row (`frame`), id -> its text (`word`).

    prefix, suffix: ids before and behind the text; pad: fills the row; room: how many ids fit
    between; placeholder: an id that no pooling and no mask takes for something else, for the places
    of pseudo-words (`reserved`: ids that the text tower itself reads as padding or end). Raises
    ValueError for a tokenizer of neither kind, and for one that pads on the left.
    """

    def __init__(self, tokenizer, name: str = "", reserved: Sequence[int] = ()):
        self.tokenizer, self.context_length = tokenizer, getattr(tokenizer, "context_length", None)
        self._known: dict[tuple[str, str], list[int]] = {}
        simple = hasattr(tokenizer, "eot_token_id")
        self.inner = None if simple else getattr(tokenizer, "tokenizer", None)
        if simple:
            self.prefix, self.suffix = [tokenizer.sot_token_id], [tokenizer.eot_token_id]
            self.special, self.pad, self._tail = {*self.prefix, *self.suffix}, 0, 0
            self.room = self.context_length - 2
        elif callable(self.inner) and self.context_length:
            self.special = set(self.inner.all_special_ids) - {self.inner.unk_token_id}
            self._read_frame(name)
        else:
            raise ValueError(
                f"{name or 'the model'}: prompts are composed for open_clip's own tokenizer"
                " (SimpleTokenizer) and for its wrapper of one of transformers (HFTokenizer), and"
                f" this model has a {type(tokenizer).__name__}"
            )
        taken = self.special | {0, self.pad, *self.prefix, *self.suffix, *reserved}
        self.placeholder = next(i for i in range(1, len(taken) + 2) if i not in taken)

    def _read_frame(self, name: str) -> None:
        """Prefix, suffix and pad, from a row with one word and a row with too many."""
        too_many = " ".join([ANCHOR] * (self.context_length + 2))
        few, many = self._encode(ANCHOR), self._encode(too_many)
        short, full = self.tokenizer([ANCHOR, too_many]).tolist()
        start = next((i for i in range(len(short)) if few and short[i : i + len(few)] == few), None)
        if start is None or short[:start] != full[:start]:
            raise ValueError(
                f"{name or 'the model'}: its tokenizer ({type(self.inner).__name__}) pads on the"
                " left, or changes words by what surrounds them; prompts cannot be composed for it"
                " piece by piece"
            )
        same = [a == b for a, b in zip(full[start:], many, strict=False)]
        self.room = (same + [False]).index(False)
        self.prefix, rest = short[:start], short[start + len(few) :]
        self.suffix = full[start + self.room :]
        # how much of the suffix stands before the padding
        for before in range(len(self.suffix), -1, -1):
            behind = self.suffix[before:]
            fill = rest[before : len(rest) - len(behind)]
            if fill and len(set(fill)) == 1 and rest == self.suffix[:before] + fill + behind:
                self.pad, self._tail = fill[0], len(behind)
                return
        fault = f"{name or 'the model'}: the rows of its tokenizer"
        raise ValueError(f"{fault} ({type(self.inner).__name__}) have no plain padding")

    def _encode(self, text: str) -> list[int]:
        return self.inner(text, add_special_tokens=False).input_ids

    def _simple_ids(self, text: str) -> list[int]:
        text = _settled(text, self.tokenizer.clean_fn)
        ids = self.tokenizer.encode(text)
        if any(i in self.special for i in ids):  # somebody typed "<end_of_text>"
            ids = self.tokenizer.encode(text.replace("<", "< "))
        return ids

    def _wrapped_ids(self, text: str, before: str) -> list[int]:
        text = _settled(text, self.tokenizer.clean_fn)
        # somebody typed "</s>" or "[SEP]": no special token, but characters
        for tag in self.inner.all_special_tokens:
            while len(tag) > 1 and tag in text:
                text = text.replace(tag, f"{tag[0]} {tag[1:]}")
        ids = self._encode(text) if text else []
        if before and text:  # as the tokenizer writes it within a text, not at its start
            anchor = self._encode(ANCHOR)
            whole = self._encode(ANCHOR + " " * (before == "space") + text)
            ids = whole[len(anchor) :] if whole[: len(anchor)] == anchor else ids
        return [i for i in ids if i not in self.special]  # should one have got through all the same

    def ids(self, text: str, before: str = "") -> list[int]:
        """Ids of a piece of text, without a frame. before: nothing (""), a "space" or a "word"."""
        key = (text, before)
        if key not in self._known:
            if len(self._known) >= 10_000:
                self._known.clear()
            made = self._wrapped_ids(text, before) if self.inner else self._simple_ids(text)
            self._known[key] = made
        return list(self._known[key])

    def frame(self, ids: Sequence[int]) -> list[int]:
        """The whole row for ids that fit into `room`: prefix, ids, suffix, padding."""
        cut = len(self.suffix) - self._tail
        fill = [self.pad] * (self.room - len(ids))
        return [*self.prefix, *ids, *self.suffix[:cut], *fill, *self.suffix[cut:]]

    def word(self, i: int) -> str:
        """The text of one id, without the space that goes with it."""
        return (self.inner or self.tokenizer).decode([int(i)]).strip()


def hf_tokenizer(folder: Path, **settings) -> open_clip.tokenizer.HFTokenizer:
    """A tokenizer of `transformers` from its files. Raises ValueError naming one that is none."""
    for path in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        if path.exists():
            read_json(path, "a tokenizer or its settings")
    made = open_clip.tokenizer.HFTokenizer(
        str(folder), local_files_only=True, trust_remote_code=False, **settings
    )
    made([ANCHOR])  # some settings are only looked at now
    made.tokenizer(ANCHOR)
    return made


@lru_cache(maxsize=8)
def _simple(settings: str) -> open_clip.SimpleTokenizer:
    """open_clip's tokenizer with these settings (JSON); shared, as its tables take seconds."""
    return open_clip.SimpleTokenizer(**json.loads(settings))


def load_tokenizer(text: dict, name: str, folder: Path | None = None):
    """A model's own tokenizer.

    text: the model's text settings; folder: the model's, whose tokenizer files come first. Raises
    ConnectionError, at once, for a tokenizer that is neither on this machine nor within reach.
    """
    length = text.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
    settings = {"context_length": length, **(text.get("tokenizer_kwargs") or {})}
    if not text.get("hf_tokenizer_name"):
        return _simple(json.dumps(settings))
    files = ("tokenizer.json", "tokenizer_config.json")
    if folder is None or not any((folder / file).is_file() for file in files):
        folder = tokenizer_folder(text["hf_tokenizer_name"], name)
    return hf_tokenizer(folder, tokenizer_mode=text.get("tokenizer_mode"), **settings)
