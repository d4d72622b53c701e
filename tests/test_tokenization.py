"""Pieces of a prompt against the tokenizer's own rows of the whole text, for each kind of tokenizer
there is.
"""

import open_clip
import pytest
import torch
from open_clip.tokenizer import HFTokenizer

from isa_lite.models.tokenization import Words

transformers = pytest.importorskip(
    "transformers", reason="needs the extra: pip install 'isa_lite[blip]'"
)
tokenizers = pytest.importorskip(
    "tokenizers", reason="needs the extra: pip install 'isa_lite[blip]'"
)

CORPUS = [
    "a photo of a red cat, make it blue",
    "an image of the large star at the top left, without the circle",
] * 4
WHOLE = [
    ("a photo of cat, make it blue", ["a photo of ", "cat", ", ", "make it blue"]),
    ("star but blue", ["star", " but ", "blue"]),
]
WHOLE += [("blue in a picture of the cat", ["blue", " in a picture of ", "the cat"])]


def made(kind: str, folder, side: str = "right", **settings) -> HFTokenizer:
    """A tokenizer of a kind, trained on a few lines, framed as the models frame it, in open_clip's
    wrapper.
    """
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    if kind == "word pieces":  # BERT
        own = Tokenizer(models.WordPiece(unk_token="<unk>"))
        own.pre_tokenizer, trainer = (
            pre_tokenizers.BertPreTokenizer(),
            trainers.WordPieceTrainer(vocab_size=80, special_tokens=special),
        )
    elif kind == "byte pairs":  # RoBERTa: a word with a space before it is another word
        own, own_pre = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
        own.pre_tokenizer, own.decoder = own_pre, decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=alphabet
        )
    else:  # sentence pieces: T5, XLM-R (a mark before each word) or Gemma (a mark for each space)
        own, scheme = (
            Tokenizer(models.Unigram()),
            "always" if kind == "sentence pieces" else "never",
        )
        own.pre_tokenizer, own.decoder = (
            pre_tokenizers.Metaspace(prepend_scheme=scheme),
            decoders.Metaspace(prepend_scheme=scheme),
        )
        trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>")
    own.normalizer = normalizers.Lowercase()
    own.train_from_iterator(CORPUS, trainer)
    frame = "<s> $A </s>" if kind in ("word pieces", "byte pairs") else "$A </s>"
    own.post_processor = processors.TemplateProcessing(
        single=frame, special_tokens=[(t, special.index(t)) for t in ("<s>", "</s>")]
    )
    names = dict(
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        cls_token="<s>",
        unk_token="<unk>",
    )
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=own, padding_side=side, **names)
    wrapped.save_pretrained(folder)
    return HFTokenizer(str(folder), context_length=48, **settings)


KINDS = ["word pieces", "byte pairs", "sentence pieces", "spaces marked"]


def framed(words: Words, pieces: list[str]) -> list[int]:
    ids, before = [], ""
    for piece in pieces:
        before = "space" if before and piece[:1].isspace() else before
        ids += words.ids(piece, before)
        before = "space" if piece[-1:].isspace() else "word"
    return words.frame(ids)


@pytest.mark.parametrize("kind", [*KINDS, "open_clip's own"])
@pytest.mark.parametrize("text, pieces", WHOLE)
def test_pieces_in_a_frame_are_the_row_of_the_whole_text(kind, text, pieces, tmp_path):
    tokenizer = (
        open_clip.SimpleTokenizer(context_length=48)
        if kind.startswith("open_clip")
        else made(kind, tmp_path)
    )
    words = Words(tokenizer)
    assert framed(words, pieces) == tokenizer([text])[0].tolist()


@pytest.mark.parametrize(
    "settings",
    [{}, {"strip_sep_token": True}, {"tokenizer_mode": "clips"}, {"clean": "canonicalize"}],
    ids=["plain", "CLIPA", "CLIPS", "SigLIP"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_frame_is_read_off_the_tokenizer(kind, settings, tmp_path):
    tokenizer = made(kind, tmp_path, **settings)
    words = Words(tokenizer)
    for text in ("red", "a photo of the large star", "make it blue without the circle"):
        assert words.frame(words.ids(text)) == tokenizer([text])[0].tolist()
    full = words.frame([words.placeholder] * words.room)
    assert (
        len(full) == 48
        and words.pad not in full[len(words.prefix) : len(words.prefix) + words.room]
    )
    assert words.placeholder not in (*words.prefix, *words.suffix, words.pad, 0)


def test_padding_that_is_also_the_end_is_told_from_it(tmp_path):
    """SigLIP's tokenizer ends and fills a row with the same id."""
    tokenizer = made("sentence pieces", tmp_path)
    tokenizer.tokenizer.pad_token = "</s>"
    words = Words(tokenizer)
    assert words.pad == words.suffix[0] == 2 and words.room == 47
    assert words.frame(words.ids("red star")) == tokenizer(["red star"])[0].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_tag_typed_into_a_text_is_characters(kind, tmp_path):
    words = Words(made(kind, tmp_path))
    for tag in (
        "</s>",
        "<s>",
        "<pad>",
        "&lt;/s&gt;",
        "</s></s>",
        "red </s> blue",
        "&amp;lt;pad&amp;gt;",
    ):
        for before in ("", "space", "word"):
            assert words.ids(tag, before) and not set(words.ids(tag, before)) & words.special, tag
    # what follows counts
    assert words.ids("red </s> blue")[-len(words.ids("blue", "space")) :] == words.ids(
        "blue", "space"
    )


def test_ids_are_remembered_but_cannot_be_changed_from_outside(tmp_path):
    words = Words(made("word pieces", tmp_path))
    words.ids("red").append(99)
    assert 99 not in words.ids("red")


def test_a_word_is_read_back(tmp_path):
    words = Words(made("byte pairs", tmp_path))
    assert "".join(words.word(i) for i in words.ids("star", "space")) == "star"
    own = Words(open_clip.SimpleTokenizer())
    assert [own.word(i) for i in own.ids("a red star")] == ["a", "red", "star"] and own.word(
        torch.tensor(320)
    ) == "a"


def test_ids_that_the_tower_reserves_are_no_placeholder():
    assert Words(open_clip.SimpleTokenizer()).placeholder == 1
    assert Words(open_clip.SimpleTokenizer(), reserved=[1, 2]).placeholder == 3


def test_a_tokenizer_that_pads_on_the_left_is_refused(tmp_path):
    with pytest.raises(ValueError, match="SomeModel.*tokenizer.*left"):
        Words(made("word pieces", tmp_path, side="left"), "SomeModel")
